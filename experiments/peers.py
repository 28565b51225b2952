"""Well-known networks in the tasks of this package, trained from scratch, to compare with."""

from typing import Any, Literal

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from luna_vision.tasks import DetectionTask, SegmentationTask

__all__ = ["ResNetDetectionTask", "UNetSegmentationTask"]


class ResNetDetectionTask(DetectionTask):
    """torchvision's Faster R-CNN with a ResNet and a feature pyramid, its own anchors, and images of their own size.

    Args:
        resnet: torchvision's name of it.
        *args, **kwargs: Those of `DetectionTask`; what they say of the backbone does not count.
    """

    def __init__(self, *args: Any, resnet: Literal["resnet18", "resnet50"] = "resnet18", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        transform = self.model.transform  # with which images are not resized
        # its batch norms are frozen by default, as suits trained weights
        backbone = resnet_fpn_backbone(
            backbone_name=resnet, weights=None, trainable_layers=5, norm_layer=nn.BatchNorm2d
        )
        hp = self.hparams
        self.model = FasterRCNN(backbone, hp.num_classes + 1, **(hp.detector_kwargs or {}))
        self.model.transform = transform


class UNetSegmentationTask(SegmentationTask):
    """The U-Net of segmentation_models_pytorch.

    Args:
        encoder: Its name there.
        *args, **kwargs: Those of `SegmentationTask`; what they say of the backbone does not count.
    """

    def __init__(self, *args: Any, encoder: str = "resnet18", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model = _UNet(encoder, self.hparams.in_chans, self.classes)


class _UNet(nn.Module):
    """A U-Net for images (B, C, H, W) of any size with pixels in [0, 1]."""

    def __init__(self, encoder: str, in_chans: int, classes: int) -> None:
        super().__init__()
        self.unet = smp.Unet(encoder, encoder_weights=None, in_channels=in_chans, classes=classes)
        for name, values in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor, image_sizes: Any = None) -> Tensor:
        height, width = images.shape[2:]
        images = F.pad((images - self.mean) / self.std, (0, -width % 32, 0, -height % 32))
        return self.unet(images)[:, :, :height, :width]
