"""Train a memory whose every prefix works: each batch runs with a random number of slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from luna_vision.models import LunaVit
from luna_vision.utils.checks import check_at_least

from .base import log_number


class NestedMemory(Callback):
    """Draw a number of memory slots for each training batch, so that the trained model works with any number of them
    (``model.set_memory_len``). The first slots are trained most often and learn what matters most.

    All Luna ViTs of the task take part. Validation, tests and checkpoints use the full memory. A draw depends on (seed,
    step, batch) alone: all processes and a resumed run make the same ones. Logged: ``memory_len`` of the batch.

    Source: nested dropout, Rippel et al. 2014 (arXiv 1402.0915). NOTE: from a list of lengths, each drawn with equal
    probability, as in Matryoshka representations (arXiv 2205.13147), which train all lengths in every step instead.

    Args:
        lens: lengths to draw from, with the full one; one that is listed twice is drawn twice as often. By default the
            powers of two below the full length, and the full length.
        seed: seed of the draws.

    Raises:
        ValueError: a length below 1, no length, a negative seed, or (when training starts) lengths that do not fit the
            model, or a model without a memory.
    """

    def __init__(self, lens: list[int] | None = None, seed: int = 0) -> None:
        if lens is not None and (not lens or min(lens) < 1):
            raise ValueError(f"lens must be lengths of at least 1, got {lens}")
        check_at_least(0, seed=seed)
        self.lens, self.seed = lens, seed

    def draw(self, lens: Sequence[int], step: int, batch_idx: int) -> int:
        """The length for one batch."""
        return int(np.random.default_rng((self.seed, step, batch_idx)).choice(lens))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.models = [m for m in pl_module.modules() if isinstance(m, LunaVit) and m.memory is not None]
        lens = sorted({model.memory.shape[1] for model in self.models})
        if len(lens) != 1:
            found = f"the lengths {', '.join(map(str, lens))}" if lens else "none"
            raise ValueError(f"NestedMemory trains Luna ViTs with memories of one length, and the task has {found}")
        self.full = lens[0]
        powers = [2**i for i in range(self.full.bit_length()) if 2**i < self.full]
        self.choices = [*powers, self.full] if self.lens is None else self.lens
        if max(self.choices) != self.full:
            raise ValueError(
                f"lens must have the model's memory_len, {self.full}, as its largest, got {self.choices}: slots beyond "
                "it would not be trained"
            )

    def _set(self, memory_len: int) -> None:
        for model in self.models:
            model.set_memory_len(memory_len)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        memory_len = self.draw(self.choices, trainer.global_step, batch_idx)
        self._set(memory_len)
        log_number(pl_module, "memory_len", memory_len)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._set(self.full)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if hasattr(self, "full"):
            self._set(self.full)
