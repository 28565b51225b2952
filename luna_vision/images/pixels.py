"""Rows of an image that is never held as a whole, converted and normalised as the model wants them.

Shapes: H, W pixels, c channels, p side of a patch.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from ..utils.checks import check_option
from ..utils.device import to_device
from ..utils.errors import UserError, one_line
from .masks import valid_patches
from .transforms import per_channel
from .values import MASK, Levels, Values, check_bands, to_unit, type_range

__all__ = ["ON_ERROR", "Pixels", "chunk_side", "chunk_spans", "pixel_statistics"]

ON_ERROR = ("raise", "fill", "skip")


def pixel_statistics(
    model: nn.Module, mean: Sequence[float] | float | None = None, std: Sequence[float] | float | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by channel, of pixels in [0, 1]: what is given, else the model's `pretrained_cfg`.

    Raises:
        ValueError: Not one number for each channel or for all.
    """
    config = resolve_data_config(pretrained_cfg=getattr(model, "pretrained_cfg", {}))
    out = []
    for name, given in (("mean", mean), ("std", std)):
        out.append(per_channel(name, config[name] if given is None else given, model.in_chans))
    return out[0], out[1]


class Pixels:
    """An image as `rows(start, stop)` of normalised pixels."""

    def __init__(
        self,
        image: Any,
        in_chans: int,
        mean: Sequence[float],
        std: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        values: Values | None = None,
        on_error: str = "raise",
    ) -> None:
        """
        Args:
            image: Anything with a `shape`, (H, W) or (H, W, c), and rows by `image[start:stop]`: integers or floating
                point. Grey and colour are converted to each other. What is stored in chunks of many rows
                (`image.chunks`, as zarr's or dask's) is read chunk by chunk; `image.chunk_shift` rows are missing of
                the first row of chunks. `image.top` and `image.nodata`, if there
                are any, are those of `luna_vision.images.values.Raster`.
            in_chans: Channels that the model wants.
            mean, std: As `pixel_statistics` gives them.
            dtype, device: Of the result.
            values: What the numbers mean; by default as `Values` has it.
            on_error: What becomes of tiles (or strips) that cannot be read, of an image that has any: "raise"; "fill",
                they have what missing numbers have; or "skip", they are missing, see `valid`. `broken` has them.

        Raises:
            ValueError: Another shape, type or number of channels, or no pixels.
        """
        shape, self.name = tuple(getattr(image, "shape", ())), str(getattr(image, "file", "the image"))
        if len(shape) not in (2, 3) or min(shape) < 1:
            raise ValueError(f"{self.name} must have shape (height, width) or (height, width, channels), got {shape}")
        channels = shape[2] if len(shape) == 3 else 1
        if shape[0] in (1, 3, 4) and len(shape) == 3 and channels not in (1, 3, in_chans):
            raise ValueError(f"channels come last: {self.name} of shape {shape} has {channels} of them")
        check_bands(channels, in_chans, self.name)
        self.dtype = _dtype(image).newbyteorder("=")
        if self.dtype.kind not in "buif":
            raise ValueError(f"{self.name} has numbers of type {self.dtype}: integers and floating point are read")
        self.values = values or Values(mean=tuple(mean))
        self.top, self.nodata = getattr(image, "top", None), getattr(image, "nodata", None)
        # whether its numbers go through floating point, and not through Pillow's 8 bits
        self.deep = self.dtype != np.uint8 or not self.values.keeps_8_bits or self.nodata is not None
        if self.values.value_range is None:
            try:
                type_range(self.dtype, self.top)  # which refuses what no range is known of
            except UserError as error:
                raise UserError(f"{self.name}: {error}") from error
        self.levels = Levels(self.name, default=self.values.value_range is None)
        self.image, self.shape, self.channels, self.in_chans = image, shape, channels, in_chans
        self.step = chunk_side(image, 0, 0)
        self.shift = getattr(image, "chunk_shift", 0)
        check_option("on_error", on_error, ON_ERROR)
        self.on_error = on_error
        # top, bottom, left and right of each tile; a new set for each, as a thread may read ahead
        self.broken: frozenset[tuple[int, int, int, int]] = frozenset()
        self.any_read = False
        self.last = shape[0]  # where the last row ends that is read
        self.wanted: np.ndarray | None = None
        self.patch_size = (1, 1)
        self.slab: tuple[int, np.ndarray] | None = None
        self.out = {"dtype": dtype, "device": device}
        self.mean = torch.tensor(mean, **self.out).view(-1, 1, 1)
        self.std = torch.tensor(std, **self.out).view(-1, 1, 1)

    @property
    def held_bytes(self) -> int:
        """What is held all the time: the chunks of one row of chunks, and what the image itself holds decoded."""
        row = self.shape[1] * self.channels * self.dtype.itemsize
        return min(self.step, self.shape[0]) * row + getattr(self.image, "held_bytes", 0)

    def band_bytes(self, rows: int, columns: int) -> int:
        """What `rows` needs at most for so many rows, padded to so many columns."""
        raw, unit = self.channels * self.dtype.itemsize, self.in_chans * self.out["dtype"].itemsize
        if self.deep:
            # in the widest type that they go through, with a mask of what is missing
            raw += self.channels * (4 if self.dtype.itemsize <= 2 or self.dtype == np.float32 else 8)
        return rows * columns * (2 * raw + 3 * unit)

    def ahead_bytes(self, rows: int) -> int:
        """What the thread of `ahead` holds at most besides, for so many rows: what it reads, and a copy."""
        return 2 * rows * self.shape[1] * self.channels * self.dtype.itemsize

    def raw(self, start: int, stop: int) -> np.ndarray:
        """Pixels (stop - start, W[, c]) as the image has them, but in the byte order of this machine.

        Raises:
            OSError: They cannot be read.
        """
        if not self.step:
            rows = self._slice(start, stop)
            return rows.astype(rows.dtype.newbyteorder("="), copy=False)
        out, done = None, 0
        for first, end in chunk_spans(start, stop, self.step, self.shift, self.shape[0]):
            if self.slab is None or self.slab[0] != first:
                self.slab = None  # before the next one is read: there is to be one at a time
                self.slab = first, self._slice(first, end)
            part = self.slab[1][max(start - first, 0) : stop - first]
            if out is None:
                out = np.empty((stop - start, *part.shape[1:]), part.dtype.newbyteorder("="))
            out[done : done + len(part)] = part  # a copy: a view would keep its slab while the next one is read
            done += len(part)
            del part
        return out

    def ahead(self, spans: Iterable[tuple[int, int]]) -> Iterator[tuple[np.ndarray, frozenset]]:
        """`raw` of these rows, span by span, and the `broken` tiles until then. A thread reads the next span meanwhile.

        Close it, or take all of it: closing waits until the thread reads no more.

        Raises:
            OSError: In place of the rows that cannot be read; nothing beyond them is read then.
        """

        def read(span: tuple[int, int]) -> tuple[np.ndarray, frozenset]:
            return self.raw(*span), self.broken

        with ThreadPoolExecutor(1) as thread:
            coming = None
            for span in spans:
                found = None if coming is None else coming.result()
                coming = thread.submit(read, span)
                if found is not None:
                    yield found
            if coming is not None:
                yield coming.result()

    def restrict(self, wanted: np.ndarray, patch_size: tuple[int, int]) -> None:
        """Read only these patches from now on, (H', W') bool. Pixels of others are some number or other.

        An image with a method `window` (rows and columns, as slices) is read there alone, any other by rows.
        """
        self.wanted, self.patch_size, self.slab = wanted, patch_size, None
        self.last = min((int(np.flatnonzero(wanted.any(axis=1)).max(initial=-1)) + 1) * patch_size[0], self.shape[0])

    @property
    def first(self) -> int:
        """The first row of pixels that is read."""
        return 0 if self.wanted is None else int(self.wanted.any(axis=1).argmax()) * self.patch_size[0]

    def _wanted(self, start: int, stop: int) -> np.ndarray:
        """(n', W') bool, the mask of the rows of patches in which the pixel rows [start, stop) are."""
        side = self.patch_size[0]
        return self.wanted[start // side : -(-stop // side)]

    def _slice(self, start: int, stop: int) -> np.ndarray:
        """Pixels (stop - start, W[, c]) as the image gives them.

        Raises:
            OSError: It does not.
        """
        if self.wanted is None:
            return self._read(start, stop, None)
        occupied, across = self._wanted(start, stop).any(axis=0), self.patch_size[1]
        if not hasattr(self.image, "window") and occupied.any():
            return self._read(start, stop, None)
        out = np.zeros((stop - start, *self.shape[1:]), self.dtype)
        edges = np.flatnonzero(np.diff(occupied.astype(np.int8), prepend=0, append=0)).reshape(-1, 2) * across
        chunk, shift = chunk_side(self.image, 1, 1), getattr(self.image, "column_shift", 0)
        parts: list[list[int]] = []
        for left, right in edges.tolist():
            right = min(right, self.shape[1])
            if (
                parts and (left + shift) // chunk <= (parts[-1][1] - 1 + shift) // chunk
            ):  # they share a chunk, which is decoded once
                parts[-1][1] = right
            else:
                parts.append([left, right])
        for left, right in parts:
            out[:, left:right] = self._read(start, stop, slice(left, right))
        return out

    def _read(self, start: int, stop: int, columns: slice | None) -> np.ndarray:
        """Pixels of these rows and columns, what cannot be read of them as `on_error` has it."""
        try:
            rows = self._ask(start, stop, columns)
        except OSError:
            if self.on_error == "raise" or not self.step:
                raise
            return self._read_tiles(start, stop, columns)
        self.any_read = True
        return rows

    def _read_tiles(self, start: int, stop: int, columns: slice | None) -> np.ndarray:
        """Pixels tile by tile; those of broken tiles are a number that is not missing."""
        windows = hasattr(self.image, "window")
        left, right = (0, self.shape[1]) if columns is None else (columns.start, columns.stop)
        across = chunk_side(self.image, 1, 1) if windows else self.shape[1]
        shift = getattr(self.image, "column_shift", 0) if windows else 0
        out = np.full((stop - start, right - left, *self.shape[2:]), self._number(), self.dtype)
        for top, bottom in chunk_spans(start, stop, self.step, self.shift, self.shape[0]):
            for first, last in chunk_spans(left, right, across, shift, self.shape[1]):
                tile = top, bottom, first, last
                a, b, c, d = max(top, start), min(bottom, stop), max(first, left), min(last, right)
                try:
                    if tile not in self.broken:
                        part = self._ask(a, b, slice(c, d) if windows else None)
                        out[a - start : b - start, c - left : d - left] = part
                        self.any_read = True
                except OSError:
                    self.broken |= {tile}
        return out

    def check_broken(self) -> None:
        """Raise an OSError if nothing at all could be read."""
        if self.broken and not self.any_read:
            raise OSError(f"cannot read {self.name}: all of its {len(self.broken)} tiles are broken")

    def _ask(self, start: int, stop: int, columns: slice | None) -> np.ndarray:
        try:
            found = self.image[start:stop] if columns is None else self.image.window(slice(start, stop), columns)
            rows = np.asarray(found)
        except (MemoryError, KeyboardInterrupt):
            raise
        except Exception as error:  # decoders raise nearly anything
            raise OSError(
                f"cannot read the pixel rows {start} to {stop - 1} of {self.name}: {one_line(error)}"
            ) from error
        width = self.shape[1] if columns is None else columns.stop - columns.start
        if rows.shape != (stop - start, width, *self.shape[2:]):
            raise OSError(f"the pixel rows {start} to {stop - 1} of {self.name} have shape {rows.shape}")
        return rows

    def rows(self, start: int, stop: int) -> Tensor:
        """Normalised pixels (1, in_chans, stop - start, W), those of `eval_transform` at the image's own size.

        They are NaN where they are missing, if `values` leave them missing.

        Raises:
            UserError: Numbers are missing that `values` refuse to fill.
            OSError: They cannot be read.
        """
        return self.normalised(self.raw(start, stop), start)

    def normalised(self, array: np.ndarray, start: int, left: int = 0) -> Tensor:
        """Pixels (n, m[, c]) from `raw`, of the rows from `start` and the columns from `left` on: (1, in_chans, n, m).

        Raises:
            UserError: As `rows`.
        """
        stop = start + len(array)
        if self.deep:
            array = array if array.ndim == 3 else array[:, :, None]
            array = self._to_unit(self._blanked(array, start, left), stop)
        else:
            array = convert(array, self.in_chans)
        array = np.require(array, requirements=["C", "W"])  # a copy of what is read-only, which PyTorch does not like
        x = to_device(torch.from_numpy(array), torch.device(self.out["device"])).permute(2, 0, 1)
        x = x.to(self.out["dtype"], memory_format=torch.contiguous_format, copy=True)
        if not self.deep:
            x.div_(255)
        return self._without_broken(x.sub_(self.mean).div_(self.std)[None], start, left)

    def _without_broken(self, x: Tensor, start: int, left: int) -> Tensor:
        """Normalised pixels (1, in_chans, n, m), those of broken tiles as `on_error` has it."""
        height, width = x.shape[2:]
        for top, bottom, first, last in self.broken:
            rows = slice(max(top - start, 0), min(bottom - start, height))
            columns = slice(max(first - left, 0), min(last - left, width))
            if rows.start < rows.stop and columns.start < columns.stop:
                x[:, :, rows, columns] = self._missing()
        return x

    def _missing(self) -> Tensor:
        """What a broken tile has, normalised (in_chans, 1, 1)."""
        fill = self.values.fill
        if self.on_error == "skip" or fill == MASK:
            return torch.full_like(self.mean, torch.nan)
        if isinstance(fill, str):
            return torch.zeros_like(self.mean)  # the mean
        low, high = self.values.value_range or type_range(self.dtype, self.top)
        return (min(max((fill - low) / (high - low), 0.0), 1.0) - self.mean) / self.std

    def _blanked(self, array: np.ndarray, start: int, left: int) -> np.ndarray:
        """Pixels (n, m, c) in which those of patches that are not wanted are a number that is not missing."""
        if self.wanted is None:
            return array
        side, across = self.patch_size
        rows, columns = (np.arange(first, first + n) for first, n in zip((start, left), array.shape, strict=False))
        unwanted = ~self.wanted[np.ix_(rows // side, columns // across)]
        return np.where(unwanted[:, :, None], array.dtype.type(self._number()), array)

    def _number(self) -> int:
        """A number that is not missing."""
        return next(n for n in (0, 1, 2) if n not in (self.nodata, self.values.nodata))

    def valid(self, patch_size: tuple[int, int], rows: int) -> np.ndarray | None:
        """The patches (H', W') that have a pixel which is not missing; None if none is left missing.

        It reads the whole image, or what it is restricted to, so many rows of patches at a time.

        Raises:
            UserError: There are no others.
            OSError: They cannot be read.
        """
        if self.values.fill != MASK and self.on_error != "skip":
            return self.wanted
        side, height = patch_size[0], self.shape[0]
        spans = [(start, min(start + rows * side, height)) for start in range(0, height, rows * side)]
        found = []
        with closing(self.ahead(spans)) as ahead:
            for (start, _), (raw, _) in zip(spans, ahead, strict=True):
                found.append(valid_patches(self.normalised(raw, start), patch_size)[0])
        valid = torch.cat(found).cpu().numpy()
        if self.wanted is not None:
            valid &= self.wanted
        if not valid.any():
            raise UserError(f"{self.name} has no pixel that is not missing")
        return valid

    def _to_unit(self, array: np.ndarray, stop: int) -> np.ndarray:
        dtype = np.float64 if self.out["dtype"] == torch.float64 else np.float32
        unit = to_unit(array, self.in_chans, self.values, self.top, self.nodata, self.levels, dtype)
        if stop >= self.last:
            self.levels.warn()
        return unit


def chunk_side(image: Any, axis: int, default: int) -> int:
    """How many rows (axis 0) or columns (axis 1) are stored together; dask lists those of every chunk."""
    chunks = getattr(image, "chunks", None) or ()
    if len(chunks) <= axis:
        return default
    return max(map(int, chunks[axis])) if isinstance(chunks[axis], Sequence) else int(chunks[axis])


def chunk_spans(start: int, stop: int, step: int, shift: int, end: int) -> Iterator[tuple[int, int]]:
    """The chunks [first, last) along an axis of length `end` that [start, stop) is in; the first lacks `shift`."""
    for first in range((start + shift) // step * step - shift, stop, step):
        yield max(first, 0), min(first + step, end)


def _dtype(image: Any) -> np.dtype:
    try:
        return np.dtype(image.dtype)
    except (AttributeError, TypeError):  # OpenSlide-like readers do not say
        return np.asarray(image[0:1]).dtype


def convert(rows: np.ndarray, in_chans: int) -> np.ndarray:
    """Pixels of 8 bits (n, W) or (n, W, c) to (n, W, in_chans).

    NOTE: what `luna_vision.images.decode.to_channels` does, which is Pillow's conversion, on arrays of any size.
    """
    if rows.ndim == 2:
        rows = rows[:, :, None]
    if rows.shape[2] == in_chans:
        return rows
    if in_chans == 3:
        return np.broadcast_to(rows, (*rows.shape[:2], 3))
    weights = np.array((19595, 38470, 7471), np.uint32)  # ITU-R 601-2, in 16 bits
    return ((rows.astype(np.uint32) @ weights + 0x8000) >> 16).astype(np.uint8)[:, :, None]
