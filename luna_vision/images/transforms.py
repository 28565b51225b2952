"""From an image to what a model sees: sizes, the range [0, 1], normalisation. Nothing here is random."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

__all__ = ["ImageTransform", "SeededTransform", "eval_transform", "per_channel", "resize", "to_tensor"]

ImageTransform = Callable[[Image.Image, int], Image.Image | np.ndarray | Tensor]


def per_channel(name: str, values: Sequence[float], in_chans: int) -> tuple[float, ...]:
    """Bring statistics to ``in_chans`` numbers: one is repeated, three are averaged where there are not three channels.

    Raises:
        ValueError: Another number of them, one that is not finite, or a standard deviation that is not above 0.
    """
    values = tuple(float(v) for v in values)
    counts = sorted({1, 3, in_chans})
    if len(values) not in counts or not all(map(math.isfinite, values)) or (name == "std" and min(values) <= 0):
        allowed = " or ".join(map(str, counts))
        raise ValueError(f"{name} must be {allowed} finite numbers{', above 0' if name == 'std' else ''}, got {values}")
    if len(values) == in_chans:
        return values
    return (sum(values) / len(values),) * in_chans


class SeededTransform:
    """PIL image and seed to a normalised float32 tensor (C, H, W).

    Args:
        transform: The part that keeps the image in 8 bits.
        mean: Mean that is subtracted, by channel, for pixels in [0, 1].
        std: Standard deviation to divide by, by channel.
        erase: What is done to the normalised tensor, given the seed.
    """

    def __init__(
        self,
        transform: ImageTransform,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        erase: Callable[[Tensor, int], Tensor] | None = None,
    ) -> None:
        self.transform, self.erase = transform, erase
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)

    def __call__(self, image: Image.Image, seed: int = 0) -> Tensor:
        tensor = to_tensor(self.transform(image, seed)).sub_(self.mean).div_(self.std)
        return tensor if self.erase is None else self.erase(tensor, seed)


def eval_transform(
    size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...], crop_pct: float | None = None
) -> SeededTransform:
    """The deterministic transform of validation, test and prediction.

    Args:
        size: Height and width of the result in pixels.
        mean: As in :class:`SeededTransform`.
        std: As in :class:`SeededTransform`.
        crop_pct: None resizes the whole image to ``size``, whatever its aspect ratio. A number keeps the aspect ratio:
            the image is resized to cover ``size / crop_pct``, and the centre of ``size`` is cut out.
    """
    if crop_pct is None:
        return SeededTransform(partial(resize, size=size), mean, std)
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct must be in (0, 1], got {crop_pct}")
    return SeededTransform(partial(_resize_and_crop, size=size, crop_pct=crop_pct), mean, std)


# Functions and not lambdas, as datasets must be picklable for worker processes that are spawned.
def resize(image: Image.Image, seed: int, size: tuple[int, int]) -> Image.Image:
    """Resize the whole image to ``size``, height and width in pixels, bicubically and with antialiasing."""
    return v2.functional.resize(image, list(size), interpolation=InterpolationMode.BICUBIC)


def _resize_and_crop(image: Image.Image, seed: int, size: tuple[int, int], crop_pct: float) -> Image.Image:
    scale = max(size[0] / image.height, size[1] / image.width) / crop_pct
    resized = (max(size[0], round(image.height * scale)), max(size[1], round(image.width * scale)))
    image = v2.functional.resize(image, list(resized), interpolation=InterpolationMode.BICUBIC)
    return v2.functional.center_crop(image, list(size))


def to_tensor(image: Image.Image | np.ndarray | Tensor) -> Tensor:
    """8-bit image, (H, W) or (H, W, C) or a tensor (C, H, W), to float32 (C, H, W) in [0, 1]."""
    if not isinstance(image, Tensor):
        array = np.array(image)  # a copy: PIL's own buffer is read-only
        image = torch.from_numpy(array[:, :, None] if array.ndim == 2 else array).permute(2, 0, 1)
    return image.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
