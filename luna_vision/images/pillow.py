"""Image files, opened by Pillow, and those among them that Pillow itself would bring to 8 bits."""

import importlib.util
import os
import re
from collections.abc import Callable
from functools import cache
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

__all__ = ["Deep", "deep_numbers", "has_heif", "nodata_of", "open_image_file", "orientation_of", "parse_nodata"]

PROGRAMS = ("EPS", "WMF")  # which Pillow hands to Ghostscript and to Windows
ORIENTATION = 274  # of EXIF and TIFF
NODATA = 42113  # of GDAL, text
_BIT_DEPTH, _COLOUR = 24, 25  # of a PNG, where they are in the file
_SIZ = b"\xff\x4f\xff\x51"  # what a JPEG 2000 codestream begins with
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT, _EXTRA_SAMPLES, _SAMPLES = 258, 262, 339, 338, 277


class Deep(NamedTuple):
    """An image of more than 8 bits.

    Attributes:
        bands: c; alpha is none.
        dtype, top: As in `luna_vision.images.values.Raster`.
        read: Gives the numbers (H, W) or (H, W, c), as stored.
    """

    bands: int
    dtype: np.dtype
    top: float | None
    read: Callable[[], np.ndarray]


@cache
def has_heif() -> bool:
    """Whether HEIC files are read: where `pillow-heif` is installed, which registers itself here."""
    if importlib.util.find_spec("pillow_heif") is None:
        return False
    import pillow_heif

    pillow_heif.register_heif_opener()
    return True


def open_image_file(file: str | os.PathLike | BinaryIO) -> Image.Image:
    """`Image.open`, but for formats that another program would draw: they are programs, whatever a file is called."""
    Image.init()
    has_heif()
    return Image.open(file, formats=[name for name in Image.OPEN if name not in PROGRAMS])


def deep_numbers(image: Image.Image) -> Deep | None:
    """The numbers of an image that Pillow has opened, if they have more than 8 bits; nothing is decoded yet.

    Raises:
        ValueError: A kind of which Pillow would only give 8 bits, or bands that it would leave out.
    """
    if image.format == "TIFF":
        _check_tiff(image)
    reader = {"PNG": _png, "PPM": _ppm, "JPEG2000": _jpeg2000, "FITS": _fits, "AVIF": _avif}.get(image.format)
    deep = reader(image) if reader else None
    return deep or _mode(image)


def orientation_of(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8, of an image that is open and perhaps not decoded yet.

    A PNG may have it behind its pixels, where Pillow finds it only by decoding them.
    """
    if image.format == "PNG" and "exif" not in image.info and image.fp is not None:
        at, size = 8, image.fp.seek(0, os.SEEK_END)
        while at + 8 <= size:
            image.fp.seek(at)
            length, kind = int.from_bytes(image.fp.read(4)), image.fp.read(4)
            if kind == b"eXIf" and at + 12 + length <= size:
                image.info["exif"] = b"Exif\0\0" + image.fp.read(length)
                break
            at += 12 + length
    return Image.Image.getexif(image).get(ORIENTATION, 1)  # not the PNG's own, which decodes


def nodata_of(image: Image.Image) -> float | None:
    """The number that GDAL's tag of a TIFF names for no data, where it is one of the numbers that Pillow gives."""
    if image.format != "TIFF" or image.mode in ("P", "PA", "CMYK", "YCbCr", "LAB"):
        return None
    return parse_nodata(image.tag_v2.get(NODATA))


def parse_nodata(text: Any) -> float | None:
    """The number in a tag for no data; None without one."""
    try:
        return float(str(text).strip("\0 "))
    except ValueError:
        return None


def _mode(image: Image.Image) -> Deep | None:
    """Of a mode of Pillow that holds them all."""
    mode, dtype, top = image.mode, None, None
    if mode.startswith("I;16"):
        dtype = np.dtype(np.uint16)
        if image.format == "TIFF" and image.tag_v2.get(_BITS_PER_SAMPLE) == (12,):
            top = 4095.0
    elif mode in ("I", "F"):
        dtype = np.dtype(np.int32 if mode == "I" else np.float32)
    else:
        return None

    def read() -> np.ndarray:
        image.load()
        return np.asarray(image).astype(dtype, copy=False)

    return Deep(1, dtype, top, read)


def _content(image: Image.Image) -> bytes:
    image.fp.seek(0)
    return image.fp.read()


def _codec(name: str, what: str) -> Callable[..., Any]:
    if importlib.util.find_spec("imagecodecs") is None:
        raise ValueError(f"{what} takes imagecodecs (pip install 'luna-vision[streaming]')")
    import imagecodecs

    return getattr(imagecodecs, name)


def _png(image: Image.Image) -> Deep | None:
    """Of 16 bits and in colour, or with alpha; Pillow gives all bits of a grey one."""
    image.fp.seek(0)
    head = image.fp.read(_COLOUR + 1)
    if len(head) <= _COLOUR or head[_BIT_DEPTH] != 16 or head[_COLOUR] == 0:
        return None
    decode, bands = _codec("png_decode", "a PNG of 16 bits in colour"), 1 if head[_COLOUR] == 4 else 3
    return Deep(bands, np.dtype(np.uint16), None, lambda: decode(_content(image))[:, :, :bands])


def _ppm(image: Image.Image) -> Deep | None:
    """Of more than 8 bits, which Pillow would scale."""
    decoder, _, offset, args = image.tile[0]
    top = args[-1] if decoder in ("ppm", "ppm_plain") else 65535 if image.mode == "I" else 255
    if not isinstance(top, int) or top < 256 or image.mode not in ("I", "L", "RGB"):
        return None
    if decoder == "ppm_plain":
        raise ValueError(f"a plain PPM of numbers up to {top} is not read: save it as binary")
    shape = (image.height, image.width, 3 if image.mode == "RGB" else 1)

    def read() -> np.ndarray:
        count = shape[0] * shape[1] * shape[2]
        numbers = np.frombuffer(_content(image), ">u2", offset=offset)
        if len(numbers) < count:
            raise ValueError("it is truncated")
        return numbers[:count].reshape(shape).astype(np.uint16)

    return Deep(shape[2], np.dtype(np.uint16), None if top == 65535 else float(top), read)


def _jpeg2000(image: Image.Image) -> Deep | None:
    """Of more than 8 bits, which Pillow would shift."""
    image.fp.seek(0)
    head = image.fp.read(2**20)
    start = head.find(_SIZ)
    if start < 0 or len(head) < start + 43:
        return None
    bands, size = int.from_bytes(head[start + 40 : start + 42]), head[start + 42]
    signed, bits = size >> 7, (size & 127) + 1
    if bits <= 8:
        return None
    if bits > 16:
        raise ValueError(f"a JPEG 2000 of {bits} bits is not read")
    decode = _codec("jpeg2k_decode", "a JPEG 2000 of more than 8 bits")
    top = None if signed or bits == 16 else float(2**bits - 1)
    return Deep(bands, np.dtype(np.int16 if signed else np.uint16), top, lambda: decode(_content(image)))


def _avif(image: Image.Image) -> Deep | None:
    """Of 10 and 12 bits, which Pillow would scale."""
    image.fp.seek(0)
    head = image.fp.read(2**16)
    start = head.find(b"pixi")  # of the picture, which comes before its alpha
    bits = head[start + 9] if 0 <= start < len(head) - 9 else 8
    if bits <= 8:
        return None
    decode, bands = _codec("avif_decode", "an AVIF of more than 8 bits"), 1 if image.mode in ("L", "LA") else 3

    def read() -> np.ndarray:
        numbers = decode(_content(image), index=0)
        return numbers if numbers.ndim == 2 else numbers[:, :, :bands]

    return Deep(bands, np.dtype(np.uint16), float(2**bits - 1), read)


def _fits(image: Image.Image) -> Deep | None:
    """Integers with signs, scaled as the header says; Pillow gives them without signs, and not scaled."""
    image.fp.seek(0)
    head = image.fp.read(2**18)
    scale, zero = (_fits_number(head, key, default) for key, default in ((b"BSCALE", 1.0), (b"BZERO", 0.0)))
    if not image.mode.startswith("I;16") and (scale, zero) == (1.0, 0.0):
        return None
    if image.mode in ("I", "F", "L") or (scale, zero) not in ((1.0, 0.0), (1.0, 32768.0)):
        raise ValueError("a FITS with BSCALE or BZERO is read of 16-bit integers without signs alone")
    dtype = np.dtype(np.uint16 if zero else np.int16)

    def read() -> np.ndarray:
        image.load()
        numbers = np.asarray(image).astype(np.uint16, copy=False)
        return numbers ^ np.uint16(0x8000) if zero else numbers.view(np.int16)

    return Deep(1, dtype, None, read)


def _fits_number(head: bytes, key: bytes, default: float) -> float:
    found = re.search(rb"(?:^|[ \n])" + key.ljust(8) + rb"= *([-+.\dEeDd]+)", head)
    return float(found[1].replace(b"D", b"E")) if found else default


def _check_tiff(image: Image.Image) -> None:
    """Refuse what Pillow takes for something else. These are the files that `luna_vision.images.tiff` does not read."""
    tags = image.tag_v2
    bits = max(tags.get(_BITS_PER_SAMPLE, (1,)))
    deep = image.mode.startswith("I") or image.mode == "F"
    if bits > 8 and not deep:
        raise ValueError(
            f"Pillow gives 8 of its {bits} bits; others take 'luna-vision[streaming]' and colours it knows"
        )
    if (deep and tags.get(_PHOTOMETRIC) == 0) or (not deep and max(tags.get(_SAMPLE_FORMAT, (1,))) != 1):
        raise ValueError("Pillow gives other numbers than it holds; pip install 'luna-vision[streaming]' reads them")
    base = {1: 1, 3: 1, 2: 3, 5: 4, 6: 3, 8: 3}.get(tags.get(_PHOTOMETRIC), 1)
    samples, extras = tags.get(_SAMPLES, 1), tags.get(_EXTRA_SAMPLES, ())
    if samples > base and (len(extras) < samples - base or any(extra not in (1, 2, 999) for extra in extras)):
        raise ValueError(f"it has {samples} bands, and does not say that those after {base} are alpha")
