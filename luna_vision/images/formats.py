"""Image files as rows of pixels, for `encode`: TIFF (tiled, pyramids too), zarr, .npy, and what Pillow decodes.

The content of a file says what it is, not its name. TIFF, zarr and .npy files are read piece by piece. Pillow decodes
a PNG or a JPEG as a whole, and keeps it: 4 bytes a pixel in colour, which counts as `held_bytes`, as does what decoders
take beside what they give.

Shapes: H, W pixels, c channels.
"""

import copy
import importlib.util
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from .rasters import has_rasterio, open_raster
from .regions import Choice, Source, opened, positive
from .slides import open_slide, vendor_of
from .tiff import GEOREFERENCE, MICROMETRES, Kind, NotReadHere, Turn, check_axes, is_tiff, open_tiff

__all__ = ["ChunkedImage", "NpyImage", "PillowImage", "open_image"]

ZIP, JP2 = b"PK\x03\x04", b"\0\0\0\x0cjP  \r\n\x87\n"
# Bytes that a decoder takes for each number of a pixel, beyond what it gives: measured, as none of them says so.
_DECODING = {"JPEG": 2, "WEBP": 4, "JPEG2000": 5, "AVIF": 2}


def open_image(path: str | os.PathLike, level: int | None = None, **choice: Any) -> Any:
    """Open an image file for `encode`.

    Args:
        path: TIFF (with GeoTIFF, OME-TIFF and COG), what OpenSlide reads, a .zarr folder or .zarr.zip (with OME-Zarr),
            JPEG 2000 with a georeference, .npy, or what Pillow knows.
        level: Of a pyramid, 0 is the largest.
        **choice: Other fields of `luna_vision.images.regions.Choice`: mpp, magnification, region, region_in, bands,
            channel, series, z, t.

    Returns:
        An image with a `shape`, (H, W) or (H, W, c), a `dtype`, and rows by `image[start:stop]`; `top` and `nodata`,
        if it has them, are those of `luna_vision.images.values.Raster`; `frame` is its place in the file.

    Raises:
        ValueError: The file is not an image that can be read row by row, or has no such level, region or band.
        OSError: There is no such file, or it cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no image {path}")
    chosen = Choice(level, **choice)
    image = opened(_source(path, chosen), chosen)
    image.file = path
    # not its size and date: a damaged file may be replaced by a whole one, to go on with
    image.identity = f"{os.path.abspath(path)} {chosen.described()}"
    return image


def _source(path: Path, choice: Choice) -> Source:
    """The levels of an image file, of any kind."""
    head = b""
    if not path.is_dir():
        if not path.is_file():  # a pipe would be waited for
            raise ValueError(f"{path} is neither a file nor a folder")
        with open(path, "rb") as file:
            head = file.read(16)
        if not head:
            raise ValueError(f"image file {path} is empty (0 bytes)")
    stack = {axis: place for axis, place in (("Z", choice.z), ("T", choice.t)) if place is not None}
    if path.is_dir() or (head.startswith(ZIP) and path.name.lower().endswith(".zip")):
        return _zarr_source(path, choice.series or 0, stack)
    plain = choice.series is None and not stack
    if plain and (vendor := vendor_of(path)):
        return (vendor == "aperio" and _complete(path)) or open_slide(path)
    if is_tiff(head):
        return (plain and _georeferenced(path)) or _tiff_source(path, choice.series or 0, stack)
    if plain and head.startswith(JP2) and has_rasterio() and (source := open_raster(path, "JP2OpenJPEG")):
        return source
    if choice.level is not None:
        raise ValueError(f"only TIFF and zarr images have levels, and {path} is none")
    if not plain:
        raise ValueError(f"only TIFF and zarr images have series and stacks, and {path} is none")
    image = NpyImage(path) if head.startswith(NPY) else PillowImage(path)
    return Source([image.shape[:2]], lambda level: image, str(path))


def _complete(path: Path) -> Source | None:
    """A slide that is a TIFF without missing tiles, and has all levels: OpenSlide interpolates where a level is not an
    exact fraction of level 0, and TIFF is read as it is, here as elsewhere."""
    try:
        slide, tiff = open_slide(path), _tiff_source(path, 0, {})
    except (ValueError, OSError):
        return None
    return tiff if tiff.sizes == slide.sizes and not tiff.sparse else None


def _georeferenced(path: Path) -> Source | None:
    """A TIFF with a georeference, where rasterio is there to read it."""
    if not has_rasterio() or importlib.util.find_spec("tifffile") is None:
        return None
    import tifffile

    try:
        with tifffile.TiffFile(path, _multifile=False) as tiff:
            if not any(tag in tiff.pages.first.tags for tag in GEOREFERENCE):
                return None
    except Exception:  # of a damaged file, nearly anything; the reader of TIFF says what
        return None
    source = open_raster(path)
    if source is not None and source.lossy:
        # decoders differ: level 0 is that of training and prediction, which read it as a whole
        whole, levels = _tiff_source(path, 0, {}), source.open
        source.open = lambda level: levels(level) if level else whole.open(0)
    return source


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
        at: Mapping[str, int] | None = None,
    ) -> None:
        """
        Args:
            array: The zarr array.
            axes: A letter for each axis: Y and X, C or S for channels; others must have length 1.
            encoded: Bytes of a chunk in the file at most, if it is known; otherwise as many as decoded.
            kind: What its numbers become; by default they stay.
            turn: How it becomes upright; by default it is.
            at: Where the image is on other axes, if they are longer than 1: "Z", "T".

        Raises:
            ValueError: Other axes, or longer ones.
        """
        axes = axes.upper().replace("S", "C")
        check_axes(axes, tuple(array.shape), at)
        self.at = at or {}
        self.array, self.axes, self.kind, self.turn = array, axes, kind, turn or Turn()
        kept = [a for a in axes if a in "YXC"]
        self.order, self.bands = [kept.index(a) for a in "YXC" if a in kept], None
        height, width, *bands = (array.shape[axes.index(a)] for a in "YXC" if a in kept)
        if kind is not None:
            bands = [kind.bands] if kind.bands > 1 else []
        rows, columns = ("X", "Y") if self.turn.transposed else ("Y", "X")  # as they are stored
        self.columns = columns
        self.shape = (width, height, *bands) if self.turn.transposed else (height, width, *bands)
        self.rows = rows
        self.dtype = np.dtype(array.dtype) if kind is None else kind.dtype
        self.top, self.nodata = (None, None) if kind is None else (kind.top, kind.nodata)
        self.chunks = (array.chunks[axes.index(rows)], array.chunks[axes.index(columns)])
        # the last chunk of the file may be cut, and is the first one where they are reversed
        self.chunk_shift = -self.shape[0] % self.chunks[0] if self.turn.rows else 0
        self.column_shift = -self.shape[1] % self.chunks[1] if self.turn.columns else 0
        self.encoded = encoded
        self.held_bytes = self._held_bytes()

    def _held_bytes(self) -> int:
        array, others = self.array, self.columns + "C"
        # what is read at a time: a chunk, or of a shard the chunks that are beside each other
        shards = array.shards or array.chunks
        parts = [s if a in others else c for a, s, c in zip(self.axes, shards, array.chunks, strict=True)]
        counts = {a: -(-n // p) for a, n, p in zip(self.axes, array.shape, parts, strict=True) if a in others}
        if self.bands is not None:
            counts["C"] = min(counts["C"], len(self.bands))
        size = math.prod(parts) * array.dtype.itemsize
        # encoded and decoded, and in a shard put together
        copies = size * (2 if array.shards else 1) + (size if self.encoded is None else self.encoded)
        return int(min(math.prod(counts.values()), _chunks_at_once())) * copies

    def of_bands(self, bands: list[int]) -> "ChunkedImage | None":
        """The image with these bands, the chunks of others are not read; None if colours are made of several bands."""
        if "C" not in self.axes or not (self.kind is None or self.kind.by_band):
            return None
        chosen = copy.copy(self)
        chosen.bands = bands
        chosen.shape = (*self.shape[:2], *([len(bands)] if len(bands) > 1 else []))
        chosen.held_bytes = chosen._held_bytes()
        return chosen

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.window(rows, slice(None))

    def window(self, rows: slice, columns: slice) -> np.ndarray:
        """Pixels (n, m[, c]); only the chunks that they are in are read."""
        (top, bottom, _), (left, right, _) = rows.indices(self.shape[0]), columns.indices(self.shape[1])
        turn = self.turn
        across = slice(self.shape[1] - right, self.shape[1] - left) if turn.columns else slice(left, right)
        bands = slice(None) if self.bands is None else self.bands
        stored = {self.rows: turn.stored(top, bottom, self.shape[0]), self.columns: across, "C": bands}
        place = tuple(stored.get(a, self.at.get(a, 0)) for a in self.axes)
        array = np.asarray(self.array[place] if self.bands is None else self.array.oindex[place]).transpose(self.order)
        if self.kind is not None:
            array = self.kind.convert(array if array.ndim == 3 else array[:, :, None])
        return turn(array).reshape(bottom - top, right - left, *self.shape[2:])


def _chunks_at_once() -> float:
    """How many chunks zarr reads and decodes at the same time; it may be told to take all."""
    import zarr

    limit = zarr.config.get("async.concurrency")
    return math.inf if limit is None else limit


def _tiff_source(path: Path, series: int, stack: dict[str, int]) -> Source:
    """The levels of a TIFF or, of a kind that only Pillow reads, the whole."""
    _need("tifffile", f"{path}")
    _need("zarr", f"{path}")

    def open_level(level: int) -> ChunkedImage:
        import zarr

        with _damaged(path):
            tiff = open_tiff(path, str(path), path.stat().st_size, level, series, stack)
            array = zarr.open(tiff.as_zarr(), mode="r")
            return ChunkedImage(array, tiff.axes, tiff.encoded, tiff.kind, tiff.turn, stack)

    try:
        with _damaged(path):
            tiff = open_tiff(path, str(path), path.stat().st_size, 0, series, stack)
    except NotReadHere as error:
        try:
            if not series and not stack:
                image = PillowImage(path)
                return Source([image.shape[:2]], lambda level: image, str(path))
        except (ValueError, OSError):
            pass  # what Pillow says is that it does not know the file
        raise UserError(f"{path} has {error}: it is not read") from error
    sizes = [size[::-1] for size in tiff.sizes] if tiff.turn.transposed else tiff.sizes
    return Source(sizes, open_level, str(path), tiff.mpp, tiff.magnification, list(tiff.channels), sparse=tiff.sparse)


@contextmanager
def _damaged(path: Path, what: str = "") -> Iterator[None]:
    """Errors of a file that is opened become one line, which names it."""
    try:
        yield
    except (NotReadHere, MemoryError, UserError):
        raise
    except Exception as error:  # of a damaged file, nearly anything
        raise ValueError(f"cannot read {what.format(path) or path}: {one_line(error)}") from error


def _zarr_source(path: Path, series: int, stack: dict[str, int]) -> Source:
    """The levels of a zarr array or of a group with multiscales, in a folder or a .zip."""
    for name in ("zarr", "imagecodecs"):
        _need(name, f"{path}")
    import zarr

    from .zarr_arrays import bounded, zip_store

    what = "{} as zarr" if path.is_file() else "the folder {} as zarr"
    with _damaged(path, what):
        store, inside = (path, "") if path.is_dir() else zip_store(path)
        node = zarr.open(store, path=inside, mode="r")
        if isinstance(node, zarr.Group):
            arrays, axes, about = _multiscales(node, path, series)
        elif series:
            raise ValueError(f"it is one array, and has no series {series}")
        else:
            first = node.ndim == 3 and node.shape[0] in (1, 3, 4) and node.shape[2] > 4
            axes = {2: "YX", 3: "CYX" if first else "YXC", 5: "TCZYX"}.get(node.ndim, "?" * node.ndim)
            arrays, about = [node], {}
        check_axes(axes.upper(), tuple(arrays[0].shape), stack)
    sizes = [tuple(array.shape[axes.upper().index(a)] for a in "YX") for array in arrays]

    def open_level(level: int) -> ChunkedImage:
        with _damaged(path, what):
            return ChunkedImage(bounded(arrays[level]), axes, at=stack)

    return Source(sizes, open_level, str(path), **about)


def _multiscales(group: Any, path: Path, series: int) -> tuple[list[Any], str, dict[str, Any]]:
    """The arrays of a group's levels, their axes, and what is known of them.

    Source: OME-NGFF 0.4 and 0.5, and the layout of bioformats2raw: a group with a number for each series.
    """
    attributes = dict(group.attrs)
    attributes = attributes.get("ome") or attributes
    scales = attributes.get("multiscales")
    if not scales and (attributes.get("bioformats2raw.layout") or "0" in group):
        names = sorted((name for name in group.group_keys() if name.isdecimal()), key=int)
        if series >= len(names):
            raise ValueError(f"it has series 0 to {len(names) - 1}, got {series}")
        return _multiscales(group[names[series]], path / names[series], 0)
    if not scales:
        raise ValueError(f"it is a group without multiscales: give one of its arrays, as {path}/NAME")
    if series >= len(scales):
        raise ValueError(f"it has series 0 to {len(scales) - 1}, got {series}")
    scale = scales[series]
    arrays = [group[one["path"]] for one in scale["datasets"]]
    axes = "".join(a["name"] if isinstance(a, dict) else a for a in scale.get("axes", ()))
    axes = axes or {2: "YX", 5: "TCZYX"}.get(arrays[0].ndim, "?" * arrays[0].ndim)
    about: dict[str, Any] = {
        "bands": [str(c.get("label", "")) for c in (attributes.get("omero") or {}).get("channels", ())]
    }
    units = [a.get("unit") if isinstance(a, dict) else None for a in scale.get("axes", ())]
    # those of the level and, after them, those of all levels
    turns = (turn for one in (scale["datasets"][0], scale) for turn in one.get("coordinateTransformations", ()))
    if steps := [turn["scale"] for turn in turns if turn.get("type") == "scale"]:
        x = axes.lower().index("x")
        about["mpp"] = positive(math.prod(step[x] for step in steps), MICROMETRES.get(units[x]) if units else None)
    return arrays, axes, about


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
        self.path = path

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
        self.loaded = False
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
