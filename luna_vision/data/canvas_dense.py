"""Canvases for detection and segmentation, with exact boxes and masks."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from luna_vision.data.canvas import Canvas, CanvasDataset
from luna_vision.data.canvas_module import CanvasDataModule
from luna_vision.data.dense import DenseDataModule
from luna_vision.images.decode import to_channels
from luna_vision.images.transforms import to_tensor


class CanvasTargets(Dataset):
    """(image (C, S, S) with pixels in [0, 1], target) of canvases; keys are indices or (epoch, index)."""

    def __init__(self, source: CanvasDataset, in_chans: int, target: Any) -> None:
        self.source, self.in_chans, self.target = source, in_chans, target

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, dict[str, Tensor] | Tensor]:
        canvas = self.source.canvas(key[1] if isinstance(key, tuple) else key)
        return to_tensor(to_channels(canvas.image, self.in_chans)), self.target(canvas)


class CanvasDenseDataModule(CanvasDataModule):
    """Base of the canvases with dense targets. Canvases are plain and not augmented; the models normalise them.

    Arguments are those of :class:`CanvasDataModule`.
    """

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
        lengths = {"num_train": num_train, "num_val": num_val, "num_test": num_test}
        batches = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "num_workers": num_workers}
        canvas = {"noise": noise, "canvas_seed": canvas_seed, "in_chans": in_chans, "seed": seed}
        super().__init__(source, root, download, side, num_items, item_size, **lengths, **batches, **canvas)

    @staticmethod
    def target(canvas: Canvas) -> dict[str, Tensor] | Tensor:
        """The truth about a canvas."""
        raise NotImplementedError

    def timm_cfg(self) -> dict[str, Any]:
        """The classes alone: the models prepare images themselves."""
        return {"num_classes": self.num_classes, "label_names": list(self.class_names)}

    def predict_dataloader(self) -> None:
        raise ValueError(f"{type(self).__name__} has no images to predict")

    def _tensors(self, source: CanvasDataset, split: str) -> Dataset:
        return CanvasTargets(source, self.in_chans, self.target)


class CanvasDetectionDataModule(CanvasDenseDataModule):
    """Canvases for detectors. Batches are (images, targets), as torchvision's detectors take them.

    Images are a list of (C, S, S) with pixels in [0, 1]. Targets are a list of dicts: boxes (n, 4) (left, top, right,
    bottom in pixels), labels (n,) from 1, and masks (n, S, S) bool. Arguments are those of :class:`CanvasDataModule`.
    """

    collate_fn = staticmethod(DenseDataModule.collate_fn)

    @staticmethod
    def target(canvas: Canvas) -> dict[str, Tensor]:
        return {
            "boxes": torch.from_numpy(canvas.boxes).float(),
            "labels": torch.from_numpy(canvas.classes) + 1,
            "masks": torch.from_numpy(canvas.masks),
        }


class CanvasSegmentationDataModule(CanvasDenseDataModule):
    """Canvases for semantic segmentation. Batches are (images (B, C, S, S), masks (B, S, S) int64).

    Pixels are in [0, 1]. A mask is 0 on the background, and the class + 1 on an item. Arguments are those of
    :class:`CanvasDataModule`.
    """

    @staticmethod
    def target(canvas: Canvas) -> Tensor:
        return torch.from_numpy(np.concatenate([[0], canvas.classes + 1])[canvas.instances])
