"""A picture for each of many image files, in colours that mean the same in all of them."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from matplotlib.backend_bases import FigureCanvasBase
from torch import nn

from luna_vision.images.decode import SampleError
from luna_vision.utils.errors import one_line
from luna_vision.utils.files import check_folder, save_figure
from luna_vision.utils.progress import progress_bar
from luna_vision.utils.text import printable

from .features import FeatureColors, feature_maps, fit_colors
from .figures import plot_features, plot_memory
from .maps import check_memory, check_slots, has_memory, slot_maps
from .view import MAX_SIZE, View, view

# errors that concern one image; all others stop the run
IMAGE_ERRORS = (SampleError, OSError, MemoryError)
FIT_IMAGES = 64  # images that the colours of features are fitted to, at most


def picture_files(out: Path, files: Sequence[str], single: bool) -> list[Path]:
    """The path of each image's picture: `out` itself for a single image, or a file in that folder.

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
    check_folder(next(parent for parent in (folder, *folder.parents) if parent.exists()))  # the rest is made later
    return targets


def picture_names(files: Sequence[str]) -> list[str]:
    """A file name for each image's picture. Names differ in more than case, which some file systems ignore."""
    names: dict[str, str] = {}
    numbers: dict[str, int] = {}  # the next one to try for a stem
    for stem in (Path(file).stem for file in files):
        number = numbers.get(stem.casefold(), 1)
        while (name := f"{stem}-{number}.png" if number > 1 else f"{stem}.png").casefold() in names:
            number += 1
        numbers[stem.casefold()] = number + 1
        names[name.casefold()] = name
    return list(names.values())


def draw_pictures(
    model: nn.Module,
    files: Sequence[str],
    targets: Sequence[Path],
    failures: list[tuple[str, str]],
    kind: str | None = None,
    layers: Sequence[int] | None = None,
    slots: Sequence[int] | int = 6,
    head: int | None = None,
    max_size: int = MAX_SIZE,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    value_range: str | Sequence[float] | None = None,
    nodata: float | None = None,
    fill: float | str | None = None,
    warning: str = "",
) -> Iterator[Path]:
    """Draw each image, and write its picture.

    Args:
        model: A timm model.
        files: Image files.
        targets: The path of each picture.
        failures: (image, reason) of each image that cannot be read is added here.
        kind: "memory", "features" or "both"; by default what the model has.
        layers, slots, head, warning: As in :func:`luna_vision.visualize.plot_memory`.
        max_size, mean, std, value_range, nodata, fill: As in :func:`luna_vision.visualize.view`.

    Yields:
        The path of each picture that has been written.

    Raises:
        ValueError: An argument does not go with the model, or its weights are broken.
        OSError: A picture cannot be written.
    """
    kind = kind or ("both" if has_memory(model) else "features")
    if kind != "features":
        check_memory(model)
    elif head is not None or not isinstance(slots, int):
        raise ValueError("--slots and --head choose what is drawn of the memory, and only features are drawn")
    see = partial(view, model, max_size=max_size, mean=mean, std=std, value_range=value_range, nodata=nodata, fill=fill)
    # find mistakes in the arguments and broken weights on a single pixel, before any work
    # (of a number that hardly any option takes for no data)
    pixel = see(np.full((1, 1, getattr(model, "in_chans", model.pretrained_cfg["input_size"][0])), 0.505, np.float32))
    if kind != "features":
        check_slots(slots, slot_maps(model, pixel, layers, head))
    colors = None
    if kind != "memory":
        feature_maps(model, pixel, layers)
        colors = _fit_colors(model, files, see, layers)
    for target, (file, seen) in zip(targets, _read(files, see, "drawing"), strict=True):
        if not isinstance(seen, View):
            failures.append((file, seen))
            continue
        if kind == "features":
            figure = plot_features(model, seen, colors=colors, warning=warning)
        else:
            figure = plot_memory(model, seen, layers, slots, head, colors, warning=warning)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # file names may be in any script
            save_figure(figure, target)
        yield target


def _fit_colors(
    model: nn.Module, files: Sequence[str], see: Callable[[str], View], layers: Sequence[int] | None
) -> dict[int, FeatureColors] | None:
    """Colours for all pictures, fitted to some of the images that can be read; None if there is no such image."""
    shuffled = [files[i] for i in np.random.default_rng(0).permutation(len(files))]
    readable = (seen for _, seen in _read(shuffled, see, "fitting colours") if isinstance(seen, View))
    some = list(islice(readable, FIT_IMAGES))
    return fit_colors(model, some, layers) if some else None


def _read(files: Sequence[str], see: Callable[[str], View], name: str) -> Iterator[tuple[str, View | str]]:
    """Each image file as the model sees it, or the reason why it cannot be read."""
    for file in progress_bar(files, len(files) > 1, desc=name, unit="image"):
        try:
            seen = see(file)
        except IMAGE_ERRORS as error:
            seen = printable(one_line(error))
        yield file, seen
