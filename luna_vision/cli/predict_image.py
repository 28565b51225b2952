"""``luna-vision predict IMAGE --out FILE.tif``: classes or objects of an image that need not fit into memory."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from ..utils.errors import UserError
from .common import DEVICES, Parser, add_speed_options, at_speed
from .streaming import (
    IMAGE_HELP,
    add_streaming_options,
    adopt_training,
    check_file,
    open_chosen,
    say_broken,
    stopped,
    streaming_arguments,
)

if TYPE_CHECKING:
    from torch import nn

__all__ = ["is_of_image", "main"]

OF_ZARR = ("zarr.json", ".zgroup", ".zarray")  # one of them is in a folder of zarr
SUFFIXES = (".tif", ".tiff", ".zarr", ".geojson")


def is_of_image(words: tuple[str, ...]) -> bool:
    """Whether a command line of predict has the output of one image of any size."""
    given = [word.removeprefix("--out=") for word in words if word.startswith("--out=")]
    given += [after for word, after in zip(words, words[1:], strict=False) if word == "--out"]
    return any(name.lower().endswith(SUFFIXES) for name in given)


def _parser() -> Parser:
    parser = Parser(
        "predict",
        usage="%(prog)s IMAGE --checkpoint FILE --out FILE.tif|.zarr|.geojson [options]",
        description="The class of each pixel, or the objects, of one image of any size, as the model finds them in the "
        "whole image. With --store, the same command resumes a run that was stopped. Many images: --out FOLDER of "
        "masks, or .json of boxes.",
    )
    parser.add_argument("image", type=Path, metavar="IMAGE", help=IMAGE_HELP)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="FILE",
        help="best.safetensors or best.ckpt of the training of a segmenter or a detector on a Luna ViT",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="the number of each pixel's class, .tif (with the georeference of the image) or .zarr (OME-Zarr); or the "
        "boxes of objects, .geojson",
    )
    parser.add_argument(
        "--probabilities", type=Path, metavar="FILE", help="of the classes, .tif or .zarr: a channel each, 255 for 1"
    )
    parser.add_argument(
        "--polygons",
        type=Path,
        metavar="FILE",
        help="the outlines of the classes, .geojson: in pixels of level 0 for QuPath or, of an image with a "
        "georeference, in longitude and latitude; takes --out in .tif",
    )
    parser.add_argument("--coco", type=Path, metavar="FILE", help="the boxes also in COCO's form, .json")
    parser.add_argument("--overwrite", action="store_true", help="replace these files")
    parser.add_argument(
        "--pack-by-row",
        action="store_true",
        help="let the memory read each row of patches by itself, and take the mean: for an image four or more times as "
        "large as those of the training, that shows more of the same",
    )
    parser.add_argument(
        "--device", choices=DEVICES, default="auto", help="auto takes a GPU if there is one (default: auto)"
    )
    add_speed_options(parser, compiles=False)  # bands go through parts of a block
    add_streaming_options(parser, statistics=False)
    return parser


def main(words: list[str]) -> int:
    """Run the command. Returns the exit code, 130 after Ctrl-C."""
    args = _parser().parse_args(words)
    adopt_training(args)

    from ..images.maps import check_map
    from ..images.polygons import check_geojson
    from ..loading import load
    from ..models import LunaVit
    from ..models.checkpoints import training_checkpoint
    from ..models.factory import pick_device
    from ..utils.files import check_output

    boxes = args.out.suffix.lower() == ".geojson"
    _check_options(args, boxes)
    for path, what, check in (
        (args.out, "the output", check_geojson if boxes else check_map),
        (args.probabilities, "the probabilities", check_map),
        (args.polygons, "the polygons", check_geojson),
        (args.coco, "the boxes", lambda path: check_output(path, [".json"], args.overwrite)),
    ):
        if path is not None:
            check(path)
            check_file(path, what, args.image, args.overwrite)
    if args.image.is_dir() and not any((args.image / name).is_file() for name in OF_ZARR):
        raise UserError(
            f"{args.image} is a folder, and --out {args.out.suffix} is of one image: give an image, or --out FOLDER "
            "for the masks of many, --out FILE.json for boxes"
        )
    image = open_chosen(args)
    model, _, names = load(args.checkpoint)
    model = model.to(pick_device(args.device))
    if args.pack_by_row:
        for module in model.modules():
            if isinstance(module, LunaVit):
                module.set_pack_by_row()
    cfg = training_checkpoint(args.checkpoint).get("data", {}).get("cfg", {})
    try:
        with at_speed(args, model):
            said = (_boxes if boxes else _map)(args, model, image, names, cfg)
    except KeyboardInterrupt:
        return stopped(args)
    print(f"{args.out}: {said}")
    return 0


def _check_options(args: Namespace, boxes: bool) -> None:
    """Raise a UserError for a file that the output has not, or that two options name."""
    others = {"--probabilities": args.probabilities, "--polygons": args.polygons, "--coco": args.coco}
    given = {option: path for option, path in others.items() if path is not None}
    for option in given:
        if boxes != (option == "--coco"):
            raise UserError(
                f"{option} goes with {'boxes, --out .geojson' if option == '--coco' else 'a map, --out .tif'}"
            )
    paths = [path.resolve() for path in (args.out, *given.values())]
    if len(set(paths)) < len(paths):
        raise UserError(f"--out, {' and '.join(given)} name one file twice: give another name")


def _map(args: Namespace, model: "nn.Module", image: Any, names: list[str] | None, cfg: dict[str, Any]) -> str:
    from ..downstream.segmentation import FCN
    from ..downstream.whole import segment

    if not isinstance(model, FCN):
        raise UserError(f"{args.checkpoint} is no segmenter, whose classes {args.out} could show: see predict --help")
    files = args.out, args.probabilities, args.polygons
    how = streaming_arguments(args)
    result = segment(model, image, *files, values=cfg.get("mask_values"), class_names=names, **how)
    (height, width), seen = image.shape[:2], ""
    if result.patch_valid is not None:
        seen = f", of which {result.patch_valid.float().mean():.1%} looked at"
    return f"{height} x {width} pixels{seen}{say_broken(result.broken_tiles)}"


def _boxes(args: Namespace, model: "nn.Module", image: Any, names: list[str] | None, cfg: dict[str, Any]) -> str:
    from ..downstream.boxes import detect
    from ..downstream.segmentation import FCN

    if isinstance(model, FCN):
        raise UserError(f"{args.checkpoint} is a segmenter: give --out .tif, and --polygons for GeoJSON")
    names = names and names[1:]  # the first is the background
    ids, how = cfg.get("category_ids"), streaming_arguments(args)
    count, result = detect(model, image, args.out, args.coco, class_names=names, category_ids=ids, **how)
    return f"{count} objects in {image.shape[0]} x {image.shape[1]} pixels{say_broken(result.broken_tiles)}"
