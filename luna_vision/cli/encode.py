"""``luna-vision encode``: images that need not fit into memory."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.errors import UserError
from .common import Parser, add_model_options, add_speed_options, at_speed, load, model_options, say_used
from .streaming import (
    IMAGE_HELP,
    add_streaming_options,
    adopt_training,
    check_file,
    check_streaming,
    open_chosen,
    say_broken,
    stopped,
    streaming_arguments,
)

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from ..execution import Encoded

SUFFIXES = (".npz", ".safetensors")
TABLE = "encodings.parquet"


def _parser() -> Parser:
    parser = Parser(
        "encode",
        usage="%(prog)s IMAGE|FOLDER|CSV --out FILE [options]",
        description="Embedding, logits and memory of images of any size, as the ordinary forward pass computes them: "
        "of one, or a row for each of many. The same command resumes a run that was stopped: of one image with "
        "--store; of many at the image in work, with --store in the middle of it.",
    )
    parser.add_argument(
        "image",
        type=Path,
        metavar="IMAGE",
        help=f"{IMAGE_HELP}. Or many: a folder that is searched, or a .csv with the columns path and, if wanted, mask "
        "and region (X Y W H), which replace --mask and --region",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help=f".npz or .safetensors of one image; .parquet, or a folder for {TABLE}, of many",
    )
    parser.add_argument(
        "--grid", type=Path, metavar="FILE", help="the patch features (H', W', C), .npy or .zarr; of many, a folder"
    )
    parser.add_argument(
        "--attention",
        type=Path,
        metavar="FILE",
        help="where each slot of the memory looks, a channel each over the image, .tif or .zarr; of many, a folder",
    )
    parser.add_argument(
        "--attention-layer", type=int, metavar="N", help="of this block, from 0 (default: the last pack)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files at --out, --grid and --attention")
    add_model_options(parser)
    add_speed_options(parser, compiles=False)  # bands go through parts of a block
    add_streaming_options(parser)
    return parser


def main(words: list[str]) -> int:
    """Run the command. Returns the exit code: 1 if one of many images could not be used, 130 after Ctrl-C."""
    args = _parser().parse_args(words)
    adopt_training(args)
    if args.out.suffix in ("", ".parquet"):
        return _many(args)

    from .. import __version__
    from ..execution import encode
    from ..execution.grid import ZARR_FILES, check_grid
    from ..images.maps import check_map
    from ..models.factory import random_weights
    from ..utils.files import check_output

    if args.image.suffix.lower() == ".csv":
        raise UserError(f"{args.image} lists many images: give --out FILE.parquet")
    if _is_searched(args.image) and not any((args.image / name).is_file() for name in ZARR_FILES):
        raise UserError(f"{args.image} holds many images: give --out FILE.parquet")
    check_output(args.out, SUFFIXES, args.overwrite)
    check_file(args.out, "the output", args.image, args.overwrite)
    if args.grid is not None:
        check_grid(args.grid)
        check_file(args.grid, "the patch grid", args.image, args.overwrite)
    if args.attention is not None:
        check_map(args.attention)
        check_file(args.attention, "the attention map", args.image, args.overwrite)
    image = open_chosen(args)
    model = load(args)
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
                **streaming_arguments(args),
                grid=args.grid,
                attention=args.attention,
                attention_layer=args.attention_layer,
                save=lambda result: _save(args.out, result, about | {"dtype": dtype}),
            )
    except KeyboardInterrupt:
        return stopped(args)
    (height, width), (rows, columns) = image.shape[:2], result.grid_size
    seen = "" if result.patch_valid is None else f", {int(result.patch_valid.sum())} of them looked at"
    print(f"{args.out}: {height} x {width} pixels, {rows} x {columns} patches{seen}{say_broken(result.broken_tiles)}")
    return 0


def _many(args: "Namespace") -> int:
    """A table of many images."""
    from ..downstream.embed import check_target
    from ..downstream.encode_files import encode_files
    from ..images.find import Listed, find_files, read_list
    from ..images.pixels import pixel_statistics
    from ..models.factory import random_weights
    from ..utils.ranks import is_first, joined_ranks

    out = args.out if args.out.suffix else args.out / TABLE
    check_target(out, args.overwrite)
    for option in ("grid", "attention"):
        path = getattr(args, option)
        if path is not None and (path.suffix or path.is_file()):
            raise UserError(f"--{option} of many images is a folder, got {path}")
    for option in ("grid", "attention", "store"):
        path = getattr(args, option)
        if path is not None and _is_searched(args.image) and path.resolve().is_relative_to(args.image.resolve()):
            raise UserError(f"--{option} {path} lies in {args.image}, where images are searched: give another folder")
    choice, missing = check_streaming(args), []
    own = {"mask": args.mask, "region": choice.pop("region")}
    if args.image.suffix.lower() == ".csv":
        found = read_list(args.image)
    else:
        say = partial(print, file=sys.stderr) if is_first() else lambda line: None
        files, missing = find_files(args.image, say, large=True)
        found = [Listed(file) for file in files]
    items = [Listed(one.path, one.mask or own["mask"], one.region or own["region"]) for one in found]
    model = load(args)
    how = streaming_arguments(args) | {"attention_layer": args.attention_layer}
    how.pop("mask")
    pixel_statistics(model, how["mean"], how["std"])  # which raises here and not for each image
    try:
        with at_speed(args, model), joined_ranks() as ranks:
            failures = encode_files(
                model,
                items,
                out,
                choice,
                grid=args.grid,
                attention=args.attention,
                overwrite=args.overwrite,
                random_weights=random_weights(**model_options(args)),
                ranks=ranks,
                **how,
            )
    except KeyboardInterrupt:
        print("stopped; the same command continues from here", file=sys.stderr)
        return 130
    if not is_first():
        return 0
    if failures and out.exists():
        print("the same command with --overwrite tries those again that could not be used", file=sys.stderr)
    return say_used(out, len(items) + len(missing), missing + failures)


def _is_searched(image: Path) -> bool:
    """Whether it is a folder in which images are searched, and not an array of zarr by its name."""
    from ..images.find import ZARR

    return image.is_dir() and not image.name.lower().endswith(ZARR)


def _save(path: Path, result: "Encoded", about: dict[str, Any]) -> None:
    import numpy as np
    from safetensors.numpy import save

    from ..utils.files import new_file

    named = {name: getattr(result, name) for name in ("embedding", "logits", "memory", "raw_memory")}
    arrays = {name: value.float().numpy() for name, value in named.items() if value is not None}
    if result.patch_valid is not None:
        arrays["patch_valid"] = result.patch_valid.numpy()
    about = {**about, "grid_size": list(result.grid_size), "broken_tiles": result.broken_tiles}
    with new_file(path) as file:
        if path.suffix == ".npz":
            np.savez(file, **arrays, about=np.array(json.dumps(about)))
        else:
            file.write(save(arrays, {"about": json.dumps(about)}))
