"""Distillation without labels: a Luna ViT learns the features of any timm model.

Shapes: B batch, C channels or width, D the teacher's width, L memory slots, N patches, h x w the teacher's grid.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from luna_vision.models import LunaVit
from luna_vision.utils.checks import check_at_least
from luna_vision.utils.fingerprint import describe

from .base import check_sizes
from .output_cache import OutputCache
from .teacher import (
    Teacher,
    TeacherTask,
    check_teacher,
    feature_widths,
    features_of_teacher,
    fit_to_size,
    load_feature_teacher,
    recorded_kwargs,
)
from .unlabelled import UnlabelledTask


class FeatureDistillationTask(TeacherTask, UnlabelledTask):
    """Train a Luna ViT to have the features of a teacher, on images alone.

    The first slot of the memory learns the teacher's embedding g, which its head would read (of a ViT, most often the
    class token). Patches learn the teacher's patches t, or the positions of the last feature map of a CNN, resampled to
    the student's grid. Two linear layers, which are dropped afterwards, map the student's width to the teacher's::

        loss = 1 - cos(W_g slot, g) + mean over patches of 1 - cos(W_p patch, t) + mean of (W_p patch - t)^2

    g and t are standardised by channel, with statistics of ``statistics_images`` training images. Both models see the
    same view. With ``mixup``, that is a mixture of two images, with a share from U(0, 1) for each batch.

    Logged besides: ``train_global_loss``, ``train_patch_cosine_loss``, ``train_patch_mse_loss``.

    The teacher, a ViT or a CNN, with or without a head, is in half precision on a GPU. By default, images are resized
    for it to the student's size, rounded to whole patches of the teacher, and its ``teacher_kwargs`` are those that a
    checkpoint of this package records.

    Source: VECA (arXiv 2605.12491), with the training of lightly-train.

    Args:
        *args: ``teacher_model`` and the other arguments of `TeacherTask`.
        mixup: mix images.
        mix_seed: seed of the mixing, which depends on it and on the step alone.
        statistics_images: training images, on each device, that means and standard deviations are taken of.
        cache: folder to keep the teacher's outputs in, in float16, so that each view goes through it once. Views must
            come again (``repeat_epochs`` of the data), and not be mixed.
        **kwargs: the arguments of `TeacherTask`, and those of `UnlabelledTask` for the student.

    Raises:
        ValueError: an argument out of its range, an unknown model, a teacher without weights, or (when a run starts) a
            file of another model, or images that the teacher does not take.
        FileNotFoundError: when a run starts, there is no such file.
        OSError: when a run starts, pretrained weights cannot be fetched.
    """

    teacher_has_head = False

    def __init__(
        self,
        *args: Any,
        mixup: bool = True,
        mix_seed: int = 0,
        statistics_images: int = 2000,
        cache: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_at_least(2, statistics_images=statistics_images)
        if cache and mixup:
            raise ValueError("cache keeps outputs for views that come again, and mixed images do not: give mixup=false")
        self._cache: OutputCache | None = None
        hp = self.hparams
        name, file = hp.teacher_model, hp.teacher_checkpoint
        hp.teacher_kwargs = recorded_kwargs(name, file) | (hp.teacher_kwargs or {})
        check_teacher(name, file, hp.teacher_kwargs)
        self.widths = feature_widths(name, hp.teacher_kwargs)
        self.heads = nn.ModuleList(nn.Linear(self.model.embed_dim, width) for width in self.widths)
        self.statistics = nn.ModuleList(_Standardise(width) for width in self.widths)

    # ---- the teacher

    @cached_property
    def teacher(self) -> Teacher:
        hp = self.hparams
        names = ("teacher_model", "teacher_checkpoint", "teacher_kwargs", "teacher_mean", "teacher_std")
        return load_feature_teacher(*(hp[name] for name in names), head=self.teacher_has_head)

    def check_data(self, data: LightningDataModule | None, stage: str) -> None:
        super().check_data(data, stage)
        if self.hparams.cache and getattr(data, "repeat_epochs", 1) is None:
            raise ValueError(
                "cache needs views that come again, and these never do: give data.repeat_epochs, such as 8"
            )
        if hasattr(data, "timm_cfg"):
            cfg = data.timm_cfg()
            self.teacher.set_source(cfg["mean"], cfg["std"])
            size = tuple(cfg["input_size"][1:])
            self.teacher.img_size = fit_to_size(self.teacher.model, self.teacher_size or size)
            channels = self.hparams.in_chans
            if channels not in (1, self.teacher.channels):
                raise ValueError(
                    f"images of {channels} channels cannot be shown to a teacher of {self.teacher.channels}: give "
                    f"data.in_chans={self.teacher.channels} or another teacher"
                )
            name = f"the teacher {self.hparams.teacher_model}"
            check_sizes(self.teacher.model, self.teacher.channels, [self.teacher.img_size], name)

    def configure_optimizers(self) -> dict[str, Any]:
        device = self.trainer.strategy.root_device
        half = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float16
        self.teacher.to(device=device, dtype=half if device.type == "cuda" else None)
        return super().configure_optimizers()

    def trained_module(self) -> nn.Module:
        return nn.ModuleList([self.model, self.heads])

    def targets(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's embedding (B, D) and feature map (B, D, h, w) of images (B, C, H, W) of the student."""
        return self._teach(images) if self._cache is None else self._cache(images, self._teach)

    @torch.no_grad()
    def _teach(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return features_of_teacher(self.teacher.model, self.teacher.prepare(images))

    def _open_cache(self) -> OutputCache:
        teacher = self.teacher
        source = [x.flatten().tolist() for x in (teacher.source_mean, teacher.source_std) if x is not None]
        stats = [x.flatten().tolist() for x in (teacher.mean_kd, teacher.std_kd)]
        about = {"teacher": self.hparams.teacher_model, "weights": describe(teacher.model)["weights"]}
        return OutputCache(self.hparams.cache, about | {"img_size": teacher.img_size, "stats": stats, "source": source})

    def on_fit_start(self) -> None:
        """Open the cache, and take the statistics of the teacher's features, unless a checkpoint had them."""
        if self.hparams.cache:
            self._cache = self._open_cache()
        if all(part.known for part in self.statistics):
            return
        self.teacher.to(self.device)
        seen = 0
        for images, *_ in self.trainer.datamodule.train_dataloader():
            g, t = self.targets(images.to(self.device))
            self.statistics[0].update(g)
            self.statistics[1].update(t.flatten(2).transpose(1, 2).flatten(0, 1))
            seen += len(images)
            if seen >= self.hparams.statistics_images:
                break
        for part in self.statistics:
            part.finish(self.trainer.strategy.reduce)

    # ---- batches

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        (images,) = batch
        if self.hparams.mixup:
            images = mix(images, (self.hparams.mix_seed, self.global_step, batch_idx, self.global_rank))
        parts = self.training_parts(images)
        loss = sum(parts.values())
        self.log_training(loss, len(images), parts)
        return loss

    def training_parts(self, images: Tensor) -> dict[str, Tensor]:
        """The parts of the loss of images (B, C, H, W)."""
        return self._losses(images, *self.targets(images))[0]

    def loss_of(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts, memory, patches = self._losses(images, *self.targets(images))
        return sum(parts.values()), memory, patches

    def _losses(self, images: Tensor, g: Tensor, t: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        memory, patches = self.tokens(images)
        g, t = self.statistics[0](g), self.statistics[1](to_grid(t, grid_of(self.model, images)))
        slot = memory[:, 0] if memory.shape[1] else patches.mean(1)
        return feature_losses(self.heads[0](slot), self.heads[1](patches), g, t), memory, patches


class _Standardise(nn.Module):
    """Zero mean and unit variance by channel, for the teacher's features (..., D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("std", torch.zeros(dim, dtype=torch.float64))  # of squares until `finish`
        self.register_buffer("finished", torch.zeros((), dtype=torch.bool))

    @property
    def known(self) -> bool:
        """Whether the statistics have been taken."""
        return bool(self.finished)

    def update(self, x: Tensor) -> None:
        """Count features (n, D)."""
        x = x.double()
        self.count += len(x)
        self.mean += x.sum(0)
        self.std += x.square().sum(0)

    def finish(self, reduce: Any) -> None:
        """Turn the sums, over all processes, into statistics."""
        count, total, squares = (reduce(x, reduce_op="sum") for x in (self.count, self.mean, self.std))
        self.mean = total / count
        variance = squares / count - self.mean.square()
        self.std = variance.clamp(min=0).sqrt().clamp(min=1e-6)  # of a channel that never changes
        self.finished.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() - self.mean.float()) / self.std.float()


def feature_losses(slot: Tensor, patches: Tensor, g: Tensor, t: Tensor) -> dict[str, Tensor]:
    """The three parts of the loss, see `FeatureDistillationTask`.

    Args:
        slot: the student's slot in the teacher's width, (B, D).
        patches: its patches, (B, N, D).
        g: the teacher's embedding (B, D), standardised.
        t: the teacher's patches (B, N, D), standardised.
    """
    slot, patches = slot.float(), patches.float()
    return {
        "global_loss": 1 - F.cosine_similarity(slot, g, dim=-1).mean(),
        "patch_cosine_loss": 1 - F.cosine_similarity(patches, t, dim=-1).mean(),
        "patch_mse_loss": F.mse_loss(patches, t),
    }


def grid_of(model: LunaVit, images: Tensor) -> tuple[int, int]:
    """Rows and columns of the patches of images (B, C, H, W)."""
    rows, columns = (-(-n // p) for n, p in zip(images.shape[-2:], model.patch_embed.patch_size, strict=True))
    return rows, columns


def to_grid(t: Tensor, grid: tuple[int, int]) -> Tensor:
    """A feature map (B, D, h, w) as patches (B, N, D) of another grid (bilinear, with antialiasing)."""
    if tuple(t.shape[-2:]) != grid:
        t = F.interpolate(t.float(), grid, mode="bilinear", antialias=True)
    return t.flatten(2).transpose(1, 2)


def mix(images: Tensor, seed: tuple[int, ...]) -> Tensor:
    """Each image (B, C, H, W) mixed with another of the batch, with a share from U(0, 1) (arXiv 1710.09412)."""
    rng = np.random.default_rng(seed)
    share, order = rng.uniform(), torch.from_numpy(rng.permutation(len(images))).to(images.device)
    return share * images + (1 - share) * images[order]
