"""TIFF: one description of what a file holds, from which whole images and rows of huge ones are read alike.

The numbers are those of the file, with the care that Pillow takes of 8 bits: white that is 0 is turned round, fewer
than 8 bits are spread over 8, palettes and CMYK become colours, alpha is taken off (and colours are divided by it that
were multiplied by it), and orientation turns the image upright. A kind that is not read here (`NotReadHere`) is left to
Pillow, by both readers.

Shapes: H, W pixels of the upright image, n x m a part of it as stored, s samples of a pixel, c bands.
"""

import importlib.util
import io
import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO
from xml.etree import ElementTree

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from .limits import pixel_limit
from .pillow import NODATA, ORIENTATION, parse_nodata
from .regions import positive
from .values import Raster

__all__ = ["NotReadHere", "Turn", "georeference", "is_tiff", "missing_library", "open_tiff", "read_tiff"]

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
LIBRARIES = ("tifffile", "imagecodecs")
# None, LZW, JPEG (2), deflate (2), PackBits, JPEG 2000 (4), ZSTD (2), WebP (2). A decoder is given the room that a
# tile takes, and no more; those of the formats that are images of their own are not, see `_checked`.
COMPRESSIONS = (1, 5, 7, 33007, 8, 32946, 32773, 33003, 33004, 33005, 34712, 50000, 34926, 50001, 34927)
TO_RGB = (7, 33007, 33003, 33005, 34712, 50001, 34927)  # whose decoders make RGB of YCbCr
IN_TILES = ("JPEG", "JPEG2000", "WEBP")
WHITE_IS_0, BLACK_IS_0, RGB, PALETTE, CMYK, YCBCR = 0, 1, 2, 3, 5, 6
SAMPLES = {WHITE_IS_0: 1, BLACK_IS_0: 1, RGB: 3, PALETTE: 1, CMYK: 4, YCBCR: 3}
ALPHA = (1, 2, 999)  # multiplied into the colours, not multiplied, and what Corel Draw calls the latter
# kinds of series that only say that there are several pages, and not that these are one image
PAGES = ("generic", "uniform")
INK_SET, X_RESOLUTION, RESOLUTION_UNIT = 332, 282, 296
CENTIMETRE = 3
# tags of GeoTIFF (OGC 19-008r4): the scale of a pixel, or a matrix; with tie points and the coordinate system
GEOREFERENCE = (33550, 34264)
GEO_TAGS = (*GEOREFERENCE, 33922, 34735, 34736, 34737)

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # what it says of damaged tags is no news to users


class NotReadHere(Exception):
    """A kind of TIFF that Pillow may read."""


@dataclass(frozen=True)
class Turn:
    """From an image as stored to an upright one: first transposed, then reversed."""

    transposed: bool = False
    rows: bool = False
    columns: bool = False

    @classmethod
    def of(cls, orientation: Any) -> "Turn":
        """That of EXIF's orientation, 1 to 8; anything else counts as 1."""
        return cls(orientation in (5, 6, 7, 8), orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7))

    def __call__(self, array: np.ndarray) -> np.ndarray:
        """Turn (n, m, ...)."""
        if self.transposed:
            array = array.swapaxes(0, 1)
        return array[:: -1 if self.rows else 1, :: -1 if self.columns else 1]

    def stored(self, start: int, stop: int, height: int) -> slice:
        """Where rows of the upright image, of so many, are along the axis that becomes its rows."""
        return slice(height - stop, height - start) if self.rows else slice(start, stop)


@dataclass(frozen=True)
class Kind:
    """How the samples of a file become numbers.

    Attributes:
        convert: From (n, m, s) to (n, m, c).
        bands: c.
        dtype: Of the result.
        top, nodata: As in `Raster`.
        by_band: Whether c is s, and each of them is converted by itself.
    """

    convert: Callable[[np.ndarray], np.ndarray]
    bands: int
    dtype: np.dtype
    top: float | None
    nodata: float | None
    by_band: bool = False


@dataclass
class OpenTiff:
    """A TIFF file that has been opened and understood.

    Attributes:
        source: A page or a series of tifffile, which holds the image.
        axes: Of its array, Y, X and perhaps C; others have length 1.
        kind, turn: What becomes of it.
        encoded: Bytes of a chunk in the file at most.
        sizes: (height, width) of each level, as stored.
        mpp: Micrometres of a pixel of level 0, if the file says so.
        magnification: Of the objective, likewise.
        channels: Names of the channels, likewise.
        sparse: Whether tiles are missing in the file, which are read as 0.
    """

    source: Any
    axes: str
    kind: Kind
    turn: Turn
    encoded: int
    sizes: list[tuple[int, int]]
    mpp: float | None = None
    magnification: float | None = None
    channels: tuple[str, ...] = ()
    sparse: bool = False

    def as_zarr(self) -> Any:
        """A store of zarr with the array, as stored."""
        return self.source.aszarr(**({"level": 0} if hasattr(self.source, "levels") else {}))


def is_tiff(head: bytes) -> bool:
    """Whether a file begins as TIFF or BigTIFF do."""
    return head[:4] in MAGIC


def georeference(path: str | os.PathLike) -> TiffImagePlugin.ImageFileDirectory_v2 | None:
    """Where a GeoTIFF lies on the earth, as tags that Pillow writes into a TIFF of the same pixels.

    None for any other file, and for one that is stored turned: its tags are of the image as stored. Of a TIFF of
    several pages, the first one counts.
    """
    with open(path, "rb") as file:
        head = file.read(8)
        if not is_tiff(head):
            return None
        found = TiffImagePlugin.ImageFileDirectory_v2(head + (file.read(8) if 43 in head[2:4] else b""))
        file.seek(found.next)
        found.load(file)
    kept = TiffImagePlugin.ImageFileDirectory_v2()
    for tag in GEO_TAGS:
        if tag in found:
            kept.tagtype[tag] = found.tagtype[tag]
            kept[tag] = found[tag]
    return kept if len(kept) and found.get(ORIENTATION, 1) == 1 else None


def missing_library() -> str:
    """The first of the libraries that this takes and that is not installed; empty if all are."""
    return next((name for name in LIBRARIES if importlib.util.find_spec(name) is None), "")


def open_tiff(
    file: Any, name: str, size: int, level: int = 0, number: int = 0, at: Mapping[str, int] | None = None
) -> OpenTiff:
    """Open a TIFF and find out what it holds.

    Args:
        file: Its path, or an open file.
        name: What errors call it.
        size: Bytes of the file.
        level: Of a pyramid.
        number: Of the series, as tifffile divides a file into images.
        at: Where an image of a stack is, by axis: "Z", "T".

    Raises:
        NotReadHere: A compression or kind of colours that Pillow may know.
        ValueError: It has no such level, is no single image or a part of one, or is damaged.
    """
    import tifffile

    # of several files, only the one that is named is opened
    tiff = tifffile.TiffFile(file, is_mmstack=False, is_ndtiff=False, _multifile=False)
    if others := _other_files(tiff.ome_metadata or "", os.path.basename(name)):
        raise ValueError(f"it is a part of an image: there are pixels in other files, such as {others[0]!r}")
    if number >= len(tiff.series):
        raise ValueError(f"it has series 0 to {len(tiff.series) - 1}, got {number}")
    series, at = tiff.series[number], at or {}
    levels = series.levels
    source = levels[level] if level < len(levels) else None
    stacked = any(n != 1 for a, n in zip(series.axes, series.shape, strict=True) if a not in "YXSC")
    if stacked and series.kind in PAGES and not at:
        levels, source = [series], series.keyframe if level == 0 else None
    if source is None:
        raise ValueError(f"it has levels 0 to {len(levels) - 1}, got {level}")
    page = source.keyframe
    if page.compression not in COMPRESSIONS:
        raise NotReadHere(f"the compression {getattr(page.compression, 'name', page.compression)}")
    pages = [one for one in getattr(source, "pages", [source]) if one is not None]
    encoded = max(max(one.databytecounts, default=0) for one in pages)
    if encoded > size:
        raise ValueError(f"it ends before a tile of {encoded} bytes")
    axes = source.axes.upper().replace("S", "C").replace("Q", "Z").replace("I", "Z")
    check_axes(axes, source.shape, at)
    samples = source.shape[axes.index("C")] if "C" in axes else 1
    first = tiff.pages.first
    nodata = (page if NODATA in page.tags else first).tags.valueof(NODATA)
    kind = _kind(page, samples, parse_nodata(nodata))
    if page.compression in tifffile.TIFF.IMAGE_COMPRESSIONS:
        page.decode = _checked(page.decode, math.prod(page.chunks))
    orientation = (page if ORIENTATION in page.tags else first).tags.valueof(ORIENTATION, 1)
    sizes = [tuple(one.shape[one.axes.upper().index(a)] for a in "YX") for one in levels]
    sparse = any(0 in one.keyframe.databytecounts for one in levels)
    about = (series.keyframe, tiff.ome_metadata or "", number)
    resolution = _resolution(*about)
    return OpenTiff(source, axes, kind, Turn.of(orientation), encoded, sizes, *resolution, _channels(*about), sparse)


def read_tiff(file: BinaryIO, name: str, max_pixels: int) -> Raster:
    """A TIFF as a whole.

    Args:
        file: An open file.
        name: What errors and warnings call it.
        max_pixels: The largest image that is decoded, height times width.

    Raises:
        NotReadHere: As `open_tiff`.
        ValueError: Likewise, or it is larger.
        Exception: Decoders raise nearly anything.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    tiff = open_tiff(file, name, size)
    at = dict(zip(tiff.axes, tiff.source.shape, strict=True))
    if 0 in tiff.source.shape:
        raise ValueError("it has no pixels")
    for what, height, width in (
        ("", at["Y"], at["X"]),
        ("tiles of ", tiff.source.keyframe.tilelength, tiff.source.keyframe.tilewidth),
    ):
        if height * width > max_pixels:
            raise ValueError(f"{what}{width} x {height} pixels are more than max_pixels={max_pixels}")
    array = tiff.source.asarray(maxworkers=1)  # of a series, that is its largest level
    if array.ndim != len(tiff.axes):
        array = array.reshape(tiff.source.shape)
    array = array[tuple(slice(None) if a in "YXC" else 0 for a in tiff.axes)]
    kept = [a for a in tiff.axes if a in "YXC"]
    array = array.transpose([kept.index(a) for a in "YXC" if a in kept])
    array = tiff.kind.convert(array if array.ndim == 3 else array[:, :, None])
    return Raster(np.ascontiguousarray(tiff.turn(array)), tiff.kind.top, tiff.kind.nodata, name)


def check_axes(axes: str, shape: tuple[int, ...], at: Mapping[str, int] | None = None) -> None:
    """
    Raises:
        ValueError: There are other axes than Y, X and C, of another length than 1, of which `at` does not say where.
    """
    at = at or {}
    long = [(a, n) for a, n in zip(axes, shape, strict=False) if a not in "YXC" and n != 1]
    counts = axes.count("Y"), axes.count("X"), axes.count("C")
    if len(axes) != len(shape) or counts not in ((1, 1, 0), (1, 1, 1)) or any(a not in at for a, _ in long):
        hint = "; of a stack, z and t choose one" if {a for a, _ in long} & {"Z", "T"} else ""
        raise ValueError(f"it has axes {axes} of shape {tuple(shape)}: an image has Y, X and channels{hint}")
    for axis, index in at.items():
        length = shape[axes.index(axis)] if axis in axes else 1
        if index >= length:
            raise ValueError(f"it has {axis.lower()} 0 to {length - 1}, got {index}")


# the units of OME-XML, and those of OME-Zarr
MICROMETRES = {"\u00b5m": 1.0, "\u03bcm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}
MICROMETRES |= {"micrometer": 1.0, "nanometer": 1e-3, "millimeter": 1e3, "centimeter": 1e4, "meter": 1e6}


def _ome_pixels(ome: str, number: int) -> ElementTree.Element | None:
    """The `Pixels` of an image in OME-XML."""
    try:
        images = [one for one in ElementTree.fromstring(ome) if one.tag.endswith("}Image")] if ome else []
    except ElementTree.ParseError:
        return None
    parts = list(images[number]) if number < len(images) else []
    return next((part for part in parts if part.tag.endswith("}Pixels")), None)


def _resolution(page: Any, ome: str, number: int) -> tuple[float | None, float | None]:
    """Micrometres of a pixel and magnification: of OME-XML, Aperio's description, or tags in centimetres.

    Tags in inches are those of printing, 72 or 300 of nearly any image program.
    """
    if (pixels := _ome_pixels(ome, number)) is not None:
        unit = MICROMETRES.get(pixels.get("PhysicalSizeXUnit", "\u00b5m"))
        return positive(pixels.get("PhysicalSizeX"), unit), None
    found = dict(re.findall(r"(MPP|AppMag)\s*=\s*([\d.]+)", page.description or ""))
    if "MPP" in found:
        return positive(found["MPP"]), positive(found.get("AppMag"))
    if page.tags.valueof(RESOLUTION_UNIT, 2) == CENTIMETRE:
        across = page.tags.valueof(X_RESOLUTION, (0, 1))
        return (1e4 * across[1] / across[0] if across[0] and across[1] else None), None
    return None, None


def _channels(page: Any, ome: str, number: int) -> tuple[str, ...]:
    """Names of the channels, of OME-XML."""
    pixels = _ome_pixels(ome, number)
    parts = [] if pixels is None else [part for part in pixels if part.tag.endswith("}Channel")]
    return tuple(part.get("Name", "") for part in parts)


def _kind(page: Any, samples: int, nodata: float | None) -> Kind:
    """What the samples of a page mean; `samples` of a pixel, which may be on several pages."""
    photometric, dtype, bits = page.photometric, page.dtype, page.bitspersample
    if dtype is None or dtype.kind not in "buif" or not isinstance(bits, int):
        raise ValueError(f"its numbers are of type {dtype}, of {bits} bits: integers and floating point are read")
    if photometric not in SAMPLES:
        raise NotReadHere(f"colours of kind {getattr(photometric, 'name', photometric)}")
    if photometric == YCBCR and page.compression not in TO_RGB:
        raise NotReadHere("YCbCr that is not of JPEG")
    if photometric == CMYK and (page.compression in TO_RGB or page.tags.valueof(INK_SET, 1) != 1):
        raise NotReadHere("inks in JPEG, or others than CMYK")
    unsigned = dtype.kind in "bu"
    if photometric in (WHITE_IS_0, PALETTE, CMYK) and not unsigned:
        raise ValueError(f"its colours are of kind {photometric.name}, of numbers of type {dtype}: that has no meaning")
    base, extras = SAMPLES[photometric], [int(extra) for extra in page.extrasamples]
    if page.samplesperpixel != samples:  # a page for each band
        base, extras = samples, []
    if samples < base:
        raise ValueError(f"its colours are of kind {photometric.name}, of {samples} samples")
    extras = (extras + [0] * samples)[: samples - base]
    kept = [*range(base), *(base + i for i, extra in enumerate(extras) if extra not in ALPHA)]
    alpha = next((base + i for i, extra in enumerate(extras) if extra in ALPHA), None)
    divided = alpha is not None and extras[alpha - base] == 1
    top = white = float(2**bits - 1) if unsigned else 1.0
    if len(kept) > base and photometric in (PALETTE, CMYK):
        raise ValueError(f"its colours are of kind {photometric.name}, with more bands that are not alpha")

    steps: list[Callable[[np.ndarray], np.ndarray]] = []
    if dtype.kind == "b":
        dtype = np.dtype(np.uint8)
        steps.append(lambda x: x.astype(np.uint8))
    if alpha is not None:

        def without_alpha(x: np.ndarray) -> np.ndarray:
            taken = x[:, :, kept]
            if not divided:
                return taken
            colours = _divided(taken[:, :, :base], x[:, :, alpha, None], white)
            return np.concatenate([colours, taken[:, :, base:]], axis=2)

        steps.append(without_alpha)
    if photometric == WHITE_IS_0:
        steps.append(lambda x: x.dtype.type(white) - x)
        nodata = None if nodata is None else top - nodata
    elif photometric == PALETTE:
        colours = (np.asarray(page.colormap).T >> 8).astype(np.uint8)
        steps.append(lambda x: _missing_as_nan(colours[x[:, :, 0].astype(int)], x, nodata))
    if bits < 8 and unsigned and photometric != PALETTE:
        spread = np.round(np.arange(2**bits) * (255 / (2**bits - 1))).astype(np.uint8)
        steps.append(lambda x: spread[x])
        nodata = nodata if nodata is None or math.isnan(nodata) else float(round(nodata * 255 / (2**bits - 1)))
        bits, top = 8, 255.0
    bands = len(kept)
    if photometric == CMYK:
        steps.append(lambda x: _missing_as_nan(_cmyk(x, int(top)), x, nodata))
    if photometric in (PALETTE, CMYK):
        bands, bits = 3, 8 if photometric == PALETTE else bits
        dtype = np.dtype(np.uint8 if bits <= 8 else dtype)
        if nodata is not None:
            return Kind(lambda x: _all(steps, x), bands, np.dtype(np.float32), float(2**bits - 1), math.nan)
    full = not unsigned or bits in (8, dtype.itemsize * 8)
    by_band = alpha is None and photometric not in (PALETTE, CMYK)
    return Kind(lambda x: _all(steps, x), bands, dtype.newbyteorder("="), None if full else top, nodata, by_band)


def _all(steps: list[Callable[[np.ndarray], np.ndarray]], x: np.ndarray) -> np.ndarray:
    for step in steps:
        x = step(x)
    return x.astype(x.dtype.newbyteorder("="), copy=False)


def _divided(colours: np.ndarray, alpha: np.ndarray, top: float) -> np.ndarray:
    """Colours that alpha was multiplied into, without it, as Pillow computes it; 0 where alpha is."""
    if colours.dtype.kind != "u":
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(alpha == 0, 0, colours * top / alpha).astype(colours.dtype)
    wide = colours.astype(np.uint64) * int(top) // np.maximum(alpha, 1)
    return np.where(alpha == 0, 0, np.minimum(wide, int(top))).astype(colours.dtype)


def _cmyk(inks: np.ndarray, top: int) -> np.ndarray:
    """CMYK (n, m, 4) to RGB, (1 - c)(1 - k), as Pillow computes it."""
    if top == 255:
        return np.asarray(Image.frombytes("CMYK", inks.shape[1::-1], np.ascontiguousarray(inks)).convert("RGB"))
    white = top - inks.astype(np.uint64)
    return ((white[:, :, :3] * white[:, :, 3:] + top // 2) // top).astype(inks.dtype)


def _missing_as_nan(colours: np.ndarray, samples: np.ndarray, nodata: float | None) -> np.ndarray:
    """Colours whose samples were no data as NaN, as no colour could stand for them."""
    if nodata is None:
        return colours
    return np.where((samples == nodata).all(axis=2, keepdims=True), np.float32(np.nan), colours.astype(np.float32))


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
                with pixel_limit(None), Image.open(io.BytesIO((jpegheader or b"") + data), formats=IN_TILES) as image:
                    found = image.width * image.height * len(image.getbands())
            except UnidentifiedImageError as error:
                raise ValueError("a tile is an image of unknown size") from error
            if found > numbers:
                raise ValueError(f"a tile of {numbers} numbers is an image of {found}")
        return decode(data, index, jpegheader=jpegheader, **options)

    return checked
