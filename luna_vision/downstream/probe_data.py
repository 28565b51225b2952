"""The labelled images of a probe: a training and a test set, both through the evaluation transform."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from luna_vision.data.images import TransformedDataset, describe_split, known_labels
from luna_vision.images.find import listed
from luna_vision.utils.errors import arguments_of

__all__ = ["DATA", "ProbeData", "check_classes", "open_data"]


DATA: dict[str, Callable[..., ImageDataModule]] = {
    "digits": DigitsDataModule,
    "fashion_mnist": FashionMNISTDataModule,
    "cifar10": CIFAR10DataModule,
    "cifar100": CIFAR100DataModule,
    "canvas": CanvasDataModule,
    "imagefolder": ImageFolderDataModule,
    "timm": TimmDataModule,
}


@dataclass
class ProbeData:
    """The data of a probe.

    Attributes:
        train, test: Loaders of (images, labels), in the order of the data.
        train_labels: The labels of the training images; None if they cannot be known without reading the images.
        module: The data module.
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
    """All training images of a data module, and its test images (or validation images if it has no test images).

    Args:
        data: A key of `DATA`.
        arguments: Arguments of the data module.
        num_train: Training images, at most: always the same random choice, with the share of each class kept.
        num_test: Test images, at most, likewise.
        batch_size: Images in a batch.
        say: Called with lines of text about the images that were found and those that are left out.

    Raises:
        ValueError: Unknown data, an unknown argument of the module, no test images, a stream, or a class that has test
            images but no training images.
        OSError: The data do not exist, or cannot be fetched.
    """
    if data not in DATA:
        raise ValueError(f"data must be one of {', '.join(DATA)}, got {data!r}")
    with arguments_of(f"{arguments} do not fit {DATA[data].__name__}"):
        # with a fraction of 0 no training images are held out for validation
        module = DATA[data](val_fraction=0.0, batch_size=batch_size, **arguments)
    module.prepare_data()
    module.find_values()
    sources = {"training": module.make_source("train"), "test": module.make_source("test") or module.make_source("val")}
    labels, loaders = {}, {}
    for split, limit in (("training", num_train), ("test", num_test)):
        source = sources[split]
        if source is None or isinstance(source, IterableDataset):
            raise ValueError(f"{data} has no {split} images" if source is None else f"{data} must not be a stream")
        say(describe_split(split, source, module.num_classes))
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
    """Choose `count` of `total` positions, always the same; with labels, the share of each class is kept."""
    order = np.random.default_rng(0).permutation(total)
    if labels is not None:
        share = np.empty(total)
        for label in np.unique(labels):
            own = np.flatnonzero(labels[order] == label)
            share[own] = (np.arange(len(own)) + 0.5) / len(own)
        order = order[np.argsort(share, kind="stable")]
    return np.sort(order[:count])


def check_classes(train_labels: np.ndarray, test_labels: np.ndarray, names: Sequence[str] | None = None) -> None:
    """Raise a ValueError if a class has test images but no training images."""
    missing = np.setdiff1d(test_labels, train_labels)
    if len(missing):
        shown = listed([str(names[label] if names else label) for label in missing])
        raise ValueError(f"there are test images but no training images of class {shown}")
