"""Any dataset that timm's dataset factory reads."""

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import timm.data
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from luna_vision.data.base import ImageDataModule, train_or_val
from luna_vision.data.images import Source
from luna_vision.images.decode import decode_image
from luna_vision.images.find import check_class_names, listed
from luna_vision.utils.errors import one_line


class TimmSource:
    """(image, label) from timm's ImageDataset.

    NOTE timm's own ``__getitem__`` puts the next image in the place of one that does not decode.
    """

    def __init__(self, dataset: timm.data.ImageDataset) -> None:
        self.reader = dataset.reader
        self.targets = getattr(self.reader, "targets", None)
        if hasattr(self.reader, "class_to_idx") and hasattr(self.reader, "samples"):  # of folders
            self.targets = [label for _, label in self.reader.samples]

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file, label, *_ = self.reader[index]
        with file:
            return decode_image(file, self.sample_file(index)), -1 if label is None else label

    def sample_file(self, index: int) -> str:
        return self.reader.filename(index, absolute=True) or str(index)  # images of a database may have no files


class TimmDataModule(ImageDataModule):
    """Any dataset that ``timm.data.create_dataset`` reads: folders, tars, ``torch/``, ``hfds/``, ``wds/``, ``tfds/``.

    timm reads folders in its own way: the classes are the names of the innermost folders, in natural order ("2" before
    "10"), and all splits have the classes of the training split. Hidden names count. For photos of your own take
    :class:`~luna_vision.data.ImageFolderDataModule`.

    timm's readers shuffle streams (``wds/``, ``tfds/``, ``hfids/``) and share them out to processes. Streams need a
    ``val_split`` of their own. Their samples have no indices, so the content of an image seeds its augmentation.

    Args:
        name: Name for ``create_dataset``: "" for folders and tars, "torch/cifar10", "hfds/owner/name", ...
        num_classes: Number of classes.
        root: Folder of the data.
        train_split: Name of the training split.
        val_split: Name of the validation split; None holds ``val_fraction`` of the training split out.
        test_split: Name of the test split, if there is one.
        class_names: A name for each class; by default the names of the folders, else numbers.
        download: Fetch the data if it is missing, where timm can.
        dataset_args: Further arguments of ``create_dataset``, for example ``class_map`` for a folder.
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
        if name.lower() in ("torch/folder", "torch/image_folder"):
            raise ValueError(f"{name!r} is what ImageFolderDataModule reads; name='' has timm's order of the classes")
        self.name, self.num_classes, self.download = name, num_classes, download
        self.splits = {"train": train_split, "val": val_split, "test": test_split}
        self.dataset_args = dataset_args or {}
        self._given_names = class_names

    def prepare_data(self) -> None:
        if self.download:
            for split in filter(None, self.splits.values()):
                self._open(split, download=True)

    def make_source(self, split: str) -> Source | IterableDataset | None:
        held_out = split == "val" and self.splits["val"] is None
        name = self.splits["train" if held_out else split]
        if name is None:
            return None
        if split == "train" or held_out:
            data = self._train if self._in_files else self._open(name, is_training=split == "train")
        else:
            data = self._open(name)
        if isinstance(data, IterableDataset):
            if self.splits["val"] is None and self.val_fraction > 0:
                raise ValueError(
                    f"nothing can be held out of {self.name!r}, a stream: give val_split or val_fraction=0"
                )
            return None if held_out else data
        source = TimmSource(data) if isinstance(data, timm.data.ImageDataset) else data
        if split == "test" or self.splits["val"] is not None:
            return source
        return train_or_val(source, split, self.val_fraction)

    @property
    def _in_files(self) -> bool:
        """Whether the data are a folder or a tar, whose classes are the names of folders."""
        return "/" not in self.name

    @cached_property
    def _train(self) -> Dataset:
        """The training split of a folder or a tar."""
        data = self._open(self.splits["train"], is_training=True)
        names = list(getattr(data.reader, "class_to_idx", ()))  # of a folder
        if names and "class_map" not in self.dataset_args:
            check_class_names(names, data.reader.root)
            if len(names) != self.num_classes:
                raise ValueError(
                    f"num_classes={self.num_classes}, but {data.reader.root} has {len(names)} classes: {listed(names)}"
                )
        return data

    @property
    def _has_names(self) -> bool:
        return self._in_files and os.path.isdir(self.root) and "class_map" not in self.dataset_args

    @property
    def class_names(self) -> list[str]:
        if self._given_names is not None:
            return self._given_names
        return list(self._train.reader.class_to_idx) if self._has_names else list(map(str, range(self.num_classes)))

    def timm_cfg(self) -> dict[str, Any]:
        cfg = super().timm_cfg()
        if self._given_names is None and not self._has_names:
            del cfg["label_names"]  # numbers are no names
        return cfg

    def _open(self, split: str, download: bool = False, is_training: bool = False) -> Dataset:
        arguments = dict(self.dataset_args)
        if self._has_names and not is_training:
            arguments["class_map"] = self._train.reader.class_to_idx  # a split may lack some of the classes
        try:
            data = timm.data.create_dataset(
                self.name,
                root=self.root,
                split=split,
                download=download,
                is_training=is_training,
                batch_size=self.batch_size,
                seed=self.seed,
                **arguments,
            )
        except (AssertionError, RuntimeError, OSError) as error:
            raise FileNotFoundError(
                f"timm cannot open dataset {self.name!r}, split {split!r}, in {self.root}: {one_line(error)}"
            ) from error
        # without a folder for a split, timm takes all images in root
        if self._in_files and not is_training and Path(self._train.reader.root).is_relative_to(data.reader.root):
            raise ValueError(f"splits {self.splits['train']!r} and {split!r} in {self.root} are the same images")
        return data
