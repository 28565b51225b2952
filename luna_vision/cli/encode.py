"""``luna-vision encode``: an image that need not fit into memory."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import Parser, add_model_options, add_speed_options, at_speed, load, model_options
from .streaming import (
    IMAGE_HELP,
    add_streaming_options,
    check_file,
    open_chosen,
    say_broken,
    stopped,
    streaming_arguments,
)

if TYPE_CHECKING:
    from ..execution import Encoded

MODEL = "luna_vit_tiny"  # the default
SUFFIXES = (".npz", ".safetensors")


def _parser() -> Parser:
    parser = Parser(
        "encode",
        usage="%(prog)s IMAGE --out FILE [options]",
        description="Embedding, logits and memory of one image of any size, as the ordinary forward pass computes "
        "them. With --store, the same command resumes a run that was stopped.",
    )
    parser.add_argument("image", type=Path, metavar="IMAGE", help=IMAGE_HELP)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=".npz or .safetensors")
    parser.add_argument("--grid", type=Path, metavar="FILE", help="the patch features (H', W', C), .npy or .zarr")
    parser.add_argument(
        "--attention",
        type=Path,
        metavar="FILE",
        help="where each slot of the memory looks, a channel each over the image, .tif or .zarr",
    )
    parser.add_argument(
        "--attention-layer", type=int, metavar="N", help="of this block, from 0 (default: the last pack)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files at --out, --grid and --attention")
    add_model_options(parser, default=MODEL)
    add_speed_options(parser, compiles=False)  # bands go through parts of a block
    add_streaming_options(parser)
    return parser


def main(words: list[str]) -> int:
    """Run the command. Returns the exit code, 130 after Ctrl-C."""
    args = _parser().parse_args(words)

    from .. import __version__
    from ..execution import encode
    from ..execution.grid import check_grid
    from ..images.maps import check_map
    from ..models.factory import random_weights
    from ..utils.files import check_output

    check_output(args.out, SUFFIXES, args.overwrite)
    check_file(args.out, "the output", args.image, args.overwrite)
    if args.grid is not None:
        check_grid(args.grid)
        check_file(args.grid, "the patch grid", args.image, args.overwrite)
    if args.attention is not None:
        check_map(args.attention)
        check_file(args.attention, "the attention map", args.image, args.overwrite)
    image = open_chosen(args)
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
