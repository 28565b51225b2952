"""torchvision's detectors on a `PyramidBackbone`, with the padding of mixed batches masked in the backbone."""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign

from luna_vision.images.transforms import per_channel

from .pyramid import PyramidBackbone

__all__ = ["DETECTORS", "build_detector", "detector_of"]

ASPECT_RATIOS = (0.5, 1.0, 2.0)
# arguments of torchvision's classes that are set here
_SET_HERE = ("self", "backbone", "num_classes", "min_size", "max_size", "image_mean", "image_std", "kwargs")


class _Sizes(threading.local):
    """The image sizes of the batch at hand: torchvision hands its backbone the padded batch and nothing else.

    Of each thread its own, as servers call one detector from several.
    """

    value: list[tuple[int, int]] | None = None

    def __reduce__(self) -> tuple[type, tuple]:  # what is at hand is not copied or pickled; threads cannot be
        return _Sizes, ()


class _Transform(GeneralizedRCNNTransform):
    """torchvision's resizing, normalisation and padding, which leaves the sizes for the backbone."""

    def __init__(self, sizes: _Sizes, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.sizes = sizes

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> tuple[ImageList, list]:
        images, targets = super().forward(images, targets)
        self.sizes.value = images.image_sizes
        return images, targets


class _MaskedBackbone(nn.Module):
    """The backbone as torchvision calls it, with the sizes that the transform has left."""

    def __init__(self, backbone: PyramidBackbone, sizes: _Sizes) -> None:
        super().__init__()
        self.pyramid_backbone = backbone
        self.out_channels = backbone.out_channels
        self.sizes = sizes

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        sizes, self.sizes.value = self.sizes.value, None
        return self.pyramid_backbone(x, sizes)


def build_detector(
    detector: str,
    backbone: PyramidBackbone,
    num_classes: int,
    anchor_sizes: Sequence[float] | None = None,
    min_size: int = 800,
    max_size: int = 1333,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    **kwargs,
) -> FasterRCNN | RetinaNet:
    """A torchvision detector.

    It is called as torchvision's are: `model(images, targets)` with a list of images (C, H, W) of any sizes, pixels in
    [0, 1], and in training a list of dicts of boxes (n, 4), corners in pixels, and labels (n,) from 1; it returns a
    dict of losses, or for each image boxes, labels and scores.

    Args:
        detector: A key of `DETECTORS`: "faster_rcnn" (Ren et al. 2015, arXiv 1506.01497) or "retinanet" (Lin et al.
            2017, arXiv 1708.02002).
        backbone: Whose maps it reads.
        num_classes: Classes without the background.
        anchor_sizes: Side of the anchors at each stride, pixels; 8 times the stride (4 times for RetinaNet, which has
            three sizes at each) if None.
        min_size, max_size: Images are resized so that the shorter side is `min_size`, unless the longer would exceed
            `max_size`; pixels.
        image_mean, image_std: By channel, for pixels in [0, 1]; the backbone's `pretrained_cfg` if None.
        **kwargs: Further arguments of torchvision's class.

    Raises:
        ValueError: An unknown detector or argument, or anchors that do not fit the strides.
    """
    if detector not in DETECTORS:
        raise ValueError(f"detector must be one of {', '.join(map(repr, DETECTORS))}, got {detector!r}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1 (the background does not count), got {num_classes}")
    if anchor_sizes is not None and len(anchor_sizes) != len(backbone.strides):
        raise ValueError(
            f"anchor_sizes must be one for each of the strides {list(backbone.strides)}, got {list(anchor_sizes)}"
        )
    build, cls = DETECTORS[detector]
    allowed = [a for a in inspect.signature(cls.__init__).parameters if a not in _SET_HERE]
    for argument in kwargs:  # torchvision swallows those that it does not know
        if argument not in allowed:
            raise ValueError(f"{detector} has no argument {argument!r}; it takes {', '.join(allowed)}")
    sizes = _Sizes()
    cfg = backbone.body.pretrained_cfg
    in_chans = backbone.arguments["in_chans"]
    mean, std = (list(per_channel(k, v or cfg[k], in_chans)) for v, k in ((image_mean, "mean"), (image_std, "std")))
    # whole patches of the coarsest map, so that all maps cover the same pixels
    divisor = max(*backbone.strides, backbone.stride)
    transform = _Transform(sizes, min_size, max_size, mean, std, size_divisible=divisor)
    model = build(_MaskedBackbone(backbone, sizes), backbone.strides, num_classes, anchor_sizes, **kwargs)
    model.transform = transform
    return model


def detector_of(hyper_parameters: Mapping[str, Any]) -> FasterRCNN | RetinaNet:
    """The detector that a `luna_vision.tasks.DetectionTask` of these hyperparameters trains, with initial weights."""
    hp = hyper_parameters
    arguments = {"img_size": hp["min_size"]} | (hp["model_kwargs"] or {})
    pyramid = (hp["strides"] or [4, 8, 16, 32], hp["pyramid_channels"])
    backbone = PyramidBackbone(hp["model_name"], *pyramid, in_chans=hp["in_chans"], **arguments)
    sizes = {"min_size": hp["min_size"], "max_size": hp["max_size"]}
    arguments = (hp["detector"], backbone, hp["num_classes"], hp["anchor_sizes"])
    return build_detector(*arguments, **sizes, **(hp["detector_kwargs"] or {}))


def _faster_rcnn(
    backbone: nn.Module, strides: Sequence[int], num_classes: int, anchor_sizes: Sequence[float] | None, **kwargs
) -> FasterRCNN:
    sides = anchor_sizes or [8 * stride for stride in strides]
    anchors = AnchorGenerator(tuple((side,) for side in sides), (ASPECT_RATIOS,) * len(sides))
    pool = MultiScaleRoIAlign([str(i) for i in range(len(strides))], output_size=7, sampling_ratio=2)
    arguments = {"rpn_anchor_generator": anchors, "box_roi_pool": pool} | kwargs
    return FasterRCNN(backbone, num_classes + 1, **arguments)


def _retinanet(
    backbone: nn.Module, strides: Sequence[int], num_classes: int, anchor_sizes: Sequence[float] | None, **kwargs
) -> RetinaNet:
    sides = anchor_sizes or [4 * stride for stride in strides]
    octaves = tuple((side, side * 2 ** (1 / 3), side * 2 ** (2 / 3)) for side in sides)
    anchors = AnchorGenerator(octaves, (ASPECT_RATIOS,) * len(sides))
    return RetinaNet(backbone, num_classes + 1, **({"anchor_generator": anchors} | kwargs))


# how it is built, and torchvision's class
DETECTORS: dict[str, tuple[Callable[..., nn.Module], type[nn.Module]]] = {
    "faster_rcnn": (_faster_rcnn, FasterRCNN),
    "retinanet": (_retinanet, RetinaNet),
}
