"""Callbacks: weight averaging and throughput."""

from __future__ import annotations

import time
import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from luna_vision.utils.errors import UserError

from .base import TUNERS, TimmTask, log_number
from .guard import NonFiniteGuard


class EMA(WeightAveraging):
    """Exponential moving average of the weights: evaluated, saved as the checkpoint's weights, and kept after training.

    Lightning's callback with four changes. Until averaging starts, the average equals the current weights (instead of
    the initial ones). An update does not wait for the device. Testing a checkpoint after ``fit`` uses the average
    (instead of the raw weights). ``save_weights_only`` is refused, as it would save the raw weights. Steps that a
    :class:`NonFiniteGuard` skips do not count.

    Args:
        decay: weight of the old average at each update.
        start_step: number of optimizer steps before averaging starts.
        warmup: raise the decay as (1 + step) / (10 + step), so that short runs do not average in the start.

    Raises:
        ValueError: ``decay`` outside [0, 1), a ModelCheckpoint of the run has ``save_weights_only``, or the strategy is
            FSDP2.
    """

    def __init__(self, decay: float = 0.9999, start_step: int = 0, warmup: bool = True) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"EMA decay must be in [0, 1), got {decay}")
        super().__init__()
        self.decay = decay
        self.start_step = start_step
        self.warmup = warmup
        self._step = 0
        self._guard: NonFiniteGuard | None = None

    def decay_at(self, step: int) -> float:
        """The decay of the update after optimizer step ``step`` (from 0): 0 up to ``start_step``."""
        if step <= self.start_step:
            return 0.0
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        if step_idx is None or (self._guard is not None and step_idx == self._guard.last_skipped):
            return False
        self._step = step_idx
        return True

    def _update(self, task: LightningModule) -> None:
        """Update the average. torch's own update reads a counter on the device."""
        average = self._average_model.module
        update = get_ema_multi_avg_fn(self.decay_at(self._step))
        update(list(average.parameters()), list(task.parameters()), None)
        for own, current in zip(average.buffers(), task.buffers(), strict=True):
            own.copy_(current)  # constants, and statistics that are averages already
        self._average_model.n_averaged += 1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            self._average_model = None  # the checkpoint's weights are the average
            return
        if any(isinstance(c, ModelCheckpoint) and c.save_weights_only for c in trainer.callbacks):
            raise ValueError(
                "EMA with ModelCheckpoint(save_weights_only=True) would save the raw weights; set it to False"
            )
        self._guard = next((c for c in trainer.callbacks if isinstance(c, NonFiniteGuard)), None)
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError(
                "EMA keeps a copy of the whole model, which no process has under FSDP2: leave the callback out, or "
                "train with --trainer.strategy=ddp"
            )
        with warnings.catch_warnings():  # about configure_model, which only FSDP2 uses
            warnings.filterwarnings("ignore", message=".*overrides the configure_model.*")
            super().setup(trainer, pl_module, stage)
        # the copy was made before the task moved to its device
        self._average_model.to(trainer.strategy.root_device).update_parameters = self._update

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.ckpt_path is None:  # the starting weights were loaded after `setup` copied the model
            self._average_model.module.load_state_dict(pl_module.state_dict())

    on_train_start = on_sanity_check_start

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)


def check_tools(trainer: Trainer, task: TimmTask, resumed: bool) -> None:
    """Refuse Lightning's callbacks where they would break a run or do something else than they say.

    Args:
        trainer: Before a fit.
        task: That it trains.
        resumed: Whether it resumes a run.

    Raises:
        UserError: Says which, and what to do.
    """

    def found(*kinds: type) -> str:
        return next((type(c).__name__ for c in trainer.callbacks if isinstance(c, kinds)), "")

    for callback in trainer.callbacks:
        if type(callback) in (WeightAveraging, EMAWeightAveraging):
            raise UserError(f"{type(callback).__name__} tests the raw weights after a fit: use luna_vision.tasks.EMA")
    if found(EMA) and (name := found(ModelPruning, StochasticWeightAveraging)):
        raise UserError(f"{name} and EMA do not go together, as both replace the weights: leave one of them out")
    if resumed and (name := found(ModelPruning, StochasticWeightAveraging)):
        raise UserError(f"a run with {name} cannot be resumed: Lightning's checkpoints have not all of its state")
    if trainer.world_size > 1 and (name := found(BaseFinetuning)):
        raise UserError(f"{name} is for one process: others would not average the gradients of unfrozen weights")
    sharded = isinstance(trainer.strategy, ModelParallelStrategy)
    if sharded and (name := found(ModelPruning, StochasticWeightAveraging, *TUNERS)):
        raise UserError(f"{name} needs whole weights, which no process has with fsdp2: use ddp")
    if task.hparams.freeze is not None and (name := found(BaseFinetuning)):
        raise UserError(f"{name} unfreezes what model.freeze freezes: leave one of them out")
    loads = task.hparams.checkpoint or task.hparams.init_from_vit
    if loads and any(isinstance(c, ModelPruning) and c._use_lottery_ticket_hypothesis for c in trainer.callbacks):
        raise UserError("ModelPruning would reset weights to random ones: set use_lottery_ticket_hypothesis to false")


class ImagesPerSecond(Callback):
    """Log ``images_per_s``: training images a second since the epoch began, on all devices together.

    Waiting for data counts, validation inside an epoch (``val_check_interval``) does not.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_epoch_start(trainer, pl_module)  # Lightning leaves it out when it resumes within an epoch

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
        log_number(pl_module, "images_per_s", rate, prog_bar=True)
