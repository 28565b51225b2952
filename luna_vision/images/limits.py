"""Pillow's limit to the pixels of an image, which it has once for the whole process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

__all__ = ["pixel_limit"]

_lock = threading.RLock()


@contextmanager
def pixel_limit(pixels: int | None) -> Iterator[None]:
    """Have Pillow refuse images of more than twice so many pixels within the block, or none at all.

    The one place that sets ``Image.MAX_IMAGE_PIXELS``. It puts back what was there, and blocks of several threads come
    one after the other. A thread that decodes by itself meanwhile has the limit of the block: keep it short.
    """
    with _lock:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before
