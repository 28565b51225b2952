"""Image classification with any timm model.

Shapes: B batch, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from luna_vision.execution import set_band_checkpointing
from luna_vision.models import LunaVit
from luna_vision.models.factory import build_model, sized

from .base import TimmTask, check_sizes
from .mixing import StepMixup

Batch = tuple[Tensor, Tensor]


class ClassificationTask(TimmTask):
    """Train, evaluate and apply a timm classifier.

    Batches are (images (B, C, H, W) float, targets (B,) int64), and (images, ids) for prediction. Logged:
    ``train_loss`` and ``train_acc1`` (with ``_epoch``: the epoch's mean), ``lr``; ``val_loss``, ``val_acc1`` and, with
    more than five classes, ``val_acc5``; likewise for ``test``. Accuracies are shares in [0, 1].

    Args:
        model_name: name for ``timm.create_model``; the ``luna_vit`` models are registered.
        num_classes: number of classes; in a run that of the data, else the model's, by default.
        in_chans: number of image channels; likewise.
        img_size: side of the images in pixels, or [height, width], for a model that is built for one size; likewise.
        model_kwargs: further arguments of the model, such as ``patch_size`` or ``drop_path_rate``.
        checkpoint: file to start from (timm, Lightning or safetensors). Not read when a run is resumed.
        init_from_vit: start from a plain ViT: a timm model name or a file, see ``luna_vision.models.init_from_vit``.
        loss: ``ce`` (softmax cross-entropy, with soft targets where MixUp or CutMix makes them) or ``bce`` (one binary
            cross-entropy per class, averaged over classes).
        label_smoothing: share of the target spread over all classes, in [0, 1).
        bce_threshold: with ``bce``, targets above this value become 1, others 0; None keeps them soft.
        optimizer: name from ``timm.optim.list_optimizers()``.
        lr: peak learning rate of one optimizer step, whatever the batch size.
        weight_decay: not applied to biases, norms and what the model's ``no_weight_decay()`` names.
        layer_decay: learning rate factor from each layer to the one below; None trains all at the same rate.
        optimizer_kwargs: further arguments of the optimizer, such as ``betas``, ``eps`` or ``momentum``.
        scheduler: name of a timm schedule: cosine, constant, step, multistep, poly, tanh, wsd, rsqrt.
        schedule_by: move the learning rate after every optimizer step (``update``) or every epoch.
        warmup_epochs: length of the linear warm-up, part of ``max_epochs``.
        warmup_lr: learning rate at which the warm-up begins.
        min_lr: learning rate at the end.
        scheduler_kwargs: further arguments of ``timm.scheduler.create_scheduler_v2``; lengths in epochs.
        mixup: alpha of MixUp (arXiv 1710.09412); 0 is off.
        cutmix: alpha of CutMix (arXiv 1905.04899); 0 is off.
        mix_prob: probability that a batch is mixed.
        mix_switch_prob: probability of CutMix rather than MixUp where both are on.
        mix_mode: one draw for a batch, for each pair, or for each image.
        mix_seed: seed of the draws, which are a function of it and of the step alone.
        compile: run the model through ``torch.compile``, in place: names of the weights stay. ``auto`` does so on CUDA
            alone, as a CPU takes minutes to compile. From when a trainer sets the task up, and not where the trainer
            detects anomalies.
        channels_last: keep images and convolutions in channels-last memory format.
        grad_checkpointing: recompute activations in the backward pass, for less memory.
        band_rows: for very large images: recompute, too, and run each block of a Luna ViT so many rows of patches at a
            time (`luna_vision.execution.set_band_checkpointing`); 0 is off. Instead of ``grad_checkpointing`` and
            ``compile``.

    Raises:
        ValueError: an argument out of its range, an unknown model, or (when a run starts) data that does not fit.
    """

    headline = ("test_acc1", "test accuracy")

    def __init__(
        self,
        model_name: str = "luna_vit_tiny",
        num_classes: int | None = None,
        in_chans: int | None = None,
        img_size: int | list[int] | None = None,
        model_kwargs: dict[str, Any] | None = None,
        checkpoint: str | None = None,
        init_from_vit: str | None = None,
        loss: Literal["ce", "bce"] = "ce",
        label_smoothing: float = 0.0,
        bce_threshold: float | None = None,
        optimizer: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        layer_decay: float | None = None,
        optimizer_kwargs: dict[str, Any] | None = None,
        scheduler: Literal["cosine", "constant", "step", "multistep", "poly", "tanh", "wsd", "rsqrt"] = "cosine",
        schedule_by: Literal["update", "epoch"] = "update",
        warmup_epochs: float = 0.0,
        warmup_lr: float = 1e-6,
        min_lr: float = 1e-6,
        scheduler_kwargs: dict[str, Any] | None = None,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_prob: float = 1.0,
        mix_switch_prob: float = 0.5,
        mix_mode: Literal["batch", "pair", "elem"] = "batch",
        mix_seed: int = 0,
        compile: bool | Literal["auto"] = False,
        channels_last: bool = False,
        grad_checkpointing: bool = False,
        band_rows: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()  # plain data, so that checkpoints load with weights_only=True
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        if checkpoint and init_from_vit:
            raise ValueError("checkpoint and init_from_vit both name the starting weights: give one of them")
        hp = self.hparams  # which say what was built
        hp.model_kwargs = sized(model_name, model_kwargs, img_size)
        self.model = build_model(model_name, num_classes, in_chans, **hp.model_kwargs)
        hp.num_classes = num_classes = self.model.num_classes
        hp.in_chans = in_chans or 3
        if grad_checkpointing:
            self.model.set_grad_checkpointing(True)
        if band_rows:
            self._set_bands()
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.train_loss, self.train_loss_soft = self._losses()
        self.mix = self._mixer()
        accuracies = {"acc1": MulticlassAccuracy(num_classes, top_k=1, average="micro", validate_args=False)}
        if num_classes > 5:
            accuracies["acc5"] = MulticlassAccuracy(num_classes, top_k=5, average="micro", validate_args=False)
        self.val_metrics = MetricCollection(accuracies, prefix="val_")
        self.test_metrics = MetricCollection(accuracies, prefix="test_").clone()

    def _set_bands(self) -> None:
        hp = self.hparams
        for name in ("grad_checkpointing", "compile"):
            if hp[name]:
                raise ValueError(f"band_rows={hp.band_rows} and {name} do not go together: give one of them")
        if not isinstance(self.model, LunaVit):
            raise ValueError(f"band_rows is for Luna ViTs, and {hp.model_name} is none: set it to 0")
        set_band_checkpointing(self.model, hp.band_rows)

    def _losses(self) -> tuple[nn.Module, nn.Module]:
        """The losses of class indices and of soft targets; mixing smooths soft targets itself."""
        hp = self.hparams
        if hp.loss == "bce":
            bce = BinaryCrossEntropy(hp.label_smoothing, target_threshold=hp.bce_threshold)
            return bce, bce
        return LabelSmoothingCrossEntropy(hp.label_smoothing), SoftTargetCrossEntropy()

    def _mixer(self) -> StepMixup | None:
        hp = self.hparams
        for name in ("mixup", "cutmix"):
            if not 0 <= hp[name] < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {hp[name]}")
        for name in ("mix_prob", "mix_switch_prob"):
            if not 0 <= hp[name] <= 1:
                raise ValueError(f"{name} is a probability, got {hp[name]}")
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
        # autograd could only say of compiled code that the anomaly is somewhere in it
        if self.compiles() and not self.trainer._detect_anomaly:
            self.model.compile()  # at the first call

    def compiles(self) -> bool:
        """Whether ``compile`` says yes for the trainer's device."""
        if self.hparams.compile == "auto":
            return self.trainer.strategy.root_device.type == "cuda"
        return self.hparams.compile

    def check_data(self, data: LightningDataModule | None, stage: str) -> None:
        super().check_data(data, stage)
        # a Luna ViT takes any size; once there are weights a run is under way, and they may have been cut up
        if hasattr(data, "timm_cfg") and not isinstance(self.model, LunaVit) and not self._has_weights:
            sizes = getattr(data, "train_sizes", []) if stage == "fit" else []
            check_sizes(self.model, self.hparams.in_chans, [tuple(data.timm_cfg()["input_size"][1:]), *sizes])

    # ---- batches

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W)."""
        return self.model(self.as_model_input(images))

    def as_model_input(self, images: Tensor) -> Tensor:
        """The images in the memory format that the model is in."""
        return images.contiguous(memory_format=torch.channels_last) if self.hparams.channels_last else images

    def _check_batch(self, images: Tensor, targets: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != self.hparams.in_chans:
            raise ValueError(f"images must be (B, {self.hparams.in_chans}, H, W), got {tuple(images.shape)}")
        low, high = targets.aminmax()
        if low < 0 or high >= self.hparams.num_classes:  # on a GPU, PyTorch would only say "device-side assert"
            raise ValueError(f"targets must be in [0, {self.hparams.num_classes}), got {int(low)} to {int(high)}")

    def compute_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Training loss of logits (B, K) for class indices (B,) or soft targets (B, K)."""
        return (self.train_loss_soft if targets.ndim == 2 else self.train_loss)(logits.float(), targets)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = batch
        self._check_batch(images, targets)
        if self.mix is not None:
            images, targets = self.mix(images, targets, (self.global_step, batch_idx, self.global_rank))
        loss, logits = self.training_loss(images, targets)
        self._log_training(loss.detach(), logits, targets)
        return loss

    def training_loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss to minimise, and the logits (B, K), of images (B, C, H, W) as they are after mixing."""
        logits = self(images)
        return self.compute_loss(logits, targets), logits

    def _log_training(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        # Against mixed targets, accuracy is how often the class with the largest share is found.
        labels = targets.argmax(1) if targets.ndim == 2 else targets
        accuracy = (logits.argmax(1) == labels).float().mean()
        values = {"train_loss": loss, "train_acc1": accuracy}
        self.log_dict(values, prog_bar=True)
        for name, value in values.items():
            # which class NaN logits are taken for says nothing
            self.log_epoch_mean(f"{name}_epoch", torch.where(loss.isfinite(), value, torch.nan), len(logits))
        self.log_learning_rate()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, self.val_metrics, "val_loss")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, self.test_metrics, "test_loss")

    def _evaluate(self, batch: Batch, metrics: MetricCollection, loss_name: str) -> None:
        images, targets = batch
        self._check_batch(images, targets)
        self._log_evaluation(self(images).float(), targets, metrics, loss_name)

    def _log_evaluation(self, logits: Tensor, targets: Tensor, metrics: MetricCollection, loss_name: str) -> None:
        metrics.update(logits, targets)
        # Plain cross-entropy whatever the training loss is, so that runs can be compared.
        self.log_evaluation_mean(loss_name, F.cross_entropy(logits, targets), len(logits))
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

    def load_line(self, checkpoint: str, weights: str) -> str:
        hp = self.hparams
        arguments = {"num_classes": hp.num_classes, "in_chans": hp.in_chans, **(hp.model_kwargs or {})}
        listed = "".join(f", {name}={value!r}" for name, value in arguments.items())
        name = f"{hp.model_name!r}, checkpoint_path={weights!r}"
        return f"import luna_vision, timm; model = timm.create_model({name}{listed})"
