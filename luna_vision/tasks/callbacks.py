"""Callbacks that change what a run does: weight averaging, the guard against non-finite losses, throughput."""

from __future__ import annotations

import math
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .checkpoints import last_checkpoint


class EMA(WeightAveraging):
    """Exponential moving average of the weights: evaluated, saved as the checkpoint's weights, and kept after training.

    Lightning's callback, with three gaps closed: until the average starts it equals the current weights (so an early
    validation does not score the initial ones), testing a checkpoint after ``fit`` uses the average (Lightning would
    load the raw weights), and ``save_weights_only``, which would save the raw weights, is refused.

    Args:
        decay: weight of the old average at each update.
        start_step: number of optimizer steps before averaging starts.
        warmup: raise the decay from 0.1 as (1 + step) / (10 + step), so that short runs do not average in the start.

    Raises:
        ValueError: ``decay`` outside [0, 1), or a ModelCheckpoint of the run has ``save_weights_only``.
    """

    def __init__(self, decay: float = 0.9999, start_step: int = 0, warmup: bool = True) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"EMA decay must be in [0, 1), got {decay}")
        # Buffers are copied, not averaged: they are constants or statistics that already average.
        super().__init__(use_buffers=False, multi_avg_fn=self._average)
        self.decay = decay
        self.start_step = start_step
        self.warmup = warmup
        self._step = 0

    def _average(self, averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor | int) -> None:
        get_ema_multi_avg_fn(self.decay_at(self._step))(averaged, current, num_averaged)

    def decay_at(self, step: int) -> float:
        """The decay that the update after optimizer step ``step`` (from 0) uses."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        if step_idx is None or step_idx < self.start_step:
            return False
        self._step = step_idx
        return True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            self._average_model = None  # the checkpoint's weights are the average already: nothing to swap
            return
        if any(isinstance(c, ModelCheckpoint) and c.save_weights_only for c in trainer.callbacks):
            raise ValueError(
                "EMA with ModelCheckpoint(save_weights_only=True) would save the raw weights; set it to False"
            )
        super().setup(trainer, pl_module, stage)

    def _follow(self, pl_module: LightningModule) -> None:
        """Until the first update, the average is what the weights are now."""
        if self._average_model is not None and int(self._average_model.n_averaged) == 0:
            self._average_model.module.load_state_dict(pl_module.state_dict())

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._follow(pl_module)
        super().on_validation_epoch_start(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._follow(pl_module)
        super().on_train_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._follow(pl_module)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)


class NonFiniteLossError(ArithmeticError):
    """The training loss, the validation loss or the weights are NaN or infinite."""


class NonFiniteGuard(Callback):
    """Stop training at the first loss that is NaN or infinite, before it reaches the weights or a checkpoint.

    The training loss is looked at before ``backward``, the validation loss before ModelCheckpoint (which Lightning runs
    last) sees it. A last step can break the weights without a loss to show it, so the weights themselves are looked at
    before a checkpoint of them is written. Costs one device synchronisation per batch.

    Raises:
        NonFiniteLossError: says the step and the last checkpoint written.
    """

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for name, value in checkpoint["state_dict"].items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                self._stop(trainer, f"{name} has values that are not finite")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._check(trainer, "training loss", loss.item())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = trainer.callback_metrics.get("val_loss")
        if loss is not None:
            self._check(trainer, "validation loss", float(loss))

    def _check(self, trainer: Trainer, name: str, value: float) -> None:
        if not math.isfinite(value):
            self._stop(trainer, f"{name} is {value}")

    @staticmethod
    def _stop(trainer: Trainer, what: str) -> None:
        checkpoint = last_checkpoint(trainer)
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint had been written yet"
        raise NonFiniteLossError(
            f"{what} at step {trainer.global_step} (epoch {trainer.current_epoch}): training stopped, {kept}"
        )


class ImagesPerSecond(Callback):
    """Log ``images_per_s``: training images a second since the epoch began, on all devices together.

    Waiting for data counts, validation inside an epoch (``val_check_interval``) does not.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_epoch_start(trainer, pl_module)  # which Lightning leaves out where it goes on within an epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._images = 0
        self._since = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._since += time.perf_counter() - self._paused

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # processes may share an image
        self._images += len(batch[0]) * (trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
        rate = self._images / (time.perf_counter() - self._since)
        pl_module.log("images_per_s", rate, prog_bar=True, batch_size=len(batch[0]))
