"""Image classification with any timm model.

Shapes: B batch, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from luna_vision.data.images import known_labels
from luna_vision.execution import set_band_checkpointing
from luna_vision.images.masks import split_missing
from luna_vision.models import LunaVit
from luna_vision.models.factory import build_model, sized
from luna_vision.utils.checks import check_share
from luna_vision.utils.device import compile_blocks

from .base import TimmTask, check_sizes, leaves_missing
from .mixing import StepMixup
from .outcomes import ClassOutcome

Batch = tuple[Tensor, Tensor]


class ClassificationTask(TimmTask):
    """Train, evaluate and apply a timm classifier.

    Batches are (images (B, C, H, W) float, targets (B,) int64), and (images, ids) for prediction. Logged:
    ``train_loss`` and ``train_acc1`` (with ``_epoch``: the epoch's mean), ``lr``; ``val_loss``, ``val_acc1``, with more
    than five classes ``val_acc5``, and the same for ``test``. Accuracies are in [0, 1].

    Args:
        img_size: side of the images in pixels, or [height, width], for a model that is built for one size; by default
            that of the data.
        loss: ``ce`` (softmax cross-entropy, with soft targets from MixUp or CutMix) or ``bce`` (one binary
            cross-entropy per class, averaged over classes).
        label_smoothing: share of the target spread over all classes, in [0, 1).
        bce_threshold: with ``bce``, targets above this value become 1, others 0; None keeps them soft.
        class_weights: weight of each class in the training loss, or ``balanced``: inverse to the number of its training
            images, 1 on average over the images.
        layer_decay: learning rate factor from each layer to the one below; None trains all at the same rate.
        mixup: alpha of MixUp (arXiv 1710.09412); 0 is off.
        cutmix: alpha of CutMix (arXiv 1905.04899); 0 is off.
        mix_prob: probability that a batch is mixed.
        mix_switch_prob: probability of CutMix rather than MixUp where both are on.
        mix_mode: one draw for a batch, for each pair, or for each image.
        mix_seed: seed of the draws, which depend on it and on the step alone.
        compile: run the model through ``torch.compile``, in place, so that weights keep their names. ``auto`` compiles
            on CUDA only, as a CPU takes minutes for it. ``blocks`` compiles block by block, which takes a fraction of
            the time, as equal blocks share their code. Each size of images is compiled by itself. Off where the trainer
            detects anomalies.
        channels_last: keep images and convolutions in channels-last memory format.
        grad_checkpointing: save memory by recomputing activations in the backward pass.
        band_rows: for very large images: recompute as well, and run each block of a Luna ViT this number of rows of
            patches at a time (`luna_vision.execution.set_band_checkpointing`); 0 is off. Excludes
            ``grad_checkpointing`` and ``compile``.
        **kwargs: the arguments of `TimmTask`; without data, ``num_classes`` is the model's and ``in_chans`` is 3.

    Raises:
        ValueError: an argument out of its range, an unknown model, or (when a run starts) data that does not fit.
    """

    headline = ("test_acc1", "test accuracy")
    outcome = ClassOutcome

    def __init__(
        self,
        *args: Any,
        img_size: int | list[int] | None = None,
        loss: Literal["ce", "bce"] = "ce",
        label_smoothing: float = 0.0,
        bce_threshold: float | None = None,
        class_weights: list[float] | Literal["balanced"] | None = None,
        layer_decay: float | None = None,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_prob: float = 1.0,
        mix_switch_prob: float = 0.5,
        mix_mode: Literal["batch", "pair", "elem"] = "batch",
        mix_seed: int = 0,
        compile: bool | Literal["auto", "blocks"] = False,
        channels_last: bool = False,
        grad_checkpointing: bool = False,
        band_rows: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        hp = self.hparams
        if hp.num_classes is not None and hp.num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {hp.num_classes}")
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        # the hyperparameters say what was built
        hp.model_kwargs = sized(hp.model_name, hp.model_kwargs, img_size)
        self.model = build_model(hp.model_name, hp.num_classes, hp.in_chans, **hp.model_kwargs)
        hp.num_classes, hp.in_chans = self.model.num_classes, hp.in_chans or 3
        if grad_checkpointing:
            self.model.set_grad_checkpointing(True)
        if band_rows:
            self._set_bands()
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        weight = None if class_weights is None else given_weights(class_weights, hp.num_classes)
        self.register_buffer("class_weight", weight, persistent=False)
        self.bce = BinaryCrossEntropy(label_smoothing, target_threshold=bce_threshold) if loss == "bce" else None
        if self.bce is not None:  # `compute_loss` sets its weight, which does not belong into checkpoints
            self.bce.register_buffer("weight", None, persistent=False)
        self.mix = self._mixer()
        tops = (1, 5) if hp.num_classes > 5 else (1,)
        accuracy = partial(MulticlassAccuracy, hp.num_classes, average="micro", validate_args=False)
        accuracies = MetricCollection({f"acc{top}": accuracy(top_k=top) for top in tops})
        self.metrics = nn.ModuleDict({split: accuracies.clone(prefix=f"{split}_") for split in ("val", "test")})

    def _set_bands(self) -> None:
        hp = self.hparams
        for name in ("grad_checkpointing", "compile"):
            if hp[name]:
                raise ValueError(f"band_rows={hp.band_rows} and {name} do not go together: give one of them")
        if not isinstance(self.model, LunaVit):
            raise ValueError(f"band_rows is for Luna ViTs, and {hp.model_name} is none: set it to 0")
        set_band_checkpointing(self.model, hp.band_rows)

    def _mixer(self) -> StepMixup | None:
        hp = self.hparams
        for name in ("mixup", "cutmix"):
            if not 0 <= hp[name] < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {hp[name]}")
        check_share(mix_prob=hp.mix_prob, mix_switch_prob=hp.mix_switch_prob)
        if hp.mixup == 0 and hp.cutmix == 0:
            return None
        mixup = Mixup(
            mixup_alpha=hp.mixup,
            cutmix_alpha=hp.cutmix,
            prob=hp.mix_prob,
            switch_prob=hp.mix_switch_prob,
            mode=hp.mix_mode,
            label_smoothing=hp.label_smoothing,
            num_classes=hp.num_classes,
        )
        return StepMixup(mixup, hp.mix_seed)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.hparams.class_weights == "balanced":
            self.class_weight.copy_(self._balanced(self.trainer.datamodule))
        # in compiled code, autograd cannot say which operation has the anomaly
        if self.compiles() and not self.trainer._detect_anomaly:
            # At the first call, and each size by itself: in a backward pass for any size, Inductor fails to order the
            # strides of a grid ("cannot determine truth value of Relational").
            if self.hparams.compile == "blocks":
                compile_blocks(self.model, dynamic=False)
            else:
                self.model.compile(dynamic=False)

    def _balanced(self, data: LightningDataModule | None) -> Tensor:
        labels = known_labels(getattr(data.dataset("train"), "source", None)) if hasattr(data, "dataset") else None
        if labels is None:
            raise ValueError("class_weights=balanced needs data whose labels are known without reading it: give a list")
        counts = torch.bincount(torch.as_tensor(labels), minlength=self.hparams.num_classes)
        return len(labels) / (self.hparams.num_classes * counts.clamp(min=1))

    @property
    def takes_masks(self) -> bool:
        return isinstance(self.model, LunaVit)

    def check_data(self, data: LightningDataModule | None, stage: str) -> None:
        super().check_data(data, stage)
        # A Luna ViT takes any size. Loaded weights may be sharded, and have been checked before.
        if hasattr(data, "timm_cfg") and not isinstance(self.model, LunaVit) and not self._has_weights:
            sizes = getattr(data, "train_sizes", []) if stage == "fit" else []
            check_sizes(self.model, self.hparams.in_chans, [tuple(data.timm_cfg()["input_size"][1:]), *sizes])

    # ---- batches

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W), in which NaN is missing where the data leaves pixels missing."""
        if self._trainer is None or not leaves_missing(self.trainer.datamodule):
            return self.model(self.as_model_input(images))
        images, valid = split_missing(images, self.model.patch_embed.patch_size)
        return self.model(self.as_model_input(images), patch_valid=valid)

    def as_model_input(self, images: Tensor) -> Tensor:
        """The images in the memory format of the model."""
        return images.contiguous(memory_format=torch.channels_last) if self.hparams.channels_last else images

    def check_batch(self, images: Tensor, targets: Tensor) -> None:
        """Raise ``ValueError`` for images (B, C, H, W) or targets that do not fit."""
        if not isinstance(images, Tensor):
            raise ValueError(f"{type(self).__name__} takes images of one size, and the data gives a list of them")
        if images.ndim != 4 or images.shape[1] != self.hparams.in_chans:
            raise ValueError(f"images must be (B, {self.hparams.in_chans}, H, W), got {tuple(images.shape)}")
        self.check_targets(targets)

    def check_targets(self, targets: Tensor) -> None:
        low, high = targets.aminmax()
        if low < 0 or high >= self.hparams.num_classes:  # on a GPU, PyTorch would only say "device-side assert"
            raise ValueError(f"targets must be in [0, {self.hparams.num_classes}), got {int(low)} to {int(high)}")

    def compute_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Training loss of logits (B, K) for class indices (B,) or soft targets (B, K)."""
        if self.bce is not None:
            self.bce.weight = self.class_weight
            return self.bce(logits.float(), targets)
        smoothing = 0.0 if targets.ndim == 2 else self.hparams.label_smoothing  # mixing has smoothed soft targets
        return F.cross_entropy(logits.float(), targets, self.class_weight, label_smoothing=smoothing)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = batch
        if self.mix is not None:
            images, targets = self.mix(images, targets, (self.global_step, batch_idx, self.global_rank))
        loss, logits = self.training_loss(images, targets)
        self._log_training(loss, logits, targets)
        return loss

    def training_loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and the logits (B, K) of images (B, C, H, W), after mixing."""
        logits = self(images)
        return self.compute_loss(logits, targets), logits

    def _log_training(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        # of mixed targets, the class with the largest share counts
        labels = targets.argmax(1) if targets.ndim == 2 else targets
        accuracy = (logits.argmax(1) == labels).float().mean()
        self.log_training(loss, len(logits), {"acc1": accuracy})
        # where the loss is NaN, the predicted class means nothing
        self.log_epoch_mean("train_acc1_epoch", accuracy.masked_fill(~loss.isfinite(), torch.nan), len(logits))

    def evaluate(self, split: str, images: Tensor, targets: Tensor) -> dict[str, Any]:
        logits = self(images).float()
        self._log_evaluation(split, logits, targets)
        return {"found": logits}

    def _log_evaluation(self, split: str, logits: Tensor, targets: Tensor) -> None:
        # Plain cross-entropy whatever the training loss is, so that runs can be compared.
        self.log_evaluation_mean(f"{split}_loss", F.cross_entropy(logits, targets), len(logits))
        metrics = self.metrics[split]
        metrics.update(logits, targets)
        for name, metric in metrics.items():
            self.log(name, metric, prog_bar=name.endswith("acc1"), batch_size=len(logits))

    def predict_step(self, batch: tuple[Tensor, list[str]], batch_idx: int) -> dict[str, Any]:
        """The five most probable classes (fewer where there are fewer), most probable first.

        Returns:
            ``ids`` list of B strings, ``labels`` (B, 5) int64, ``probabilities`` (B, 5) float in [0, 1]
        """
        images, ids = batch
        return self._most_probable(self(images).float(), ids)

    def _most_probable(self, logits: Tensor, ids: list[str]) -> dict[str, Any]:
        probabilities = logits.sigmoid() if self.hparams.loss == "bce" else logits.softmax(1)
        top = probabilities.topk(min(5, self.hparams.num_classes), dim=1)
        return {"ids": list(ids), "labels": top.indices, "probabilities": top.values}


def given_weights(given: list[float] | str | None, count: int) -> Tensor:
    """The argument ``class_weights`` of a task (K,): ones where none are given, and where `setup` is to count.

    Raises:
        ValueError: They are not K finite numbers of at least 0.
    """
    if given is None or given == "balanced":
        return torch.ones(count)
    if len(given) != count or not all(0 <= weight < math.inf for weight in given):
        raise ValueError(f"class_weights must be {count} finite numbers of at least 0, got {given}")
    return torch.tensor(given, dtype=torch.float32)
