"""Image files and arrays as the image that a model reads.

Whatever reads images as a whole goes through here: training, prediction, embeddings, pictures. (Rows of images that are
never held as a whole are made by the same functions, in `luna_vision.images.pixels`.) What the numbers of a file mean
is settled in `luna_vision.images.values`.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..utils.errors import UserError, one_line
from ..utils.text import printable
from .limits import pixel_limit
from .npy import MAGIC as NPY
from .npy import read_npy
from .pillow import ORIENTATION, deep_numbers, nodata_of, open_image_file, orientation_of
from .tiff import NotReadHere, Turn, is_tiff, missing_library, read_tiff
from .values import MASK, SAMPLE_IMAGES, Levels, Raster, Values, to_unit

__all__ = [
    "GREY",
    "MODES",
    "SampleError",
    "decode_image",
    "plain",
    "read_image",
    "sample_rasters",
    "to_channels",
    "to_picture",
    "to_raster",
]


MODES = {1: "L", 3: "RGB"}  # Pillow's name of an image, by the number of channels that a model wants
GREY = ("1", "L", "LA", "La")  # Pillow's names of what is grey


class SampleError(UserError):
    """A sample cannot be used: its image does not decode, or its label is not one of the declared classes."""

    def __init__(self, message: str) -> None:
        # DataLoader re-raises a worker's exception with the worker's whole traceback as the message, whose last line
        # is "module.SampleError: what happened": keep what happened.
        super().__init__(message.rstrip().rsplit("\n", 1)[-1].rpartition(f"{__name__}.SampleError: ")[2])


def read_image(path: str | os.PathLike, max_pixels: int | None = None) -> Image.Image | Raster:
    """Decode an image file, see :func:`decode_image`; a missing one is a FileNotFoundError."""
    with open(path, "rb") as file:
        return decode_image(file, str(path), max_pixels)


def decode_image(file: BinaryIO, name: str, max_pixels: int | None = None) -> Image.Image | Raster:
    """Decode an image completely and turn it upright as its orientation says. Its content tells the format.

    Args:
        file: Where it is read from.
        name: What errors call it.
        max_pixels: The largest image that is decoded, height times width; by default what Pillow allows, twice
            ``Image.MAX_IMAGE_PIXELS``: 179 megapixels. Threads that give a number decode one after the other, see
            `luna_vision.images.limits`.

    Returns:
        Pillow's image of 8-bit grey or colour, with or without alpha; of more bits, of other bands and of files that
        name a number for no data, the numbers of the file.

    Raises:
        SampleError: The file is empty, is larger than ``max_pixels`` or is not an image that is read here.
        MemoryError: There is no room for it.
    """
    head, kind = file.read(16), ""
    if not head:
        raise SampleError(f"image file {name} is empty (0 bytes)")
    file.seek(0)
    limit = max_pixels if max_pixels is not None else 2 * (Image.MAX_IMAGE_PIXELS or 2**62)
    try:
        if head.startswith(NPY):
            return Raster(read_npy(file, limit), name=name)
        if is_tiff(head) and not missing_library():
            try:
                return _as_picture(read_tiff(file, name, limit))
            except NotReadHere as error:
                file.seek(0)
                kind = f"it has {error}, and Pillow does not read it: "
        with _open(file, max_pixels) as image:
            deep, nodata = deep_numbers(image), nodata_of(image)
            if deep is not None:
                if image.width * image.height > limit:  # which decoders other than Pillow's do not know
                    raise ValueError(f"{image.width} x {image.height} pixels are more than {limit}")
                turn = Turn.of(orientation_of(image))
                return Raster(np.ascontiguousarray(turn(deep.read())), deep.top, nodata, name)
            image.load()
            upright = ImageOps.exif_transpose(image)
            if nodata is None:
                return upright
            return Raster(np.asarray(plain(upright, image.mode in GREY)), nodata=nodata, name=name)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:  # whose message names the stream, not the file
        reason = f"{kind}not an image of a format that Pillow knows"
        raise SampleError(f"cannot decode image file {name}: {reason}") from error
    except Exception as error:  # decoders raise nearly anything: OSError, SyntaxError, struct.error, ...
        raise SampleError(f"cannot decode image file {name}: {kind}{one_line(error)}") from error


@contextmanager
def _open(file: BinaryIO, max_pixels: int | None) -> Iterator[Image.Image]:
    """`open_image_file` with a limit of its own."""
    if max_pixels is None:
        with open_image_file(file) as image:
            yield image
        return
    with pixel_limit(None):  # opening reads no pixels
        image = open_image_file(file)
    with image:
        if image.width * image.height > max_pixels:
            raise ValueError(f"{image.width} x {image.height} pixels are more than max_pixels={max_pixels}")
        with pixel_limit(max_pixels):  # for parts of the file that declare a size of their own
            yield image


def _as_picture(raster: Raster) -> Image.Image | Raster:
    """Pillow's image of what 8 bits of grey or colour hold."""
    array = raster.array
    if array.dtype != np.uint8 or array.shape[2] not in MODES or raster.nodata is not None:
        return raster
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def to_raster(image: Image.Image | np.ndarray | Raster) -> Raster:
    """The numbers of an image that is decoded; those of 8 bits as grey or colour, without alpha.

    Raises:
        TypeError, ValueError: Of a mode of Pillow that it does not convert, or an array that is no image.
    """
    if isinstance(image, Raster):
        return image
    if isinstance(image, np.ndarray):
        if image.ndim not in (2, 3):
            raise ValueError(f"an array must have shape (height, width) or (height, width, bands), got {image.shape}")
        return Raster(image.astype(image.dtype.newbyteorder("="), copy=False))
    if image.mode.startswith("I;16"):
        return Raster(np.asarray(image).astype(np.uint16, copy=False))
    if image.mode in ("I", "F"):
        return Raster(np.asarray(image))
    return Raster(np.asarray(plain(image, grey=image.mode in GREY)))


def sample_rasters(count: int, read: Callable[[int], Image.Image | np.ndarray | Raster]) -> Iterator[Raster]:
    """The numbers of images of a data set of ``count``, `SAMPLE_IMAGES` of them at most, always the same.

    Images that cannot be read are left out: who uses them will tell.

    Args:
        count: Images there are.
        read: Decodes one, by its position.
    """
    for index in np.linspace(0, count - 1, min(count, SAMPLE_IMAGES)).round().astype(int):
        try:
            yield to_raster(read(int(index)))
        except (ValueError, OSError):
            continue


def plain(image: Image.Image, grey: bool) -> Image.Image:
    """An image of Pillow with 8 bits as grey or RGB; alpha is dropped."""
    if image.mode in ("P", "PA"):  # a palette may carry transparency, which Pillow only resolves by way of RGBA
        image = image.convert("RGBA")
    elif image.mode in ("La", "RGBa"):  # alpha is multiplied in
        image = image.convert(image.mode.upper())
    mode = "L" if grey else "RGB"
    return image if image.mode == mode else image.convert(mode)


def to_channels(
    image: Image.Image | np.ndarray | Raster, in_chans: int, values: Values | None = None
) -> Image.Image | np.ndarray:
    """Convert to the channels that a model reads; alpha is dropped, grey and colour are converted to each other, and an
    image of Pillow is turned upright.

    Args:
        image: Of Pillow, what `decode_image` returns, or an array (H, W) or (H, W, bands).
        in_chans: C.
        values: What the numbers mean; by default as :class:`~luna_vision.images.values.Values` has it.

    Returns:
        Grey or RGB of 8 bits, where the image has no more and `values` leave them as they are; else pixels in [0, 1],
        float32 (H, W, C), in which nothing is missing, or NaN is where `values.fill` is "mask".

    Raises:
        SampleError: Pillow does not convert it, the model does not take its bands, numbers are missing in it that
            `values` refuse to fill, or all are where they are to be masked.
    """
    values = values or Values()
    try:
        if isinstance(image, Image.Image) and image.getexif().get(ORIENTATION, 1) != 1:  # as a file is read
            image = ImageOps.exif_transpose(image)
        if isinstance(image, np.ndarray) and image.dtype == np.uint8:
            image = _as_picture(to_raster(image))
        if isinstance(image, Image.Image) and in_chans in MODES and values.keeps_8_bits:
            if not (image.mode.startswith("I") or image.mode == "F"):
                return plain(image, grey=in_chans == 1)
        raster = to_raster(image)
        levels = Levels(raster.name, default=values.value_range is None)
        unit = to_unit(raster.array, in_chans, values, raster.top, raster.nodata, levels)
    except (TypeError, ValueError) as error:  # of Pillow: a mode, such as LAB, or numbers of another kind
        raise SampleError(one_line(error)) from error
    levels.warn()
    if values.fill == MASK and np.isnan(unit).all():
        raise SampleError(f"{printable(raster.name)} has no pixel that is not missing")
    return unit


def to_picture(image: Image.Image | np.ndarray) -> Image.Image:
    """What `to_channels` returns, of grey or colour, as an image of 8 bits: to draw, and for what takes no other."""
    if isinstance(image, Image.Image):
        return image
    array = np.round(image * 255).astype(np.uint8)
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
