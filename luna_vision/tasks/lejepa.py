"""LeJEPA: learn features from images alone, without teacher, averaged weights or pairs of negatives.

Shapes: B batch, V views, C channels or width, K outputs of the projector, L memory slots.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from luna_vision.execution.collectives import shared_sum
from luna_vision.utils.checks import check_at_least

from .unlabelled import UnlabelledTask

KNOTS, LARGEST = 17, 3.0  # of the characteristic function


class LeJEPATask(UnlabelledTask):
    """Train a Luna ViT so that views of an image agree and embeddings are distributed as an isotropic Gaussian.

    An embedding is e = LN(concat(mean slot, mean patch)), and z = MLP(e) its projection, with BatchNorm and two hidden
    layers; both are dropped afterwards. With the mean z of an image's global views::

        loss = (1 - sigreg_weight) mean of (z - mean z)^2 + sigreg_weight SIGReg(z)

    Training batches are (global views (B, V, C, H, W), local views likewise), the latter smaller; see
    `luna_vision.data.UnlabelledDataModule`. So are validation batches. Logged besides, with their weights:
    ``train_agreement_loss``, ``train_sigreg_loss``.

    Source: Balestriero and LeCun, "LeJEPA" (arXiv 2511.08544).

    NOTE: the projector's BatchNorm takes its statistics on each device, unless ``trainer.sync_batchnorm`` is true.

    Args:
        sigreg_weight: weight of SIGReg, the loss's only hyperparameter.
        directions: random directions of SIGReg in a step.
        direction_seed: seed of the directions, which depend on it and on the step alone.
        projector_hidden: width of the projector's hidden layers.
        projector_out: K.
        **kwargs: the arguments of `UnlabelledTask`.

    Raises:
        ValueError: an argument out of its range, or (when a run starts) batches of one image.
    """

    def __init__(
        self,
        sigreg_weight: float = 0.02,
        directions: int = 256,
        direction_seed: int = 0,
        projector_hidden: int = 2048,
        projector_out: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 < sigreg_weight < 1:
            raise ValueError(f"sigreg_weight must be between 0 and 1, got {sigreg_weight}")
        check_at_least(1, directions=directions, projector_hidden=projector_hidden, projector_out=projector_out)
        width = self.model.embed_dim * (2 if self.model.memory is not None else 1)
        self.projector = projector(width, projector_hidden, projector_out)

    def check_data(self, data: LightningDataModule | None, stage: str) -> None:
        super().check_data(data, stage)
        if stage == "fit" and getattr(data, "batch_size", 2) < 2:
            raise ValueError("batch_size must be at least 2: a batch of one image has no distribution to learn from")
        if getattr(data, "views", None) == (1, 0):
            raise ValueError("there must be two views of an image to agree: give data.global_views=2 or local_views")

    def trained_module(self) -> nn.Module:
        return nn.ModuleList([self.model, self.projector])

    def projections(self, *views: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projections z (V, B, K) of all views, and memory (B, L, C) and patches (B, N, C) of the first one.

        Args:
            *views: (B, V, C, H, W) for each size.
        """
        embeddings, first = [], []
        for images in views:  # a pass for each size
            memory, patches = self.tokens(images.transpose(0, 1).flatten(0, 1))
            first += [memory[: len(images)], patches[: len(images)]]
            means = [part.mean(1) for part in (memory, patches) if part.shape[1]]
            embeddings.append(torch.cat(means, dim=-1))
        z = self.projector(torch.cat(embeddings)).float()
        return z.unflatten(0, (-1, len(views[0]))), first[0], first[1]

    def losses(self, z: Tensor, global_views: int, step: int) -> dict[str, Tensor]:
        """The weighted parts of the loss of projections (V, B, K), of which the first are of global views."""
        shape = self.hparams.projector_out, self.hparams.directions
        directions = unit_directions(*shape, (self.hparams.direction_seed, step)).to(z.device)
        weight = self.hparams.sigreg_weight
        agreement = (z - z[:global_views].mean(0)).square().mean()
        return {"agreement_loss": (1 - weight) * agreement, "sigreg_loss": weight * sigreg(z, directions)}

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        z, *_ = self.projections(*batch)
        parts = self.losses(z, batch[0].shape[1], self.global_step)
        loss = sum(parts.values())
        self.log_training(loss, len(batch[0]), parts)
        return loss

    def loss_of(self, *views: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, memory, patches = self.projections(*views)
        return sum(self.losses(z, views[0].shape[1], 0).values()), memory, patches


def projector(width: int, hidden: int, out: int) -> nn.Sequential:
    """LayerNorm, then an MLP with BatchNorm and two hidden layers."""
    layers: list[nn.Module] = [nn.LayerNorm(width)]
    for before in (width, hidden):
        layers += [nn.Linear(before, hidden, bias=False), nn.BatchNorm1d(hidden), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(hidden, out))


def unit_directions(dim: int, count: int, seed: tuple[int, int]) -> Tensor:
    """Random directions (dim, count) of length 1, the same on all devices."""
    directions = np.random.default_rng(seed).standard_normal((dim, count), dtype=np.float32)
    return nn.functional.normalize(torch.from_numpy(directions), dim=0)


def sigreg(z: Tensor, directions: Tensor) -> Tensor:
    """How far the projections of a batch are from an isotropic Gaussian; averaged over views and directions.

    Along each direction, the squared distance of their characteristic function from that of a standard normal
    distribution, weighted by exp(-t^2 / 2) and integrated over [-3, 3] (Epps and Pulley's statistic), times the number
    of images. Of several processes, all images count.

    Args:
        z: (V, B, K), of images that are independent: not of the slots or the patches of one.
        directions: (K, S), of length 1.
    """
    t = torch.linspace(0, LARGEST, KNOTS, device=z.device, dtype=z.dtype)
    normal = torch.exp(-t.square() / 2)
    weights = torch.full_like(t, 2 * LARGEST / (KNOTS - 1))  # both signs of t at once
    weights[[0, -1]] /= 2
    angles = (z @ directions.to(z.dtype))[..., None] * t  # V, B, S, T
    sums = torch.stack([angles.cos().sum(1), angles.sin().sum(1)])
    count = torch.full((), z.shape[1], device=z.device, dtype=z.dtype)
    if dist.is_initialized():
        sums = shared_sum(sums, dist.group.WORLD)
        dist.all_reduce(count)
    cos, sin = sums / count
    return count * (((cos - normal).square() + sin.square()) @ (weights * normal)).mean()
