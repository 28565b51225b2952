"""The benchmark's table and plots."""

import math
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.command import markdown_table
from luna_vision.utils.files import save_figure

__all__ = ["exponent", "plot", "short_name", "table"]

GROUP = ("dtype", "device", "execution", "mode", "batch_size", "allocator")


def short_name(text: str) -> str:
    """A spec as people say it."""
    name, *args = text.split(",")
    args = [a.removeprefix("mixer=").replace("memory_len=", "").replace("_", " ") for a in args]
    said = {"identity": "no mixing", "softmax": "softmax in the same shell"}
    args = [said.get(a, f"{a} slots" if a.isdigit() else a) for a in args]
    return name + (f" ({', '.join(args)})" if args else "")


def exponent(pixels: list[float], seconds: list[float]) -> float:
    """The power of the pixels with which time grows: the slope of the least-squares line on logarithmic axes."""
    return float(np.polyfit(np.log(pixels), np.log(seconds), 1)[0])


def table(result: dict[str, Any], baselines: list[str]) -> str:
    """Markdown: for each type, mode and size a row for each model. A ratio above 1 says how many times the model is
    faster than the baseline."""
    parts = []
    rows = sorted(result["rows"], key=lambda r: [str(r[k]) for k in GROUP] + [r["height"] * r["width"]])
    for key, group in groupby(rows, key=lambda r: tuple(r[k] for k in GROUP)):
        group = list(group)
        dtype, device, execution, mode, batch, allocator = key
        used = [b for b in baselines if any(r["model"] == b for r in group)]
        memory = "saved for backward (MB)" if mode == "training" else "peak memory (MB)"
        heads = ["pixels", "model", "ms", "quartiles", "images/s", *(f"{short_name(b)} / it" for b in used)]
        heads += [memory, "GMACs", "share of GEMM rate"]
        lines = []
        for (height, width), sized in groupby(group, key=lambda r: (r["height"], r["width"])):
            sized = list(sized)
            seconds = {r["model"]: r.get("seconds") for r in sized}
            for r in sized:
                cells = _cells(r, used, seconds, result["gemm_macs_per_second"])
                cells += [""] * (len(heads) - 2 - len(cells))
                lines.append([f"{height} x {width}", short_name(r["model"]), *cells])
        parts.append(f"\n### {dtype}, {device}, {execution}, {mode}, batch {batch}, allocator: {allocator}\n")
        parts.append(markdown_table(heads, lines))
    return "\n".join(parts)


def _cells(r: dict[str, Any], used: list[str], seconds: dict[str, Any], gemm: dict[str, float]) -> list[str]:
    if not r.get("seconds"):
        return [r.get("error", "not measured")]
    ratios = [f"{seconds[b] / r['seconds']:.2f}" if seconds.get(b) else "-" for b in used]
    passes = 3 if r["mode"] == "training" else 1  # the backward pass computes twice what the forward pass does
    share = passes * r["macs"] * r["batch_size"] / r["seconds"] / gemm[f"{r['dtype']}/{r['device']}"]
    memory = r.get("saved_bytes", r["peak_bytes"])
    return [
        f"{1e3 * r['seconds']:.4g}",
        " to ".join(f"{1e3 * q:.4g}" for q in r["quartiles"]),
        f"{r['batch_size'] / r['seconds']:.3g}",
        *ratios,
        f"{memory / 1e6:.0f}",
        f"{r['macs'] / 1e9:.1f}",
        f"{share:.0%}",
    ]


def plot(result: dict[str, Any], folder: Path) -> list[Path]:
    """Time, memory and share of the limit against pixels, one PNG for each type and mode. Returns the files.

    Only square images.
    """
    paths = []
    rows = [r for r in result["rows"] if r.get("seconds") and r["height"] == r["width"]]
    for key in sorted({tuple(r[k] for k in GROUP) for r in rows}, key=str):
        group = [r for r in rows if tuple(r[k] for k in GROUP) == key]
        if len({r["height"] for r in group}) < 2:
            continue
        fig = Figure(figsize=(16, 5.2), layout="constrained")
        axes = fig.subplots(1, 3)
        for i, model in enumerate(dict.fromkeys(r["model"] for r in group)):
            _draw(axes, sorted((r for r in group if r["model"] == model), key=lambda r: r["height"]), group, i)
        mode = key[3]
        memory = "saved for the backward pass" if mode == "training" else "peak memory"
        for ax, title, label in zip(
            axes,
            (f"time of one {'step' if mode == 'training' else 'image'}", memory, "share of the limit"),
            ("seconds", "GB", "time without mixing / time"),
            strict=True,
        ):
            ax.set(title=title, ylabel=label, xlabel="side of the image (pixels)")
            sides = sorted({r["height"] for r in group})
            ax.set_xscale("log")
            ax.set_xticks(sides, [str(s) for s in sides], minor=False)
            ax.minorticks_off()
            ax.grid(alpha=0.3)
        axes[0].set_yscale("log")
        axes[1].set_yscale("log")
        axes[2].set_ylim(0, 1.05)
        title = "model, and power of the pixels\nwith which its time grows"
        axes[0].legend(fontsize=8, title=title, title_fontsize=8, loc="upper left", bbox_to_anchor=(-1.05, 1.0))
        fig.suptitle(f"{key[0]}, {key[1]}, {key[2]}, {mode}, batch {key[4]} ({result['machine']['cpu']})", fontsize=10)
        path = folder / ("-".join(str(k) for k in key[:4]) + f"-batch{key[4]}-{key[5]}.png")
        save_figure(fig, path, dpi=110)
        paths.append(path)
    return paths


def _draw(axes: Any, mine: list[dict[str, Any]], group: list[dict[str, Any]], i: int) -> None:
    """One model's three lines."""
    model, sides = mine[0]["model"], [r["height"] for r in mine]
    large = [r for r in mine if r["height"] >= 512]  # below, fixed costs are a large part
    power = ""
    if len(large) > 1:
        power = f", {exponent([r['height'] ** 2 for r in large], [r['seconds'] for r in large]):.2f}"
    ours = model.startswith("luna") and "mixer" not in model
    style = dict(marker="o", ms=4, color=f"C{i}", lw=2 if ours else 1.3, ls="-" if ours else "--")
    axes[0].plot(sides, [r["seconds"] for r in mine], label=short_name(model) + power, **style)
    axes[1].plot(sides, [r.get("saved_bytes", r["peak_bytes"]) / 1e9 for r in mine], **style)
    limit = {r["height"]: r["seconds"] for r in group if "mixer=identity" in r["model"]}
    shares = [limit.get(r["height"], math.nan) / r["seconds"] for r in mine]
    axes[2].plot(sides, shares, **style)
