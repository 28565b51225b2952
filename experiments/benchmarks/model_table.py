"""Parameters and cost of every registered model: `python -m experiments.benchmarks.model_table --help`."""

import argparse
import datetime
import json
import platform
from pathlib import Path

import timm
import torch
from timm.models import create_model

import luna_vision  # noqa: F401  registers the models
from luna_vision.utils.cost import count_macs

__all__ = ["main"]


def main(argv: list[str] | None = None) -> None:
    """Print the table as Markdown, and write it as JSON if asked."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.model_table",
        description="Parameters and GMACs (multiply-adds; most papers call them FLOPs) of the registered models.",
    )
    parser.add_argument("--models", nargs="+", metavar="NAME", help="names; all of this package's if left out")
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 1024], metavar="PIXELS", help="image sides")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    names = args.models or [n for n in timm.list_models(module="luna_vit") if not n.startswith("test_")]
    unknown = [n for n in names if not timm.is_model(n)]
    if unknown:
        parser.error(f"unknown model {', '.join(unknown)}; luna models are {', '.join(timm.list_models('luna*'))}")

    rows = []
    for name in names:
        for size in args.sizes:
            # timm's ViTs are built for one size, ours run at any
            model = create_model(name, device="meta", **({} if "luna" in name else {"img_size": size}))
            params = sum(p.numel() for p in model.parameters())
            rows.append({"model": name, "size": size, "params": params, "macs": count_macs(model, size, size)})
    print("| model | parameters (M) | " + " | ".join(f"GMACs at {s}" for s in args.sizes) + " |")
    print("|---|---|" + "---|" * len(args.sizes))
    for name in names:
        mine = {r["size"]: r for r in rows if r["model"] == name}
        cells = [f"{mine[s]['macs'] / 1e9:.1f}" for s in args.sizes]
        print(f"| `{name}` | {mine[args.sizes[0]]['params'] / 1e6:.1f} | " + " | ".join(cells) + " |")
    if args.out:
        versions = {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__}
        result = {"date": datetime.date.today().isoformat(), "versions": versions, "rows": rows}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
