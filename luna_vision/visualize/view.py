"""What a model sees of an image, and how the grid of its patches lies over it.

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

from luna_vision.images.decode import SampleError, read_image, to_channels, to_picture
from luna_vision.images.transforms import eval_transform, per_channel
from luna_vision.images.values import model_values
from luna_vision.models.luna_vit import LunaVit
from luna_vision.utils.text import printable

ImageLike = str | os.PathLike | Image.Image | np.ndarray
MAX_SIZE = 1024  # longer side in pixels, of the model's input by default and of what is drawn


@dataclass(frozen=True)
class View:
    """An image as a model sees it, and as it is drawn.

    Attributes:
        name: What errors call the image.
        picture: uint8 (h, w, 3), the image in colour, for drawing.
        pixels: (1, C, H, W), the model's input, normalised.
        patch_size: Pixels of the input that a patch covers, where the model pads its input up to whole patches; None
            where the grid just covers the input.
        original_size: Height and width of the image in pixels, upright.
    """

    name: str
    picture: np.ndarray
    pixels: Tensor
    patch_size: tuple[int, int] | None
    original_size: tuple[int, int]

    def to_pixels(self, grid: np.ndarray) -> np.ndarray:
        """Lay values of patches (..., H', W') over the picture: (..., h, w). See :func:`to_pixels`."""
        return to_pixels(grid, tuple(self.pixels.shape[-2:]), self.patch_size, self.picture.shape[:2])


def to_pixels(
    grid: np.ndarray,
    input_size: tuple[int, int],
    patch_size: tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Give each pixel the value of the patch that it lies in; what lies in the padding is cropped away.

    Nothing is interpolated: a patch is shown as the rectangle that it is.

    Args:
        grid: (..., H', W').
        input_size: Height and width of the model's input in pixels, before padding.
        patch_size: As in :class:`View`.
        size: Height and width of the result, which shows the same area; that of the input if None.

    Returns:
        (..., height, width).
    """
    index = []
    for axis in (0, 1):
        length, patches = input_size[axis], grid.shape[axis - 2]
        cell = patch_size[axis] if patch_size else length / patches
        pixels = size[axis] if size else length
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

    A Luna ViT sees the image at its own size, a timm model for one size (most ViTs) at that size, and any other with
    sides rounded up to what its strides divide. `picture` has the image's own aspect ratio in every case.

    Args:
        model: A timm model of 1 or 3 channels.
        image: An image file, a PIL image or an array (height, width[, 3]); a View is returned as it is.
        max_size: Longer side in pixels to which larger images are reduced before the model sees them.
        mean: Mean by channel, of pixels in [0, 1], that is subtracted; that of the model's `pretrained_cfg` if None.
        std: Standard deviation to divide by, likewise.
        value_range, nodata, fill: What numbers in files mean, see docs/pixels.md; as in the model's training if None.

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
    if in_chans not in (1, 3):
        raise ValueError(f"pictures are made for models of 1 or 3 channels, and this one has {in_chans}")
    name = printable(str(image)) if isinstance(image, str | os.PathLike) else "the image"
    if isinstance(image, str | os.PathLike):
        image = read_image(image)
    mean = per_channel("mean", cfg["mean"] if mean is None else mean, in_chans)
    std = per_channel("std", cfg["std"] if std is None else std, in_chans)
    values = model_values(cfg, mean, value_range, nodata, fill)
    try:
        own = to_channels(image, in_chans, values)
        original = to_picture(to_channels(image, 3, replace(values, mean=(0.0,))))  # what is missing is black
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
    return View(name, picture, pixels, patch_size, (original.height, original.width))


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
    """Call a method of the model, in eval mode, with pixels on its device and in its precision."""
    parameter = next(model.parameters())
    training = model.training
    model.eval()
    try:
        return getattr(model, method)(pixels.to(parameter.device, parameter.dtype), **arguments)
    finally:
        model.train(training)
