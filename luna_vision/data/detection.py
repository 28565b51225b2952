"""Objects in boxes, from label files."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luna_vision.data.dense import DenseDataModule, Truth, check_image_size, size_of
from luna_vision.data.faults import LabelFaults
from luna_vision.data.label_files import FORMATS, LAYOUTS, LabelSet, recognise
from luna_vision.images.decode import read_image
from luna_vision.images.find import listed
from luna_vision.utils.checks import check_option
from luna_vision.utils.errors import UserError


class BoxSource:
    """(image, `Truth`) of the images in a `LabelSet`.

    Attributes:
        labels: The label set.
        where, skipped: In words, where the labels are, and what they hold.
    """

    def __init__(self, labels: LabelSet) -> None:
        self.labels = labels
        self.where = labels.where
        counts = labels.counts
        each = listed([f"{name} {count}" for name, count in zip(labels.names, counts, strict=True) if count], 20)
        empty = sum(not len(image.labels) for image in labels.images)
        never = [name for name, count in zip(labels.names, counts, strict=True) if not count]
        self.skipped = f"; {counts.sum()} boxes ({each})" + f"; {empty} images without a box" * bool(empty)
        self.skipped += f"; never occur: {listed(never)}" if never else ""

    def __len__(self) -> int:
        return len(self.labels.images)

    def sample_file(self, index: int) -> str:
        return self.labels.images[index].file

    def presence(self) -> np.ndarray:
        return self.labels.presence

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
        root: Folder of the data; of YOLO also its data.yaml.
        format: "coco", "voc" or "yolo"; by default the one that ``root`` has.
        class_names: The classes in the order of their labels; by default those of the training labels. Objects of
            other classes are faults.
        **kwargs: The other arguments of :class:`~luna_vision.data.dense.DenseDataModule`.

    Raises:
        ValueError: On setup: faulty labels, an argument out of range, or more than one format.
        FileNotFoundError: On setup: ``root`` has no labels.
    """

    def __init__(
        self, root: str = "data", format: str | None = None, class_names: list[str] | None = None, **kwargs
    ) -> None:
        super().__init__(root=root, **kwargs)
        if format is not None:
            check_option("format", format, FORMATS)
        self._format, self._class_names = format, class_names

    @property
    def format(self) -> str:
        """A key of `luna_vision.data.label_files.FORMATS`."""
        if self._format is None:
            self._format = recognise(self.root)
        return self._format

    @property
    def class_names(self) -> list[str]:
        if self._class_names is None:
            self._class_names = self.source("train").labels.names
        return self._class_names

    def read(self, split: str) -> BoxSource | None:
        find, read = FORMATS[self.format]
        place = find(Path(self.root), split)
        if place is None and split == "train":
            raise FileNotFoundError(f"no training labels in {self.root} as {self.format}: it must be {LAYOUTS}")
        if place is None:
            return None
        names = self._class_names if split == "train" else self.class_names
        faults = LabelFaults(f"{type(self).__name__} {split}", self.max_error_share)
        labels = read(place, names, faults)
        faults.settle(len(labels.images) + int(labels.counts.sum()) + sum(map(len, faults.found.values())))
        if not labels.images or not labels.names:
            raise UserError(f"{place.labels} has no {'images' if labels.names else 'classes'}")
        return BoxSource(labels)

    @property
    def image_ids(self) -> dict[str, int]:
        """COCO's numbers of the image files that were read so far."""
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
