"""``luna-vision predict IMAGE --out FILE.tif``: the classes of an image that need not fit into memory, as a map."""

from pathlib import Path

from ..utils.errors import UserError
from .common import DEVICES, Parser, add_speed_options, at_speed
from .streaming import IMAGE_HELP, add_streaming_options, check_file, open_chosen, stopped, streaming_arguments

__all__ = ["is_map", "main"]

SUFFIXES = (".tif", ".tiff", ".zarr")


def is_map(words: tuple[str, ...]) -> bool:
    """Whether a command line of predict has a map as its output."""
    given = [word.removeprefix("--out=") for word in words if word.startswith("--out=")]
    given += [after for word, after in zip(words, words[1:], strict=False) if word == "--out"]
    return any(name.lower().endswith(SUFFIXES) for name in given)


def _parser() -> Parser:
    parser = Parser(
        "predict",
        usage="%(prog)s IMAGE --checkpoint FILE --out FILE.tif [options]",
        description="The class of each pixel of one image of any size, as a segmenter finds it in the whole image. "
        "With --store, the same command resumes a run that was stopped. Masks of many images: --out FOLDER.",
    )
    parser.add_argument("image", type=Path, metavar="IMAGE", help=IMAGE_HELP)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="FILE",
        help="best.safetensors or best.ckpt of the training of a segmenter on a Luna ViT",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="the number of each pixel's class: .tif (with the georeference of the image) or .zarr (OME-Zarr)",
    )
    parser.add_argument(
        "--probabilities", type=Path, metavar="FILE", help="of the classes, a channel each, 255 for 1; likewise"
    )
    parser.add_argument(
        "--polygons",
        type=Path,
        metavar="FILE",
        help="the outlines of the classes, .geojson: in pixels of level 0 for QuPath or, of an image with a "
        "georeference, in longitude and latitude; takes --out in .tif",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace these files")
    parser.add_argument(
        "--device", choices=DEVICES, default="auto", help="auto takes a GPU if there is one (default: auto)"
    )
    add_speed_options(parser, compiles=False)  # bands go through parts of a block
    add_streaming_options(parser, statistics=False)
    return parser


def main(words: list[str]) -> int:
    """Run the command. Returns the exit code, 130 after Ctrl-C."""
    args = _parser().parse_args(words)

    from ..downstream.segmentation import FCN
    from ..downstream.whole import segment
    from ..images.maps import check_map
    from ..images.polygons import check_geojson
    from ..loading import load
    from ..models.checkpoints import training_checkpoint
    from ..models.factory import pick_device

    files = (args.out, "the output"), (args.probabilities, "the probabilities"), (args.polygons, "the polygons")
    for path, what in files:
        if path is not None:
            (check_geojson if path is args.polygons else check_map)(path)
            check_file(path, what, args.image, args.overwrite)
    if args.probabilities is not None and args.probabilities.resolve() == args.out.resolve():
        raise UserError(f"--out and --probabilities are both {args.out}: give another name")
    image = open_chosen(args)
    model, _, names = load(args.checkpoint)
    if not isinstance(model, FCN):
        raise UserError(f"{args.checkpoint} is no segmenter, whose classes {args.out} could show: see predict --help")
    model = model.to(pick_device(args.device))
    values = training_checkpoint(args.checkpoint).get("data", {}).get("cfg", {}).get("mask_values")
    try:
        with at_speed(args, model):
            how = streaming_arguments(args)
            result = segment(
                model, image, args.out, args.probabilities, args.polygons, values=values, class_names=names, **how
            )
    except KeyboardInterrupt:
        return stopped(args)
    (height, width), seen = image.shape[:2], ""
    if result.patch_valid is not None:
        seen = f", of which {result.patch_valid.float().mean():.1%} looked at"
    print(f"{args.out}: {height} x {width} pixels{seen}")
    return 0
