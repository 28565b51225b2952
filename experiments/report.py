"""The report of `experiments.compare`: a table as Markdown and JSON, and two plots, from whatever results there are."""

import datetime
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from luna_vision.utils.files import save_figure, write_json, write_text

from .command import markdown_table
from .plots import wilson

Rows = dict[str, list[dict[str, Any]]]  # by task
NOTE = (
    "Accuracy in %: with one seed, and in brackets, the 95% interval of the binomial (Wilson); with more, their mean ± "
    "standard deviation. Columns in px are sides of test images; training is at the first. GMACs are multiply-adds of "
    "one image, saved MB what autograd keeps for a training step, both at the training side. Step times are medians, "
    "on one thread."
)


def collect(out: Path, tasks: Sequence[str], variants: Sequence[str]) -> Rows:
    """A row for each task and variant that has a result, a measurement or an error."""
    results, measured = (
        [json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / folder).glob("*.json"))]
        for folder in ("runs", "measured")
    )
    rows: Rows = {}
    for task in tasks:
        for variant in variants:
            mine = [r for r in results if (r["task"], r["variant"]) == (task, variant)]
            timing = [r for r in measured if (r["task"], r["variant"]) == (task, variant)]
            if mine or timing:
                rows.setdefault(task, []).append(_row(variant, mine, timing[0] if timing else {}))
    return rows


def _row(variant: str, results: list[dict[str, Any]], timing: dict[str, Any]) -> dict[str, Any]:
    done = [r for r in results if "error" not in r]
    facts = done[0] if done else timing
    row: dict[str, Any] = {
        "variant": variant,
        "split": (facts or {}).get("config", {}).get("split", "test"),
        "seeds": sorted(r["seed"] for r in done),
        "errors": {str(r["seed"]): r["error"] for r in results if "error" in r},
        "accuracy": {
            scale: _spread([r["accuracy"][scale] for r in done]) for scale in (done[0]["accuracy"] if done else ())
        },
    }
    row.update({name: facts.get(name) for name in ("params", "macs", "saved_bytes", "batch_size")})
    row.update({name: timing.get(name) for name in ("step_seconds", "images_per_s")})
    return row


def _spread(tests: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, and the interval (one seed) or standard deviation (more), of a variant's tests at one side."""
    values = [test["accuracy"] for test in tests]
    first = {"side": tests[0]["side"], "images": tests[0]["images"], "mean": statistics.fmean(values), "values": values}
    if len(tests) == 1:
        return {**first, "interval": wilson(tests[0]["correct"], tests[0]["images"])}
    return {**first, "std": statistics.stdev(values)}


def markdown(rows: Rows, titles: dict[str, tuple[str, str]]) -> str:
    """The tables, one for each task; `titles` holds a title and a description for each."""
    parts = []
    for task, mine in rows.items():
        sides = {s: a["side"] for row in mine for s, a in row["accuracy"].items()}
        images = {s: a["images"] for row in mine for s, a in row["accuracy"].items()}
        heads = ["variant", "seeds", *(f"{sides[s]} px{' mosaics' if s == 'mosaic' else ''}" for s in sides)]
        heads += ["parameters (M)", "GMACs", "step (ms)", "images/s", "saved (MB)"]
        table = []
        for row in mine:
            cells = [f"`{row['variant']}`", str(len(row["seeds"])), *(_accuracy(row, s) for s in sides)]
            cells += [_number(row["params"], 1e-6, 2), _number(row["macs"], 1e-9, 3)]
            cells += [_number(row["step_seconds"], 1e3, 0), _number(row["images_per_s"], 1, 1)]
            cells += [_number(row["saved_bytes"], 1e-6, 1)]
            table.append(cells)
        lines = [markdown_table(heads, table)]
        for row in mine:
            for seed, error in row["errors"].items():
                lines.append(f"\n`{row['variant']}`, seed {seed}, failed: {error}")
        batch = next((row["batch_size"] for row in mine if row["batch_size"]), None)
        about = [titles[task][1]]
        if images:
            counts = ", ".join(f"{n} at {sides[s]} px" for s, n in images.items() if s != "mosaic")
            about.append(f"{_images(mine).capitalize()}: {counts}.")
        if batch:
            about.append(f"Steps are of {batch} images.")
        parts.append("\n".join([f"## {titles[task][0]}", "", " ".join(about), "", *lines]))
    return "\n\n".join([*parts, NOTE]) + "\n"


def _images(rows: list[dict[str, Any]]) -> str:
    """The images that accuracy is of."""
    return "held-out images" if any(row["split"] == "val" for row in rows) else "test images"


def _accuracy(row: dict[str, Any], scale: str) -> str:
    if scale not in row["accuracy"]:
        return "failed" if row["errors"] else "-"
    found = row["accuracy"][scale]
    if "std" in found:
        return f"{100 * found['mean']:.1f} ± {100 * found['std']:.1f}"
    low, high = found["interval"]
    return f"{100 * found['mean']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _number(value: float | None, factor: float, digits: int) -> str:
    return "-" if value is None else f"{value * factor:.{digits}f}"


def write_report(
    out: Path, suite: str, tasks: Sequence[str], variants: Sequence[str], titles: dict[str, tuple[str, str]]
) -> str:
    """Write `SUITE.md`, `SUITE.json` and the plots into `out`.

    Returns:
        The tables.
    """
    rows = collect(out, tasks, variants)
    if not rows:
        return f"no results in {out / 'runs'} yet"
    text = markdown(rows, titles)
    write_text(out / f"{suite}.md", text)
    write_json(out / f"{suite}.json", {"date": datetime.date.today().isoformat(), "suite": suite, "tasks": rows})
    plots = {"resolution": _draw_resolution}
    if any(row["images_per_s"] and "1" in row["accuracy"] for mine in rows.values() for row in mine):
        plots["throughput"] = _draw_throughput
    for name, draw in plots.items():
        figure = Figure(figsize=(7 * len(rows), 4.5), layout="constrained")
        for axes, (task, mine) in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows.items(), strict=True):
            draw(axes, mine)
            axes.set_title(titles[task][0])
            axes.grid(alpha=0.3)
        save_figure(figure, out / f"{suite}-{name}.png", dpi=120)
    return text


def _draw_throughput(axes: Any, rows: list[dict[str, Any]]) -> None:
    for i, row in enumerate(r for r in rows if r["accuracy"]):
        if row["images_per_s"] and "1" in row["accuracy"]:
            found = row["accuracy"]["1"]
            axes.errorbar(row["images_per_s"], 100 * found["mean"], yerr=_error_bar(found), **_style(i, row))
    axes.set_xlabel("training images a second, one thread")
    axes.set_ylabel(f"accuracy on {_images(rows)} (%)")
    _legend(axes)


def _draw_resolution(axes: Any, rows: list[dict[str, Any]]) -> None:
    for i, row in enumerate(r for r in rows if r["accuracy"]):
        found = [tests for scale, tests in row["accuracy"].items() if scale != "mosaic"]
        sides, means = [f["side"] for f in found], [100 * f["mean"] for f in found]
        bars = [[_error_bar(f)[end][0] for f in found] for end in (0, 1)]
        axes.errorbar(sides, means, yerr=bars, **_style(i, row))
        axes.set_xticks(sides, [str(side) for side in sides])
    axes.set_xlabel("side of test images (px), trained at the first")
    axes.set_ylabel(f"accuracy on {_images(rows)} (%)")
    _legend(axes)


def _style(i: int, row: dict[str, Any]) -> dict[str, Any]:
    """The same in all plots."""
    line = ("-", "--", ":")[i // 10 % 3]
    return {
        "label": row["variant"], "color": f"C{i % 10}", "marker": "osD^v<>PX*"[i % 10], "linestyle": line, "capsize": 3,
        "markerfacecolor": "white" if line != "-" else None,  # where there are no lines to tell ten from ten more
    }  # fmt: skip


def _legend(axes: Any) -> None:
    if axes.has_data():
        # beside the plot, as there is no room among twenty names; long handles tell dashes from lines
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1), handlelength=4)


def _error_bar(found: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Lengths downwards and upwards, in %."""
    if "std" in found:
        return [100 * found["std"]], [100 * found["std"]]
    low, high = found["interval"]
    return [100 * (found["mean"] - low)], [100 * (high - found["mean"])]
