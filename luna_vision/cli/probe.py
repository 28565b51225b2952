"""``luna-vision probe``: how good frozen features are."""

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.errors import UserError
from ..utils.text import printable
from .common import (
    Parser,
    add_model_options,
    add_speed_options,
    add_statistics_options,
    add_value_options,
    at_least,
    at_speed,
    load,
    model_options,
    pairs,
    value_options,
)

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from ..downstream.features import Extractor

DATA = ("digits", "fashion_mnist", "cifar10", "cifar100", "canvas", "imagefolder", "timm")


def _parser() -> Parser:
    parser = Parser(
        "probe",
        usage="%(prog)s --data DATA [options]",
        description="Top-1 accuracy of frozen features: k nearest neighbours, and a linear classifier.",
    )
    add_model_options(parser)
    add_speed_options(parser)
    group = parser.add_argument_group("images")
    group.add_argument("--data", choices=DATA, required=True, help="imagefolder is ROOT/train and ROOT/{test,val}")
    group.add_argument("--root", help="folder of the data (default: the data module's)")
    group.add_argument("--data-args", nargs="+", default=[], metavar="NAME=VALUE", help="others of the data module's")
    group.add_argument(
        "--img-size",
        type=at_least(1),
        metavar="N",
        help="side in pixels (default: the checkpoint's or the data module's)",
    )
    add_statistics_options(
        group,
        "one number or one a channel (default: those of a training checkpoint, a local-dir or timm's pretrained "
        "weights; else those of the data, with which train.py trains)",
    )
    add_value_options(group, "the training images")
    group.add_argument("--num-train", type=at_least(1), metavar="N", help="training images at most, of all classes")
    group.add_argument("--num-test", type=at_least(1), metavar="N", help="test images at most")
    group.add_argument("--batch-size", type=at_least(1), default=128, metavar="N", help="(default: %(default)s)")
    group.add_argument(
        "--workers", type=at_least(0), default=0, metavar="N", help="processes that read (default: 0, this one does)"
    )
    group = parser.add_argument_group("probes")
    group.add_argument("--knn-k", type=at_least(1), default=20, metavar="K", help="neighbours (default: %(default)s)")
    group.add_argument("--knn-t", type=float, default=0.07, metavar="T", help="temperature (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON of the results")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE, which is refused otherwise")
    return parser


def main(words: list[str]) -> int:
    """Run the command. Returns the exit code."""
    args = _parser().parse_args(words)

    from ..downstream.features import Extractor
    from ..downstream.probe import MAX_ITER, open_data, probe_model
    from ..models.factory import random_weights
    from ..utils.files import check_output, write_json
    from ..utils.fingerprint import describe
    from ..utils.record import machine

    if args.out:
        check_output(args.out, [".json"], args.overwrite)
    model = load(args, num_classes=0)
    extractor = Extractor(model)
    sizes = (args.num_train, args.num_test, args.batch_size)
    data = open_data(args.data, _data_arguments(args, extractor), *sizes, lambda line: print(printable(line)))
    counts = len(data.train.dataset), len(data.test.dataset)
    height, width = data.module.img_size
    print(f"{args.data}: {counts[0]} training and {counts[1]} test images of {height} x {width} pixels")
    with at_speed(args, model) as dtype:
        knn, linear, features = probe_model(model, data, None, args.knn_k, args.knn_t, say=partial(print, flush=True))
    if not linear.converged:
        print(f"the linear classifier had not converged after {MAX_ITER} iterations", file=sys.stderr)
    if args.out:
        name = getattr(model, "pretrained_cfg", {}).get("architecture", args.model)
        result: dict[str, Any] = {
            "model": {"name": name, "args": args.model_args, "class": extractor.name, **describe(model)},
            "checkpoint": str(args.checkpoint) if args.checkpoint else None,
            "random_weights": random_weights(**model_options(args)),
            "features": features,
            "dtype": dtype,
            "data": {"name": args.data, "root": args.root, "args": args.data_args},
            "images": {"train": counts[0], "test": counts[1], "height": height, "width": width},
            "normalisation": {"mean": data.module.mean, "std": data.module.std},
            "values": data.module.values.described(),
            "knn": {"top1": knn, "k": args.knn_k, "temperature": args.knn_t},
            "linear": {**linear._asdict(), "held_out": {f"{c:g}": a for c, a in linear.held_out.items()}},
            "machine": machine(extractor.device.type),
        }
        result["linear"]["top1"] = result["linear"].pop("accuracy")
        write_json(args.out, result)
    return 0


def _data_arguments(args: "Namespace", extractor: "Extractor") -> dict[str, Any]:
    """Arguments of the data module that the command line names, for a model."""
    from ..downstream.windows import Settings, data_config
    from ..models.factory import knows_its_images

    mean, std, size, values = args.mean, args.std, args.img_size, value_options(args)
    if knows_its_images(**model_options(args)):
        config, cfg = data_config(extractor, Settings(mean=mean, std=std)), extractor.model.pretrained_cfg
        mean, std = config["mean"], config["std"]
        height, width = cfg["input_size"][1:]
        own = height if args.data == "canvas" or height == width else [height, width]  # canvases are square
        size = own if size is None else size
        values = {name: cfg.get(name) if value is None else value for name, value in values.items()}
    options = {
        "root": args.root,
        "in_chans": extractor.in_chans,
        "side" if args.data == "canvas" else "img_size": size,
        "mean": mean,
        "std": std,
        **values,
        "num_workers": args.workers,
    }
    extra = pairs(args.data_args, "--data-args")
    if twice := sorted(set(extra) & {*options, "val_fraction", "batch_size"}):
        raise UserError(f"--data-args {', '.join(twice)}: there is an option for it, or it is settled by the model")
    return {**{name: value for name, value in options.items() if value is not None}, **extra}
