"""Pictures of training samples with their labels."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from PIL import Image
from torch import Tensor

from ..tasks.pictures import draw, to_pixels
from ..utils.errors import UserError


def samples(data: Any) -> Iterator[tuple[Tensor, Any]]:
    """(image, target) of the training batches of a data module, one by one."""
    for images, targets in data.train_dataloader():
        if not isinstance(images[0], Tensor):
            raise UserError(f"preview draws images that are held as a whole, and {type(data).__name__} has none")
        yield from zip(images, targets, strict=True)


def pictures(data: Any, count: int) -> list[tuple[Image.Image, tuple[int, int]]]:
    """The first training samples, drawn, and the height and width of each image."""
    names, background = list(data.class_names), bool(getattr(data, "background", False))
    transform = getattr(data, "train_transform", None)
    return [
        (draw(to_pixels(image, transform), target, names, background), tuple(image.shape[1:]))
        for image, target in islice(samples(data), count)
    ]


def sizes(found: list[tuple[Image.Image, tuple[int, int]]]) -> str:
    """The sizes of the images that the model gets, in words."""
    heights, widths = zip(*(size for _, size in found), strict=True)
    smallest, largest = f"{min(widths)} x {min(heights)}", f"{max(widths)} x {max(heights)}"
    return f"{len(found)} training images drawn, of {smallest} to {largest} pixels"
