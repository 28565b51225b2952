"""``luna-vision embed``: embeddings of image files."""

import sys
from functools import partial
from pathlib import Path

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
    say_used,
    value_options,
)


def _parser() -> Parser:
    parser = Parser(
        "embed",
        usage="%(prog)s IMAGE [IMAGE ...] --out FILE [options]",
        description="Embeddings of images, a row for each. The same command resumes a run that was stopped.",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, and folders that are searched for images")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=".parquet or .npz")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE, which is refused otherwise")
    add_model_options(parser)
    add_speed_options(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--memory", action="store_true", help="the memory slots (L, C), too; takes a Luna ViT")
    group.add_argument("--grid", action="store_true", help="the patch grid (H', W', C), too")
    group = parser.add_argument_group("reading", "Images keep their size, unless one of the first two is given.")
    group.add_argument("--max-size", type=at_least(1), metavar="N", help="longer side at most, in pixels; shrinks only")
    group.add_argument(
        "--img-size",
        type=at_least(1),
        metavar="N",
        help="squares of this side, by the evaluation transform with the model's crop_pct and crop_mode",
    )
    add_statistics_options(group, "one number or one a channel (default: the model's)")
    add_value_options(group, "the files")
    group.add_argument(
        "--max-pixels",
        type=at_least(1),
        metavar="N",
        help="images with more pixels are refused, as decompression bombs may be (default: 178956970, Pillow's)",
    )
    group.add_argument("--batch-size", type=at_least(1), default=32, metavar="N", help="at most (default: %(default)s)")
    group.add_argument(
        "--workers",
        type=at_least(0),
        default=0,
        metavar="N",
        help="processes that decode (default: 0, this one does)",
    )
    return parser


def main(words: list[str]) -> int:
    """Run the command. Returns the exit code: 1 if an image could not be used, 130 after Ctrl-C."""
    args = _parser().parse_args(words)

    from ..downstream.embed import Settings, check_target, write_embeddings
    from ..images import find_files
    from ..models.factory import random_weights
    from ..utils.ranks import is_first, joined_ranks

    names = ("max_size", "img_size", "mean", "std", "memory", "grid", "batch_size", "max_pixels", "workers")
    settings = Settings(
        **{name: getattr(args, name) for name in names if getattr(args, name) is not None}, **value_options(args)
    )
    check_target(args.out, args.overwrite)
    files, missing = find_files(args.images, partial(print, file=sys.stderr) if is_first() else lambda line: None)
    model = load(args, num_classes=0)
    try:
        with at_speed(args, model), joined_ranks() as ranks:
            failures = missing + write_embeddings(
                model, files, args.out, settings, random_weights(**model_options(args)), ranks=ranks
            )
    except KeyboardInterrupt:
        print("stopped; the same command continues from here", file=sys.stderr)
        return 130
    return say_used(args.out, len(files) + len(missing), failures) if is_first() else 0
