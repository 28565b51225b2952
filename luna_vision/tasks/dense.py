"""Detection and semantic segmentation on a feature pyramid of any timm model of one stride."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning_utilities.core.imports import package_available
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.detection import MeanAveragePrecision

from luna_vision.data.dense import IGNORE
from luna_vision.downstream.detection import detector_of
from luna_vision.downstream.segmentation import has_background, segmenter_of
from luna_vision.execution import set_band_checkpointing
from luna_vision.models import LunaVit
from luna_vision.models.checkpoints import load_whole
from luna_vision.models.factory import build_model, sized

from .base import TimmTask
from .classification import given_weights
from .multilabel import MOST_WEIGHT
from .outcomes import BoxOutcome, MaskOutcome
from .prediction_files import CocoPredictions, MaskPredictions

BAND_PATCHES = 4096  # of a band where the data is to be trained on in bands
Targets = list[dict[str, Tensor]]


class _PyramidTask(TimmTask):
    """A task on a pyramid of a timm model, which starts from the weights of a whole model."""

    pyramid: ClassVar[str]  # its name in self.model
    _by_bands = False

    def __init__(self, *args: Any, lr: float = 5e-4, **kwargs: Any) -> None:
        super().__init__(*args, lr=lr, **kwargs)
        hp = self.hparams
        hp.num_classes = 10 if hp.num_classes is None else hp.num_classes
        hp.in_chans = 3 if hp.in_chans is None else hp.in_chans

    @property
    def timm_model(self) -> nn.Module:
        return self.model.get_submodule(self.pyramid).body

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._by_bands = stage == "fit" and getattr(self.trainer.datamodule, "train_on", None) == "bands"

    def check_data(self, data: LightningDataModule | None, stage: str) -> None:
        super().check_data(data, stage)
        if stage == "fit" and getattr(data, "train_on", None) == "bands":
            if not isinstance(self.timm_model, LunaVit):
                raise ValueError(f"train_on=bands is for Luna ViTs, and {self.hparams.model_name} is none: give crops")
            set_band_checkpointing(self.timm_model, 1)  # raises where the model cannot; `_set_bands` says how many rows

    def _set_bands(self, images: list[Tensor] | Tensor) -> None:
        """Have the backbone run in bands, if the data is to be trained on so, as high as suits the widest image."""
        if self._by_bands:
            width = max(image.shape[-1] for image in images)
            columns = -(-width // self.model.get_submodule(self.pyramid).stride)
            set_band_checkpointing(self.timm_model, max(1, BAND_PATCHES // columns))

    def _log_classes(self, name: str, values: dict[str, Tensor]) -> None:
        self.log_dict({f"{name}/{label}": value.float().to(self.device) for label, value in values.items()})

    def load_trained_weights(self, checkpoint: str) -> None:
        if load_whole(self.model, checkpoint, self.hparams.model_name):
            rank_zero_info(f"weights loaded from {checkpoint}")
        else:
            super().load_trained_weights(checkpoint)

    def load_starting_weights(self, load: Callable[[nn.Module], None]) -> None:
        backbone = self.model.get_submodule(self.pyramid)
        full = build_model(**backbone.arguments)
        load(full)
        backbone.load_body(full)


class DetectionTask(_PyramidTask):
    """Train and evaluate a torchvision detector on a pyramid of a timm model.

    Batches are (images, targets) as torchvision's detectors take them: a list of (C, H, W) with pixels in [0, 1], and a
    list of dicts of ``boxes`` (n, 4) in pixels and ``labels`` (n,) from 1. Logged: ``train_loss`` and its parts,
    ``lr``; ``val_map`` (mean average precision at IoU 0.50 to 0.95), ``val_map_50``, ``val_map_75``, and the same for
    ``test``; ``test_ap/NAME``, the average precision of each class that is there. Targets may have ``iscrowd``
    (n,), 1 for objects that scores ignore; training must not have such objects.

    Args:
        detector: ``faster_rcnn`` or ``retinanet``.
        strides: strides of the pyramid, pixels; by default 4, 8, 16, 32.
        pyramid_channels: channels of the pyramid.
        anchor_sizes: side of the anchors at each stride, pixels; see ``luna_vision.downstream.detection``.
        min_size: shorter side that images are resized to, pixels; None keeps them as they are.
        max_size: limit of their longer side, pixels, which makes the shorter one smaller.
        detector_kwargs: further arguments of torchvision's class.
        **kwargs: the arguments of `TimmTask`; by default 10 classes and 3 channels where the data does not say.

    Raises:
        ValueError: an argument out of its range, an unknown model, or (when a run starts) data that does not fit.
    """

    headline = ("test_map", "test mAP")
    pyramid = "backbone.pyramid_backbone"
    predictions = CocoPredictions
    outcome = BoxOutcome

    def __init__(
        self,
        *args: Any,
        detector: Literal["faster_rcnn", "retinanet"] = "faster_rcnn",
        strides: list[int] | None = None,
        pyramid_channels: int = 256,
        anchor_sizes: list[float] | None = None,
        min_size: int | None = 512,
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
        self._set_bands(images)
        losses = self.model(images, targets)
        loss = sum(losses.values())
        self.log_training(loss, len(images), losses)
        return loss

    def evaluate(self, split: str, images: list[Tensor], targets: Targets) -> dict[str, Any]:
        metric = self._metrics.get(split)
        if metric is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of more detections than the 100 that COCO counts
                metric = self._metrics[split] = MeanAveragePrecision(class_metrics=split == "test").to(self.device)
        metric.warn_on_many_detections = False
        kept = ("boxes", "labels", "iscrowd")
        found = self(images)
        metric.update(found, [{k: t[k] for k in kept if k in t} for t in targets])
        return {"found": found}

    def _finish(self, split: str) -> None:
        metric = self._metrics.pop(split, None)
        if metric is not None:
            found = metric.compute()
            values = {f"{split}_{name}": found[name].float().to(self.device) for name in ("map", "map_50", "map_75")}
            self.log_dict(values, prog_bar=True)
            if split == "test":
                names, classes = self.class_labels(), found["classes"].reshape(-1).tolist()
                each = zip(classes, found["map_per_class"].reshape(-1), strict=True)
                self._log_classes("test_ap", {names[c - 1]: ap for c, ap in each if ap >= 0})

    def predict_step(self, batch: tuple[list[Tensor], list[str]], batch_idx: int) -> dict[str, Any]:
        """The objects of images.

        Returns:
            ``ids`` list of B strings, ``sizes`` list of (height, width), ``objects`` list of dicts of boxes (n, 4) in
            pixels, labels (n,) from 1, scores (n,)
        """
        images, ids = batch
        return {"ids": list(ids), "sizes": [tuple(image.shape[1:]) for image in images], "objects": self(images)}

    def on_validation_epoch_end(self) -> None:
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        self._finish("test")


def iou_of(confusion: Tensor) -> Tensor:
    """Intersection over union (K,) of pixels (K, K), truth by prediction; NaN for a class in neither."""
    hits = confusion.diag().double()
    return (hits / (confusion.sum(0) + confusion.sum(1) - hits)).float()


class SegmentationTask(_PyramidTask):
    """Train and evaluate torchvision's FCN head on a pyramid of a timm model.

    Batches are (images (B, C, H, W) with pixels in [0, 1], masks (B, H, W) integers), or two lists of images and masks
    of any sizes, which are padded; the padding is masked in the backbone and ignored in loss and scores. In masks, 0 is
    the background and 1 to K are the classes, or 0 to K - 1 are the classes where there is no background; 255 is
    ignored. Logged: ``train_loss``, ``lr``; ``val_loss``, ``val_miou`` (mean intersection over union of all classes,
    with the background), and the same for ``test``; ``test_iou/NAME``, that of each class.

    Args:
        img_size: side of the images in pixels, or [height, width], for a model that is built for one size; by default
            that of the data.
        stride: stride of the map that the head reads, pixels.
        pyramid_channels: its channels.
        background: whether class 0 is the background, which ``num_classes`` does not count; by default as the data
            says, else true.
        background_weight: weight of background pixels in the loss; below 1 where there are far more of them.
        class_weights: weight of each class in the training loss, the background among them, or ``balanced``: the median
            share of a class among the training pixels, divided by its own share, at most 20 (Badrinarayanan et al.,
            "SegNet", TPAMI 2017). Times ``background_weight``. ``val_loss`` is without.
        **kwargs: the arguments of `TimmTask`; by default 10 classes and 3 channels where the data does not say.

    Raises:
        ValueError: an argument out of its range, an unknown model, or (when a run starts) data that does not fit.
    """

    headline = ("test_miou", "test mIoU")
    pyramid = "backbone"
    predictions = MaskPredictions
    outcome = MaskOutcome

    def __init__(
        self,
        *args: Any,
        img_size: int | list[int] | None = None,
        stride: int = 4,
        pyramid_channels: int = 256,
        background: bool | None = None,
        background_weight: float = 1.0,
        class_weights: list[float] | Literal["balanced"] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        hp = self.hparams
        if background_weight <= 0:
            raise ValueError(f"background_weight must be above 0, got {background_weight}")
        hp.background = has_background(hp)
        if background_weight != 1 and not hp.background:
            raise ValueError(f"background_weight={background_weight} needs data with a background: leave it at 1")
        hp.model_kwargs = sized(hp.model_name, hp.model_kwargs, img_size)
        self.model = segmenter_of(hp)
        self.classes = hp.num_classes + hp.background
        weight = torch.ones(self.classes)
        if hp.background:
            weight[0] = background_weight
        self.register_buffer("class_weight", weight, persistent=False)
        self.register_buffer("train_weight", weight * given_weights(class_weights, self.classes), persistent=False)
        iou = {"num_classes": self.classes, "ignore_index": IGNORE, "validate_args": False}
        self.metrics = nn.ModuleDict({f"{split}_miou": MulticlassJaccardIndex(**iou) for split in ("val", "test")})

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.hparams.class_weights == "balanced":
            data = self.trainer.datamodule
            if not hasattr(data, "pixel_share"):
                raise ValueError("class_weights=balanced needs data that counts the pixels of its classes: give a list")
            share = data.pixel_share().clamp(min=1e-9)
            balanced = (share[share > 1e-9].median() / share).clamp(max=MOST_WEIGHT)
            self.train_weight.copy_(self.class_weight * balanced.to(self.class_weight))

    def check_data(self, data: LightningDataModule | None, stage: str) -> None:
        super().check_data(data, stage)
        if stage == "predict":  # which needs no labels
            return
        found, expected = getattr(data, "background", None), self.hparams.background
        if found is not None and found != expected:
            raise ValueError(f"the data has background={found}, but the model is built for background={expected}")

    def forward(self, images: Tensor | list[Tensor]) -> Tensor:
        """Logits (B, K, H, W) of images (B, C, H, W), or of a list of (C, H, W), padded to the largest."""
        if isinstance(images, Tensor):
            return self.model(images)
        sizes = [tuple(image.shape[1:]) for image in images]
        return self.model(_padded(images, 0.0), sizes if len(set(sizes)) > 1 else None)

    def check_batch(self, images: Tensor | list[Tensor], masks: Tensor | list[Tensor]) -> None:
        hp = self.hparams
        for image, mask in zip(images, masks, strict=True):
            if image.ndim != 3 or image.shape[0] != hp.in_chans:
                raise ValueError(f"images must be ({hp.in_chans}, H, W), got {tuple(image.shape)}")
            counted = mask[mask != IGNORE]
            if len(counted) and (counted.min() < 0 or counted.max() >= self.classes):
                low, high = int(counted.min()), int(counted.max())
                raise ValueError(f"masks must be 0 to {self.classes - 1}, or {IGNORE}, got {low} to {high}")

    def _loss(self, logits: Tensor, masks: Tensor, weight: Tensor) -> Tensor:
        total = F.cross_entropy(logits.float(), masks, weight, ignore_index=IGNORE, reduction="sum")
        counted = masks != IGNORE
        weights = weight[masks.where(counted, 0)] * counted
        return total / weights.sum().clamp(min=1e-6)  # the mean, and 0 where all is ignored, as a crop may be

    def training_step(self, batch: tuple[Any, Any], batch_idx: int) -> Tensor:
        images, masks = batch
        self._set_bands(images)
        loss = self._loss(self(images), _padded(masks, IGNORE).long(), self.train_weight)
        self.log_training(loss, len(images))
        return loss

    def evaluate(self, split: str, images: Tensor | list[Tensor], masks: Tensor | list[Tensor]) -> dict[str, Any]:
        logits, masks = self(images), _padded(masks, IGNORE).long()
        self.log_evaluation_mean(f"{split}_loss", self._loss(logits, masks, self.class_weight), len(images))
        metric = self.metrics[f"{split}_miou"]
        metric.update(logits.argmax(1), masks)
        self.log(f"{split}_miou", metric, prog_bar=True, batch_size=len(images))
        found = zip(logits, images, strict=True)
        return {"found": [one[:, : image.shape[1], : image.shape[2]] for one, image in found]}

    def on_test_epoch_end(self) -> None:
        metric = self.metrics["test_miou"]
        if not metric.update_called:
            return
        with metric.sync_context():
            iou = iou_of(metric.confmat)
        names = ["background"] * self.hparams.background + self.class_labels()
        self._log_classes("test_iou", {name: iou[c] for c, name in enumerate(names) if not iou[c].isnan()})

    def predict_step(self, batch: tuple[list[Tensor], list[str]], batch_idx: int) -> dict[str, Any]:
        """The most probable class of each pixel.

        Returns:
            ``ids`` list of B strings, ``masks`` list of uint8 (H, W)
        """
        images, ids = batch
        classes = self(images).argmax(1).to(torch.uint8)
        found = zip(classes, images, strict=True)
        return {"ids": list(ids), "masks": [mask[: image.shape[1], : image.shape[2]] for mask, image in found]}


def _padded(tensors: Tensor | list[Tensor], value: float) -> Tensor:
    """A list of (..., H, W) as one tensor (B, ..., H, W), filled up below and to the right."""
    if isinstance(tensors, Tensor):
        return tensors
    height, width = (max(tensor.shape[axis] for tensor in tensors) for axis in (-2, -1))
    fill = [F.pad(t, (0, width - t.shape[-1], 0, height - t.shape[-2]), value=value) for t in tensors]
    return torch.stack(fill)
