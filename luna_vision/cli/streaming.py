"""Shared by the commands that stream one image of any size: the part of the image, its mask, memory and disk."""

import sys
from pathlib import Path
from typing import Any

from ..utils.errors import UserError
from .common import Parser, add_statistics_options, add_value_options, at_least, value_options

__all__ = [
    "add_streaming_options",
    "adopt_training",
    "check_file",
    "check_streaming",
    "open_chosen",
    "say_broken",
    "stopped",
    "streaming_arguments",
]

CHOICE = ("level", "mpp", "magnification", "region", "region_in", "bands", "channel", "series", "z", "t")
NO_MASK = "none"
STORE_TYPES = ("float32", "bfloat16")
IMAGE_HELP = "TIFF (tiled, pyramid, OME, GeoTIFF), slides of OpenSlide, .zarr, .npy; PNG, JPEG, ... are decoded whole"


def add_streaming_options(parser: Parser, statistics: bool = True) -> None:
    """Add the options that `open_chosen` and `streaming_arguments` read, with mean and std if `statistics`."""
    group = parser.add_argument_group(
        "part of the image",
        "Level or resolution, bands or channels, and the mask: by default as in training on slides.",
    )
    group.add_argument("--level", type=at_least(0), metavar="N", help="of a pyramid; 0, the default, is the largest")
    group.add_argument("--mpp", type=float, metavar="X", help="micrometres of a pixel, in place of a level")
    group.add_argument("--magnification", type=float, metavar="X", help="of the objective, such as 20, likewise")
    group.add_argument(
        "--region", type=float, nargs=4, metavar=("X", "Y", "W", "H"), help="a rectangle, from its upper left corner"
    )
    group.add_argument(
        "--region-in",
        choices=("pixels", "map"),
        default="pixels",
        help="unit of --region: pixels of level 0, or that of the map of a georeferenced image (default: pixels)",
    )
    group.add_argument("--bands", type=at_least(1), nargs="+", metavar="N", help="to read, in this order, from 1")
    group.add_argument("--channel", nargs="+", metavar="NAME", help="names or, from 0, numbers, in place of bands")
    group.add_argument("--series", type=at_least(0), metavar="N", help="of a file with several images, from 0")
    group.add_argument("--z", type=at_least(0), metavar="N", help="of a stack, from 0")
    group.add_argument("--t", type=at_least(0), metavar="N", help="likewise")
    group.add_argument(
        "--mask",
        metavar="otsu|valid|FILE|none",
        help="leave out the rest: tissue by Otsu's threshold on a low level; what holds data by alpha, a mask or a "
        "number for no data of a GeoTIFF; an image that is 0 there; or polygons in GeoJSON",
    )
    group = parser.add_argument_group("pixels")
    if statistics:
        add_statistics_options(group, "one number or one a channel (default: the model's)")
    add_value_options(group)
    group.add_argument(
        "--on-error",
        choices=("raise", "fill", "skip"),
        default="raise",
        help="what becomes of tiles that cannot be read: raise stops (with --store, a good file continues the run), "
        "fill gives them what missing numbers get, skip leaves out their patches (default: raise)",
    )
    group = parser.add_argument_group("memory and disk")
    group.add_argument(
        "--memory-budget", default="4GB", metavar="SIZE", help="beyond model and libraries (default: %(default)s)"
    )
    group.add_argument("--store", type=Path, metavar="FOLDER", help="keep the patches there; without, in memory")
    group.add_argument("--store-dtype", choices=STORE_TYPES, help="type in which they are kept (default: the model's)")
    group.add_argument("--band-rows", type=at_least(1), metavar="N", help="rows of patches at a time (default: chosen)")


def check_file(path: Path | None, what: str, image: Path, overwrite: bool) -> None:
    """Raise an OSError if a file exists that is not to be replaced, a ValueError if it is the image."""
    from ..execution.grid import check_apart

    if path is not None:
        check_apart(path, what, image)
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists: give --overwrite to replace it")


def check_streaming(args: Any) -> dict[str, Any]:
    """Check the options as far as they concern no image; those that choose a part of it, as `open_image` takes them."""
    from ..execution.plan import parse_bytes
    from ..images.regions import Choice

    parse_bytes(args.memory_budget)
    if args.store is not None and args.store.exists() and not args.store.is_dir():
        raise NotADirectoryError(f"--store {args.store} is a file: give a folder")
    choice = {name: getattr(args, name) for name in CHOICE}
    Choice(**choice)
    return choice


def adopt_training(args: Any) -> None:
    """Let options that are not given be those of a checkpoint's training on slides, and say so."""
    from ..images.regions import as_in_training
    from ..models.checkpoints import image_cfg, training_checkpoint
    from ..utils.ranks import is_first

    recorded = image_cfg(training_checkpoint(args.checkpoint)).get("slides", {}) if args.checkpoint else {}
    taken = []
    for name, value in as_in_training(recorded, vars(args)).items():
        setattr(args, name, value)
        taken.append(f"--{name} {' '.join(map(str, value if isinstance(value, list) else [value]))}")
    if taken and is_first():
        print(f"as in training: {' '.join(taken)}", file=sys.stderr)
    args.mask = None if args.mask == NO_MASK else args.mask


def open_chosen(args: Any) -> Any:
    """The part of the image that the options choose."""
    from ..images import open_image
    from ..utils.ranks import world_size

    if world_size() > 1:
        raise UserError("one image takes one process: start the command without torchrun")
    return open_image(args.image, **check_streaming(args))


def streaming_arguments(args: Any) -> dict[str, Any]:
    """The options as arguments of `luna_vision.execution.encode`."""
    import torch

    return {
        **{name: getattr(args, name) for name in ("mean", "std") if hasattr(args, name)},
        **value_options(args),
        **{name: getattr(args, name) for name in ("on_error", "mask", "store", "memory_budget", "band_rows")},
        "store_dtype": getattr(torch, args.store_dtype) if args.store_dtype else None,
    }


def say_broken(count: int) -> str:
    """The end of a line about a result: how many tiles could not be read, if any."""
    return f"; {count} broken {'tile' if count == 1 else 'tiles'}" if count else ""


def stopped(args: Any) -> int:
    """Say after Ctrl-C what can be done; the exit code."""
    again = "the same command continues from here" if args.store else "with --store FOLDER it could be resumed"
    print(f"stopped; {again}", file=sys.stderr)
    return 130
