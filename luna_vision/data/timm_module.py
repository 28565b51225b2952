"""Any dataset that timm's dataset factory reads."""

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import timm.data
from PIL import Image
from timm.data.readers.class_map import load_class_map
from timm.utils.misc import natural_key
from torch.utils.data import Dataset, IterableDataset

from luna_vision.data.base import ImageDataModule, train_or_val
from luna_vision.data.folders import ClassFolder, numbered
from luna_vision.data.images import Source
from luna_vision.images.decode import decode_image
from luna_vision.images.find import VAL_NAMES, Folder, check_class_names, listed, split_folder, unused_folders, walk
from luna_vision.utils.errors import one_line


class TimmSource:
    """(image, label) from timm's ImageDataset.

    NOTE timm's own ``__getitem__`` puts the next image in the place of one that does not decode.
    """

    def __init__(self, dataset: timm.data.ImageDataset) -> None:
        self.reader = dataset.reader
        self.targets = getattr(self.reader, "targets", None)

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

    Folders are searched as by :class:`~luna_vision.data.ImageFolderDataModule`: hidden names do not count, and "val",
    "validation" and "valid" are one split. The classes are timm's: the innermost folders, in natural order ("2" before
    "10"). All splits have the classes of the training split, and ``root`` may be that split itself.

    timm's readers shuffle streams (``wds/``, ``tfds/``, ``hfids/``) and share them out to processes. Streams need a
    ``val_split`` of their own. Their samples have no indices, so the content of an image seeds its augmentation.

    Args:
        name: Name for ``create_dataset``: "" for folders and tars, "torch/cifar10", "hfds/owner/name", ...
        num_classes: Number of classes.
        root: Folder of the data.
        train_split: Name of the training split.
        val_split: Name of the validation split; None holds ``val_fraction`` of the training split out.
        test_split: Name of the test split; None tests the images of validation.
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
        self._numbers = [str(number) for number in range(num_classes)]
        self._given_names = class_names

    def prepare_data(self) -> None:
        if self.download:
            for split in filter(None, self.splits.values()):
                self._open(split, download=True)

    def make_source(self, split: str) -> Source | IterableDataset | None:
        if split == "test" and self.splits["test"] is None:
            split = "val"
        held_out = split == "val" and self.splits["val"] is None
        name = self.splits["train" if held_out else split]
        if name is None:
            return None
        data = self._open_folder(name) if self._in_folders else self._open(name, is_training=split == "train")
        if isinstance(data, IterableDataset):
            if self.splits["val"] is None and self.val_fraction > 0:
                raise ValueError(
                    f"nothing can be held out of {self.name!r}, a stream: give val_split or val_fraction=0"
                )
            return None if held_out else data
        if split != "train" and not held_out and self._is_training_data(name):
            raise ValueError(f"splits {self.splits['train']!r} and {name!r} in {self.root} are the same images")
        source = TimmSource(data) if isinstance(data, timm.data.ImageDataset) else data
        if split == "test" or self.splits["val"] is not None:
            return source
        return train_or_val(source, split, self.val_fraction)

    def _is_training_data(self, name: str) -> bool:
        """Whether a split is the training split: a tar, or a folder without folders of splits, has no others."""
        if self._in_folders:
            return self._folder(name) == self._folder(self.splits["train"])
        return os.path.isfile(self.root)

    # ---- folders

    @property
    def _in_folders(self) -> bool:
        return "/" not in self.name and os.path.isdir(self.root)

    def _folder(self, name: str) -> Path:
        """The folder of a split: root itself, if it has a folder for none of the splits."""
        found = {n: split_folder(self.root, "val" if n in VAL_NAMES else n) for n in self.splits.values() if n}
        if found[name] is None and any(found.values()):
            raise FileNotFoundError(f"there is no folder for the split {name!r} in {self.root}")
        return found[name] or Path(self.root)

    def _open_folder(self, name: str) -> ClassFolder:
        folder = self._folder(name)
        found = _innermost(folder)
        if "class_map" in self.dataset_args:  # which may leave out classes
            found = {name: at for name, at in found.items() if name in self._labels}
        return ClassFolder(folder, self._labels, found)

    @cached_property
    def _labels(self) -> dict[str, int]:
        """The label of each class."""
        train = self._folder(self.splits["train"])
        if "class_map" in self.dataset_args:
            try:
                return load_class_map(self.dataset_args["class_map"], str(train))
            except AssertionError as error:
                raise FileNotFoundError(one_line(error)) from error
        names = list(_innermost(train))
        if len(names) != self.num_classes:
            raise ValueError(f"num_classes={self.num_classes}, but {train} has {len(names)} classes: {listed(names)}")
        check_class_names(names, train)
        return numbered(names)

    @property
    def class_names(self) -> list[str]:
        if self._given_names is not None:
            return self._given_names
        return list(self._labels) if self._in_folders and "class_map" not in self.dataset_args else self._numbers

    def timm_cfg(self) -> dict[str, Any]:
        cfg = super().timm_cfg()
        if self.class_names is self._numbers:  # which are no names
            del cfg["label_names"]
        return cfg

    def unused(self) -> list[str]:
        used = [self._folder(name) for name in self.splits.values() if name] if self._in_folders else []
        return unused_folders(self.root, used) if used and Path(self.root) not in used else []

    # ---- all else

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


def _innermost(folder: Path) -> dict[str, list[Folder]]:
    """The folders with images, or without folders, below a folder: the classes by name, in timm's order.

    Raises:
        ValueError: There are none.
        OSError: A folder cannot be read.
    """
    found: dict[str, list[Folder]] = {}
    for at in sorted(walk(folder)):
        if at.path != str(folder) and (at.images or not at.folders):
            found.setdefault(Path(at.path).name, []).append(at)
    if not found:
        raise ValueError(f"no class folders in {folder}: expected {folder}/<class>/<images>")
    return dict(sorted(found.items(), key=lambda item: natural_key(item[0])))
