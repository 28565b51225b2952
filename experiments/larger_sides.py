"""Why accuracy falls on larger images: `python -m experiments.larger_sides --help`.

Trained models of `experiments.compare` are tested at a multiple of the side of training as they are, and with one thing
changed at a time that may be to blame. Nothing is trained. The images are those held out of training, and each
change is tested on the same ones.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import load_state_dict
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from luna_vision.layers.local_mixing import LocalMixing
from luna_vision.layers.luna import LunaAttention
from luna_vision.mixers.softmax import SoftmaxMixer
from luna_vision.utils.files import write_json
from luna_vision.utils.record import read_json

from .command import Parser, at_least
from .measure import fresh_model
from .plots import cell
from .runs import Run, finished, make_data

__all__ = ["CHANGES", "load", "main", "parse_models"]

Change = Callable[[nn.Module, int], None]


def sharpen(share: float) -> Change:
    """Multiply what the softmax over the patches sees by 1 + share (log N / log N0 - 1), N patches in place of N0."""

    def change(model: nn.Module, scale: int) -> None:
        N = math.prod(model.patch_embed.grid_size)
        factor = 1 + share * (math.log(N * scale**2) / math.log(N) - 1)
        for module in model.modules():
            if isinstance(module, LunaAttention):
                module.pack_q.weight.mul_(factor)
                module.pack_q.bias.mul_(factor)
            elif isinstance(module, SoftmaxMixer):
                module.qkv.weight[: module.dim].mul_(factor)
                module.qkv.bias[: module.dim].mul_(factor)

    return change


def coarse_positions(model: nn.Module, scale: int) -> None:
    """Give each patch the position of the patch of training that lies over it."""
    add_at = model.pos_embed.add_at

    def coarse(coords: Tensor) -> Tensor:
        return coords.unflatten(-1, (-1, scale)).mean(-1).repeat_interleave(scale, dim=-1)

    model.pos_embed.add_at = lambda x, rows, columns: add_at(x, coarse(rows), coarse(columns))


def no_positions(model: nn.Module, scale: int) -> None:
    """Add no positions."""
    model.pos_embed = None


def dilate(model: nn.Module, scale: int) -> None:
    """Have the convolutions reach as far in the image as in training."""
    for module in model.modules():
        if isinstance(module, LocalMixing):
            module.conv.dilation = module.conv.padding = (scale, scale)


def coarse_mixing(model: nn.Module, scale: int) -> None:
    """Run the convolutions on the mean patches of a grid as fine as in training, and interpolate what they give."""
    for module in model.modules():
        if isinstance(module, LocalMixing):
            shrink, enlarge = nn.AvgPool2d(scale), nn.Upsample(scale_factor=scale, mode="bilinear")
            module.conv = nn.Sequential(shrink, module.conv, enlarge)


def no_mixing(model: nn.Module, scale: int) -> None:
    """Leave out the convolutions."""
    for module in model.modules():
        if isinstance(module, LocalMixing):
            module.conv = _Nothing()


class _Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def pool_patches(model: nn.Module, scale: int) -> None:
    """Average the embedded patches to a grid as fine as in training; all after that is as in training."""
    model.patch_embed.register_forward_hook(
        lambda module, args, x: F.avg_pool2d(x.permute(0, 3, 1, 2), scale).permute(0, 2, 3, 1)
    )


def by_row(model: nn.Module, scale: int) -> None:
    """Pack each row of patches by itself, where there is a memory."""
    if model.memory is not None:
        model.set_pack_by_row()


def both(*changes: Change) -> Change:
    """Several changes."""

    def change(model: nn.Module, scale: int) -> None:
        for one in changes:
            one(model, scale)

    return change


CHANGES: dict[str, Change] = {
    "none": lambda model, scale: None,
    "attention sharpened by log N": sharpen(1.0),
    "half of that": sharpen(0.5),
    "attention flattened by log N": sharpen(-1.0),
    "packed by row": by_row,
    "positions of the training grid": coarse_positions,
    "no positions": no_positions,
    "convolutions dilated": dilate,
    "convolutions on the training grid": coarse_mixing,
    "no convolutions": no_mixing,
    "convolutions on the training grid, its positions": both(coarse_mixing, coarse_positions),
    "convolutions dilated, attention sharpened": both(dilate, sharpen(1.0)),
    "patches averaged to the training grid": pool_patches,
}


@torch.inference_mode()
def correct(model: nn.Module, loader: DataLoader) -> int:
    """How many images are classified rightly."""
    return sum(int((model(x).argmax(-1) == y).sum()) for x, y in loader)


def load(result: dict[str, Any], work: Path) -> nn.Module:
    """The trained model of a result, in eval mode."""
    run = Run(result["task"], result["variant"], result["seed"], result["config"])
    model = fresh_model(run.config)
    state = load_state_dict(str(work / run.work_name / "checkpoints" / "last.ckpt"), use_ema=False)
    model.load_state_dict({name.removeprefix("model."): value for name, value in state.items() if "model." in name})
    return model.eval().requires_grad_(False)


def parse_models(parser: Parser, argv: list[str] | None) -> tuple[argparse.Namespace, list[dict[str, Any]]]:
    """The command line with the arguments that choose trained models, and the results of these."""
    parser.add_argument("--only", nargs="+", required=True, metavar="NAME", help="variants")
    parser.add_argument("--task", default="cifar10", help="that they were trained on")
    parser.add_argument("--out", type=Path, default=Path("runs/compare/results"), help="folder of the results")
    parser.add_argument("--work", type=Path, default=Path("runs/compare/work"), help="folder of the checkpoints")
    args = parser.parse_args(argv)
    found = [r for r in finished(args.out) if r["task"] == args.task and r["variant"] in args.only]
    if not found:
        parser.error(f"no results of {', '.join(args.only)} on {args.task} in {args.out}")
    torch.set_num_threads(1)
    return args, found


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says."""
    parser = Parser(
        prog="python -m experiments.larger_sides",
        description="Test trained models of experiments.compare on larger images, with one thing changed at a time.",
    )
    parser.add_argument("--changes", nargs="+", choices=list(CHANGES), default=list(CHANGES), metavar="CHANGE")
    parser.add_argument("--scale", type=at_least(2), default=4, help="of the side of training")
    parser.add_argument("--images", type=at_least(1), default=1000, help="at most")
    parser.add_argument("--root", default="data", help="folder of the data")
    args, found = parse_models(parser, argv)
    for result in found:
        path = args.out / "larger_sides" / f"{args.task}-{result['variant']}-seed{result['seed']}-x{args.scale}.json"
        rows = read_json(path).get("changes", {})
        dataset = make_data(result["config"], args.root, args.scale).dataset("val")
        images = min(args.images, len(dataset))
        spread = Subset(dataset, [i * len(dataset) // images for i in range(images)])
        loader = DataLoader(spread, max(1, result["config"]["batch_size"] // args.scale**2))
        for name in args.changes:
            if name in rows:
                continue
            model = load(result, args.work)
            CHANGES[name](model, args.scale)
            n = correct(model, loader)
            rows[name] = {"images": images, "correct": n, "accuracy": n / images}
            write_json(path, {"scale": args.scale, "changes": rows})
            print(f"{result['variant']}, seed {result['seed']}: {name}: {cell(rows[name])}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
