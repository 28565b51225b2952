"""A tiny task and synthetic data, so that runs through Lightning take a second."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader, Dataset

from luna_vision.tasks import ClassificationTask


class Samples(Dataset):
    """Images whose class is a brightness; with ``ids``, (image, id) for prediction."""

    def __init__(self, count: int, num_classes: int, ids: bool = False) -> None:
        generator = torch.Generator().manual_seed(count)
        self.targets = torch.arange(count) % num_classes
        self.images = torch.randn(count, 1, 16, 16, generator=generator) * 0.1 + self.targets[:, None, None, None] / 4
        self.ids = ids

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int):
        return self.images[index], f"image{index}" if self.ids else self.targets[index]


class SyntheticData(LightningDataModule):
    def __init__(self, num_classes: int = 6, in_chans: int = 1, count: int = 32, batch_size: int = 8) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.class_names = [f"class{i}" for i in range(num_classes)]
        self.count = count
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Samples(self.count, self.num_classes), batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Samples(13, self.num_classes), batch_size=self.batch_size)

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(Samples(13, self.num_classes, ids=True), batch_size=self.batch_size)


def tiny_task(**arguments) -> ClassificationTask:
    """A task over test_luna_vit for :class:`SyntheticData`."""
    defaults = dict(
        model_name="test_luna_vit",
        num_classes=6,
        in_chans=1,
        model_kwargs={"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2},
    )
    return ClassificationTask(**{**defaults, **arguments})


def tiny_trainer(path, **arguments) -> Trainer:
    defaults = dict(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        default_root_dir=path,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    return Trainer(**{**defaults, **arguments})


def last_rows(path: Path) -> dict[tuple, dict[str, str]]:
    """What was logged last of each step, by the step and the names of the values, without the speed."""
    with path.open(newline="") as file:
        rows = [{k: v for k, v in row.items() if v and k != "images_per_s"} for row in csv.DictReader(file)]
    return {(int(row["step"]), *sorted(row)): row for row in rows}


@pytest.fixture
def data() -> SyntheticData:
    return SyntheticData()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
