"""Parameters and cost of every registered model: `python -m experiments.benchmarks.model_table --help`."""

import timm

from experiments.command import Parser, at_least, json_file, markdown_table, measured_on
from luna_vision.utils.cost import count_macs
from luna_vision.utils.files import write_json

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
    parser.add_argument("--out", type=json_file, help="JSON file to write")
    args = parser.parse_args(argv)
    registered = (name for name in timm.list_models(module="luna_vit") if not name.startswith("test_"))
    specs = args.models or list(map(Spec.parse, registered))
    rows = []
    for spec in specs:
        for size in args.sizes:
            model = build(spec, size, size, device="meta")
            params = sum(p.numel() for p in model.parameters())
            rows.append({"model": spec.text, "size": size, "params": params, "macs": count_macs(model, size, size)})
    table = []
    for name in (spec.text for spec in specs):
        mine = {r["size"]: r for r in rows if r["model"] == name}
        cells = [f"{mine[s]['macs'] / 1e9:.1f}" for s in args.sizes]
        table.append([f"`{name}`", f"{mine[args.sizes[0]]['params'] / 1e6:.1f}", *cells])
    print(markdown_table(["model", "parameters (M)", *(f"GMACs at {s}" for s in args.sizes)], table))
    if args.out:
        write_json(args.out, {**measured_on(), "rows": rows})


if __name__ == "__main__":
    main()
