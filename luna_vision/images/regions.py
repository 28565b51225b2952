"""What part of an image file is read, and how large its pixels are: level, resolution, region, bands.

An image file has levels (a plain one has one). `Choice` says what is wanted of it, and `opened` makes it the image that
is read by rows. Regions are given in pixels of level 0, or in map coordinates.

Shapes: H, W pixels of the image that is read, c bands.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..utils.errors import UserError

__all__ = ["Choice", "Frame", "Georeference", "Source", "as_in_training", "opened", "positive"]

ALTERNATIVES = (("level", "mpp", "magnification"), ("bands", "channel"), ("mask",))
LEVELS_AT = 0.05  # and a level as near as that stands for what was asked for


def as_in_training(recorded: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """How a training read its slides, where nothing else is given: what is recorded of each group of alternatives of
    which all are None or missing in `given`."""
    open_groups = [group for group in ALTERNATIVES if all(given.get(name) is None for name in group)]
    return {name: recorded[name] for group in open_groups for name in group if name in recorded}


def positive(text: str | float | None, unit: float | None = 1.0) -> float | None:
    """A number, or that in a text, times a unit; None if it is not above 0 and finite, or if either is missing."""
    try:
        number = float(text) * unit
    except (TypeError, ValueError):
        return None
    return number if 0 < number < math.inf else None


@dataclass(frozen=True)
class Georeference:
    """Where an image lies on a map.

    Attributes:
        crs: Its coordinate system, as WKT.
        transform: From (column, row) of level 0 to (x, y): x = a column + b row + c, y = d column + e row + f.
    """

    crs: str
    transform: tuple[float, float, float, float, float, float]

    def pixels(self, x: float, y: float) -> tuple[float, float]:
        """Column and row of a place on the map."""
        a, b, c, d, e, f = self.transform
        x, y, det = x - c, y - f, a * e - b * d
        return (e * x - b * y) / det, (a * y - d * x) / det


@dataclass(frozen=True)
class Frame:
    """The place of an image in its file.

    Attributes:
        size: (height, width) of level 0.
        box: (left, top, width, height) of the image, in pixels of level 0.
        georeference: Of level 0, if it has one.
        mpp: Micrometres of a pixel of level 0, if they are known.
    """

    size: tuple[int, int]
    box: tuple[float, float, float, float]
    georeference: Georeference | None = None
    mpp: float | None = None

    @staticmethod
    def of(image: Any) -> "Frame":
        """That of an image; of an array, which is in no file, its own pixels are level 0."""
        height, width = image.shape[:2]
        return getattr(image, "frame", None) or Frame((height, width), (0.0, 0.0, float(width), float(height)))


@dataclass
class Source:
    """An image file that has been opened.

    Attributes:
        sizes: (height, width) of each level, the largest first.
        open: Makes a level an image: `shape`, `dtype`, rows by `image[start:stop]`.
        name: What errors call it.
        mpp: Micrometres of a pixel of level 0.
        magnification: Of the objective of level 0.
        bands: Names of the bands, as far as they have any.
        georeference: Where it lies on a map.
        sparse: Whether tiles are missing in the file.
        lossy: Whether it is JPEG, whose decoders differ by a little.
        valid: Makes of a level an image of bool: whether a pixel holds data; None if the file does not say so.
    """

    sizes: list[tuple[int, int]]
    open: Callable[[int], Any]
    name: str
    mpp: float | None = None
    magnification: float | None = None
    bands: list[str] = field(default_factory=list)
    georeference: Georeference | None = None
    sparse: bool = False
    lossy: bool = False
    valid: Callable[[int], Any] | None = None


@dataclass(frozen=True)
class Choice:
    """What is wanted of an image file; nothing of it is the largest level as a whole.

    Attributes:
        level: Of a pyramid, 0 is the largest.
        mpp: Micrometres of a pixel, instead of a level. Between two levels, the finer one is resampled.
        magnification: Of the objective, likewise.
        region: (x, y, width, height) of a rectangle, x and y of its upper left corner.
        region_in: "pixels" of level 0, or the unit of the "map".
        bands: Numbers of the bands that are read, in this order; the first is 1.
        channel: Names or, from 0, numbers of channels, instead of bands.
        series: Of a file with several images, from 0.
        z, t: Of a stack, from 0.

    Raises:
        UserError: A number out of its range, or two options that mean the same.
    """

    level: int | None = None
    mpp: float | None = None
    magnification: float | None = None
    region: Sequence[float] | None = None
    region_in: str = "pixels"
    bands: Sequence[int] | None = None
    channel: Sequence[str | int] | None = None
    series: int | None = None
    z: int | None = None
    t: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("level", "mpp", "magnification") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} all say how large pixels are: give one of them")
        if self.bands is not None and self.channel is not None:
            raise UserError("bands and channel both choose bands: give one of them")
        for name in ("level", "series", "z", "t"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise UserError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("mpp", "magnification"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UserError(f"{name} must be a number above 0, got {value}")
        if self.region_in not in ("pixels", "map"):
            raise UserError(f"region_in must be 'pixels' or 'map', got {self.region_in!r}")
        if self.region is not None:
            if len(self.region) != 4 or not all(map(math.isfinite, self.region)) or min(self.region[2:]) <= 0:
                raise UserError(f"region must be X Y WIDTH HEIGHT, sides above 0, got {tuple(self.region)}")

    def described(self) -> str:
        """What tells two choices of one file apart; of the default and a level, the level alone."""
        others = {name: value for name, value in vars(self).items() if name != "level" and value is not None}
        if self.region is None:
            del others["region_in"]
        return " ".join([str(self.level or 0), *(f"{name}={value}" for name, value in others.items())])


def opened(source: Source, choice: Choice) -> Any:
    """The image that is wanted of a file, with `frame`, its `Frame`, and `valid`, see `Source`.

    Raises:
        UserError: There is no such level, resolution, region or band.
    """
    level, factor = _level(source, choice)
    image = source.open(level)
    (height, width), full = image.shape[:2], source.sizes[0]
    box = (0.0, 0.0, float(full[1]), float(full[0]))
    bands = _bands(source, choice, image.shape[2] if len(image.shape) == 3 else 1)
    read = bands  # which are to be chosen of what is read
    if bands is not None and (chosen := getattr(image, "of_bands", lambda bands: None)(bands)) is not None:
        image, read = chosen, None
    if factor != 1.0:
        image = Resampled(image, factor)
        height, width = image.shape[:2]
    rows, columns = slice(0, height), slice(0, width)
    if choice.region is not None:
        left, top, right, bottom = _rectangle(source, choice)
        across, down = full[1] / width, full[0] / height
        columns = slice(math.floor(left / across + 1e-6), min(math.ceil(right / across - 1e-6), width))
        rows = slice(math.floor(top / down + 1e-6), min(math.ceil(bottom / down - 1e-6), height))
        sides = (columns.stop - columns.start) * across, (rows.stop - rows.start) * down
        box = (columns.start * across, rows.start * down, *sides)
    if choice.region is not None or read is not None:
        image = Part(image, rows, columns, read)
    image.frame = Frame(full, box, source.georeference, source.mpp)
    image.valid = None if source.valid is None else Part(source.valid(level), rows, columns)
    image.overview = partial(_overview, source, image, level, bands)
    return image


def _overview(
    source: Source, image: Any, level: int, bands: list[int] | None, side: int
) -> "tuple[Part, tuple[float, float, float, float], int] | None":
    """What a coarser level has of an image; None if there is none.

    Args:
        source, image: The file, and what was opened of it.
        level: That the image is of.
        bands: Of the image.
        side: Pixels of the image that are one of the result's at most.

    Returns:
        A part of the level, (h, w[, c]); left, top, width and height of the image in it, as shares; and how many of its
        pixels `side` pixels of the image are.
    """
    (height, width), (left, top, w, h) = source.sizes[0], image.frame.box
    across, down = w / image.shape[1] * side * 1.05, h / image.shape[0] * side * 1.05  # in pixels of level 0
    coarser = [
        i for i, size in enumerate(source.sizes) if i > level and width / size[1] <= across and height / size[0] <= down
    ]
    if not coarser:
        return None
    chosen = source.open(coarser[-1])
    step = int(min(across * chosen.shape[1] / width, down * chosen.shape[0] / height))
    across, down = width / chosen.shape[1], height / chosen.shape[0]
    columns = slice(math.floor(left / across), min(math.ceil((left + w) / across), chosen.shape[1]))
    rows = slice(math.floor(top / down), min(math.ceil((top + h) / down), chosen.shape[0]))
    part = Part(chosen, rows, columns, bands)
    wide, high = part.shape[1] * across, part.shape[0] * down
    place = (left - columns.start * across) / wide, (top - rows.start * down) / high, w / wide, h / high
    return part, place, step


def _level(source: Source, choice: Choice) -> tuple[int, float]:
    """The level that is read, and by how much it is shrunk."""
    count = len(source.sizes)
    if choice.level is not None and choice.level >= count:
        beside = f"{source.name}.ovr"
        hint = f" ({beside} is not of this file, or takes a GeoTIFF and rasterio)" if Path(beside).is_file() else ""
        raise UserError(f"cannot read {source.name}: it has levels 0 to {count - 1}, got {choice.level}{hint}")
    if choice.mpp is not None:
        if source.mpp is None:
            raise UserError(f"{source.name} does not say how many micrometres a pixel has: give a level, not mpp")
        wanted, finest = choice.mpp / source.mpp, f"{source.mpp:.4g} micrometres"
    elif choice.magnification is not None:
        if source.magnification is None:
            raise UserError(f"{source.name} does not say its magnification: give a level, not magnification")
        wanted, finest = source.magnification / choice.magnification, f"magnification {source.magnification:g}"
    else:
        return choice.level or 0, 1.0
    scales = [math.sqrt(source.sizes[0][0] / h * source.sizes[0][1] / w) for h, w in source.sizes]
    nearest = min(range(count), key=lambda i: abs(math.log(scales[i] / wanted)))
    if abs(scales[nearest] / wanted - 1) <= LEVELS_AT:
        return nearest, 1.0
    if wanted < 1:
        raise UserError(f"{source.name} has pixels of {finest} at its finest level, which is coarser than asked for")
    level = max(i for i in range(count) if scales[i] <= wanted)
    return level, wanted / scales[level]


def _bands(source: Source, choice: Choice, count: int) -> list[int] | None:
    """The bands that are read, from 0; None for all."""
    if choice.bands is not None:
        if not choice.bands or not all(1 <= band <= count for band in choice.bands):
            raise UserError(f"{source.name} has bands 1 to {count}, got {' '.join(map(str, choice.bands))}")
        return [band - 1 for band in choice.bands]
    if choice.channel is None:
        return None
    found = []
    for channel in map(str, choice.channel):
        if channel in source.bands:
            found.append(source.bands.index(channel))
        elif channel.isdecimal() and int(channel) < count:
            found.append(int(channel))
        else:
            names = f", called {', '.join(source.bands)}" if any(source.bands) else ""
            raise UserError(f"{source.name} has channels 0 to {count - 1}{names}, got {channel}")
    return found


def _rectangle(source: Source, choice: Choice) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the region in pixels of level 0."""
    height, width = source.sizes[0]
    x, y, w, h = choice.region
    if choice.region_in == "map":
        where = source.georeference
        if where is None:
            raise UserError(f"{source.name} has no georeference: give its region in pixels")
        a, b, _, d, e, _ = where.transform
        if b or d or a <= 0 or e >= 0:
            raise UserError(f"{source.name} is turned on the map: give its region in pixels")
        (left, top), (right, bottom) = where.pixels(x, y), where.pixels(x + w, y - h)
        whole = [round(n) if abs(n - round(n)) < 1e-3 else n for n in (left, top, right, bottom)]
        left, top, right, bottom = math.floor(whole[0]), math.floor(whole[1]), math.ceil(whole[2]), math.ceil(whole[3])
    else:
        left, top, right, bottom = x, y, x + w, y + h
    if left < 0 or top < 0 or right > width or bottom > height:
        given = " ".join(f"{number:.10g}" for number in (left, top, right - left, bottom - top))
        raise UserError(f"the region {given} is not within {source.name}, which has {width} x {height} pixels")
    return left, top, right, bottom


def window(image: Any, rows: slice, columns: slice) -> np.ndarray:
    """Pixels (n, m[, c]) of a part of an image; only that part is read, if it can do so."""
    if hasattr(image, "window"):
        return np.asarray(image.window(rows, columns))
    return np.asarray(image[rows])[:, columns]


class Part:
    """A rectangle of an image, or some of its bands."""

    def __init__(self, image: Any, rows: slice, columns: slice, bands: list[int] | None = None) -> None:
        self.image, self.rows, self.columns, self.bands = image, rows, columns, bands
        sides = rows.stop - rows.start, columns.stop - columns.start
        count = image.shape[2:] if bands is None else (len(bands),) * (len(bands) > 1)
        self.shape, self.dtype = (*sides, *count), image.dtype
        self.top, self.nodata = getattr(image, "top", None), getattr(image, "nodata", None)
        self.held_bytes = getattr(image, "held_bytes", 0)
        if chunks := getattr(image, "chunks", None):
            self.chunks = chunks
            self.chunk_shift = (getattr(image, "chunk_shift", 0) + rows.start) % chunks[0]
            self.column_shift = (getattr(image, "column_shift", 0) + columns.start) % chunks[1]

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.window(rows, slice(None))

    def window(self, rows: slice, columns: slice) -> np.ndarray:
        (top, bottom, _), (left, right, _) = rows.indices(self.shape[0]), columns.indices(self.shape[1])
        down, across = self.rows.start, self.columns.start
        found = window(self.image, slice(top + down, bottom + down), slice(left + across, right + across))
        if self.bands is None:
            return found
        found = found if found.ndim == 3 else found[:, :, None]
        return found[:, :, self.bands].reshape(*found.shape[:2], *self.shape[2:])


class Resampled:
    """An image that is shrunk by any factor, with the antialiased triangle of Pillow."""

    ROWS = 256  # that are made together

    def __init__(self, image: Any, factor: float) -> None:
        self.image, self.factor = image, factor
        height, width = (max(1, math.floor(n / factor + 1e-6)) for n in image.shape[:2])
        self.shape, self.dtype = (height, width, *image.shape[2:]), image.dtype
        self.top, self.nodata = getattr(image, "top", None), getattr(image, "nodata", None)
        self.chunks = (self.ROWS, self.ROWS)
        bands = image.shape[2] if len(image.shape) == 3 else 1
        source = math.ceil((self.ROWS + 4) * factor) * image.shape[1] * bands * np.dtype(image.dtype).itemsize
        self.held_bytes = getattr(image, "held_bytes", 0) + 3 * source
        if self.nodata is not None:
            raise UserError("pixels of no data cannot be resampled: give a level")

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.window(rows, slice(None))

    def window(self, rows: slice, columns: slice) -> np.ndarray:
        spans, boxes = [], []
        for part, length, full in zip((rows, columns), self.shape, self.image.shape, strict=False):
            start, stop, _ = part.indices(length)
            around = 2 * self.factor
            low, high = max(math.floor(start * self.factor - around), 0), math.ceil(stop * self.factor + around)
            spans.append(slice(low, min(high, full)))
            boxes.append((start * self.factor - low, min(stop * self.factor, full) - low, stop - start))
        array = window(self.image, *spans)
        (top, bottom, height), (left, right, width) = boxes
        how = {"size": (width, height), "resample": Image.Resampling.BILINEAR, "box": (left, top, right, bottom)}
        if array.dtype == np.uint8 and (array.ndim == 2 or array.shape[2] == 3):
            return np.asarray(Image.fromarray(array).resize(**how))
        bands = array[:, :, None] if array.ndim == 2 else array
        found = [Image.fromarray(bands[:, :, i].astype(np.float32)).resize(**how) for i in range(bands.shape[2])]
        out = np.stack([np.asarray(band) for band in found], axis=2)
        if array.dtype.kind in "iu":
            limits = np.iinfo(array.dtype)
            out = np.clip(np.round(out.astype(np.float64)), limits.min, limits.max)
        return out.astype(array.dtype).reshape(height, width, *array.shape[2:])
