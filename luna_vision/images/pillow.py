"""Image files, opened by Pillow."""

import os
from typing import BinaryIO

from PIL import Image

__all__ = ["open_image_file"]

PROGRAMS = ("EPS", "WMF")  # which Pillow hands to Ghostscript and to Windows


def open_image_file(file: str | os.PathLike | BinaryIO) -> Image.Image:
    """`Image.open`, but for formats that another program would draw: they are programs, whatever a file is called."""
    Image.init()
    return Image.open(file, formats=[name for name in Image.OPEN if name not in PROGRAMS])
