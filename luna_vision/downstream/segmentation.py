"""Semantic segmentation: torchvision's FCN head on one level of a `PyramidBackbone`.

Shapes: B batch, H x W pixels, K classes, the background counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.fcn import FCNHead

from luna_vision.images.transforms import per_channel

from .pyramid import PyramidBackbone, patches_of_images

__all__ = ["FCN", "segmenter_of"]


class FCN(nn.Module):
    """A fully convolutional head on a map of stride 4 (or another), upsampled to the pixels.

    Source: Long et al., "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015 (arXiv 1411.4038), in
    torchvision's form.
    """

    def __init__(
        self,
        backbone: PyramidBackbone,
        num_classes: int,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        """
        Args:
            backbone: Its first stride is the one that the head reads; it needs no more.
            num_classes: K.
            image_mean, image_std: By channel, for pixels in [0, 1]; the backbone's `pretrained_cfg` if None.

        Raises:
            ValueError: Fewer than two classes.
        """
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, with the background, got {num_classes}")
        self.backbone = backbone
        self.classifier = FCNHead(backbone.out_channels, num_classes)
        cfg, in_chans = backbone.body.pretrained_cfg, backbone.arguments["in_chans"]
        mean, std = (per_channel(k, v or cfg[k], in_chans) for v, k in ((image_mean, "mean"), (image_std, "std")))
        self.register_buffer("image_mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(std).view(-1, 1, 1), persistent=False)

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
        if image_sizes is not None:  # padding is zero, as where an image is padded to whole patches
            pixels = patches_of_images(image_sizes, (height, width), (1, 1), images.device)
            images = images * pixels.view(-1, 1, height, width)
        maps = self.backbone(images, image_sizes)["0"]
        logits = self.classifier(maps)
        stride = self.backbone.strides[0]
        # the map covers whole patches: first to their pixels, then without those that the image has not
        size = (logits.shape[2] * stride, logits.shape[3] * stride)
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return logits[:, :, :height, :width]


def segmenter_of(hyper_parameters: Mapping[str, Any]) -> FCN:
    """The segmenter that a `luna_vision.tasks.SegmentationTask` of these hyperparameters trains, with initial weights.

    Its K is one more than the task's ``num_classes``: class 0 is the background.
    """
    hp = hyper_parameters
    pyramid = ([hp["stride"]], hp["pyramid_channels"])
    backbone = PyramidBackbone(hp["model_name"], *pyramid, in_chans=hp["in_chans"], **hp["model_kwargs"] or {})
    return FCN(backbone, hp["num_classes"] + 1)
