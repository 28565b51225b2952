"""The labelled images of a probe: a training and a test set, both through the evaluation transform."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, Subset

from luna_vision.data import (
    CanvasDataModule,
    CIFAR10DataModule,
    CIFAR100DataModule,
    DigitsDataModule,
    FashionMNISTDataModule,
    ImageDataModule,
    ImageFolderDataModule,
    TimmDataModule,
)
from luna_vision.data.images import TransformedDataset, describe, known_labels
from luna_vision.images.find import listed, split_folder
from luna_vision.utils.errors import arguments_of

__all__ = ["DATA", "ProbeData", "check_classes", "open_data"]


class FolderPair(ImageFolderDataModule):
    """Photos in two folders, TRAIN/<class>/<image> and TEST/<class>/<image>.

    By default they are train and val in `root`, or train and test where there is no val.
    Arguments not listed here are those of `ImageFolderDataModule`.
    """

    def __init__(
        self, root: str = "data/imagenet", folders: Sequence[str | os.PathLike] | None = None, **kwargs: Any
    ) -> None:
        """
        Args:
            root: Folder of train and val.
            folders: The two folders, which may lie anywhere.
        """
        super().__init__(root=root, **kwargs)
        train, test = folders or (
            Path(self.root, "train"),
            split_folder(self.root, "val") or split_folder(self.root, "test") or Path(self.root, "val"),
        )
        self.folders = {"train": Path(train), "test": Path(test), "val": None}
        self.in_root = folders is None

    def folder(self, split: str) -> Path | None:
        return self.folders[split]

    def find_class_names(self) -> list[str]:
        for folder in (self.folders["train"], self.folders["test"]):
            if not folder.is_dir():
                raise FileNotFoundError(f"no folder {folder}: it must contain <class>/<images>")
        return super().find_class_names()

    def unused(self) -> list[str]:
        return super().unused() if self.in_root else []


DATA: dict[str, Callable[..., ImageDataModule]] = {
    "digits": DigitsDataModule,
    "fashion_mnist": FashionMNISTDataModule,
    "cifar10": CIFAR10DataModule,
    "cifar100": CIFAR100DataModule,
    "canvas": CanvasDataModule,
    "imagefolder": FolderPair,
    "timm": TimmDataModule,
}


@dataclass
class ProbeData:
    """What `open_data` returns.

    Attributes:
        train, test: Loaders of (images, labels), in the order of the data.
        train_labels: The labels of the training images, if they are to be had without the images.
        module: Where they come from.
    """

    train: DataLoader
    test: DataLoader
    train_labels: np.ndarray | None
    module: ImageDataModule


def open_data(
    data: str,
    arguments: dict[str, Any],
    num_train: int | None = None,
    num_test: int | None = None,
    batch_size: int = 128,
    say: Callable[[str], object] = lambda line: None,
) -> ProbeData:
    """All training images of a data module, and its test images (its validation images if it has no others).

    Args:
        data: A key of `DATA`.
        arguments: Of the data module.
        num_train: Training images at most, a fixed random choice with the classes in their proportions.
        num_test: The same of test images.
        batch_size: Images in a batch.
        say: Is told, line by line, what images there are and what is left out.

    Raises:
        ValueError: Unknown data, an argument that the module does not take, no test images, a stream, or test images of
            classes of which there are no training images.
        OSError: The data are not there, or cannot be fetched.
    """
    if data not in DATA:
        raise ValueError(f"data must be one of {', '.join(DATA)}, got {data!r}")
    with arguments_of(f"{arguments} do not fit {DATA[data].__name__}"):
        # everything that the module would hold out of the training images belongs to them here
        module = DATA[data](val_fraction=0.0, batch_size=batch_size, **arguments)
    module.prepare_data()
    module.find_values()
    sources = {"training": module.make_source("train"), "test": module.make_source("test") or module.make_source("val")}
    labels, loaders = {}, {}
    for split, limit in (("training", num_train), ("test", num_test)):
        source = sources[split]
        if source is None or isinstance(source, IterableDataset):
            raise ValueError(f"{data} has no {split} images" if source is None else f"{data} must not be a stream")
        say(describe(split, source, module.num_classes))
        dataset = TransformedDataset(
            source, module.eval_transform, module.in_chans, module.num_classes, name=f"{data} {split}"
        )
        labels[split] = known_labels(source)
        if limit is not None and limit < len(dataset):
            chosen = choose(limit, len(dataset), labels[split])
            dataset = Subset(dataset, chosen.tolist())
            labels[split] = labels[split][chosen] if labels[split] is not None else None
        loaders[split] = DataLoader(dataset, batch_size, num_workers=module.num_workers, pin_memory=module.pin_memory)
    if unused := module.unused():
        say(f"not used of {module.root}: {listed(unused)}")
    if labels["training"] is not None and labels["test"] is not None:
        check_classes(labels["training"], labels["test"], module.class_names)
    return ProbeData(loaders["training"], loaders["test"], labels["training"], module)


def choose(count: int, total: int, labels: np.ndarray | None) -> np.ndarray:
    """So many of all positions, sorted: the same ones each time, and with known labels the same share of each class."""
    order = np.random.default_rng(0).permutation(total)
    if labels is not None:
        share = np.empty(total)
        for label in np.unique(labels):
            own = np.flatnonzero(labels[order] == label)
            share[own] = (np.arange(len(own)) + 0.5) / len(own)
        order = order[np.argsort(share, kind="stable")]
    return np.sort(order[:count])


def check_classes(train_labels: np.ndarray, test_labels: np.ndarray, names: Sequence[str] | None = None) -> None:
    """Check that there is a training image of each class of the test images.

    Raises:
        ValueError: There is none of some class.
    """
    missing = np.setdiff1d(test_labels, train_labels)
    if len(missing):
        shown = listed([str(names[label] if names else label) for label in missing])
        raise ValueError(f"there are test images but no training images of class {shown}")
