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
    """What both have in common: a pyramid of a timm model, and starting weights for that."""

    pyramid: ClassVar[str]  # where it is in self.model

    def _settle(self, num_classes: int | None, in_chans: int | None) -> None:
        """Have the hyperparameters say what is built."""
        self.hparams.num_classes = 10 if num_classes is None else num_classes
        self.hparams.in_chans = 3 if in_chans is None else in_chans

    def load_starting_weights(self, load: Callable[[nn.Module], None]) -> None:
        backbone = self.model.get_submodule(self.pyramid)
        full = build_model(**backbone.arguments)  # a checkpoint is of the whole model; here its end is left out
        load(full)
        backbone.load_body(full)

    def _count(self, loss: Tensor, batch_size: int) -> None:
        self.log("train_loss", loss, batch_size=batch_size)
        self.log_epoch_mean("train_loss_epoch", loss, batch_size)
        self.log_learning_rate()


class DetectionTask(_PyramidTask):
    """Train and evaluate a torchvision detector on a pyramid of a timm model.

    Batches are (images, targets) as torchvision's detectors take them: a list of (C, H, W) with pixels in [0, 1], and a
    list of dicts of ``boxes`` (n, 4) in pixels and ``labels`` (n,) from 1. Logged: ``train_loss`` and its parts,
    ``lr``; ``val_map`` (mean average precision at IoU 0.50 to 0.95), ``val_map_50``, ``val_map_75``; likewise for
    ``test``.

    Args:
        model_name: name for ``timm.create_model``; the ``luna_vit`` models are registered.
        num_classes: number of classes, the background not counted; in a run that of the data, else 10, by default.
        in_chans: number of image channels; in a run that of the data, else 3, by default.
        model_kwargs: further arguments of the model, such as ``mixer`` or ``drop_path_rate``.
        checkpoint: file to start the backbone from (timm, Lightning or safetensors). Not read when a run is resumed.
        init_from_vit: start the backbone from a plain ViT, see ``luna_vision.models.init_from_vit``.
        detector: ``faster_rcnn`` or ``retinanet``.
        strides: strides of the pyramid, pixels.
        pyramid_channels: channels of the pyramid.
        anchor_sizes: side of the anchors at each stride, pixels; see ``luna_vision.downstream.detection``.
        min_size: images are resized so that their shorter side is this, pixels.
        max_size: but their longer side not more than this, pixels.
        detector_kwargs: further arguments of torchvision's class.
        optimizer: name from ``timm.optim.list_optimizers()``.
        lr: peak learning rate.
        weight_decay: not applied to biases, norms and what the model's ``no_weight_decay()`` names.
        optimizer_kwargs: further arguments of the optimizer.
        scheduler: name of a timm schedule: cosine, constant, step, multistep, poly, tanh, wsd, rsqrt.
        schedule_by: move the learning rate after every optimizer step (``update``) or every epoch.
        warmup_epochs: length of the linear warm-up, part of ``max_epochs``.
        warmup_lr: learning rate at which the warm-up begins.
        min_lr: learning rate at the end.
        scheduler_kwargs: further arguments of ``timm.scheduler.create_scheduler_v2``; lengths in epochs.

    Raises:
        ValueError: an argument out of its range, an unknown model, or (when a run starts) data that does not fit.
    """

    headline = ("test_map", "test mAP")
    pyramid = "backbone.pyramid_backbone"

    def __init__(
        self,
        model_name: str = "luna_vit_tiny",
        num_classes: int | None = None,
        in_chans: int | None = None,
        model_kwargs: dict[str, Any] | None = None,
        checkpoint: str | None = None,
        init_from_vit: str | None = None,
        detector: Literal["faster_rcnn", "retinanet"] = "faster_rcnn",
        strides: list[int] | None = None,
        pyramid_channels: int = 256,
        anchor_sizes: list[float] | None = None,
        min_size: int = 512,
        max_size: int = 1333,
        detector_kwargs: dict[str, Any] | None = None,
        optimizer: str = "adamw",
        lr: float = 5e-4,
        weight_decay: float = 0.05,
        optimizer_kwargs: dict[str, Any] | None = None,
        scheduler: Literal["cosine", "constant", "step", "multistep", "poly", "tanh", "wsd", "rsqrt"] = "cosine",
        schedule_by: Literal["update", "epoch"] = "update",
        warmup_epochs: float = 0.0,
        warmup_lr: float = 1e-6,
        min_lr: float = 1e-6,
        scheduler_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self._settle(num_classes, in_chans)
        self.model = detector_of(self.hparams)
        # a plain dict: they hold the boxes of all images, which have no place in a checkpoint
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
        self._count(loss.detach(), len(images))
        parts = {f"train_{name}": value.detach() for name, value in losses.items()}
        self.log_dict(parts, batch_size=len(images))
        return loss

    def validation_step(self, batch: tuple[list[Tensor], Targets], batch_idx: int) -> None:
        self._evaluate("val", *batch)

    def test_step(self, batch: tuple[list[Tensor], Targets], batch_idx: int) -> None:
        self._evaluate("test", *batch)

    def _evaluate(self, split: str, images: list[Tensor], targets: Targets) -> None:
        metric = self._metrics.get(split)
        if metric is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of more detections than COCO counts: the best 100 are what counts
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

    Batches are (images (B, C, H, W) with pixels in [0, 1], masks (B, H, W) int64), 0 the background, K classes from 1,
    255 what does not count. Logged: ``train_loss``, ``lr``; ``val_loss``, ``val_miou`` (mean intersection over union of
    all classes, the background among them); likewise for ``test``.

    Args:
        model_name: name for ``timm.create_model``; the ``luna_vit`` models are registered.
        num_classes: number of classes, the background not counted; in a run that of the data, else 10, by default.
        in_chans: number of image channels; in a run that of the data, else 3, by default.
        img_size: side of the images in pixels, or [height, width], for a model that is built for one size; in a run
            that of the data by default.
        model_kwargs: further arguments of the model, such as ``mixer`` or ``drop_path_rate``.
        checkpoint: file to start the backbone from (timm, Lightning or safetensors). Not read when a run is resumed.
        init_from_vit: start the backbone from a plain ViT, see ``luna_vision.models.init_from_vit``.
        stride: stride of the map that the head reads, pixels.
        pyramid_channels: its channels.
        background_weight: weight of background pixels in the loss; below 1 where there are far more of them.
        optimizer: name from ``timm.optim.list_optimizers()``.
        lr: peak learning rate.
        weight_decay: not applied to biases, norms and what the model's ``no_weight_decay()`` names.
        optimizer_kwargs: further arguments of the optimizer.
        scheduler: name of a timm schedule: cosine, constant, step, multistep, poly, tanh, wsd, rsqrt.
        schedule_by: move the learning rate after every optimizer step (``update``) or every epoch.
        warmup_epochs: length of the linear warm-up, part of ``max_epochs``.
        warmup_lr: learning rate at which the warm-up begins.
        min_lr: learning rate at the end.
        scheduler_kwargs: further arguments of ``timm.scheduler.create_scheduler_v2``; lengths in epochs.

    Raises:
        ValueError: an argument out of its range, an unknown model, or (when a run starts) data that does not fit.
    """

    headline = ("test_miou", "test mIoU")
    pyramid = "backbone"
    IGNORE = 255

    def __init__(
        self,
        model_name: str = "luna_vit_tiny",
        num_classes: int | None = None,
        in_chans: int | None = None,
        img_size: int | list[int] | None = None,
        model_kwargs: dict[str, Any] | None = None,
        checkpoint: str | None = None,
        init_from_vit: str | None = None,
        stride: int = 4,
        pyramid_channels: int = 256,
        background_weight: float = 1.0,
        optimizer: str = "adamw",
        lr: float = 5e-4,
        weight_decay: float = 0.05,
        optimizer_kwargs: dict[str, Any] | None = None,
        scheduler: Literal["cosine", "constant", "step", "multistep", "poly", "tanh", "wsd", "rsqrt"] = "cosine",
        schedule_by: Literal["update", "epoch"] = "update",
        warmup_epochs: float = 0.0,
        warmup_lr: float = 1e-6,
        min_lr: float = 1e-6,
        scheduler_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self._settle(num_classes, in_chans)
        if background_weight <= 0:
            raise ValueError(f"background_weight must be above 0, got {background_weight}")
        self.hparams.model_kwargs = sized(model_name, model_kwargs, img_size)
        self.model = segmenter_of(self.hparams)
        weight = torch.ones(self.hparams.num_classes + 1)
        weight[0] = background_weight
        self.register_buffer("class_weight", weight, persistent=False)
        iou = {"num_classes": self.hparams.num_classes + 1, "average": "macro", "ignore_index": self.IGNORE}
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
        self._count(loss.detach(), len(images))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("val", *batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("test", *batch)

    def _evaluate(self, split: str, images: Tensor, masks: Tensor) -> None:
        logits = self(images)
        self.log_evaluation_mean(f"{split}_loss", self._loss(logits, masks), len(images))
        metric = self.metrics[f"{split}_miou"]
        metric.update(logits.argmax(1), masks)
        self.log(f"{split}_miou", metric, prog_bar=True, batch_size=len(images))
