"""Images: found, opened, decoded, converted, normalised. Needs no Lightning and no albumentations."""

from .formats import open_image

__all__ = ["open_image"]
