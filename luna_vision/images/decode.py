"""Image files and arrays as 8-bit images of the channels that a model reads.

Whatever reads images goes through here: training, prediction, embeddings, pictures. (Images that are never held as a
whole are converted by the same rules, row by row, in `luna_vision.images.pixels`.)
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..utils.errors import UserError, one_line
from .limits import pixel_limit
from .pillow import open_image_file

__all__ = ["MODES", "SampleError", "decode_image", "read_image", "to_8_bit", "to_channels"]


MODES = {1: "L", 3: "RGB"}  # Pillow's name of an image, by the number of channels that a model wants


class SampleError(UserError):
    """A sample cannot be used: its image does not decode, or its label is not one of the declared classes."""

    def __init__(self, message: str) -> None:
        # DataLoader re-raises a worker's exception with the worker's whole traceback as the message, whose last line
        # is "module.SampleError: what happened": keep what happened.
        super().__init__(message.rstrip().rsplit("\n", 1)[-1].rpartition(f"{__name__}.SampleError: ")[2])


def read_image(path: str | os.PathLike, max_pixels: int | None = None) -> Image.Image:
    """Decode an image file, see :func:`decode_image`; a missing one is a FileNotFoundError."""
    with open(path, "rb") as file:
        return decode_image(file, str(path), max_pixels)


def decode_image(file: BinaryIO, name: str, max_pixels: int | None = None) -> Image.Image:
    """Decode an image completely and turn it upright as its EXIF orientation says.

    Args:
        file: Where it is read from.
        name: What errors call it.
        max_pixels: The largest image that is decoded, height times width; by default what Pillow allows, twice
            ``Image.MAX_IMAGE_PIXELS``: 179 megapixels. Threads that give a number decode one after the other, see
            `luna_vision.images.limits`.

    Raises:
        SampleError: The file is empty, is larger than ``max_pixels`` or is not an image that Pillow can decode.
    """
    if not file.read(1):
        raise SampleError(f"image file {name} is empty (0 bytes)")
    file.seek(0)
    try:
        with _open(file, max_pixels) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:  # whose message names the stream, not the file
        raise SampleError(f"cannot decode image file {name}: not an image of a format that Pillow knows") from error
    except Exception as error:  # Pillow's decoders raise nearly anything: OSError, SyntaxError, struct.error, ...
        raise SampleError(f"cannot decode image file {name}: {one_line(error)}") from error


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


def to_8_bit(array: np.ndarray) -> np.ndarray:
    """16-bit numbers, 0 to 65,535 in any integer type, scaled to uint8."""
    return (array // 257).astype(np.uint8)


def to_channels(image: Image.Image | np.ndarray, in_chans: int) -> Image.Image:
    """Convert to 8-bit grey (``in_chans=1``) or RGB (3); transparency is dropped, 16-bit greys are scaled to 8.

    Floating-point greys are taken as shares of white where none is above 1, else as 8-bit or, above 255, 16-bit values.

    Raises:
        SampleError: Pillow does not convert it.
    """
    try:
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        if image.mode.startswith("I"):  # 16-bit greys (Pillow reads some as 32-bit); convert() would clip them at 255
            image = Image.fromarray(to_8_bit(np.asarray(image).astype(np.int64).clip(0, 65535)))
        elif image.mode == "F":
            grey = np.nan_to_num(np.asarray(image))
            grey = grey * (255 if grey.max() <= 1 else 1 if grey.max() <= 255 else 1 / 257)
            image = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
        elif image.mode in ("P", "PA"):  # a palette may carry transparency, which Pillow only resolves by way of RGBA
            image = image.convert("RGBA")
        mode = MODES[in_chans]
        return image if image.mode == mode else image.convert(mode)
    except (TypeError, ValueError) as error:  # of Pillow: a mode, such as LAB, or numbers of another kind
        raise SampleError(one_line(error)) from error
