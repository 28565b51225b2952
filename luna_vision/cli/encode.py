"""``luna-vision encode``: an image that need not fit into memory."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    value_options,
)

if TYPE_CHECKING:
    from ..execution import Encoded

MODEL = "luna_vit_tiny"  # the default
SUFFIXES = (".npz", ".safetensors")
CHOICE = ("level", "mpp", "magnification", "region", "region_in", "bands", "channel", "series", "z", "t")
STORE_TYPES = ("float32", "bfloat16")


def _parser() -> Parser:
    parser = Parser(
        "encode",
        usage="%(prog)s IMAGE --out FILE [options]",
        description="Embedding, logits and memory of one image of any size, as the ordinary forward pass computes "
        "them. With --store, the same command resumes a run that was stopped.",
    )
    parser.add_argument(
        "image",
        type=Path,
        metavar="IMAGE",
        help="TIFF (tiled, pyramid, OME, GeoTIFF), slides of OpenSlide, .zarr, .npy; PNG, JPEG, ... are decoded whole",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=".npz or .safetensors")
    parser.add_argument("--grid", type=Path, metavar="FILE", help="the patch features (H', W', C), .npy or .zarr")
    parser.add_argument("--overwrite", action="store_true", help="replace files at --out and --grid")
    add_model_options(parser, default=MODEL)
    add_speed_options(parser, compiles=False)  # bands go through parts of a block
    group = parser.add_argument_group("part of the image")
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
        metavar="otsu|FILE",
        help="leave out the rest: tissue by Otsu's threshold on a low level, an image that is 0 there, or polygons in "
        "GeoJSON",
    )
    group = parser.add_argument_group("pixels")
    add_statistics_options(group, "one number or one a channel (default: the model's)")
    add_value_options(group)
    group = parser.add_argument_group("memory and disk")
    group.add_argument(
        "--memory-budget", default="4GB", metavar="SIZE", help="beyond model and libraries (default: %(default)s)"
    )
    group.add_argument("--store", type=Path, metavar="FOLDER", help="keep the patches there; without, in memory")
    group.add_argument("--store-dtype", choices=STORE_TYPES, help="type in which they are kept (default: the model's)")
    group.add_argument("--band-rows", type=at_least(1), metavar="N", help="rows of patches at a time (default: chosen)")
    return parser


def main(words: list[str]) -> int:
    """Run the command. Returns the exit code, 130 after Ctrl-C."""
    args = _parser().parse_args(words)

    import torch

    from .. import __version__
    from ..execution import encode
    from ..execution.grid import check_apart, check_grid
    from ..execution.plan import parse_bytes
    from ..images import open_image
    from ..models.factory import random_weights
    from ..utils.files import check_output

    check_output(args.out, SUFFIXES, args.overwrite)
    check_apart(args.out, "the output", args.image)
    parse_bytes(args.memory_budget)
    if args.grid is not None:
        check_grid(args.grid)
        check_apart(args.grid, "the patch grid", args.image)
        if args.grid.exists() and not args.overwrite:
            raise FileExistsError(f"{args.grid} exists: give --overwrite to replace it")
    if args.store is not None and args.store.exists() and not args.store.is_dir():
        raise NotADirectoryError(f"--store {args.store} is a file: give a folder")
    image = open_image(args.image, **{name: getattr(args, name) for name in CHOICE})
    model = load(args, default=MODEL)
    about = {
        "luna_vision": __version__,
        "model": getattr(model, "pretrained_cfg", {}).get("architecture", type(model).__name__),
        "random_weights": random_weights(**model_options(args)),
        "image": str(args.image),
        "image_shape": list(image.shape),
        "store_dtype": args.store_dtype,
    }
    try:
        with at_speed(args, model) as dtype:
            result = encode(
                model,
                image,
                mean=args.mean,
                std=args.std,
                **value_options(args),
                mask=args.mask,
                store=args.store,
                store_dtype=getattr(torch, args.store_dtype) if args.store_dtype else None,
                memory_budget=args.memory_budget,
                band_rows=args.band_rows,
                grid=args.grid,
                save=lambda result: _save(args.out, result, about | {"dtype": dtype}),
            )
    except KeyboardInterrupt:
        again = "the same command continues from here" if args.store else "with --store FOLDER it could be resumed"
        print(f"stopped; {again}", file=sys.stderr)
        return 130
    (height, width), (rows, columns) = image.shape[:2], result.grid_size
    seen = "" if result.patch_valid is None else f", {int(result.patch_valid.sum())} of them looked at"
    print(f"{args.out}: {height} x {width} pixels, {rows} x {columns} patches{seen}")
    return 0


def _save(path: Path, result: "Encoded", about: dict[str, Any]) -> None:
    import numpy as np
    from safetensors.numpy import save

    from ..utils.files import new_file

    named = {name: getattr(result, name) for name in ("embedding", "logits", "memory", "raw_memory")}
    arrays = {name: value.float().numpy() for name, value in named.items() if value is not None}
    if result.patch_valid is not None:
        arrays["patch_valid"] = result.patch_valid.numpy()
    about = {**about, "grid_size": list(result.grid_size)}
    with new_file(path) as file:
        if path.suffix == ".npz":
            np.savez(file, **arrays, about=np.array(json.dumps(about)))
        else:
            file.write(save(arrays, {"about": json.dumps(about)}))
