"""Objects in boxes, from label files."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from luna_vision.data.dense import DenseDataModule, Truth, check_image_size, size_of
from luna_vision.data.label_files import FORMATS, LabelSource, Place, in_words
from luna_vision.images.decode import read_image


class BoxSource(LabelSource):
    """(image, `Truth`) of the images in a `LabelSet`."""

    def holds(self, indices: np.ndarray) -> str:
        """How many boxes of each class these images have, in words."""
        return in_words(self.labels.names, self.labels.counts[indices], "boxes")

    def __getitem__(self, index: int) -> tuple[Any, Truth]:
        labels = self.labels.images[index]
        image = read_image(labels.file)
        check_image_size(size_of(image), labels.size, "the label")
        return image, Truth(labels.boxes, labels.labels, labels.crowd)


class DetectionDataModule(DenseDataModule):
    """Photos with boxes: COCO JSON, Pascal VOC XML or YOLO text, for :class:`~luna_vision.tasks.DetectionTask`.

    Targets are dicts as torchvision's detectors take them: boxes float32 (n, 4), left, top, right, bottom in pixels;
    labels int64 (n,) from 1; iscrowd int64 (n,), 1 for objects that scores ignore, which training leaves out.

    Where the labels of each format are expected, and what is a fault, is in docs/dense.md.

    Args:
        *args: ``root``, which may also be the data.yaml of YOLO, and ``format``: "coco", "voc" or "yolo".
        class_names: The classes in the order of their labels; by default those of the training labels. Objects of
            other classes are faults.
        **kwargs: The other arguments of :class:`~luna_vision.data.dense.DenseDataModule`.

    Raises:
        ValueError: On setup: faulty labels, an argument out of range, or more than one format.
        FileNotFoundError: On setup: ``root`` has no labels.
    """

    formats = FORMATS

    def __init__(self, *args: Any, class_names: list[str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._names = class_names

    @property
    def class_names(self) -> list[str]:
        return self._names or self.source("train").labels.names

    def open_labels(self, place: Place, split: str) -> BoxSource:
        return BoxSource(self.read_labels(place, split))

    @property
    def image_ids(self) -> dict[str, int | str]:
        """COCO's ids of the image files that were read so far."""
        sets = [source.labels for source in self._sources.values() if source is not None]
        return {image.file: id_ for labels in sets for image, id_ in zip(labels.images, labels.image_ids, strict=False)}

    def timm_cfg(self) -> dict[str, Any]:
        return super().timm_cfg() | {"category_ids": self.source("train").labels.category_ids}

    def target(self, truth: Truth) -> dict[str, Tensor]:
        return {
            "boxes": torch.from_numpy(np.ascontiguousarray(truth.boxes)),
            "labels": torch.from_numpy(truth.labels) + 1,
            "iscrowd": torch.from_numpy(truth.crowd).long(),
        }
