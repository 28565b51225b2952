"""From an image to what a model sees: sizes, the range [0, 1], normalisation. Nothing here is random."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .decode import read_image, to_channels
from .values import MASK, Raster, Values

__all__ = [
    "EvalTransform",
    "ImageTransform",
    "SeededTransform",
    "eval_transform",
    "per_channel",
    "resize",
    "resize_to",
    "shrink",
    "to_tensor",
]

# Images as `to_channels` returns them, and seed: 8 bits of Pillow, or float32 (H, W, C) in [0, 1]. Where pixels are
# missing, also `missing`, (H, W) bool; then the result is an image and the pixels that are missing in it, likewise.
ImageTransform = Callable[..., Any]

ALL = 1 - 1e-5  # the share of missing pixels, up to rounding, by which a resized pixel is missing


def per_channel(name: str, values: Sequence[float] | float, in_chans: int) -> tuple[float, ...]:
    """Bring statistics to ``in_chans`` numbers: one is repeated, three are averaged where there are not three channels.

    Raises:
        ValueError: Another number of them, one that is not finite, or a standard deviation that is not above 0.
    """
    values = (float(values),) if isinstance(values, int | float) else tuple(map(float, values))
    counts = sorted({1, 3, in_chans})
    if len(values) not in counts or not all(map(math.isfinite, values)) or (name == "std" and min(values) <= 0):
        allowed = " or ".join(map(str, counts))
        raise ValueError(f"{name} must be {allowed} finite numbers{', above 0' if name == 'std' else ''}, got {values}")
    if len(values) == in_chans:
        return values
    return (sum(values) / len(values),) * in_chans


class SeededTransform:
    """PIL image, or float32 array (H, W, C) in [0, 1], and seed to a normalised float32 tensor (C, H, W).

    Pixels that are NaN are missing. They count as the mean wherever they touch others, and are NaN in the result.

    Args:
        transform: The part before normalisation, which keeps an image in 8 bits if it is one.
        mean: Mean that is subtracted, by channel, for pixels in [0, 1].
        std: Standard deviation to divide by, by channel.
        erase: What is done to the normalised tensor, given the seed.
        values: What the numbers of files mean, for `to_channels`, which comes before; by default as `Values` has it.
    """

    def __init__(
        self,
        transform: ImageTransform,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        erase: Callable[[Tensor, int], Tensor] | None = None,
        values: Values | None = None,
    ) -> None:
        self.transform, self.erase = transform, erase
        self.values = values or Values(mean=tuple(mean))
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)

    def set_values(self, values: Values, std: Sequence[float]) -> None:
        """Change what the numbers of files mean, and their mean and standard deviation."""
        self.values = values
        self.mean = torch.tensor(values.mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)

    def __call__(self, image: Image.Image | np.ndarray, seed: int = 0) -> Tensor:
        missing = np.isnan(image).all(axis=2) if isinstance(image, np.ndarray) and image.dtype.kind == "f" else None
        if missing is None or not missing.any():
            image, missing = self.transform(image, seed), None
        else:
            image = np.where(missing[:, :, None], self.mean.numpy().reshape(-1), image)
            image, missing = self.transform(image, seed, missing=missing)
        tensor = to_tensor(image).sub_(self.mean).div_(self.std)
        tensor = tensor if self.erase is None else self.erase(tensor, seed)
        return tensor if missing is None else tensor.masked_fill_(torch.from_numpy(missing), torch.nan)


def eval_transform(
    size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    crop_pct: float | None = None,
    interpolation: str = "bicubic",
    values: Values | None = None,
) -> SeededTransform:
    """The deterministic transform of validation, test and prediction.

    Args:
        size: Height and width of the result in pixels.
        mean: As in :class:`SeededTransform`.
        std: As in :class:`SeededTransform`.
        crop_pct: None resizes the whole image to ``size``, whatever its aspect ratio. A number keeps the aspect ratio:
            the image is resized to cover ``size / crop_pct``, and the centre of ``size`` is cut out.
        interpolation: A name of Pillow's resampling filters.
        values: As in :class:`SeededTransform`.
    """
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct must be in (0, 1], got {crop_pct}")
    transform = partial(resize, size=size, crop_pct=crop_pct, interpolation=interpolation)
    return SeededTransform(transform, mean, std, values=values)


@dataclass(frozen=True)
class EvalTransform:
    """An image file, PIL image or array (H, W[, bands]) to a tensor (C, H, W), as `eval_transform` prepares it.

    Attributes:
        in_chans: C: 1 (grey) or 3 (RGB), to which images are converted, or the number of their bands.
        size: Height and width of the result in pixels. None leaves the image at its own.
        mean, std, crop_pct, interpolation: As in `eval_transform`.
        values: Likewise; by default as `Values` has it. A fill of "mask" is "mean" here: there is a tensor alone.

    Raises:
        SampleError: When called: the image cannot be decoded, or the model does not take its bands.
        FileNotFoundError: When called: there is no such file.
    """

    in_chans: int
    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    crop_pct: float | None = None
    interpolation: str = "bicubic"
    values: Values | None = None

    def __call__(self, image: str | os.PathLike | Image.Image | np.ndarray | Raster) -> Tensor:
        if isinstance(image, str | os.PathLike):
            image = read_image(image)
        values = self.values or Values(mean=self.mean)
        image = to_channels(image, self.in_chans, replace(values, fill="mean") if values.fill == MASK else values)
        if self.size is None:
            return SeededTransform(lambda image, seed: image, self.mean, self.std)(image)
        return eval_transform(self.size, self.mean, self.std, self.crop_pct, self.interpolation)(image)


# A function and not a lambda, as datasets must be picklable for worker processes that are spawned.
def resize(
    image: Image.Image | np.ndarray,
    seed: int,
    size: tuple[int, int],
    crop_pct: float | None = None,
    interpolation: str = "bicubic",
    missing: np.ndarray | None = None,
) -> Any:
    """Resize to ``size``, height and width in pixels, with antialiasing. The rest is as in :func:`eval_transform`.

    With the pixels that are ``missing`` (H, W), also returns those of the result, which cover no others.
    """
    if missing is not None:
        share = resize(missing[:, :, None].astype(np.float32), seed, size, crop_pct, "box")
        return resize(image, seed, size, crop_pct, interpolation), share[:, :, 0] > ALL
    (height, width), (rows, columns) = size, size
    if crop_pct is not None:
        own_height, own_width = image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)
        scale = max(height / own_height, width / own_width) / crop_pct
        rows, columns = max(height, round(own_height * scale)), max(width, round(own_width * scale))
    image = resize_to(image, (rows, columns), interpolation)
    top, left = round((rows - height) / 2), round((columns - width) / 2)
    if isinstance(image, np.ndarray):
        return image[top : top + height, left : left + width]
    return image.crop((left, top, left + width, top + height))


def shrink(image: Image.Image | np.ndarray, seed: int, max_size: int | None, missing: np.ndarray | None = None) -> Any:
    """Resize to a longer side of ``max_size`` pixels at most; the rest is as in :func:`resize`."""
    height, width = image.shape[:2] if isinstance(image, np.ndarray) else image.size[::-1]
    longer = max(height, width)
    if max_size is None or longer <= max_size:
        return image if missing is None else (image, missing)
    size = max(1, round(height * max_size / longer)), max(1, round(width * max_size / longer))
    return resize(image, seed, size, missing=missing)


def resize_to(
    image: Image.Image | np.ndarray, size: tuple[int, int], interpolation: str = "bicubic"
) -> Image.Image | np.ndarray:
    """Pillow's resizing, with antialiasing, to a height and width: of its image, or of float32 (H, W, C) in [0, 1]."""
    filter_ = Image.Resampling[interpolation.upper()]
    if isinstance(image, Image.Image):
        return image.resize(size[::-1], filter_)
    channels = [Image.fromarray(np.ascontiguousarray(channel)) for channel in np.moveaxis(image, 2, 0)]
    resized = [np.asarray(channel.resize(size[::-1], filter_)) for channel in channels]
    return np.stack(resized, axis=2).clip(0, 1)  # as 8 bits do not swing beyond black and white either


def to_tensor(image: Image.Image | np.ndarray | Tensor) -> Tensor:
    """8-bit image, (H, W) or (H, W, C) or a tensor (C, H, W), to float32 (C, H, W) in [0, 1]; floating point stays."""
    if not isinstance(image, Tensor):
        array = np.array(image)  # a copy: PIL's own buffer is read-only
        image = torch.from_numpy(array[:, :, None] if array.ndim == 2 else array).permute(2, 0, 1)
    if image.is_floating_point():
        return image.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    return image.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
