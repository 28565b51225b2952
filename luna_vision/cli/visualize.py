"""``luna-vision visualize``: pictures of what the memory looks at, and of patch features."""

import sys
from functools import partial
from pathlib import Path

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
    named,
    value_options,
)

KINDS = ("memory", "features", "both")


def _parser() -> Parser:
    parser = Parser(
        "visualize",
        usage="%(prog)s IMAGE [IMAGE ...] [--out PATH] [options]",
        description="Draw, layer by layer, where each memory slot looks, which slot each patch reads, and patch "
        "features as colours: one picture for each image.",
        epilog="Exit code: 0, or 1 if some of the images could not be drawn, or 2 if none could.",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("pictures"),
        metavar="PATH",
        help="the picture (its ending says the format), or a folder, which gets NAME.png for each image "
        "(default: %(default)s/)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace pictures, which is refused otherwise")
    parser.add_argument(
        "--kind", choices=KINDS, help="what to draw; features work for any timm model (default: what the model has)"
    )
    parser.add_argument(
        "--layers", nargs="+", type=int, metavar="N", help="from 0, or from the last if negative (default: up to four)"
    )
    slots = parser.add_mutually_exclusive_group()
    slots.add_argument("--slots", nargs="+", type=at_least(0), metavar="N", help="slots that get a column, from 0")
    slots.add_argument(
        "--top", type=at_least(1), default=6, metavar="N", help="or this many, chosen for the image (default: 6)"
    )
    parser.add_argument("--head", type=at_least(0), metavar="N", help="one head (default: the mean over heads)")
    add_model_options(parser)
    add_speed_options(parser)
    group = parser.add_argument_group("images")
    group.add_argument(
        "--max-size",
        type=at_least(1),
        metavar="PIXELS",
        help="larger images are reduced to this longer side (default: 1024)",
    )
    add_statistics_options(group, "one number or one a channel (default: the model's)")
    add_value_options(group)
    return parser


def main(words: list[str]) -> int:
    """Do what the command line says; returns the exit code.

    Raises:
        ValueError, OSError: A mistake in the arguments, or there is not a single image.
    """
    args = _parser().parse_args(words)

    from tqdm import tqdm

    from ..images import find_files
    from ..models.factory import random_weights
    from ..utils.files import check_new
    from ..visualize.pictures import draw_pictures, picture_files

    files, failures = find_files(args.images, partial(print, file=sys.stderr))
    targets = picture_files(args.out, files, single=len(files) + len(failures) == 1)
    for target in targets:
        check_new(target, args.overwrite)
    model = load(args, num_classes=0)  # nothing that is drawn comes from the head
    names = ("kind", "layers", "head", "max_size", "mean", "std")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None} | value_options(args)
    options["slots"] = args.slots or args.top
    if random_weights(**model_options(args)):
        options["warning"] = "RANDOM WEIGHTS: this picture says nothing about the image"
    drawn = 0
    with at_speed(args, model):
        for target in draw_pictures(model, files, targets, failures, **options):
            drawn += 1
            tqdm.write(printable(str(target)))  # above the bar, if there is one
            sys.stdout.flush()
    for path, reason in failures:
        print(f"error: {named(path, reason)}", file=sys.stderr)
    return 0 if not failures else 1 if drawn else 2
