"""Draw what the memory of a model looks at, and its features: `python -m luna_vision.visualize --help`."""

import argparse
import os
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from luna_vision._commands import (
    USER_ERRORS,
    Parser,
    add_model_arguments,
    at_least,
    load_model,
    random_weights,
    run_command,
)
from luna_vision.images import find_images
from luna_vision.images.decode import one_line
from luna_vision.utils.files import check_folder, save_figure
from luna_vision.utils.text import printable

from .features import FeatureColors, feature_maps, thinned
from .figures import plot_features, plot_memory
from .maps import check_memory, check_slots, has_memory, slot_maps
from .view import MAX_SIZE, View, view

KINDS = ("memory", "features", "both")
# what a single image may raise: it is broken, its picture cannot be written, or it takes more memory than there is
IMAGE_ERRORS = (*USER_ERRORS, RuntimeError, MemoryError)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m luna_vision.visualize",
        description="Draw, layer by layer, where each memory slot looks, which slot each patch reads, and patch "
        "features as colours: one picture for each image.",
        epilog="Exit code: 0, or 1 if some of the images could not be drawn, or 2 if none could.",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("pictures"),
        help="the picture (its ending says the format), or a folder, which gets NAME.png for each image "
        "(default: %(default)s/)",
    )
    parser.add_argument(
        "--kind", choices=KINDS, help="what to draw; features work for any timm model (default: what the model has)"
    )
    parser.add_argument(
        "--layers", nargs="+", type=int, metavar="N", help="from 0, or from the last if negative (default: up to four)"
    )
    slots = parser.add_mutually_exclusive_group()
    slots.add_argument("--slots", nargs="+", type=at_least(0), metavar="N", help="slots that get a column, from 0")
    slots.add_argument("--top", type=at_least(1), default=6, help="or the so many that tell most (default: 6)")
    parser.add_argument("--head", type=at_least(0), metavar="N", help="one head (default: the mean over heads)")
    parser.add_argument(
        "--foreground", action="store_true", help="features of the foreground alone: the rarer side of the first axis"
    )
    add_model_arguments(parser)
    group = parser.add_argument_group("what the model sees")
    group.add_argument(
        "--max-size",
        type=at_least(1),
        default=MAX_SIZE,
        metavar="PIXELS",
        help="larger images are reduced to this longer side (default: %(default)s)",
    )
    for name in ("mean", "std"):
        group.add_argument(
            f"--{name}",
            nargs="+",
            type=float,
            metavar="X",
            help=f"{name} of pixels in [0, 1] that the model was trained with, one or three (default: the model's cfg)",
        )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; returns the exit code.

    Raises:
        ValueError, OSError: A mistake in the arguments, or not a single picture could be drawn.
    """
    args = _parser().parse_args(argv)
    errors: list[str] = []
    files = _find(args.images, errors)
    targets = _targets(args.out, files, single=len(files) + len(errors) == 1)
    model = load_model(args, num_classes=0)  # nothing that is drawn comes from the head
    kind = _kind(args, model)
    _try_out(model, args, kind)
    fitted = _fit_colors(model, files, args, errors) if kind != "memory" else None
    drawn = 0
    for file, target in zip(_bar(files, "drawing"), targets, strict=True):
        if file is None:
            continue
        try:
            figure = _draw(model, _see(model, file, args), kind, fitted, args)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Glyph .* missing")  # file names may be in any script
                save_figure(figure, target)
        except IMAGE_ERRORS as error:
            errors.append(_failure(file, error))
            continue
        drawn += 1
        tqdm.write(printable(str(target)))  # above the bar, if there is one
        sys.stdout.flush()
    if not drawn and len(errors) == 1:
        raise ValueError(errors[0])
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return 0 if not errors else 1 if drawn else 2


def _failure(file: str, error: Exception) -> str:
    """What to say of an image, which not every error names."""
    name, reason = printable(file), printable(one_line(error))
    return reason if name in reason else f"{name}: {reason}"


def _find(paths: list[str], errors: list[str]) -> list[str | None]:
    """The image files, each once; what is wrong with the other paths goes to `errors`."""
    files: list[str | None] = []
    say = partial(print, file=sys.stderr)  # of what is skipped in a folder
    for path in paths:
        try:
            files += find_images(path, lambda error: errors.append(printable(one_line(error))), say)
        except USER_ERRORS as error:
            errors.append(printable(one_line(error)))
    if not files and len(errors) == 1:
        raise ValueError(errors[0])
    return list(dict.fromkeys(files))


def _targets(out: Path, files: list[str | None], single: bool) -> list[Path]:
    """Where each picture goes, in a folder that can be written or made.

    Raises:
        ValueError: One file for several images, an unknown format, or an image would be overwritten.
        OSError: The folder cannot be written.
    """
    as_file = bool(out.suffix) and not out.is_dir()
    if as_file and not single:
        raise ValueError(f"--out {out} is one file, for several images: give a folder")
    if as_file and out.suffix[1:].lower() not in FigureCanvasBase.filetypes:
        raise ValueError(f"--out {out}: the format must be one of {', '.join(sorted(FigureCanvasBase.filetypes))}")
    targets = [out] * len(files) if as_file else [out / name for name in _names(files)]
    inputs = {Path(file).resolve() for file in files}
    for target in targets:
        if target.resolve() in inputs:
            raise ValueError(f"--out {out}: the picture {target} would overwrite an image: give another place")
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(f"--out {out}: {target} cannot be written")
    folder = out.parent if as_file else out
    folder = next(parent for parent in (folder, *folder.parents) if parent.exists())  # the rest is made when needed
    check_folder(folder)
    return targets


def _names(files: list[str | None]) -> list[str]:
    """A name for the picture of each image, no two alike: not even to a file system that takes A for a."""
    names: list[str] = []
    taken: set[str] = set()
    numbers: dict[str, int] = {}  # the next one of a stem
    for stem in (Path(file).stem for file in files):
        number = numbers.get(stem.casefold(), 1)
        while (name := f"{stem}-{number}.png" if number > 1 else f"{stem}.png").casefold() in taken:
            number += 1
        numbers[stem.casefold()] = number + 1
        taken.add(name.casefold())
        names.append(name)
    return names


def _kind(args: argparse.Namespace, model: nn.Module) -> str:
    kind = args.kind
    if kind is None:
        kind = "both" if has_memory(model) else "features"
    elif kind != "features":
        check_memory(model)
    for name, given, of in (
        ("slots", args.slots is not None, "memory"),
        ("head", args.head is not None, "memory"),
        ("foreground", args.foreground, "features"),
    ):
        if given and kind not in (of, "both"):
            raise ValueError(f"--{name} is of a picture of the {of}, and this one is of the {kind} alone")
    return kind


def _see(model: nn.Module, image: str | np.ndarray, args: argparse.Namespace) -> View:
    return view(model, image, args.max_size, args.mean, args.std)


def _try_out(model: nn.Module, args: argparse.Namespace, kind: str) -> None:
    """Meet what is wrong with the arguments or the weights on a single pixel, before any work."""
    seen = _see(model, np.zeros((1, 1, 3), np.uint8), args)
    if kind != "memory":
        feature_maps(model, seen, args.layers)
    if kind != "features":
        check_slots(args.slots or args.top, slot_maps(model, seen, args.layers, args.head))


def _bar(files: list[str | None], name: str) -> tqdm:
    # None: only on a terminal
    return tqdm(files, desc=name, unit="image", disable=None if len(files) > 1 else True)


def _fit_colors(
    model: nn.Module, files: list[str | None], args: argparse.Namespace, errors: list[str]
) -> dict[int, FeatureColors] | None:
    """Colours that mean the same in all pictures; images that cannot be read become None in `files`."""
    patches: dict[int, list[np.ndarray]] = {}
    for i, file in enumerate(_bar(files, "fitting colours")):
        try:
            maps = feature_maps(model, _see(model, file, args), args.layers)
        except IMAGE_ERRORS as error:
            errors.append(_failure(file, error))
            files[i] = None
            continue
        for layer, features in maps.items():
            patches.setdefault(layer, []).append(thinned(features, len(files)))
    return {layer: FeatureColors(maps, args.foreground) for layer, maps in patches.items()}


def _draw(
    model: nn.Module, seen: View, kind: str, fitted: dict[int, FeatureColors] | None, args: argparse.Namespace
) -> Figure:
    warning = "RANDOM WEIGHTS: this picture says nothing about the image" if random_weights(args) else ""
    if kind == "features":
        return plot_features(model, seen, colors=fitted, warning=warning)
    slots = args.slots or args.top
    return plot_memory(model, seen, args.layers, slots, args.head, colors=fitted, warning=warning)


if __name__ == "__main__":
    run_command(main)
