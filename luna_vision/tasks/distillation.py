"""Distillation: train a timm classifier to give the logits, and what its layers put out, of another one.

Shapes: B batch, K classes, C channels, h x w positions of a layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from timm.task.distillation import FeatureDistillationTrainableModule
from torch import Tensor, nn

from luna_vision.models.factory import build_model, training_checkpoint

from .classification import ClassificationTask
from .teacher import Teacher, build_teacher_model, check_teacher, layer_widths, logits_and_layers_of


class DistillationTask(ClassificationTask):
    """Train a student with a teacher; evaluate and apply it as `ClassificationTask` does, without the teacher.

    The loss is ``task_weight`` times the loss on the targets, plus ``logit_weight`` times that on the teacher's logits,
    see `logit_loss`, plus ``feature_weight`` times the mean over ``feature_layers`` of that on what layers put out, see
    `feature_loss`. MixUp and CutMix mix what both of them see. Logged besides: ``train_task_loss``,
    ``train_logit_loss``, ``train_feature_loss``.

    The teacher is read from its file when a run starts, is no part of checkpoints (so evaluation and ``load_line`` do
    without it), and never changes. It sees the student's batch, with its own normalisation and size. What
    ``feature_layers`` need to be compared, a projection for each pair, is trained along and is in the checkpoints, but
    not in the exported weights.

    Args:
        teacher_model: name for ``timm.create_model``.
        teacher_checkpoint: the teacher's weights: a Lightning, timm or safetensors file; None takes those that timm
            fetches for ``teacher_model``. A model without either is refused.
        teacher_kwargs: further arguments of the teacher.
        teacher_in_chans: its channels: 3 also for grey images, which then become three equal channels; None takes the
            student's.
        teacher_img_size: side of the teacher's images in pixels, or [height, width]: the batch is resized for it; None
            shows it the student's images.
        teacher_mean: mean by channel that the teacher expects to be subtracted from pixels in [0, 1]; by default what
            a checkpoint of this package or, for other files and weights, ``pretrained_cfg`` says.
        teacher_std: standard deviation, likewise.
        temperature: that of the softmax over the logits of both.
        task_weight: of the loss on the targets.
        logit_weight: of the loss on the teacher's logits.
        feature_layers: pairs [student's layer, teacher's layer], which are blocks or stages as
            ``forward_intermediates`` counts them, from 0; negative ones count from the end.
        feature_weight: of the loss on the layers.
        **kwargs: the arguments of `ClassificationTask`, all of which are the student's.

    Raises:
        ValueError: an argument out of its range, an unknown model or layer, a teacher without weights or for other
            classes, or (when a run starts) a file that is not the teacher's, or data that does not fit.
        FileNotFoundError: when a run starts: there is no such file.
    """

    def __init__(
        self,
        teacher_model: str,
        teacher_checkpoint: str | None = None,
        teacher_kwargs: dict[str, Any] | None = None,
        teacher_in_chans: int | None = None,
        teacher_img_size: int | list[int] | None = None,
        teacher_mean: list[float] | None = None,
        teacher_std: list[float] | None = None,
        temperature: float = 1.0,
        task_weight: float = 1.0,
        logit_weight: float = 1.0,
        feature_layers: list[list[int]] | None = None,
        feature_weight: float = 1.0,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        hp = self.hparams
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        for name in ("task_weight", "logit_weight", "feature_weight"):
            if hp[name] < 0:
                raise ValueError(f"{name} must not be negative, got {hp[name]}")
        if logit_weight == 0 and not (feature_layers and feature_weight):
            raise ValueError(
                "there is nothing to distill: give a logit_weight, or feature_layers with a feature_weight"
            )
        self.teacher_size = None if teacher_img_size is None else _height_width(teacher_img_size)
        check_teacher(teacher_model, teacher_checkpoint, hp.num_classes, teacher_kwargs or {})
        self._teachers: list[Teacher] = []  # a plain list: nothing in it is a part of this module
        self._pairs: list[tuple[int, int]] = []
        self.projections = nn.ModuleList(self._projections())
        self._run = logits_and_layers_of(compile=False)

    def _projections(self) -> list[nn.Module]:
        """For each pair of layers, the student's channels to the teacher's, with bias (arXiv 1412.6550)."""
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

    # ---- the teacher

    @property
    def _teacher_chans(self) -> int:
        return self.hparams.teacher_in_chans or self.hparams.in_chans

    @property
    def teacher(self) -> Teacher:
        """The teacher, read from its file when it is first asked for."""
        if not self._teachers:
            hp = self.hparams
            name = (hp.teacher_model, hp.teacher_checkpoint)
            arguments = (hp.num_classes, self._teacher_chans, hp.teacher_kwargs or {}, rank_zero_info)
            model = build_teacher_model(*name, *arguments)
            stats = {
                "mean": tuple(hp.teacher_mean or model.pretrained_cfg["mean"]),
                "std": tuple(hp.teacher_std or model.pretrained_cfg["std"]),
            }
            for which, values in stats.items():
                if len(values) != self._teacher_chans:
                    raise ValueError(
                        f"the teacher has {self._teacher_chans} channels, but its {which} is {values}: give "
                        f"teacher_{which}, or teacher_in_chans={len(values)} if that is what it was trained with"
                    )
            self._teachers.append(Teacher(model, self.teacher_size, **stats))
        return self._teachers[0]

    def configure_model(self) -> None:
        if self._pairs and self._is_sharded():  # which gathers weights for forward() only, and leaves projections alone
            raise ValueError("feature_layers do not work with fsdp2: use ddp, or the teacher's logits alone")
        super().configure_model()

    def check_start(self, optimizer: bool = True) -> None:
        super().check_start(optimizer)
        if optimizer:
            _ = self.teacher

    def check_data(self, data: LightningDataModule | None, stage: str) -> None:
        """As in `TimmTask`, and that the teacher takes the data's images."""
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
            for size in (tuple(cfg["input_size"][1:]), *getattr(data, "train_sizes", [])):
                self.teacher.check(in_chans, size)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._run = logits_and_layers_of(self.compiles() and not self.trainer._detect_anomaly)  # as the base class

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.teacher.to(self.device)
        self.teacher.run = logits_and_layers_of(self.compiles())  # without gradients, it has no anomalies

    # ---- training

    def trained_module(self) -> nn.Module:
        # timm's, which tells the optimizer about weight decay and depth of the layers in it
        return FeatureDistillationTrainableModule(self.model, self.projections) if self._pairs else self.model

    def training_loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        hp = self.hparams
        theirs, teacher_layers = self.teacher(images, sorted({theirs for _, theirs in self._pairs}))
        logits, layers = self._student(images)
        losses = {"task": self.compute_loss(logits, targets)}
        losses["logit"] = logit_loss(logits.float(), theirs.float(), hp.temperature)
        if self._pairs:
            position = [{at: i for i, at in enumerate(sorted(set(side)))} for side in zip(*self._pairs, strict=True)]
            parts = [
                feature_loss(project(layers[position[0][ours]]).float(), teacher_layers[position[1][theirs]].float())
                for project, (ours, theirs) in zip(self.projections, self._pairs, strict=True)
            ]
            losses["feature"] = sum(parts) / len(parts)
        self.log_dict({f"train_{name}_loss": value.detach() for name, value in losses.items()})
        return sum(hp[f"{name}_weight"] * value for name, value in losses.items()), logits

    def _student(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        if not self._pairs:
            return self(images), []
        return self._run(self.model, self.as_model_input(images), sorted({ours for ours, _ in self._pairs}))


def logit_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), averaged over the batch (arXiv 1503.02531, section 2).

    As in ``timm.task.LogitDistillationTask``, which has it within its ``forward``.

    Args:
        student: logits (B, K).
        teacher: logits (B, K).
        temperature: T.
    """
    log_p = F.log_softmax(student / temperature, dim=-1)
    log_q = F.log_softmax(teacher / temperature, dim=-1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error to what a layer of the teacher puts out, normalised over its channels at each position.

    NOTE ``timm.task.FeatureDistillationTask`` compares pooled features as they are; layers inside a pre-norm network
    are of any magnitude, and normalised (arXiv 2202.03555, section 3.3) the loss is of the same one for all of them.

    Args:
        student: (B, C, h, w).
        teacher: (B, C, h', w'), resized to h x w (bilinear, with antialiasing) if it has another number of positions.
    """
    teacher = F.layer_norm(teacher.movedim(1, -1), teacher.shape[1:2]).movedim(-1, 1)
    if teacher.shape != student.shape:
        teacher = F.interpolate(teacher, student.shape[-2:], mode="bilinear", antialias=True)
    return F.mse_loss(student, teacher)


def _height_width(size: int | list[int]) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"teacher_img_size must be a positive side or [height, width] in pixels, got {size}")
    return sides
