"""Data modules of canvases for detection and segmentation: boxes and masks are known exactly."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torchvision.datasets as tvd
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from luna_vision.data.canvas import CanvasDataset, CanvasSpec
from luna_vision.data.canvas_module import ITEM_SOURCES
from luna_vision.data.datasets import download_torchvision
from luna_vision.data.sampling import EpochLoader, EpochSampler, EvalSampler, next_batch
from luna_vision.images.decode import to_channels

__all__ = ["CanvasDetectionDataModule", "CanvasSegmentationDataModule"]

Detection = tuple[list[Tensor], list[dict[str, Tensor]]]


class _Targets(Dataset):
    """(image (C, S, S) with pixels in [0, 1], target) of canvases; keys are indices, or (epoch, index)."""

    def __init__(self, canvases: CanvasDataset, in_chans: int) -> None:
        self.canvases, self.in_chans = canvases, in_chans

    def __len__(self) -> int:
        return len(self.canvases)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, dict[str, Tensor] | Tensor]:
        canvas = self.canvases.canvas(key[1] if isinstance(key, tuple) else key)
        image = np.asarray(to_channels(canvas.image, self.in_chans)).reshape(*canvas.image.shape[:2], -1)
        return torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32) / 255), self.target(canvas)

    def target(self, canvas):
        raise NotImplementedError


class _Boxes(_Targets):
    def target(self, canvas) -> dict[str, Tensor]:
        return {
            "boxes": torch.from_numpy(canvas.boxes).float(),
            "labels": torch.from_numpy(canvas.classes) + 1,
            "masks": torch.from_numpy(canvas.masks),
        }


class _Masks(_Targets):
    def target(self, canvas) -> Tensor:
        of_instance = np.concatenate([[0], canvas.classes + 1])
        return torch.from_numpy(of_instance[canvas.instances])


class CanvasModule(LightningDataModule):
    """Plain canvases of items from digits or Fashion-MNIST; those of the splits share no item.

    Canvases are drawn when asked for, each a function of ``canvas_seed``, its split and its index. There is no
    augmentation: there are as many canvases as are wanted. More than half of the items on a canvas are of one class,
    drawn for each canvas (`CanvasDataModule` asks which).

    Attributes:
        num_classes: 10, without the background.
        class_names: A name for each class.

    Args:
        source: Where items come from: "digits" or "fashion_mnist".
        root: Folder that contains FashionMNIST/raw; of no use to digits.
        download: Fetch Fashion-MNIST if it is missing.
        side: Side of the canvas in pixels.
        num_items: Items on a canvas.
        item_size: Side of an item in pixels.
        noise: Standard deviation of Gaussian noise in grey levels of 0 to 255.
        num_train: Canvases for training.
        num_val: Canvases for validation.
        num_test: Canvases for testing.
        canvas_seed: Seed of the canvases.
        in_chans: 1 (grey) or 3.
        batch_size: Images in a batch, on each device.
        eval_batch_size: The same for validation and test; ``batch_size`` if None.
        num_workers: Processes that draw canvases; 0 draws in the main process.
        seed: Seed of the shuffle.

    Raises:
        ValueError: An argument is out of range.
        FileNotFoundError: On setup: the data is not under ``root``.
    """

    num_classes = 10
    targets: type[_Targets]

    def __init__(
        self,
        source: str = "digits",
        root: str = "data",
        download: bool = False,
        side: int = 512,
        num_items: int = 5,
        item_size: int = 28,
        noise: float = 0.0,
        num_train: int = 1000,
        num_val: int = 100,
        num_test: int = 200,
        canvas_seed: int = 0,
        in_chans: int = 3,
        batch_size: int = 4,
        eval_batch_size: int | None = None,
        num_workers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if source not in ITEM_SOURCES:
            raise ValueError(f"unknown source {source!r}; choose from {', '.join(ITEM_SOURCES)}")
        if in_chans not in (1, 3):
            raise ValueError(f"in_chans must be 1 or 3, got {in_chans}")
        self.lengths = {"train": num_train, "val": num_val, "test": num_test}
        sizes = {f"num_{split}": length for split, length in self.lengths.items()} | {"batch_size": batch_size}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {num_workers}")
        self.spec = CanvasSpec(side, num_items, item_size, noise=noise)
        self.source, self.root, self.download = source, root, download
        self.canvas_seed, self.in_chans, self.seed = canvas_seed, in_chans, seed
        self.img_size = (side, side)
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size or batch_size, num_workers
        names = tvd.FashionMNIST.classes if source == "fashion_mnist" else range(10)
        self.class_names = [str(name) for name in names]
        self._datasets: dict[str, Dataset] = {}

    def timm_cfg(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data, in the words of timm's `pretrained_cfg`. The models prepare images."""
        return {"num_classes": self.num_classes, "label_names": list(self.class_names)}

    def prepare_data(self) -> None:
        if self.download and self.source == "fashion_mnist":
            download_torchvision(tvd.FashionMNIST, self.root)

    def setup(self, stage: str | None = None) -> None:
        splits = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, tuple(self.lengths))
        for split in splits:
            self.dataset(split)

    def dataset(self, split: str) -> Dataset:
        """The dataset of "train", "val" or "test"; its ``canvases.canvas(index)`` gives all that is known."""
        if split not in self._datasets:
            self._datasets[split] = self.make_dataset(split)
        return self._datasets[split]

    def make_dataset(self, split: str) -> Dataset:
        items = ITEM_SOURCES[self.source](self.root)[split]
        canvases = CanvasDataset(*items, self.spec, self.lengths[split], self.canvas_seed, split)
        return self.targets(canvases, self.in_chans)

    def train_dataloader(self) -> DataLoader:
        trainer, dataset = self.trainer, self.dataset("train")
        share = self._share()
        drop_last = len(dataset) >= self.batch_size * share["num_replicas"]
        sampler = EpochSampler(dataset, seed=self.seed, drop_last=drop_last, **share)
        arguments = {"sampler": sampler, "drop_last": drop_last}
        kind = partial(EpochLoader, next_batch=lambda: next_batch(trainer))
        return self._loader(dataset, self.batch_size, kind, **arguments)

    def val_dataloader(self) -> DataLoader:
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._eval_loader("test")

    def _eval_loader(self, split: str) -> DataLoader:
        dataset = self.dataset(split)
        sampler = EvalSampler(dataset, self.eval_batch_size, **self._share())
        return self._loader(dataset, sampler.batch_size, sampler=sampler)

    def _share(self) -> dict[str, int]:
        """This process's share of the data; processes that share an image have the same."""
        return (self.trainer is not None and self.trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}

    def _loader(
        self, dataset: Dataset, batch_size: int, kind: Callable[..., DataLoader] = DataLoader, **kwargs
    ) -> DataLoader:
        return kind(
            dataset=dataset,
            batch_size=batch_size,
            collate_fn=self.collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator(),
            **kwargs,
        )

    collate = staticmethod(default_collate)


def _lists(samples: list[tuple[Tensor, dict[str, Tensor]]]) -> Detection:
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


class CanvasDetectionDataModule(CanvasModule):
    """Canvases for detectors. Batches are (images, targets), as torchvision's detectors take them.

    Images are a list of (C, S, S) with pixels in [0, 1]; targets a list of dicts of boxes (n, 4) (left, top, right,
    bottom in pixels), labels (n,) from 1, and masks (n, S, S) bool. Arguments are those of :class:`CanvasModule`.
    """

    targets = _Boxes
    collate = staticmethod(_lists)


class CanvasSegmentationDataModule(CanvasModule):
    """Canvases for semantic segmentation. Batches are (images (B, C, S, S), masks (B, S, S) int64).

    Pixels are in [0, 1]; a mask is 0 where there is no item, else the item's class + 1. Arguments are those of
    :class:`CanvasModule`.
    """

    targets = _Masks
