"""Semantic segmentation: torchvision's FCN head on one level of a `PyramidBackbone`.

Shapes: B batch, H x W pixels, K classes, the background counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.fcn import FCNHead

from .pyramid import PyramidBackbone, patches_of_images

__all__ = ["FCN", "has_background", "mask_numbers", "segmenter_of", "voc_palette"]


class FCN(nn.Module):
    """A fully convolutional head on a map of stride 4 (or another), upsampled to the pixels.

    Source: Long et al., "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015 (arXiv 1411.4038), in
    torchvision's form.
    """

    def __init__(self, backbone: PyramidBackbone, num_classes: int) -> None:
        """
        Args:
            backbone: The head reads its first map; it needs no other.
            num_classes: K.

        Raises:
            ValueError: Fewer than two classes.
        """
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, with the background, got {num_classes}")
        self.backbone = backbone
        self.classifier = FCNHead(backbone.out_channels, num_classes)
        self.register_buffer("image_mean", torch.tensor(backbone.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(backbone.std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor, image_sizes: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """
        Args:
            images: (B, C, H, W), pixels in [0, 1], padded below and to the right if their sizes differ.
            image_sizes: (height, width) of each image in pixels; see `PyramidBackbone`.

        Returns:
            Logits (B, K, H, W).
        """
        height, width = images.shape[2:]
        images = (images - self.image_mean) / self.image_std
        if image_sizes is not None:  # padding is zero, as in an image that is padded to whole patches
            pixels = patches_of_images(image_sizes, (height, width), (1, 1), images.device)
            images = images * pixels.view(-1, 1, height, width)
        logits = self.read(self.backbone.patches(images, image_sizes))
        return self.upsample(logits)[:, :, :height, :width]  # the map covers whole patches: cut away the padding

    def read(self, patches: Tensor) -> Tensor:
        """Logits (B, K, height, width) at the stride of the head, of the map (B, D, H', W') of the backbone.

        They look at the map of the head's stride 2 cells far, to each side.
        """
        return self.classifier(self.backbone.pyramid.levels[0](patches))

    def upsample(self, logits: Tensor) -> Tensor:
        """Logits at the stride of the head as logits of pixels, which look 1 cell far."""
        stride = self.backbone.strides[0]
        size = (logits.shape[2] * stride, logits.shape[3] * stride)
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def segmenter_of(hyper_parameters: Mapping[str, Any]) -> FCN:
    """The segmenter of a `luna_vision.tasks.SegmentationTask` with these hyperparameters, with initial weights.

    Its K is one more than the task's ``num_classes`` where class 0 is the background.
    """
    hp = hyper_parameters
    pyramid = ([hp["stride"]], hp["pyramid_channels"])
    backbone = PyramidBackbone(hp["model_name"], *pyramid, in_chans=hp["in_chans"], **hp["model_kwargs"] or {})
    return FCN(backbone, hp["num_classes"] + has_background(hp))


def has_background(hyper_parameters: Mapping[str, Any]) -> bool:
    """Whether class 0 is the background, which ``num_classes`` does not count; so in older checkpoints."""
    return hyper_parameters.get("background") is not False


def mask_numbers(
    count: int, values: Sequence[int] | Sequence[Sequence[int]] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The number of each class in masks that are written, and the colours that show them.

    Args:
        count: K.
        values: The number, or the colour, of each class in training masks; by default 0 to K - 1.

    Returns:
        (K,) uint8 or uint16, and (256, 3) uint8: the colours of the training masks, else those of Pascal VOC.
    """
    values = list(range(count)) if values is None else list(values)
    if isinstance(values[0], int):
        return np.array(values, np.uint16 if max(values) > 255 else np.uint8), voc_palette()
    palette = np.zeros((256, 3), np.uint8)
    palette[:count] = values
    return np.arange(count, dtype=np.uint8), palette


def voc_palette() -> np.ndarray:
    """uint8 (256, 3), the colours of Pascal VOC's masks: the bits of a number, spread over the three channels."""
    numbers = np.arange(256)
    palette = np.zeros((256, 3), np.int64)
    for bit in range(8):
        palette |= (numbers[:, None] >> np.arange(3) & 1) << (7 - bit)
        numbers = numbers >> 3
    return palette.astype(np.uint8)
