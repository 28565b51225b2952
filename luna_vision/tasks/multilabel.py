"""Classification with any number of labels an image.

Shapes: B batch, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MultilabelAveragePrecision, MultilabelF1Score

from .classification import ClassificationTask
from .outcomes import LabelsOutcome
from .prediction_files import LabelsCsv

MOST_WEIGHT = 20.0  # of a rare class with class_weights=balanced


class MultiLabelTask(ClassificationTask):
    """Train, evaluate and apply a timm classifier whose images may have several labels, or none.

    Batches are (images (B, C, H, W) float, targets (B, K) of 0 and 1). The loss is one binary cross-entropy per class,
    averaged over classes. Logged: ``train_loss``, ``lr``; ``val_loss``, ``val_map`` (mean over classes of average
    precision), ``val_f1`` (mean over classes at probability 0.5), and the same for ``test``; ``test_ap/NAME``, the
    average precision of each class.

    Args:
        loss: ``bce``.
        class_weights: weight of the images that have a class, in the loss of that class, or ``balanced``: their number
            against that of the others, at most 20.
        **kwargs: the arguments of `ClassificationTask`, but for ``mixup``, ``cutmix`` and ``bce_threshold``.

    Raises:
        ValueError: an argument out of its range, an unknown model, or (when a run starts) data that does not fit.
    """

    headline = ("test_map", "test mAP")
    predictions = LabelsCsv
    outcome = LabelsOutcome

    def __init__(self, *args: Any, loss: Literal["bce"] = "bce", **kwargs: Any) -> None:
        super().__init__(*args, loss=loss, **kwargs)
        hp = self.hparams
        for name in ("mixup", "cutmix", "bce_threshold"):
            if hp[name]:
                raise ValueError(f"{name} is for images with one label: leave it out")
        count = hp.num_classes
        average = MultilabelAveragePrecision(count, average="none", validate_args=False)
        self.average_precision = average
        both = {
            "map": MultilabelAveragePrecision(count, validate_args=False),
            "f1": MultilabelF1Score(count, validate_args=False),
        }
        collection = MetricCollection(both, compute_groups=False)
        self.metrics = torch.nn.ModuleDict({split: collection.clone(prefix=f"{split}_") for split in ("val", "test")})

    def check_targets(self, targets: Tensor) -> None:
        classes = self.hparams.num_classes
        if targets.ndim != 2 or targets.shape[1] != classes or not ((targets == 0) | (targets == 1)).all():
            raise ValueError(f"targets must be (B, {classes}) of 0 and 1, got {tuple(targets.shape)}")

    def _balanced(self, data: LightningDataModule | None) -> Tensor:
        if not hasattr(data, "positive_share"):
            raise ValueError("class_weights=balanced needs data whose labels are known without reading it: give a list")
        share = data.positive_share().clamp(min=1e-6)
        return ((1 - share) / share).clamp(max=MOST_WEIGHT)

    def compute_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Training loss of logits (B, K) for targets (B, K)."""
        smoothing = self.hparams.label_smoothing
        targets = targets * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(logits.float(), targets, pos_weight=self.class_weight)

    def _log_training(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        self.log_training(loss, len(logits))

    def _log_evaluation(self, split: str, logits: Tensor, targets: Tensor) -> None:
        loss = F.binary_cross_entropy_with_logits(logits, targets)
        self.log_evaluation_mean(f"{split}_loss", loss, len(logits))
        metrics, truth = self.metrics[split], targets.long()
        metrics.update(logits.sigmoid(), truth)
        for name, metric in metrics.items():
            self.log(name, metric, prog_bar=name.endswith("map"), batch_size=len(logits))
        if split == "test":
            self.average_precision.update(logits.sigmoid(), truth)

    def on_test_epoch_end(self) -> None:
        if self.average_precision.update_called:
            each = zip(self.class_labels(), self.average_precision.compute(), strict=True)
            self.log_dict({f"test_ap/{name}": value for name, value in each if value.isfinite()})
        self.average_precision.reset()

    def predict_step(self, batch: tuple[Tensor, list[str]], batch_idx: int) -> dict[str, Any]:
        """The probability of each class.

        Returns:
            ``ids`` list of B strings, ``probabilities`` (B, K) float in [0, 1]
        """
        images, ids = batch
        return {"ids": list(ids), "probabilities": self(images).float().sigmoid()}
