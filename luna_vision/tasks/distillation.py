"""Distillation: train a timm classifier to imitate the logits and layers of another one.

Shapes: B batch, K classes, C channels, h x w positions of a layer.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from timm.task.distillation import FeatureDistillationTrainableModule
from torch import Tensor, nn

from luna_vision.models.factory import build_model, training_checkpoint
from luna_vision.utils.checks import check_at_least

from .base import check_sizes
from .classification import ClassificationTask
from .teacher import (
    Teacher,
    TeacherTask,
    check_recorded,
    check_teacher,
    layer_widths,
    load_teacher_model,
    logits_and_layers_of,
)


class DistillationTask(TeacherTask, ClassificationTask):
    """Train a student with a teacher; evaluate and apply it as `ClassificationTask` does, without the teacher.

    The loss is ``task_weight`` times the loss on the targets, plus ``logit_weight`` times `logit_loss`, plus
    ``feature_weight`` times the mean of `feature_loss` over ``feature_layers``. MixUp and CutMix mix the images of
    both. Logged besides: ``train_task_loss``, ``train_logit_loss``, ``train_feature_loss``.

    The teacher sees the student's batch, with its own normalisation, and resized where ``teacher_img_size`` is given.
    The projections that ``feature_layers`` need are trained and are in checkpoints, but not in the exported weights.

    Args:
        *args: ``teacher_model`` and the other arguments of `TeacherTask`.
        teacher_in_chans: channels of the teacher, by default the student's. Grey images become three equal ones for 3.
        temperature: of the softmax over the logits of both.
        task_weight: weight of the loss on the targets.
        logit_weight: weight of the loss on the teacher's logits.
        feature_layers: pairs [student's layer, teacher's layer]: blocks or stages as ``forward_intermediates`` counts
            them, from 0; negative ones count from the end.
        feature_weight: weight of the loss on the layers.
        **kwargs: the arguments of `TeacherTask`, and those of `ClassificationTask` for the student.

    Raises:
        ValueError: an argument out of its range, an unknown model or layer, a teacher without weights or for other
            classes, or (when a run starts) a file of another model, or data that does not fit.
        FileNotFoundError: when a run starts, there is no such file.
    """

    def __init__(
        self,
        *args: Any,
        teacher_in_chans: int | None = None,
        temperature: float = 1.0,
        task_weight: float = 1.0,
        logit_weight: float = 1.0,
        feature_layers: list[list[int]] | None = None,
        feature_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        hp = self.hparams
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        check_at_least(0, task_weight=task_weight, logit_weight=logit_weight, feature_weight=feature_weight)
        if logit_weight == 0 and not (feature_layers and feature_weight):
            raise ValueError(
                "there is nothing to distill: give a logit_weight, or feature_layers with a feature_weight"
            )
        check_teacher(hp.teacher_model, hp.teacher_checkpoint, hp.teacher_kwargs or {}, hp.num_classes)
        self._pairs: list[tuple[int, int]] = []
        self.projections = nn.ModuleList(self._projections())
        self._run = logits_and_layers_of(compile=False)

    def _projections(self) -> list[nn.Module]:
        """For each pair of layers, a convolution from the student's channels to the teacher's (arXiv 1412.6550)."""
        hp = self.hparams
        if not hp.feature_layers:
            return []
        if any(len(pair) != 2 for pair in hp.feature_layers):
            raise ValueError(f"feature_layers are pairs [student's layer, teacher's layer], got {hp.feature_layers}")
        ours, theirs = zip(*hp.feature_layers, strict=True)
        with torch.random.fork_rng(devices=[]):
            teacher = build_model(hp.teacher_model, hp.num_classes, self._teacher_chans, **hp.teacher_kwargs or {})
        ours, widths = layer_widths(self.model, f"the student {hp.model_name}", ours)
        theirs, teacher_widths = layer_widths(teacher, f"the teacher {hp.teacher_model}", theirs)
        self._pairs = list(zip(ours, theirs, strict=True))
        return [nn.Conv2d(width, other, 1) for width, other in zip(widths, teacher_widths, strict=True)]

    takes_masks = False  # the teacher would see pixels that the student does not

    # ---- the teacher

    @property
    def _teacher_chans(self) -> int:
        return self.hparams.teacher_in_chans or self.hparams.in_chans

    @cached_property
    def teacher(self) -> Teacher:
        hp, channels = self.hparams, self._teacher_chans
        name, file, arguments = hp.teacher_model, hp.teacher_checkpoint, hp.teacher_kwargs or {}
        if file is not None:
            check_recorded(name, file, arguments)
        classes = None if file is None else hp.num_classes
        model = load_teacher_model(name, file, arguments | {"in_chans": channels}, classes)
        stats = {which: tuple(hp[f"teacher_{which}"] or model.pretrained_cfg[which]) for which in ("mean", "std")}
        for which, values in stats.items():
            if len(values) != channels:
                raise ValueError(
                    f"the teacher has {channels} channels, but its {which} is {values}: give teacher_{which}, or "
                    f"teacher_in_chans={len(values)} if that is what it was trained with"
                )
        return Teacher(model, self.teacher_size, **stats)

    @property
    def not_sharded(self) -> str:
        return "feature_layers" if self._pairs else ""

    def check_data(self, data: LightningDataModule | None, stage: str) -> None:
        """Check the data as `ClassificationTask` does, also against the teacher."""
        super().check_data(data, stage)
        if stage != "fit":
            return
        if (file := self.hparams.teacher_checkpoint) and self.hparams.logit_weight:
            self.check_classes(training_checkpoint(Path(file)), data, f"the teacher {file}", hint="")
        in_chans = self.hparams.in_chans
        if in_chans != self._teacher_chans and in_chans != 1:
            raise ValueError(f"images of {in_chans} channels cannot be shown to a teacher of {self._teacher_chans}")
        if hasattr(data, "timm_cfg"):
            cfg = data.timm_cfg()
            self.teacher.set_source(cfg["mean"], cfg["std"])
            sizes = [tuple(cfg["input_size"][1:]), *getattr(data, "train_sizes", [])]
            check_sizes(self.teacher, in_chans, sizes, f"the teacher (teacher_img_size is {self.teacher_size})")

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._run = logits_and_layers_of(self.compiles() and not self.trainer._detect_anomaly)

    def configure_optimizers(self) -> dict[str, Any]:
        self.teacher.to(self.trainer.strategy.root_device)  # before tuners train, as the starting weights
        self.teacher.run = logits_and_layers_of(self.compiles())  # it has no gradients, so no anomalies
        return super().configure_optimizers()

    # ---- training

    def trained_module(self) -> nn.Module:
        # timm's module tells the optimizer about weight decay and depth of its layers
        return FeatureDistillationTrainableModule(self.model, self.projections) if self._pairs else self.model

    def training_loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        hp = self.hparams
        theirs, teacher_layers = self.teacher(images, [layer for _, layer in self._pairs])
        if self._pairs:
            logits, layers = self._run(self.model, self.as_model_input(images), [layer for layer, _ in self._pairs])
        else:
            logits = self(images)
        losses = {"task": self.compute_loss(logits, targets)}
        losses["logit"] = logit_loss(logits.float(), theirs.float(), hp.temperature)
        if self._pairs:
            pairs = zip(self.projections, self._pairs, strict=True)
            parts = [feature_loss(project(layers[a]).float(), teacher_layers[b].float()) for project, (a, b) in pairs]
            losses["feature"] = sum(parts) / len(parts)
        self.log_dict({f"train_{name}_loss": value.detach() for name, value in losses.items()})
        return sum(hp[f"{name}_weight"] * value for name, value in losses.items()), logits


def logit_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), averaged over the batch (arXiv 1503.02531, section 2).

    ``timm.task.LogitDistillationTask`` computes the same within its ``forward``.

    Args:
        student: logits (B, K).
        teacher: logits (B, K).
        temperature: T.
    """
    log_p = F.log_softmax(student / temperature, dim=-1)
    log_q = F.log_softmax(teacher / temperature, dim=-1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error to the output of a teacher's layer, which is normalised over channels at each position.

    NOTE ``timm.task.FeatureDistillationTask`` compares pooled features without normalisation. Layers inside a pre-norm
    network differ in magnitude; normalised (arXiv 2202.03555, section 3.3), all give losses of the same magnitude.

    Args:
        student: (B, C, h, w).
        teacher: (B, C, h', w'), resized to h x w (bilinear, with antialiasing).
    """
    teacher = F.layer_norm(teacher.movedim(1, -1), teacher.shape[1:2]).movedim(-1, 1)
    if teacher.shape != student.shape:
        teacher = F.interpolate(teacher, student.shape[-2:], mode="bilinear", antialias=True)
    return F.mse_loss(student, teacher)
