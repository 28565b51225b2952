"""MixUp and CutMix whose draws depend on (seed, step) alone.

``timm.data.Mixup`` draws from NumPy's global generator, so a step would depend on all draws before it, and a resumed
run would differ. Here each call seeds that generator and restores the former state.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor


class StepMixup:
    """``timm.data.Mixup`` as a function of (batch, seed, step), for batches of odd length too.

    Args:
        mixup: the mixer; its ``label_smoothing`` is applied to every target, mixed or not.
        seed: first part of the entropy of every draw.
    """

    def __init__(self, mixup: Mixup, seed: int = 0) -> None:
        self.mixup = mixup
        self.seed = seed

    def __call__(self, images: Tensor, targets: Tensor, step: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Args:
            images: (B, C, H, W); overwritten.
            targets: (B,) class indices.
            step: identifies this call, such as (global step, batch index, rank).

        Returns:
            the images and soft targets (B, K). timm pairs a batch with its reverse, so the last image of an odd batch
            is not mixed.
        """
        even = len(images) // 2 * 2
        if even == 0:
            return images, self._soft(targets)
        with isolate_rng(include_cuda=False):
            np.random.seed(np.random.SeedSequence((self.seed, *step)).generate_state(4))  # noqa: NPY002
            mixed, soft = self.mixup(images[:even], targets[:even])
        if even < len(images):
            mixed = torch.cat([mixed, images[even:]])
            soft = torch.cat([soft, self._soft(targets[even:])])
        return mixed, soft

    def _soft(self, targets: Tensor) -> Tensor:
        return mixup_target(targets, self.mixup.num_classes, 1.0, self.mixup.label_smoothing)
