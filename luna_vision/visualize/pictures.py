"""A picture for each of many image files, in colours that mean the same in all of them."""

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from luna_vision.images.decode import SampleError
from luna_vision.utils.errors import one_line
from luna_vision.utils.files import check_folder, save_figure
from luna_vision.utils.progress import progress_bar
from luna_vision.utils.text import printable

from .features import FeatureColors, feature_maps, thinned
from .figures import plot_features, plot_memory
from .maps import check_memory, check_slots, has_memory, slot_maps
from .view import MAX_SIZE, View, view

# what an image raises that cannot be read, or has no room; all else is about more than this image
IMAGE_ERRORS = (SampleError, OSError, MemoryError)
Failures = list[tuple[str, str]]


@dataclass(frozen=True)
class Drawing:
    """What is drawn of an image, and how a model sees it.

    Attributes:
        kind: "memory", "features" or "both"; by default what the model has.
        layers, slots, head: As in :func:`luna_vision.visualize.plot_memory`.
        foreground: As in :func:`luna_vision.visualize.plot_features`.
        max_size, mean, std, value_range, nodata, fill: As in :func:`luna_vision.visualize.view`.
        warning: A line in red.
    """

    kind: str | None = None
    layers: Sequence[int] | None = None
    slots: Sequence[int] | int = 6
    head: int | None = None
    foreground: bool = False
    max_size: int = MAX_SIZE
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    value_range: str | Sequence[float] | None = None
    nodata: float | None = None
    fill: float | str | None = None
    warning: str = ""

    def see(self, model: nn.Module, image: str | np.ndarray) -> View:
        """The image as the model sees it."""
        return view(model, image, self.max_size, self.mean, self.std, self.value_range, self.nodata, self.fill)


def picture_files(out: Path, files: Sequence[str], single: bool) -> list[Path]:
    """Where the picture of each image goes: to `out` itself, or into that folder, which can be written or made.

    Raises:
        ValueError: One file for several images, an unknown format, or an image would be overwritten.
        OSError: The folder cannot be written.
    """
    as_file = bool(out.suffix) and not out.is_dir()
    if as_file and not single:
        raise ValueError(f"--out {out} is one file, for several images: give a folder")
    if as_file and out.suffix[1:].lower() not in FigureCanvasBase.filetypes:
        raise ValueError(f"--out {out}: the format must be one of {', '.join(sorted(FigureCanvasBase.filetypes))}")
    targets = [out] * len(files) if as_file else [out / name for name in picture_names(files)]
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


def picture_names(files: Sequence[str]) -> list[str]:
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


def draw_pictures(
    model: nn.Module, files: Sequence[str], targets: Sequence[Path], drawing: Drawing, failures: Failures
) -> Iterator[Path]:
    """Draw each image, and write its picture; the images that cannot be read go to `failures`.

    Args:
        model: A timm model.
        files: Images.
        targets: Of the picture of each.
        drawing: What is drawn.
        failures: Images and reasons, to which is added.

    Yields:
        The picture that has just been written.

    Raises:
        ValueError: Something that does not go with the model, or its weights are broken.
        OSError: A picture cannot be written.
    """
    kind = _kind(drawing, model)
    _try_out(model, drawing, kind)
    fitted, readable = _fit_colors(model, files, drawing, failures) if kind != "memory" else (None, files)
    for file, target in zip(_bar(files, "drawing"), targets, strict=True):
        if file not in readable:
            continue
        try:
            seen = drawing.see(model, file)
        except IMAGE_ERRORS as error:
            failures.append((file, printable(one_line(error))))
            continue
        figure = _draw(model, seen, kind, fitted, drawing)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # file names may be in any script
            save_figure(figure, target)
        yield target


def _kind(drawing: Drawing, model: nn.Module) -> str:
    kind = drawing.kind
    if kind is None:
        kind = "both" if has_memory(model) else "features"
    elif kind != "features":
        check_memory(model)
    for name, given, of in (
        ("slots", not isinstance(drawing.slots, int), "memory"),
        ("head", drawing.head is not None, "memory"),
        ("foreground", drawing.foreground, "features"),
    ):
        if given and kind not in (of, "both"):
            raise ValueError(f"--{name} is of a picture of the {of}, and this one is of the {kind} alone")
    return kind


def _try_out(model: nn.Module, drawing: Drawing, kind: str) -> None:
    """Meet what is wrong with the arguments or the weights on a single pixel, before any work."""
    seen = drawing.see(model, np.zeros((1, 1, 3), np.uint8))
    if kind != "memory":
        feature_maps(model, seen, drawing.layers)
    if kind != "features":
        check_slots(drawing.slots, slot_maps(model, seen, drawing.layers, drawing.head))


def _fit_colors(
    model: nn.Module, files: Sequence[str], drawing: Drawing, failures: Failures
) -> tuple[dict[int, FeatureColors], set[str]]:
    """Colours that mean the same in all pictures, and the images that can be read."""
    patches: dict[int, list[np.ndarray]] = {}
    readable = set()
    for file in _bar(files, "fitting colours"):
        try:
            seen = drawing.see(model, file)
        except IMAGE_ERRORS as error:
            failures.append((file, printable(one_line(error))))
            continue
        readable.add(file)
        for layer, features in feature_maps(model, seen, drawing.layers).items():
            patches.setdefault(layer, []).append(thinned(features, len(files)))
    return {layer: FeatureColors(maps, drawing.foreground) for layer, maps in patches.items()}, readable


def _draw(model: nn.Module, seen: View, kind: str, fitted: dict[int, FeatureColors] | None, drawing: Drawing) -> Figure:
    if kind == "features":
        return plot_features(model, seen, colors=fitted, warning=drawing.warning)
    memory = (drawing.layers, drawing.slots, drawing.head)
    return plot_memory(model, seen, *memory, colors=fitted, warning=drawing.warning)


def _bar(files: Sequence[str], name: str) -> tqdm:
    return progress_bar(files, len(files) > 1, desc=name, unit="image")
