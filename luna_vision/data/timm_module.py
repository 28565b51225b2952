"""Whatever timm's dataset factory reads."""

import os
from typing import Any

import timm.data
from PIL import Image
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import Dataset, IterableDataset

from luna_vision.data.base import ImageDataModule, train_or_val
from luna_vision.data.images import Source, decode_image, one_line


class TimmSource:
    """(image, label) from timm's ImageDataset.

    NOTE Not by its own ``__getitem__``, which puts the next image in the place of one that does not decode.
    """

    def __init__(self, dataset: timm.data.ImageDataset) -> None:
        self.reader = dataset.reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file, label, *_ = self.reader[index]
        with file:
            return decode_image(file, self.reader.filename(index)), -1 if label is None else label

    def sample_file(self, index: int) -> str:
        return self.reader.filename(index, absolute=True) or str(index)  # images of a database may have no files


class TimmDataModule(ImageDataModule):
    """Any dataset that ``timm.data.create_dataset`` reads: folders, tars, ``torch/``, ``hfds/``, ``wds/``, ``tfds/``.

    Streams (``wds/``, ``tfds/``, ``hfids/``) shuffle and share themselves out as timm's readers do, and need a
    ``val_split`` of their own; their augmentation derives from the content of the image, as they have no indices.

    Args:
        name: Name for ``create_dataset``: "" for folders and tars, "torch/cifar10", "hfds/owner/name", ...
        num_classes: Number of classes.
        root: Folder of the data.
        train_split: Name of the training split.
        val_split: Name of the validation split; None holds ``val_fraction`` of the training split out.
        test_split: Name of the test split, if there is one.
        class_names: A name for each class; by default their numbers.
        download: Fetch the data if it is missing, where timm can.
        dataset_args: Further arguments of ``create_dataset``.
        **kwargs: The arguments of :class:`ImageDataModule`.
    """

    MEAN, STD = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD

    def __init__(
        self,
        name: str,
        num_classes: int,
        root: str = "data",
        train_split: str = "train",
        val_split: str | None = "validation",
        test_split: str | None = None,
        class_names: list[str] | None = None,
        download: bool = False,
        dataset_args: dict[str, Any] | None = None,
        **kwargs,
    ) -> None:
        super().__init__(root=root, **kwargs)
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"class_names has {len(class_names)} names for num_classes={num_classes}")
        self.name, self.num_classes, self.download = name, num_classes, download
        self.class_names = class_names or [str(number) for number in range(num_classes)]
        self.splits = {"train": train_split, "val": val_split, "test": test_split}
        self.dataset_args = dataset_args or {}

    def prepare_data(self) -> None:
        if self.download:
            for split in filter(None, self.splits.values()):
                self._open(split, download=True)

    def make_source(self, split: str) -> Source | IterableDataset | None:
        held_out = split == "val" and self.splits["val"] is None
        name = self.splits["train" if held_out else split]
        if name is None:
            return None
        data = self._open(name, is_training=split == "train")
        if isinstance(data, IterableDataset):
            if self.splits["val"] is None and self.val_fraction > 0:
                raise ValueError(
                    f"nothing can be held out of {self.name!r}, a stream: give val_split or val_fraction=0"
                )
            return None if held_out else data
        if split != "train" and not held_out and self._is_training_data(data):
            raise ValueError(f"splits {self.splits['train']!r} and {name!r} in {self.root} are the same images")
        source = TimmSource(data) if isinstance(data, timm.data.ImageDataset) else data
        if split == "test" or self.splits["val"] is not None:
            return source
        return train_or_val(source, _labels(data), split, self.val_fraction)

    def _is_training_data(self, data: Dataset) -> bool:
        """timm falls back to all of root where there is no folder of the split's name; and one tar has no splits."""
        reader = getattr(data, "reader", None)
        if not isinstance(reader, ReaderImageFolder):
            return os.path.isfile(self.root)
        return reader.samples == self._open(self.splits["train"]).reader.samples

    def _open(self, split: str, download: bool = False, is_training: bool = False) -> Dataset:
        try:
            return timm.data.create_dataset(
                self.name,
                root=self.root,
                split=split,
                download=download,
                is_training=is_training,
                batch_size=self.batch_size,
                seed=self.seed,
                **self.dataset_args,
            )
        except (AssertionError, RuntimeError, OSError) as error:
            raise FileNotFoundError(
                f"timm cannot open dataset {self.name!r}, split {split!r}, in {self.root}: {one_line(error)}"
            ) from error


def _labels(data: Dataset) -> list[int]:
    """Labels without decoding images; all equal where they are not at hand, and the split is not stratified then."""
    reader = getattr(data, "reader", None)
    if isinstance(reader, ReaderImageFolder):
        return [label for _, label in reader.samples]
    targets = getattr(data if reader is None else reader, "targets", None)
    return [0] * len(data) if targets is None else [int(target) for target in targets]
