"""Parameters and cost of every registered model: `python -m luna_vision.benchmarks.model_table --help`."""

import argparse
import datetime
import platform
from pathlib import Path

import timm
import torch
from timm.models import create_model
from torch.utils.flop_counter import FlopCounterMode

import luna_vision  # noqa: F401  registers the models
from luna_vision.utils.files import write_json

__all__ = ["count_macs", "main"]


def count_macs(model: torch.nn.Module, height: int, width: int) -> int:
    """Multiply-adds of one image, those of attention included.

    Args:
        model: A model on the meta device. There the counter sees attention; fused CPU kernels count as nothing.
        height, width: Image size, pixels.
    """
    x = torch.empty(1, model.in_chans, height, width, device="meta")
    with FlopCounterMode(display=False) as counter:
        model.eval()(x)
    return counter.get_total_flops() // 2


def main(argv: list[str] | None = None) -> None:
    """Print the table as Markdown, and write it as JSON if asked."""
    parser = argparse.ArgumentParser(
        prog="python -m luna_vision.benchmarks.model_table",
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
        write_json(args.out, result)


if __name__ == "__main__":
    main()
