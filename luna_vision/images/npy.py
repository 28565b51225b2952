"""Headers of .npy files, which say how large an array is before there is room for it."""

import math
import os
from typing import BinaryIO

import numpy as np

__all__ = ["MAGIC", "read_header", "read_npy"]

MAGIC = np.lib.format.MAGIC_PREFIX


def read_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, type and the place of the first number of an array in an open file.

    Raises:
        ValueError: It is no .npy file, or one of Python objects, of another shape than that of an image, in Fortran's
            order, or that ends too early.
    """
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    start = file.tell()
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not read")
    if len(shape) not in (2, 3):
        raise ValueError(f"an image has shape (height, width) or (height, width, bands), got {shape}")
    if fortran:
        raise ValueError("it is in Fortran's order, column by column: save it in C's")
    size = file.seek(0, os.SEEK_END)
    if start + math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"it ends before its {math.prod(shape)} numbers")
    return shape, dtype, start


def read_npy(file: BinaryIO, max_pixels: int) -> np.ndarray:
    """An array (H, W) or (H, W, c) as a whole.

    Raises:
        ValueError: As `read_header`, or it has no pixels, other numbers, or more pixels.
    """
    shape, dtype, _ = read_header(file)
    if 0 in shape or dtype.kind not in "buif":
        raise ValueError(f"an image has pixels, integers or floating point, got shape {shape} of {dtype}")
    if shape[0] * shape[1] > max_pixels:
        raise ValueError(f"{shape[1]} x {shape[0]} pixels are more than max_pixels={max_pixels}")
    file.seek(0)
    array = np.lib.format.read_array(file, allow_pickle=False)
    return array.astype(dtype.newbyteorder("="), copy=False)
