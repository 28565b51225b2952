"""Pictures of training samples with their labels."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from ..data.dense import IGNORE
from ..tasks.prediction_files import voc_palette


def samples(data: Any) -> Iterator[tuple[Tensor, Any]]:
    """(image, target) of the training batches of a data module, one by one."""
    for images, targets in data.train_dataloader():
        yield from zip(images, targets, strict=True)


def pictures(data: Any, count: int) -> list[tuple[Image.Image, tuple[int, int]]]:
    """The first training samples, drawn, and the height and width of each image."""
    names, background = list(data.class_names), bool(getattr(data, "background", False))
    transform = getattr(data, "train_transform", None)
    mean, std = (getattr(transform, name, torch.tensor(value)) for name, value in (("mean", 0.0), ("std", 1.0)))
    drawn = []
    for image, target in islice(samples(data), count):
        pixels = (image * std + mean).clamp(0, 1)
        pixels = (pixels if len(pixels) == 3 else pixels[:1].expand(3, -1, -1)).mul(255).to(torch.uint8)
        drawn.append((_draw(pixels, target, names, background), tuple(image.shape[1:])))
    return drawn


def _draw(pixels: Tensor, target: Any, names: list[str], background: bool) -> Image.Image:
    """An image uint8 (3, H, W) with the target of its batch."""
    palette = voc_palette()
    if isinstance(target, dict):
        labels = target["labels"].tolist()
        colors = [tuple(palette[label].tolist()) for label in labels]
        words = [names[label - 1] for label in labels]
        if labels:
            pixels = draw_bounding_boxes(pixels, target["boxes"], words, colors, width=2)
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    if target.ndim == 2:  # a mask; what is ignored is white
        mask = target.numpy()
        colors = palette[(mask.astype(np.int64) + (not background)).clip(0, 255)]
        colors[mask == IGNORE] = 255
        return Image.blend(image, Image.fromarray(colors), 0.5)
    found = [names[i] for i in target.nonzero().flatten().tolist()] if target.ndim else [names[int(target)]]
    ImageDraw.Draw(image).text(
        (2, 2), ", ".join(found) or "no label", fill="white", stroke_width=2, stroke_fill="black"
    )
    return image


def sheet(images: list[Image.Image], columns: int, side: int) -> Image.Image:
    """Images in rows, none larger than `side` pixels."""
    for image in images:
        image.thumbnail((side, side))
    width, height = (max(image.size[axis] for image in images) + 4 for axis in (0, 1))
    rows = -(-len(images) // columns)
    out = Image.new("RGB", (min(columns, len(images)) * width, rows * height), "white")
    for at, image in enumerate(images):
        out.paste(image, (at % columns * width + 2, at // columns * height + 2))
    return out


def sizes(found: list[tuple[Image.Image, tuple[int, int]]]) -> str:
    """The sizes of the images that the model gets, in words."""
    heights, widths = zip(*(size for _, size in found), strict=True)
    smallest, largest = f"{min(widths)} x {min(heights)}", f"{max(widths)} x {max(heights)}"
    return f"{len(found)} training images drawn, of {smallest} to {largest} pixels"
