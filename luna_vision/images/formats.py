"""Image files as rows of pixels, for `encode`: TIFF (tiled, pyramids too), zarr, .npy, and what Pillow decodes.

The content of a file says what it is, not its name. TIFF, zarr and .npy files are read piece by piece. Pillow decodes
a PNG or a JPEG as a whole, and keeps it: 4 bytes a pixel in colour, which counts as `held_bytes`, as does what decoders
take beside what they give.

Shapes: H, W pixels, c channels.
"""

import importlib.util
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ImageOps, UnidentifiedImageError

from ..utils.errors import UserError, one_line
from .decode import GREY, plain
from .limits import pixel_limit
from .npy import MAGIC as NPY
from .npy import read_header
from .pillow import deep_numbers, nodata_of, open_image_file, orientation_of
from .tiff import Kind, NotReadHere, Turn, check_axes, is_tiff, open_tiff

__all__ = ["ChunkedImage", "NpyImage", "PillowImage", "open_image"]

# Bytes that a decoder takes for each number of a pixel, beyond what it gives: measured, as none of them says so.
_DECODING = {"JPEG": 2, "WEBP": 4, "JPEG2000": 5, "AVIF": 2}


def open_image(path: str | os.PathLike, level: int | None = None) -> Any:
    """Open an image file for `encode`.

    Args:
        path: TIFF (.svs, .ndpi, .scn and others are TIFF), a .zarr folder, .npy, or what Pillow knows.
        level: Of a pyramid (TIFF, or a zarr group with multiscales), 0 is the largest.

    Returns:
        An image with a `shape`, (H, W) or (H, W, c), a `dtype`, and rows by `image[start:stop]`; `top` and `nodata`,
        if it has them, are those of `luna_vision.images.values.Raster`.

    Raises:
        ValueError: The file is not an image that can be read row by row, or has no such level.
        OSError: There is no such file, or it cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no image {path}")
    if level is not None and level < 0:
        raise ValueError(f"level must be at least 0, got {level}")
    head = b""
    if not (zarr := path.is_dir()):
        if not path.is_file():  # a pipe would be waited for
            raise ValueError(f"{path} is neither a file nor a folder")
        with open(path, "rb") as file:
            head = file.read(16)
        if not head:
            raise ValueError(f"image file {path} is empty (0 bytes)")
    if level is not None and not (zarr or is_tiff(head)):
        raise ValueError(f"only TIFF and zarr images have levels, and {path} is none")
    if zarr:
        image = _open_zarr(path, level or 0)
    elif is_tiff(head):
        image = _open_tiff(path, level or 0)
    elif head.startswith(NPY):
        image = NpyImage(path)
    else:
        image = PillowImage(path)
    image.file = path
    # not its size and date: a damaged file may be replaced by a whole one, to go on with
    image.identity = f"{os.path.abspath(path)} {level or 0}"
    return image


def _need(name: str, what: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise ValueError(f"{what} takes {name} (pip install 'luna-vision[streaming]')")


class ChunkedImage:
    """A zarr array with any order of axes as an image (H, W) or (H, W, c), upright."""

    def __init__(
        self,
        array: Any,
        axes: str,
        encoded: int | None = None,
        kind: Kind | None = None,
        turn: Turn | None = None,
    ) -> None:
        """
        Args:
            array: The zarr array.
            axes: A letter for each axis: Y and X, C or S for channels; others must have length 1.
            encoded: Bytes of a chunk in the file at most, if it is known; otherwise as many as decoded.
            kind: What its numbers become; by default they stay.
            turn: How it becomes upright; by default it is.

        Raises:
            ValueError: Other axes, or longer ones.
        """
        axes = axes.upper().replace("S", "C")
        check_axes(axes, tuple(array.shape))
        self.array, self.axes, self.kind, self.turn = array, axes, kind, turn or Turn()
        kept = [a for a in axes if a in "YXC"]
        self.order = [kept.index(a) for a in "YXC" if a in kept]
        height, width, *bands = (array.shape[axes.index(a)] for a in "YXC" if a in kept)
        if kind is not None:
            bands = [kind.bands] if kind.bands > 1 else []
        rows, columns = ("X", "Y") if self.turn.transposed else ("Y", "X")  # as they are stored
        self.columns = columns
        self.shape = (width, height, *bands) if self.turn.transposed else (height, width, *bands)
        self.rows = rows
        self.dtype = np.dtype(array.dtype) if kind is None else kind.dtype
        self.top, self.nodata = (None, None) if kind is None else (kind.top, kind.nodata)
        self.chunks = (array.chunks[axes.index(rows)],)
        # what is read at a time: a chunk, or of a shard the chunks that are beside each other
        shards = array.shards or array.chunks
        others = columns + "C"
        parts = [s if a in others else c for a, s, c in zip(axes, shards, array.chunks, strict=True)]
        across = math.prod(-(-n // p) for a, n, p in zip(axes, array.shape, parts, strict=True) if a in others)
        size = math.prod(parts) * array.dtype.itemsize
        # encoded and decoded, and in a shard put together
        copies = size * (2 if array.shards else 1) + (size if encoded is None else encoded)
        self.held_bytes = int(min(across, _chunks_at_once())) * copies
        self.identity = ""

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.window(rows, slice(None))

    def window(self, rows: slice, columns: slice) -> np.ndarray:
        """Pixels (n, m[, c]); only the chunks that they are in are read."""
        (top, bottom, _), (left, right, _) = rows.indices(self.shape[0]), columns.indices(self.shape[1])
        turn = self.turn
        across = slice(self.shape[1] - right, self.shape[1] - left) if turn.columns else slice(left, right)
        stored = {self.rows: turn.stored(top, bottom, self.shape[0]), self.columns: across, "C": slice(None)}
        array = np.asarray(self.array[tuple(stored.get(a, 0) for a in self.axes)]).transpose(self.order)
        if self.kind is not None:
            array = self.kind.convert(array if array.ndim == 3 else array[:, :, None])
        return turn(array).reshape(bottom - top, right - left, *self.shape[2:])


def _chunks_at_once() -> float:
    """How many chunks zarr reads and decodes at the same time; it may be told to take all."""
    import zarr

    limit = zarr.config.get("async.concurrency")
    return math.inf if limit is None else limit


def _open_tiff(path: Path, level: int) -> Any:
    """Rows of a TIFF or, of a kind that only Pillow reads, the whole."""
    _need("tifffile", f"{path}")
    _need("zarr", f"{path}")
    import zarr

    try:
        tiff = open_tiff(path, str(path), path.stat().st_size, level)
        array = zarr.open(tiff.as_zarr(), mode="r")
        return ChunkedImage(array, tiff.axes, tiff.encoded, tiff.kind, tiff.turn)
    except NotReadHere as error:
        try:
            if not level:
                return PillowImage(path)
        except (ValueError, OSError):
            pass  # what Pillow says is that it does not know the file
        raise UserError(f"{path} has {error}: it is not read") from error
    except MemoryError:
        raise
    except Exception as error:  # of a damaged file, nearly anything
        if isinstance(error, UserError):
            raise
        raise ValueError(f"cannot read {path}: {one_line(error)}") from error


def _open_zarr(path: Path, level: int) -> ChunkedImage:
    for name in ("zarr", "imagecodecs"):
        _need(name, f"{path}")
    import zarr

    from .zarr_arrays import bounded

    try:
        node, axes = zarr.open(path, mode="r"), None
        if isinstance(node, zarr.Group):
            attributes = dict(node.attrs)
            scales = (attributes.get("ome") or attributes).get("multiscales")
            if not scales:
                raise ValueError(f"it is a group without multiscales: give one of its arrays, as {path}/NAME")
            datasets = scales[0]["datasets"]
            if level >= len(datasets):
                raise ValueError(f"it has levels 0 to {len(datasets) - 1}, got {level}")
            axes = "".join(a["name"] if isinstance(a, dict) else a for a in scales[0].get("axes", ())) or None
            node = node[datasets[level]["path"]]
        elif level:
            raise ValueError(f"it is one array, and has no level {level}")
        if axes is None:
            first = node.ndim == 3 and node.shape[0] in (1, 3, 4) and node.shape[2] > 4
            axes = {2: "YX", 3: "CYX" if first else "YXC", 5: "TCZYX"}.get(node.ndim, "?" * node.ndim)
        return ChunkedImage(bounded(node), axes)
    except Exception as error:  # zarr's errors are of many kinds, and so are those of other descriptions
        raise ValueError(f"cannot read the folder {path} as zarr: {one_line(error)}") from error


class NpyImage:
    """A .npy array, read by position: pages of a memory map would count as memory of the process."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ValueError: Not a .npy file, or one of Python objects or in Fortran's order.
        """
        try:
            with open(path, "rb") as file:
                self.shape, self.dtype, self.offset = read_header(file)
        except OSError:
            raise
        except Exception as error:  # numpy parses the header as Python's text
            raise ValueError(f"cannot read {path}: {one_line(error)}") from error
        self.path, self.identity = path, ""

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        with open(self.path, "rb") as file:
            file.seek(self.offset + start * (out[:1].nbytes))
            if file.readinto(memoryview(out).cast("B")) != out.nbytes:
                raise OSError(f"{self.path} ends too early")
        return out


class PillowImage:
    """What Pillow opens: decoded as a whole, when the first row is asked for."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ValueError: Not an image of a format and of numbers that are read.
        """
        try:
            with pixel_limit(None):  # large images, and large bands of them, are what this is for
                self.image = open_image_file(path)
            deep = deep_numbers(self.image)
            turned = orientation_of(self.image)
            channels = len(self.image.getbands())
        except MemoryError:
            raise
        except UnidentifiedImageError as error:
            raise ValueError(f"{path} is not an image of a format that is known here") from error
        except Exception as error:  # of a damaged header, nearly anything
            raise OSError(f"cannot read {path}: {one_line(error)}") from error
        self.path, self.deep, self.turn, self.numbers = path, deep, Turn.of(turned), None
        self.identity, self.loaded = "", False
        mode = self.image.mode
        self.grey, self.nodata = mode in GREY, nodata_of(self.image)
        height, width = self.image.size[::-1] if not self.turn.transposed else self.image.size
        bands = deep.bands if deep else 1 if self.grey else 3
        self.shape = (height, width) if bands == 1 else (height, width, bands)
        self.dtype, self.top = (deep.dtype, deep.top) if deep else (np.dtype(np.uint8), None)
        each = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2}.get(mode, 4)
        decoding = _DECODING.get(self.image.format, 0) * channels
        if self.image.format == "JPEG" and not self.image.info.get("progressive"):
            decoding = 0
        if deep:  # with what it is decoded from, and turned
            each, decoding = 2 * bands * self.dtype.itemsize, 2 * bands * self.dtype.itemsize
        self.held_bytes = height * width * (each + max(decoding, 0 if turned == 1 else each))

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        if self.deep:
            if self.numbers is None:
                with pixel_limit(None):
                    self.numbers = self.turn(self.deep.read()).reshape(self.shape)
            return self.numbers[start:stop]
        if not self.loaded:
            self.image.load()
            ImageOps.exif_transpose(self.image, in_place=True)
            if self.image.size != self.shape[1::-1]:
                raise OSError(f"{self.path} says after its pixels that they lie on their side: turn it before")
            self.loaded = True
        with pixel_limit(None):
            part = self.image.crop((0, start, self.shape[1], stop))
        return np.asarray(plain(part, self.grey))
