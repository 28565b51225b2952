"""Detection and semantic segmentation on a feature pyramid of any timm model of one stride."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from lightning_utilities.core.imports import package_available
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.detection import MeanAveragePrecision

from luna_vision.downstream.detection import detector_of
from luna_vision.downstream.segmentation import segmenter_of
from luna_vision.models.factory import build_model, sized

from .base import TimmTask

Targets = list[dict[str, Tensor]]


class _PyramidTask(TimmTask):
    """A task on a pyramid of a timm model, which starts from the weights of a whole model."""

    pyramid: ClassVar[str]  # its name in self.model

    def __init__(self, *args: Any, lr: float = 5e-4, **kwargs: Any) -> None:
        super().__init__(*args, lr=lr, **kwargs)
        hp = self.hparams
        hp.num_classes = 10 if hp.num_classes is None else hp.num_classes
        hp.in_chans = 3 if hp.in_chans is None else hp.in_chans

    @property
    def timm_model(self) -> nn.Module:
        return self.model.get_submodule(self.pyramid).body

    def load_starting_weights(self, load: Callable[[nn.Module], None]) -> None:
        backbone = self.model.get_submodule(self.pyramid)
        full = build_model(**backbone.arguments)
        load(full)
        backbone.load_body(full)

    def _log_training(self, loss: Tensor, batch_size: int) -> None:
        self.log("train_loss", loss, batch_size=batch_size)
        self.log_epoch_mean("train_loss_epoch", loss, batch_size)
        self.log_learning_rate()


class DetectionTask(_PyramidTask):
    """Train and evaluate a torchvision detector on a pyramid of a timm model.

    Batches are (images, targets) as torchvision's detectors take them: a list of (C, H, W) with pixels in [0, 1], and a
    list of dicts of ``boxes`` (n, 4) in pixels and ``labels`` (n,) from 1. Logged: ``train_loss`` and its parts,
    ``lr``; ``val_map`` (mean average precision at IoU 0.50 to 0.95), ``val_map_50``, ``val_map_75``, and the same for
    ``test``.

    Args:
        detector: ``faster_rcnn`` or ``retinanet``.
        strides: strides of the pyramid, pixels; by default 4, 8, 16, 32.
        pyramid_channels: channels of the pyramid.
        anchor_sizes: side of the anchors at each stride, pixels; see ``luna_vision.downstream.detection``.
        min_size: shorter side that images are resized to, pixels.
        max_size: limit of their longer side, pixels, which makes the shorter one smaller.
        detector_kwargs: further arguments of torchvision's class.
        **kwargs: the arguments of `TimmTask`; by default 10 classes and 3 channels where the data does not say.

    Raises:
        ValueError: an argument out of its range, an unknown model, or (when a run starts) data that does not fit.
    """

    headline = ("test_map", "test mAP")
    pyramid = "backbone.pyramid_backbone"

    def __init__(
        self,
        *args: Any,
        detector: Literal["faster_rcnn", "retinanet"] = "faster_rcnn",
        strides: list[int] | None = None,
        pyramid_channels: int = 256,
        anchor_sizes: list[float] | None = None,
        min_size: int = 512,
        max_size: int = 1333,
        detector_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.model = detector_of(self.hparams)
        # not a module: it holds the boxes of all images, which do not belong into checkpoints
        self._metrics: dict[str, MeanAveragePrecision] = {}

    def check_start(self, optimizer: bool = True) -> None:
        if not package_available("pycocotools"):
            raise ValueError("detection needs pycocotools to compute mAP: pip install 'luna-vision[downstream]'")
        super().check_start(optimizer)

    def forward(self, images: list[Tensor]) -> Targets:
        """For each image (C, H, W) its boxes (n, 4), labels (n,) and scores (n,)."""
        return self.model(images)

    def check_batch(self, images: list[Tensor], targets: Targets) -> None:
        for target in targets:
            labels = target["labels"]
            if len(labels) and (labels.min() < 1 or labels.max() > self.hparams.num_classes):
                raise ValueError(
                    f"labels must be in [1, {self.hparams.num_classes}], got {int(labels.min())} to {int(labels.max())}"
                )

    def training_step(self, batch: tuple[list[Tensor], Targets], batch_idx: int) -> Tensor:
        images, targets = batch
        losses = self.model(images, targets)
        loss = sum(losses.values())
        self._log_training(loss.detach(), len(images))
        parts = {f"train_{name}": value.detach() for name, value in losses.items()}
        self.log_dict(parts, batch_size=len(images))
        return loss

    def evaluate(self, split: str, images: list[Tensor], targets: Targets) -> None:
        metric = self._metrics.get(split)
        if metric is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of more detections than the 100 that COCO counts
                metric = self._metrics[split] = MeanAveragePrecision().to(self.device)
        metric.warn_on_many_detections = False
        metric.update(self(images), [{k: t[k] for k in ("boxes", "labels")} for t in targets])

    def _finish(self, split: str) -> None:
        metric = self._metrics.pop(split, None)
        if metric is not None:
            found = metric.compute()
            values = {f"{split}_{name}": found[name].float().to(self.device) for name in ("map", "map_50", "map_75")}
            self.log_dict(values, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        self._finish("test")


class SegmentationTask(_PyramidTask):
    """Train and evaluate torchvision's FCN head on a pyramid of a timm model.

    Batches are (images (B, C, H, W) with pixels in [0, 1], masks (B, H, W) int64). In masks, 0 is the background, 1 to
    K are the classes, and 255 is ignored. Logged: ``train_loss``, ``lr``; ``val_loss``, ``val_miou`` (mean intersection
    over union of all classes, with the background), and the same for ``test``.

    Args:
        img_size: side of the images in pixels, or [height, width], for a model that is built for one size; by default
            that of the data.
        stride: stride of the map that the head reads, pixels.
        pyramid_channels: its channels.
        background_weight: weight of background pixels in the loss; below 1 where there are far more of them.
        **kwargs: the arguments of `TimmTask`; by default 10 classes and 3 channels where the data does not say.

    Raises:
        ValueError: an argument out of its range, an unknown model, or (when a run starts) data that does not fit.
    """

    headline = ("test_miou", "test mIoU")
    pyramid = "backbone"
    IGNORE = 255

    def __init__(
        self,
        *args: Any,
        img_size: int | list[int] | None = None,
        stride: int = 4,
        pyramid_channels: int = 256,
        background_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        hp = self.hparams
        if background_weight <= 0:
            raise ValueError(f"background_weight must be above 0, got {background_weight}")
        hp.model_kwargs = sized(hp.model_name, hp.model_kwargs, img_size)
        self.model = segmenter_of(hp)
        weight = torch.ones(hp.num_classes + 1)
        weight[0] = background_weight
        self.register_buffer("class_weight", weight, persistent=False)
        iou = {"num_classes": hp.num_classes + 1, "average": "macro", "ignore_index": self.IGNORE}
        self.metrics = nn.ModuleDict({f"{split}_miou": MulticlassJaccardIndex(**iou) for split in ("val", "test")})

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K + 1, H, W) of images (B, C, H, W)."""
        return self.model(images)

    def check_batch(self, images: Tensor, masks: Tensor) -> None:
        hp = self.hparams
        if images.ndim != 4 or images.shape[1] != hp.in_chans:
            raise ValueError(f"images must be (B, {hp.in_chans}, H, W), got {tuple(images.shape)}")
        counted = masks[masks != self.IGNORE]
        if len(counted) and (counted.min() < 0 or counted.max() > hp.num_classes):
            low, high = int(counted.min()), int(counted.max())
            raise ValueError(f"masks must be 0 to {hp.num_classes}, or {self.IGNORE}, got {low} to {high}")

    def _loss(self, logits: Tensor, masks: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), masks, self.class_weight, ignore_index=self.IGNORE)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, masks = batch
        loss = self._loss(self(images), masks)
        self._log_training(loss.detach(), len(images))
        return loss

    def evaluate(self, split: str, images: Tensor, masks: Tensor) -> None:
        logits = self(images)
        self.log_evaluation_mean(f"{split}_loss", self._loss(logits, masks), len(images))
        metric = self.metrics[f"{split}_miou"]
        metric.update(logits.argmax(1), masks)
        self.log(f"{split}_miou", metric, prog_bar=True, batch_size=len(images))
