"""Rows of an image that is never held as a whole, converted and normalised as the model wants them.

Shapes: H, W pixels, c channels, p side of a patch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from ..utils.device import to_device
from ..utils.errors import UserError, one_line
from .masks import valid_patches
from .transforms import per_channel
from .values import MASK, Levels, Values, check_bands, to_unit, type_range

__all__ = ["Pixels", "pixel_statistics"]


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
        values = config[name] if given is None else (given,) if isinstance(given, int | float) else tuple(given)
        out.append(per_channel(name, values, model.in_chans))
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
    ) -> None:
        """
        Args:
            image: Anything with a `shape`, (H, W) or (H, W, c), and rows by `image[start:stop]`: integers or floating
                point. Grey and colour are converted to each other. What is stored in chunks of many rows
                (`image.chunks`, as zarr's or dask's) is read chunk by chunk. `image.top` and `image.nodata`, if there
                are any, are those of `luna_vision.images.values.Raster`.
            in_chans: Channels that the model wants.
            mean, std: As `pixel_statistics` gives them.
            dtype, device: Of the result.
            values: What the numbers mean; by default as `Values` has it.

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
        if self.values.value_range is None:
            try:
                type_range(self.dtype, self.top)  # which refuses what no range is known of
            except UserError as error:
                raise UserError(f"{self.name}: {error}") from error
        self.levels = Levels(self.name, default=self.values.value_range is None)
        self.image, self.shape, self.channels, self.in_chans = image, shape, channels, in_chans
        self.step = _rows_of_chunks(image)
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
        if self.dtype != np.uint8 or not self.values.keeps_8_bits or self.nodata is not None:
            # in the widest type that they go through, with a mask of what is missing
            raw += self.channels * (4 if self.dtype.itemsize <= 2 or self.dtype == np.float32 else 8)
        return rows * columns * (2 * raw + 3 * unit)

    def raw(self, start: int, stop: int) -> np.ndarray:
        """Pixels (stop - start, W[, c]) as the image has them, but in the byte order of this machine.

        Raises:
            OSError: They cannot be read.
        """
        if not self.step:
            rows = self._slice(start, stop)
            return rows.astype(rows.dtype.newbyteorder("="), copy=False)
        out, done = None, 0
        for first in range(start // self.step * self.step, stop, self.step):
            if self.slab is None or self.slab[0] != first:
                self.slab = None  # before the next one is read: there is to be one at a time
                self.slab = first, self._slice(first, min(first + self.step, self.shape[0]))
            part = self.slab[1][max(start - first, 0) : stop - first]
            if len(part) == stop - start:
                return part.astype(part.dtype.newbyteorder("="), copy=False)
            if out is None:
                out = np.empty((stop - start, *part.shape[1:]), part.dtype.newbyteorder("="))
            out[done : done + len(part)] = part
            done += len(part)
            del part  # which would keep its slab
        return out

    def _slice(self, start: int, stop: int) -> np.ndarray:
        try:
            rows = np.asarray(self.image[start:stop])
        except (MemoryError, KeyboardInterrupt):
            raise
        except Exception as error:  # decoders raise nearly anything
            raise OSError(
                f"cannot read the pixel rows {start} to {stop - 1} of {self.name}: {one_line(error)}"
            ) from error
        if rows.shape != (stop - start, *self.shape[1:]):
            raise OSError(f"the pixel rows {start} to {stop - 1} of {self.name} have shape {rows.shape}")
        return rows

    def rows(self, start: int, stop: int) -> Tensor:
        """Normalised pixels (1, in_chans, stop - start, W), those of `eval_transform` at the image's own size.

        They are NaN where they are missing, if `values` leave them missing.

        Raises:
            UserError: Numbers are missing that `values` refuse to fill.
            OSError: They cannot be read.
        """
        array = self.raw(start, stop)
        deep = array.dtype != np.uint8 or not self.values.keeps_8_bits or self.nodata is not None
        if deep:
            array = self._to_unit(array if array.ndim == 3 else array[:, :, None], stop)
        else:
            array = convert(array, self.in_chans)
        array = np.require(array, requirements=["C", "W"])  # a copy of what is read-only, which PyTorch does not like
        x = to_device(torch.from_numpy(array), torch.device(self.out["device"])).permute(2, 0, 1)
        x = x.to(self.out["dtype"], memory_format=torch.contiguous_format, copy=True)
        if not deep:
            x.div_(255)
        return x.sub_(self.mean).div_(self.std)[None]

    def valid(self, patch_size: tuple[int, int], rows: int) -> Tensor | None:
        """The patches (1, N) that have a pixel which is not missing; None if `values` leave none missing.

        It reads the whole image, so many rows of patches at a time.

        Raises:
            UserError: There are no others.
            OSError: They cannot be read.
        """
        if self.values.fill != MASK:
            return None
        side, height = patch_size[0], self.shape[0]
        bands = range(0, height, rows * side)
        found = [valid_patches(self.rows(start, min(start + rows * side, height)), patch_size) for start in bands]
        valid = torch.cat(found, dim=1).flatten(1)
        if not valid.any():
            raise UserError(f"{self.name} has no pixel that is not missing")
        return valid

    def _to_unit(self, array: np.ndarray, stop: int) -> np.ndarray:
        dtype = np.float64 if self.out["dtype"] == torch.float64 else np.float32
        unit = to_unit(array, self.in_chans, self.values, self.top, self.nodata, self.levels, dtype)
        if stop == self.shape[0]:
            self.levels.warn()
        return unit


def _rows_of_chunks(image: Any) -> int:
    """How many rows are stored together, 0 if nothing is said; dask lists those of every chunk."""
    chunks = getattr(image, "chunks", None)
    if not chunks:
        return 0
    return max(map(int, chunks[0])) if isinstance(chunks[0], Sequence) else int(chunks[0])


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
