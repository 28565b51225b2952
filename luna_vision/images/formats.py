"""Image files as rows of pixels: TIFF (tiled, pyramids too), zarr, .npy, and what Pillow decodes.

TIFF, zarr and .npy files are read piece by piece. Pillow decodes a PNG or a JPEG as a whole, and keeps it: 4 bytes a
pixel in colour, which counts as `held_bytes`, as does what decoders take beside what they give.

Shapes: H, W pixels, c channels.
"""

import importlib.util
import io
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .limits import pixel_limit
from .pillow import open_image_file

__all__ = ["ChunkedImage", "NpyImage", "PillowImage", "open_image"]

TIFF_SUFFIXES = (".tif", ".tiff", ".svs", ".ndpi", ".scn", ".btf")
# None, LZW, JPEG (2), deflate (2), PackBits, JPEG 2000 (4), ZSTD (2), WebP (2). A decoder is given the room that a
# tile takes, and no more; those of the formats that are images of their own are not, see `_checked`.
_TIFF_COMPRESSIONS = (1, 5, 7, 33007, 8, 32946, 32773, 33003, 33004, 33005, 34712, 50000, 34926, 50001, 34927)
_IN_TILES = ("JPEG", "JPEG2000", "WEBP")
_TURNED = 0x0112  # EXIF's orientation
# Bytes that a decoder takes for each number of a pixel, beyond what it gives: measured, as none of them says so.
_DECODING = {"JPEG": 2, "WEBP": 4, "JPEG2000": 5, "AVIF": 2}


def open_image(path: str | os.PathLike, level: int | None = None) -> Any:
    """Open an image file for `encode`.

    Args:
        path: .tif, .tiff, .svs, .ndpi, .scn, .btf; a .zarr folder; .npy; else what Pillow knows.
        level: Of a pyramid (TIFF, or a zarr group with multiscales), 0 is the largest.

    Returns:
        An image with a `shape`, (H, W) or (H, W, c), a `dtype`, and rows by `image[start:stop]`.

    Raises:
        ValueError: The file is not an image that can be read row by row, or has no such level.
        OSError: There is no such file, or it cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no image {path}")
    if level is not None and level < 0:
        raise ValueError(f"level must be at least 0, got {level}")
    suffix = path.suffix.lower()
    zarr = path.is_dir()
    if not zarr and path.stat().st_size == 0:
        raise ValueError(f"image file {path} is empty (0 bytes)")
    if level is not None and not zarr and suffix not in TIFF_SUFFIXES:
        raise ValueError(f"only TIFF and zarr images have levels, and {path} is none")
    if zarr:
        image = _open_zarr(path, level or 0)
    elif suffix in TIFF_SUFFIXES:
        image = _open_tiff(path, level or 0)
    elif suffix == ".npy":
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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class ChunkedImage:
    """A zarr array with any order of axes as an image (H, W) or (H, W, c)."""

    def __init__(self, array: Any, axes: str, name: str, encoded: int | None = None) -> None:
        """
        Args:
            array: The zarr array.
            axes: A letter for each axis: Y and X, C or S for channels; others must have length 1.
            name: What errors call it.
            encoded: Bytes of a chunk in the file at most, if it is known; otherwise as many as decoded.

        Raises:
            ValueError: Other axes, or longer ones.
        """
        axes = axes.upper().replace("S", "C")
        extra = [a for a, n in zip(axes, array.shape, strict=False) if a not in "YXC" and n != 1]
        counts = axes.count("Y"), axes.count("X"), axes.count("C")
        if len(axes) != len(array.shape) or counts not in ((1, 1, 0), (1, 1, 1)) or extra:
            raise ValueError(f"{name} has axes {axes} of shape {tuple(array.shape)}: an image has Y, X and channels")
        self.array, self.axes, self.dtype = array, axes, np.dtype(array.dtype)
        kept = [a for a in axes if a in "YXC"]
        self.order = [kept.index(a) for a in "YXC" if a in kept]
        self.shape = tuple(array.shape[axes.index(a)] for a in "YXC" if a in kept)
        self.chunks = (array.chunks[axes.index("Y")],)
        # what is read at a time: a chunk, or of a shard the chunks that are beside each other
        shards = array.shards or array.chunks
        parts = [s if a in "XC" else c for a, s, c in zip(axes, shards, array.chunks, strict=True)]
        across = math.prod(-(-n // p) for a, n, p in zip(axes, array.shape, parts, strict=True) if a in "XC")
        size = math.prod(parts) * self.dtype.itemsize
        # encoded and decoded, and in a shard put together
        copies = size * (2 if array.shards else 1) + (size if encoded is None else encoded)
        self.held_bytes = int(min(across, _chunks_at_once())) * copies
        self.identity = ""

    def __getitem__(self, rows: slice) -> np.ndarray:
        index = tuple(rows if a == "Y" else slice(None) if a in "XC" else 0 for a in self.axes)
        return np.asarray(self.array[index]).transpose(self.order)


def _chunks_at_once() -> float:
    """How many chunks zarr reads and decodes at the same time; it may be told to take all."""
    import zarr

    limit = zarr.config.get("async.concurrency")
    return math.inf if limit is None else limit


def _open_tiff(path: Path, level: int) -> ChunkedImage:
    _need("tifffile", f"{path}")
    _need("zarr", f"{path}")
    import tifffile
    import zarr

    try:
        # of several files, only the one that is named is opened
        file = tifffile.TiffFile(path, is_mmstack=False, is_ndtiff=False, _multifile=False)
        if others := _other_files(file.ome_metadata or "", path.name):
            raise ValueError(f"{path} is a part of an image: there are pixels in other files, such as {others[0]!r}")
        series = file.series[0]
        levels = series.levels
        if level >= len(levels):
            raise ValueError(f"{path} has levels 0 to {len(levels) - 1}, got {level}")
        page = levels[level].keyframe
        kind = getattr(page.photometric, "name", str(page.photometric))
        if kind not in ("MINISBLACK", "RGB", "YCBCR"):
            raise ValueError(f"{path} has colours of kind {kind}: RGB and grey are read")
        if page.compression not in _TIFF_COMPRESSIONS:
            raise ValueError(
                f"{path} has the compression {getattr(page.compression, 'name', page.compression)}: it is not read"
            )
        encoded = max(max(one.databytecounts, default=0) for one in levels[level].pages if one is not None)
        if encoded > path.stat().st_size:
            raise ValueError(f"{path} ends before a tile of {encoded} bytes")
        if page.compression in tifffile.TIFF.IMAGE_COMPRESSIONS:
            page.decode = _checked(page.decode, math.prod(page.chunks))
        array = zarr.open(series.aszarr(level=level), mode="r")
        return ChunkedImage(array, levels[level].axes.replace("Q", "Z").replace("I", "Z"), f"{path}", encoded)
    except (ValueError, OSError):
        raise
    except Exception as error:  # of a damaged file, nearly anything
        raise ValueError(f"cannot read {path}: {_one_line(error)}") from error


def _other_files(ome: str, name: str) -> list[str]:
    """The files that OME-XML names, but for the one that it stands in, which may have got another name since."""
    own = re.search(r"""<(?:\w+:)?OME\s[^>]*\bUUID\s*=\s*["']([^"']*)""", ome)
    parts = re.findall(r"""<(?:\w+:)?UUID\s[^>]*\bFileName\s*=\s*["']([^"']*)["'][^>]*>\s*([^<\s]*)""", ome)
    return [file for file, part in parts if file.lower() != name.lower() and (own is None or part != own[1])]


def _checked(decode: Callable[..., Any], numbers: int) -> Callable[..., Any]:
    """A decoder of tiles that are images of their own, which say how large they are: see that they are not larger."""

    def checked(data: bytes | None, index: int, jpegheader: bytes | None = None, **options: Any) -> Any:
        if data is not None:
            try:
                with pixel_limit(None), Image.open(io.BytesIO((jpegheader or b"") + data), formats=_IN_TILES) as image:
                    found = image.width * image.height * len(image.getbands())
            except UnidentifiedImageError as error:
                raise ValueError("a tile is an image of unknown size") from error
            if found > numbers:
                raise ValueError(f"a tile of {numbers} numbers is an image of {found}")
        return decode(data, index, jpegheader=jpegheader, **options)

    return checked


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
        return ChunkedImage(bounded(node), axes, "it")
    except Exception as error:  # zarr's errors are of many kinds, and so are those of other descriptions
        raise ValueError(f"cannot read the folder {path} as zarr: {_one_line(error)}") from error


class NpyImage:
    """A .npy array, read by position: pages of a memory map would count as memory of the process."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ValueError: Not a .npy file, or one of Python objects or in Fortran's order.
        """
        try:
            mapped = np.lib.format.open_memmap(path, mode="r")
        except ValueError as error:
            raise ValueError(f"cannot read {path}: {_one_line(error)}") from error
        if not mapped.flags.c_contiguous:
            raise ValueError(f"{path} is in Fortran's order, column by column: save it in C's")
        self.path, self.shape, self.dtype = path, mapped.shape, mapped.dtype
        self.offset, self.identity = mapped.offset, ""

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        with open(self.path, "rb") as file:
            file.seek(self.offset + start * (out[:1].nbytes))
            if file.readinto(memoryview(out).cast("B")) != out.nbytes:
                raise OSError(f"{self.path} ends too early")
        return out


class PillowImage:
    """What Pillow decodes: as a whole, when the first row is asked for."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ValueError: Not an image of a format and of numbers that are read.
        """
        try:
            with pixel_limit(None):  # large images, and large bands of them, are what this is for
                self.image = open_image_file(path)
        except UnidentifiedImageError as error:
            raise ValueError(f"{path} is not an image of a format that is known here") from error
        except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError at damaged PNG headers
            raise OSError(f"cannot read {path}: {_one_line(error)}") from error
        mode = self.image.mode
        if mode == "F":
            raise ValueError(f"{path} has floating-point pixels, of unknown range: save it in 8 or 16 bits")
        # not the PNG's own, which would decode all pixels, before a budget is known, to look for an entry behind them
        turned = Image.Image.getexif(self.image).get(_TURNED, 1)
        width, height = self.image.size if turned < 5 else self.image.size[::-1]
        self.path, self.loaded, self.identity = path, False, ""
        self.deep = mode.startswith("I")  # 16-bit greys, which Pillow reads as 32-bit, too
        self.target = "L" if mode in ("1", "L", "LA", "La") else "RGB"
        self.shape = (height, width) if self.deep or self.target == "L" else (height, width, 3)
        self.dtype = np.dtype(np.uint16 if self.deep else np.uint8)
        each = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2}.get(mode, 4)
        decoding = _DECODING.get(self.image.format, 0) * len(self.image.getbands())
        if self.image.format == "JPEG" and not self.image.info.get("progressive"):
            decoding = 0
        self.held_bytes = height * width * (each + max(decoding, 0 if turned == 1 else each))

    def __getitem__(self, rows: slice) -> np.ndarray:
        if not self.loaded:
            self.image.load()
            ImageOps.exif_transpose(self.image, in_place=True)
            if self.image.size != self.shape[1::-1]:
                raise OSError(f"{self.path} says after its pixels that they lie on their side: turn it before")
            self.loaded = True
        start, stop, _ = rows.indices(self.shape[0])
        with pixel_limit(None):
            part = self.image.crop((0, start, self.shape[1], stop))
        if self.deep:
            return np.asarray(part).astype(np.int64).clip(0, 65535).astype(np.uint16)
        if part.mode in ("P", "PA"):  # a palette may carry transparency, which Pillow only resolves by way of RGBA
            part = part.convert("RGBA")
        return np.asarray(part if part.mode == self.target else part.convert(self.target))
