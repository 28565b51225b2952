"""An image as a model sees it, and the grid of its patches over it.

Shapes: h x w pixels of the picture that is drawn, H x W pixels of the model's input, H' x W' patches.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from luna_vision.images.decode import MODES, SampleError, read_image, to_channels, to_picture
from luna_vision.images.masks import no_masks, split_missing
from luna_vision.images.transforms import eval_transform, per_channel
from luna_vision.images.values import MASK, model_values
from luna_vision.models.luna_vit import LunaVit
from luna_vision.utils.device import to_device
from luna_vision.utils.text import printable

ImageLike = str | os.PathLike | Image.Image | np.ndarray
MAX_SIZE = 1024  # longer side in pixels, by default of the model's input and always of the picture


@dataclass(frozen=True)
class View:
    """An image as a model sees it, and as it is drawn.

    Attributes:
        name: The image's name in messages.
        picture: uint8 (h, w, 3), the image in colour, for drawing.
        pixels: (1, C, H, W), the model's input, normalised.
        patch_size: Sides of a patch in pixels, for a model that pads its input to whole patches; None if the grid
            covers exactly the input.
    """

    name: str
    picture: np.ndarray
    pixels: Tensor
    patch_size: tuple[int, int] | None

    def to_pixels(self, grid: np.ndarray) -> np.ndarray:
        """Values of patches (..., H', W') as values of the picture's pixels (..., h, w), without interpolation."""
        index = []
        for axis in (0, 1):
            length, patches, pixels = self.pixels.shape[axis - 2], grid.shape[axis - 2], self.picture.shape[axis]
            cell = self.patch_size[axis] if self.patch_size else length / patches
            index.append(((np.arange(pixels) + 0.5) * (length / pixels) / cell).astype(int).clip(max=patches - 1))
        return grid[..., index[0][:, None], index[1]]


def view(
    model: nn.Module,
    image: "ImageLike | View",
    max_size: int = MAX_SIZE,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    value_range: str | Sequence[float] | None = None,
    nodata: float | None = None,
    fill: float | str | None = None,
) -> View:
    """Prepare an image for a model.

    A Luna ViT sees the image at its own size, and a model for one size (most ViTs of timm) at that size. For any other
    model the sides are rounded up to multiples of its stride. `picture` always has the image's own aspect ratio.

    Args:
        model: A timm model. The picture of an image that is neither grey nor colour is the mean of its bands.
        image: An image file, a PIL image or an array (height, width[, bands]); a View is returned as it is.
        max_size: Larger images are first reduced to this longer side in pixels.
        mean: Mean by channel, for pixels in [0, 1]; that of the model's `pretrained_cfg` if None.
        std: Standard deviation by channel, likewise.
        value_range, nodata, fill: Meaning of numbers in files, see docs/pixels.md; by default that of the training.

    Raises:
        FileNotFoundError: There is no such file.
        SampleError: It is not an image that can be read.
        ValueError: An argument is out of its range.
    """
    if isinstance(image, View):
        return image
    if max_size < 1:
        raise ValueError(f"max_size must be at least 1 pixel, got {max_size}")
    cfg = model.pretrained_cfg
    in_chans = getattr(model, "in_chans", cfg["input_size"][0])
    name = printable(str(image)) if isinstance(image, str | os.PathLike) else "the image"
    if isinstance(image, str | os.PathLike):
        image = read_image(image)
    mean = per_channel("mean", cfg["mean"] if mean is None else mean, in_chans)
    std = per_channel("std", cfg["std"] if std is None else std, in_chans)
    values = model_values(cfg, mean, value_range, nodata, fill)
    try:
        own = to_channels(image, in_chans, values)
        # what is missing is black
        black = replace(values, mean=(0.0,), fill="mean" if values.fill == MASK else values.fill)
        original = to_channels(image, 3 if in_chans in MODES else in_chans, black)
        original = to_picture(original if in_chans in MODES else original.mean(axis=2, keepdims=True)).convert("RGB")
    except SampleError as error:
        raise SampleError(f"cannot use {name}: {error}") from error
    if min(original.size) < 1:
        raise SampleError(f"{name} has no pixels: {original.width} x {original.height}")

    height, width = _input_size(model, original.height, original.width, max_size)
    pixels = eval_transform((height, width), mean, std)(own, 0)[None]
    patch_size = tuple(model.patch_embed.patch_size) if isinstance(model, LunaVit) else None
    # a picture of fewer pixels than there are patches could not show them all
    patches = math.ceil(max(height, width) / min(patch_size)) if patch_size else 1
    picture = np.asarray(_shrink(original, max(MAX_SIZE, patches)))
    return View(name, picture, pixels, patch_size)


def _input_size(model: nn.Module, height: int, width: int, max_size: int) -> tuple[int, int]:
    """Height and width at which the model sees an image, in pixels."""
    scale = min(1.0, max_size / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    if isinstance(model, LunaVit):
        return size
    patch_embed = getattr(model, "patch_embed", None)
    if getattr(patch_embed, "strict_img_size", model.pretrained_cfg.get("fixed_input_size", False)):
        return tuple(getattr(patch_embed, "img_size", None) or model.pretrained_cfg["input_size"][1:])
    stride = max(info["reduction"] for info in model.feature_info)
    return tuple(math.ceil(side / stride) * stride for side in size)


def _shrink(image: Image.Image, max_size: int) -> Image.Image:
    scale = max_size / max(image.size)
    if scale >= 1:
        return image
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)


@torch.inference_mode()
def run(model: nn.Module, pixels: Tensor, method: str, **arguments) -> list:
    """Call a method of the model, in eval mode, with pixels on its device and in its precision, without those that are
    missing (NaN).

    Raises:
        ValueError: Some are missing, and the model takes no mask.
    """
    parameter = next(model.parameters())
    training = model.training
    if pixels.isnan().any():
        if not isinstance(model, LunaVit):
            raise ValueError(no_masks(type(model).__name__))
        pixels, valid = split_missing(pixels, model.patch_embed.patch_size)
        arguments["patch_valid"] = to_device(valid, parameter.device)
    model.eval()
    try:
        return getattr(model, method)(to_device(pixels, parameter.device, parameter.dtype), **arguments)
    finally:
        model.train(training)
