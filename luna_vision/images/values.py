"""What the numbers of an image mean: the one policy, by which every command makes the same pixels of the same file.

Photographs of 8 bits stay in 8 bits until `luna_vision.images.transforms.to_tensor` divides them by 255. Everything
else (more bits, signed, floating point, other numbers of bands, a number that stands for no data, a range that was
asked for) is a `Raster`, which `to_unit` takes to floating point without a detour: LOW becomes 0, HIGH becomes 1, and
what lies outside is clipped. The mean and standard deviation of a model are of these numbers.

Shapes: H, W pixels, n rows, c bands of a file, C channels of a model.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..utils.errors import UserError
from ..utils.text import printable

__all__ = [
    "DATA",
    "DTYPE",
    "MASK",
    "PERCENTILE",
    "Levels",
    "Raster",
    "Values",
    "channel_statistics",
    "check_bands",
    "model_values",
    "parse_fill",
    "parse_value_range",
    "percentile_range",
    "to_unit",
    "type_range",
]

DTYPE, PERCENTILE = "dtype", "percentile"  # the two value ranges that have a name
DATA = "data"  # the mean that is measured
MASK = "mask"  # the fill that leaves missing pixels missing
PERCENTILES = (2, 98)
SAMPLE_IMAGES, SAMPLE_VALUES = 256, 2**14  # that percentiles are of: images, and numbers of each
LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # ITU-R 601-2, in the 16 bits that Pillow takes
FEW_LEVELS = 1 / 8  # of the range: an image that lies within less of it is told
NAMED_FILES = 5  # that one process names for each kind of warning

logger = logging.getLogger(__name__)
warned: defaultdict[str, set[str]] = defaultdict(set)  # what this process has said, by kind


@dataclass
class Raster:
    """A decoded image with the numbers of its file, upright.

    Attributes:
        array: (H, W, c), or (H, W) for one band: integers or floating point. Alpha is no band of it.
        top: The largest number that the file can hold, if that is less than its type's: 4095 of 12 bits in 16.
        nodata: The number that stands for no data, if the file has one.
        name: What errors and warnings call it.

    Raises:
        UserError: It has numbers of another type.
    """

    array: np.ndarray
    top: float | None = None
    nodata: float | None = None
    name: str = "the image"

    def __post_init__(self) -> None:
        if self.array.dtype.kind not in "buif":
            raise UserError(f"{self.name} has numbers of type {self.array.dtype}: integers and floating point are read")
        if self.array.ndim == 2:
            self.array = self.array[:, :, None]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, as Pillow has them."""
        return self.array.shape[1], self.array.shape[0]


@dataclass(frozen=True)
class Values:
    """The policy for the numbers of all images of a data set.

    Attributes:
        value_range: (LOW, HIGH), which become 0 and 1. None is "dtype": what the type of a file can hold (0 to 65,535
            of 16 bits, 0 to 4,095 of a file that declares 12, the least to the largest of signed integers), and [0, 1]
            of floating point.
        nodata: A number that stands for no data, besides the one that a file itself names.
        fill: What takes the place of missing numbers, which are no data, NaN and infinity: "mean", by channel, which is
            0 once normalised; a number in the unit of the file; "error", which refuses the image; or "mask", which
            leaves pixels missing that have no other numbers, see `luna_vision.images.masks`, and else is "mean".
        mean: Of pixels in [0, 1], by channel.
    """

    value_range: tuple[float, float] | None = None
    nodata: float | None = None
    fill: float | str = "mean"
    mean: tuple[float, ...] = (0.5,)

    @property
    def keeps_8_bits(self) -> bool:
        """Whether an image of 8 bits, in which nothing is missing, stays as it is."""
        return self.value_range is None and self.nodata is None

    def described(self) -> dict[str, Any]:
        """What a checkpoint keeps, in plain data: see `luna_vision.models.factory.PIXEL_CFG`."""
        value_range = DTYPE if self.value_range is None else list(self.value_range)
        return {"value_range": value_range, "nodata": self.nodata, "fill": self.fill}


def parse_value_range(option: str | Sequence[float | str] | None) -> tuple[float, float] | str | None:
    """A value range, as options and checkpoints have it: "dtype", "percentile", two numbers, or None if not given.

    Raises:
        UserError: It is none of these, or LOW is not below HIGH.
    """
    if option is None or isinstance(option, str) and option in (DTYPE, PERCENTILE):
        return option
    try:
        words = option.strip("[]()").replace(",", " ").split() if isinstance(option, str) else list(option)
        if words in ([DTYPE], [PERCENTILE]):
            return words[0]
        low, high = (float(word) for word in words)
        if low < high and math.isfinite(low) and math.isfinite(high):
            return low, high
    except (TypeError, ValueError):
        pass
    raise UserError(
        f"value_range must be two finite numbers, the lower one first, {DTYPE!r} or {PERCENTILE!r}, got {option!r}"
    )


def parse_fill(option: float | str | None) -> float | str | None:
    """A fill, as options and checkpoints have it: "mean", "error", "mask", a number, or None if not given.

    Raises:
        UserError: It is none of these.
    """
    if option is None or option in ("mean", "error", MASK):
        return option
    try:
        if math.isfinite(number := float(option)):
            return number
    except (TypeError, ValueError):
        pass
    raise UserError(f"fill must be 'mean', 'error', 'mask' or a finite number in the unit of the files, got {option!r}")


def model_values(
    cfg: Mapping[str, Any],
    mean: Sequence[float],
    value_range: str | Sequence[float] | None = None,
    nodata: float | None = None,
    fill: float | str | None = None,
) -> Values:
    """The policy that options say, else the data that a model was trained on, else the default.

    Args:
        cfg: The model's `pretrained_cfg`.
        mean: Of pixels in [0, 1], by channel.
        value_range, nodata, fill: Options; None where not given.

    Raises:
        UserError: An option out of range, or "percentile", which takes a data set (`percentile_range`) and no single
            image.
    """
    chosen = parse_value_range(cfg.get("value_range") if value_range is None else value_range)
    if chosen == PERCENTILE:
        raise UserError(
            f"value_range {PERCENTILE!r} is of a data set, and not of a single image: give LOW and HIGH, or a "
            "checkpoint that was trained with it"
        )
    fill = parse_fill(cfg.get("fill") if fill is None else fill)
    nodata = cfg.get("nodata") if nodata is None else nodata
    return Values(
        None if chosen in (None, DTYPE) else chosen,
        None if nodata is None else float(nodata),
        "mean" if fill is None else fill,
        tuple(mean),
    )


def type_range(dtype: np.dtype, top: float | None = None) -> tuple[float, float]:
    """The value range that "dtype" stands for.

    Args:
        dtype: Of the numbers.
        top: As in `Raster`.

    Raises:
        UserError: Integers of 64 bits, which no camera has, or no numbers at all.
    """
    if top is not None:
        return 0.0, float(top)
    if dtype.kind in "bf":
        return 0.0, 1.0
    if dtype.kind not in "iu" or dtype.itemsize > 4:
        raise UserError(f"pixels of type {dtype} take a value_range: give LOW and HIGH")
    info = np.iinfo(dtype)
    return float(info.min), float(info.max)


def check_bands(bands: int, in_chans: int, name: str = "the image") -> None:
    """See that a model takes an image of so many bands, alpha not counted: grey and colour are converted to each other,
    anything else must fit.

    Raises:
        UserError: It does not.
    """
    if bands != in_chans and not {bands, in_chans} <= {1, 3}:
        allowed = "1 or 3" if in_chans in (1, 3) else str(in_chans)
        alpha = ": nothing says that one of them is alpha, so none is left out" if bands > in_chans else ""
        raise UserError(f"{printable(name)} has {bands} bands, and the model takes {allowed}{alpha}")


def missing(array: np.ndarray, nodata: float | None) -> np.ndarray | None:
    """Which numbers (n, W, c) are `nodata`; None if there is no such number.

    A pixel of three bands, a colour, is missing where all of them are: black is a part of many colours.
    """
    if nodata is None or math.isnan(nodata):  # NaN is missing anyhow
        return None
    nodata = float(nodata)
    if array.dtype.kind == "f":
        value = array.dtype.type(nodata)
        # the largest numbers come from text, which is rounded
        found = np.isclose(array, value, rtol=1e-5, atol=0) if abs(nodata) > 1e30 else array == value
    elif not nodata.is_integer():
        return None
    else:
        found = array == int(nodata)  # False of all where the type cannot hold it
    return np.broadcast_to(found.all(axis=2, keepdims=True), found.shape) if array.shape[2] == 3 else found


def to_unit(
    array: np.ndarray,
    in_chans: int,
    values: Values,
    top: float | None = None,
    nodata: float | None = None,
    levels: "Levels | None" = None,
    dtype: type = np.float32,
) -> np.ndarray:
    """Numbers of a file (n, W, c) as pixels in [0, 1], floating point (n, W, in_chans).

    Nothing is missing in them, unless `values.fill` is "mask": then pixels are NaN of which all numbers are missing.

    Args:
        array: As in `Raster`.
        in_chans: C.
        values: The policy.
        top, nodata: As in `Raster`.
        levels: Is told what there was.
        dtype: Of the result.

    Raises:
        UserError: Bands that the model does not take, or numbers are missing and `values.fill` is "error".
    """
    check_bands(array.shape[2], in_chans, levels.name if levels else "the image")
    low, high = values.value_range or type_range(array.dtype, top)
    # float32 holds all numbers of 16 bits
    narrow = array.dtype.itemsize <= 2 or array.dtype == np.float32
    work = array.astype(np.float32 if narrow and dtype == np.float32 else np.float64)
    gone = np.zeros(work.shape, bool)
    for number in {nodata, values.nodata} - {None}:
        if (found := missing(array, number)) is not None:
            gone |= found
    strange = 0
    if array.dtype.kind == "f":
        wrong = ~np.isfinite(work) & ~gone
        strange = 0 if nodata is not None and math.isnan(nodata) else int(np.count_nonzero(wrong))
        gone |= wrong
    any_gone = bool(gone.any())
    if levels is not None:
        levels.add(work if not any_gone else work[~gone], low, high, strange, gone.size)
    if any_gone and values.fill == "error":
        raise UserError(
            f"{printable(levels.name) if levels else 'the image'} has {np.count_nonzero(gone)} numbers that are "
            "missing (no data, NaN or infinite), which fill='error' refuses"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        work -= low
        work /= high - low
    np.clip(work, 0, 1, out=work)
    if any_gone:
        work[gone] = np.nan
    bands = work.shape[2]
    if bands == 3 and in_chans == 1:
        red, green, blue = (work[:, :, i : i + 1] * work.dtype.type(LUMA[i]) for i in range(3))
        work = red + green + blue  # number by number: a product of matrices rounds by its shape
    elif bands == 1 and in_chans == 3:
        work = np.repeat(work, 3, axis=2)
    if any_gone:
        fill = values.mean
        if not isinstance(values.fill, str):
            fill = (min(max((values.fill - low) / (high - low), 0.0), 1.0),)
        gone = np.isnan(work)
        if values.fill == MASK:
            gone &= ~gone.all(axis=2, keepdims=True)
        np.copyto(work, np.asarray(fill, work.dtype), where=gone)
    return work.astype(dtype, copy=False)


@dataclass
class Levels:
    """What a default makes of the numbers of one image, and the warning if that is little.

    Attributes:
        name: The file.
        default: Whether the value range is the default; one that was given is not doubted.
    """

    name: str
    default: bool
    least: float = field(default=math.inf, init=False)
    most: float = field(default=-math.inf, init=False)
    count: int = field(default=0, init=False)
    clipped: int = field(default=0, init=False)
    strange: int = field(default=0, init=False)
    total: int = field(default=0, init=False)

    def add(self, numbers: np.ndarray, low: float, high: float, strange: int, total: int) -> None:
        """Take in numbers that are not missing, the range that they are taken in, how many others were NaN or infinite,
        and how many numbers there are together."""
        self.low, self.high = low, high
        self.strange, self.total = self.strange + strange, self.total + total
        if self.default and numbers.size:
            least, most = float(numbers.min()), float(numbers.max())
            self.least, self.most = min(self.least, least), max(self.most, most)
            if least < low or most > high:
                self.clipped += int(np.count_nonzero((numbers < low) | (numbers > high)))
            self.count += numbers.size

    def warn(self) -> None:
        """Say in the log that the default throws most levels away, or that numbers were none."""
        if self.strange:
            share = self.strange / self.total
            _warn("strange", f"{self.name}: {share:.2%} of its numbers are NaN or infinite, thus missing (see fill)")
        if not self.count or self.least == self.most:
            return
        used = (min(self.most, self.high) - max(self.least, self.low)) / (self.high - self.low)
        if self.clipped > self.count / 2 or used < FEW_LEVELS:
            what = f"has values from {self.least:g} to {self.most:g}"
            part = f"{self.clipped / self.count:.0%} of them are outside" if self.clipped else f"they are {used:.1%} of"
            _warn(
                "levels",
                f"{self.name} {what}: {part} the default range from {self.low:g} to {self.high:g}; give the "
                "value_range of the data set",
            )


def _warn(kind: str, text: str) -> None:
    """Log a warning about a file once, and of each kind for a few files only."""
    if text in warned[kind] or len(warned[kind]) == NAMED_FILES:
        return
    warned[kind].add(text)
    more = "; further files are not named" if len(warned[kind]) == NAMED_FILES else ""
    logger.warning(printable(text + more))


def _thinned(array: np.ndarray) -> np.ndarray:
    """Evenly spread pixels of (H, W, c), about `SAMPLE_VALUES` numbers."""
    step = max(1, math.isqrt(array.size // SAMPLE_VALUES))
    rows, columns = (slice(min(step, n) // 2, None, step) for n in array.shape[:2])  # there is one of a thin image, too
    return array[rows, columns]


def percentile_range(
    rasters: Iterable[Raster], nodata: float | None = None, percentiles: tuple[float, float] = PERCENTILES
) -> tuple[float, float]:
    """The value range that "percentile" stands for: the 2nd and 98th percentile of the numbers of a data set.

    All images count alike, and all bands are taken together, so that colours keep their balance.

    Args:
        rasters: Images of the data set; a few hundred of them do (`SAMPLE_IMAGES`).
        nodata: A number that stands for no data, besides those of the files.
        percentiles: Others than those.

    Raises:
        UserError: There are no numbers, or all are the same.
    """
    found = []
    for raster in rasters:
        array = _thinned(raster.array)
        good = np.isfinite(array)
        for number in {raster.nodata, nodata} - {None}:
            if (gone := missing(array, number)) is not None:
                good &= ~gone
        chosen = np.sort(array[good].astype(np.float64))
        if len(chosen):
            found.append(chosen[np.linspace(0, len(chosen) - 1, 1024).round().astype(int)])
    if not found:
        raise UserError(f"value_range {PERCENTILE!r}: there are no images, or no numbers in them")
    low, high = (float(value) for value in np.percentile(np.concatenate(found), percentiles))
    if not low < high:
        raise UserError(f"value_range {PERCENTILE!r}: nearly all numbers are {low:g}; give LOW and HIGH")
    return low, high


def channel_statistics(
    rasters: Iterable[Raster], in_chans: int, values: Values
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of a data set, by channel, of pixels in [0, 1]; what is missing does not count.

    All images count alike. A channel that is constant has the standard deviation 1.

    Args:
        rasters: Images of the data set.
        in_chans: Channels that a model reads.
        values: What their numbers mean.

    Raises:
        UserError: A channel has no numbers, or bands that the model does not take.
    """
    leave = replace(values, fill=MASK, mean=(math.nan,) * in_chans)
    sums, counts = np.zeros((2, in_chans)), np.zeros(in_chans)
    for raster in rasters:
        array = _thinned(raster.array)
        unit = to_unit(array, in_chans, leave, raster.top, raster.nodata, dtype=np.float64).reshape(-1, in_chans)
        there = ~np.isnan(unit).all(axis=0)
        if there.any():
            sums[:, there] += np.nanmean(unit[:, there], axis=0), np.nanmean(unit[:, there] ** 2, axis=0)
        counts += there
    if not counts.all():
        raise UserError(f"mean {DATA!r}: there are no images, or no numbers in channel {int(np.argmin(counts))}")
    mean, square = sums / counts
    variance = square - mean**2
    std = np.where(variance > 1e-12, np.sqrt(np.maximum(variance, 1e-12)), 1.0)
    return tuple(mean.tolist()), tuple(std.tolist())
