"""torchvision's detectors on a `PyramidBackbone`, which masks the padding of batches of mixed sizes."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign

from luna_vision.utils.checks import check_option

from .pyramid import PyramidBackbone

__all__ = ["DETECTORS", "build_detector", "coco_content", "detector_of"]

ASPECT_RATIOS = (0.5, 1.0, 2.0)
# torchvision's class, the side of its anchors divided by the stride, and the sizes of anchors around that side
DETECTORS: dict[str, tuple[type[FasterRCNN | RetinaNet], int, tuple[float, ...]]] = {
    "faster_rcnn": (FasterRCNN, 8, (1,)),
    "retinanet": (RetinaNet, 4, (1, 2 ** (1 / 3), 2 ** (2 / 3))),
}
# arguments of torchvision's classes that `build_detector` sets
_SET_HERE = ("self", "backbone", "num_classes", "min_size", "max_size", "image_mean", "image_std", "kwargs")


class _Transform(GeneralizedRCNNTransform):
    """torchvision's resizing, normalisation and padding; the padded batch keeps the sizes as an attribute."""

    resizes = True

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict | None]:
        return super().resize(image, target) if self.resizes else (image, target)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> tuple[ImageList, list]:
        images, targets = super().forward(images, targets)
        images.tensors.image_sizes = images.image_sizes  # torchvision passes only this tensor to its backbone
        return images, targets


class _MaskedBackbone(nn.Module):
    """The backbone in torchvision's signature, with the sizes that the transform has stored."""

    def __init__(self, backbone: PyramidBackbone) -> None:
        super().__init__()
        self.pyramid_backbone = backbone
        self.out_channels = backbone.out_channels

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return self.pyramid_backbone(x, getattr(x, "image_sizes", None))


def _objects_alone(head: nn.Module, inputs: tuple, logits: Tensor) -> Tensor:
    """Labels begin at 1: class 0, the background of a Faster R-CNN, is of no object of a RetinaNet either."""
    return logits if head.training else logits.index_fill(-1, torch.tensor(0, device=logits.device), float("-inf"))


def build_detector(
    detector: str,
    backbone: PyramidBackbone,
    num_classes: int,
    anchor_sizes: Sequence[float] | None = None,
    min_size: int | None = 800,
    max_size: int = 1333,
    **kwargs,
) -> FasterRCNN | RetinaNet:
    """Build a torchvision detector.

    Call it as torchvision's: `model(images, targets)`, with a list of images (C, H, W) of any sizes, pixels in [0, 1],
    and in training a list of dicts with boxes (n, 4), corners in pixels, and labels (n,) from 1. It returns a dict of
    losses in training, and otherwise boxes, labels and scores of each image.

    Args:
        detector: A key of `DETECTORS`: "faster_rcnn" (Ren et al. 2015, arXiv 1506.01497) or "retinanet" (Lin et al.
            2017, arXiv 1708.02002).
        backbone: The backbone; images are normalised with its `mean` and `std`.
        num_classes: Classes without the background.
        anchor_sizes: Side of the anchors at each stride, pixels; if None, 8 times the stride, or 4 times for RetinaNet,
            which also has two larger sizes at each stride.
        min_size, max_size: Images are resized so that the shorter side is `min_size`, unless the longer would exceed
            `max_size`; pixels. With `min_size` None, images keep their size.
        **kwargs: Further arguments of torchvision's class.

    Raises:
        ValueError: An unknown detector or argument, or anchors that do not fit the strides.
    """
    check_option("detector", detector, DETECTORS)
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1 (the background does not count), got {num_classes}")
    if anchor_sizes is not None and len(anchor_sizes) != len(backbone.strides):
        raise ValueError(
            f"anchor_sizes must be one for each of the strides {list(backbone.strides)}, got {list(anchor_sizes)}"
        )
    cls, scale, octaves = DETECTORS[detector]
    allowed = [a for a in inspect.signature(cls.__init__).parameters if a not in _SET_HERE]
    for argument in kwargs:  # torchvision ignores unknown ones
        if argument not in allowed:
            raise ValueError(f"{detector} has no argument {argument!r}; it takes {', '.join(allowed)}")
    sides = anchor_sizes or [scale * stride for stride in backbone.strides]
    scales = tuple(tuple(side * octave for octave in octaves) for side in sides)
    anchors = AnchorGenerator(scales, (ASPECT_RATIOS,) * len(sides))
    if cls is FasterRCNN:
        pool = MultiScaleRoIAlign([str(i) for i in range(len(sides))], output_size=7, sampling_ratio=2)
        kwargs = {"rpn_anchor_generator": anchors, "box_roi_pool": pool} | kwargs
    else:
        kwargs = {"anchor_generator": anchors} | kwargs
    model = cls(_MaskedBackbone(backbone), num_classes + 1, **kwargs)
    if cls is RetinaNet:
        model.head.classification_head.register_forward_hook(_objects_alone)
    # whole patches of the coarsest map, so that all maps cover the same pixels
    divisor = max(*backbone.strides, backbone.stride)
    statistics = list(backbone.mean), list(backbone.std)
    model.transform = _Transform(min_size or max_size, max_size, *statistics, size_divisible=divisor)
    model.transform.resizes = min_size is not None
    return model


def detector_of(hyper_parameters: Mapping[str, Any]) -> FasterRCNN | RetinaNet:
    """The detector of a `luna_vision.tasks.DetectionTask` with these hyperparameters, with initial weights."""
    hp = hyper_parameters
    arguments = ({"img_size": hp["min_size"]} if hp["min_size"] else {}) | (hp["model_kwargs"] or {})
    pyramid = (hp["strides"] or [4, 8, 16, 32], hp["pyramid_channels"])
    backbone = PyramidBackbone(hp["model_name"], *pyramid, in_chans=hp["in_chans"], **arguments)
    sizes = {"min_size": hp["min_size"], "max_size": hp["max_size"]}
    arguments = (hp["detector"], backbone, hp["num_classes"], hp["anchor_sizes"])
    return build_detector(*arguments, **sizes, **(hp["detector_kwargs"] or {}))


def coco_content(
    records: Sequence[Mapping[str, Any]], names: Sequence[str], category_ids: Sequence[int]
) -> dict[str, Any]:
    """What was found in images as the content of a COCO file, each object with a ``score``.

    Args:
        records: Of each image ``file_name``, ``size`` (height, width), ``boxes`` (left, top, right, bottom in pixels),
            ``labels`` from 1 and ``scores`` as lists and, if it has a number, ``id``; else they count from 1.
        names, category_ids: Of the classes.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for record in records:
        (height, width), id_ = record["size"], record.get("id", len(images) + 1)
        images.append({"id": id_, "file_name": record["file_name"], "width": width, "height": height})
        columns = (record[name] for name in ("boxes", "labels", "scores"))
        for (left, top, right, bottom), label, score in zip(*columns, strict=True):
            box = [round(x, 3) for x in (left, top, right - left, bottom - top)]
            found = {"id": len(annotations) + 1, "image_id": id_, "category_id": category_ids[label - 1], "bbox": box}
            annotations.append(found | {"area": round(box[2] * box[3], 3), "iscrowd": 0, "score": round(score, 6)})
    categories = [{"id": id_, "name": name} for id_, name in zip(category_ids, names, strict=True)]
    return {"images": images, "categories": categories, "annotations": annotations}
