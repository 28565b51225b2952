"""Parameters and cost of every registered model: `python -m experiments.benchmarks.model_table --help`."""

import datetime
import json
import platform
from pathlib import Path

import timm
import torch

from experiments.command import Parser, at_least
from luna_vision.utils.cost import count_macs

from .cell import Spec, build

__all__ = ["main"]


def main(argv: list[str] | None = None) -> None:
    """Print the table as Markdown, and write it as JSON if asked."""
    parser = Parser(
        prog="python -m experiments.benchmarks.model_table",
        description="Parameters and GMACs (multiply-adds; most papers call them FLOPs) of the registered models.",
    )
    names = {"type": Spec.parse, "metavar": "NAME[,ARG=VALUE...]"}
    parser.add_argument("--models", nargs="+", **names, help="all of this package's if left out")
    parser.add_argument(
        "--sizes", nargs="+", type=at_least(1), default=[224, 1024], metavar="PIXELS", help="image sides"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    registered = (name for name in timm.list_models(module="luna_vit") if not name.startswith("test_"))
    specs = args.models or list(map(Spec.parse, registered))
    rows = []
    for spec in specs:
        for size in args.sizes:
            model = build(spec, size, size, device="meta")
            params = sum(p.numel() for p in model.parameters())
            rows.append({"model": spec.text, "size": size, "params": params, "macs": count_macs(model, size, size)})
    print("| model | parameters (M) | " + " | ".join(f"GMACs at {s}" for s in args.sizes) + " |")
    print("|---|---|" + "---|" * len(args.sizes))
    for name in (spec.text for spec in specs):
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
