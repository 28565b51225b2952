"""The guard against losses, gradients and weights that are NaN or infinite."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from luna_vision.data.images import sample_name
from luna_vision.data.sampling import batch_indices
from luna_vision.images.find import listed
from luna_vision.utils.checks import check_at_least
from luna_vision.utils.errors import UserError
from luna_vision.utils.text import printable

from .base import SkippedStep, log_number
from .checkpoints import last_checkpoint

_logger = logging.getLogger(__name__)


class NonFiniteLossError(UserError, ArithmeticError):
    """The training loss, its gradient, the validation loss or the weights are NaN or infinite."""


class NonFiniteGuard(Callback):
    """Skip optimizer steps whose loss or gradient is NaN or infinite; stop training when there are too many of them.

    A skipped step changes neither weights nor the optimizer's state, nor the average of :class:`~luna_vision.tasks.EMA`
    or the statistics of batch norms. It counts as a step of the run: the learning rate moves on, and training ends at
    the same step. With accumulation one bad batch skips the whole step, and with several processes all skip together.
    Each skipped step is logged with its number, its loss and the files of its samples (or their indices; for a stream
    the number of the batch), and counted in the metric ``skipped_steps``.

    The guard waits for the device once in a step, between the gradients and the optimizer, and reads the loss along
    with it, which the progress bar shows as ``loss``. Nothing else in a step waits.

    A gradient scaler (``16-mixed``) tries scales that are too large, so overflowing gradients are left to it. The loss
    is still checked. With ``detect_anomaly`` training stops at the first such step, with autograd's own error.

    A validation loss that is not finite, and weights that are not finite in a checkpoint, stop training at once. So no
    checkpoint has such weights.

    Args:
        max_skipped: Steps that may be skipped in a run, resumes included; one more stops it.

    Raises:
        ValueError: ``max_skipped`` is below 0.
        NonFiniteLossError: In training; names the step, its samples and the last good checkpoint.
    """

    def __init__(self, max_skipped: int = 10) -> None:
        check_at_least(0, max_skipped=max_skipped)
        self.max_skipped = max_skipped
        self.skipped = 0
        self.last_skipped = -1  # number of that optimizer step, from 0
        self._batch_idx = 0
        self._losses: list[tuple[int, Tensor]] = []  # of the batches of a step, with their numbers in the epoch
        self._loss: float | None = None  # of the last step
        self._anomaly = False
        self._statistics: list[tuple[Tensor, Tensor]] = []  # buffers of batch norms, and copies of them

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "last_skipped": self.last_skipped}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped, self.last_skipped = state["skipped"], state["last_skipped"]

    # ---- a training step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._losses = []
        self._anomaly = torch.is_anomaly_enabled()
        norms = [module for module in pl_module.modules() if isinstance(module, _BatchNorm)]
        self._statistics = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch_idx = batch_idx
        if not self._losses:  # the forward passes of a step change them before the step is checked
            for buffer, before in self._statistics:
                before.copy_(buffer)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._losses.append((self._batch_idx, loss.detach().float()))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        # Gradients are averaged over processes, unscaled, and not yet clipped, which would spread a NaN.
        batches, losses = [batch for batch, _ in self._losses], [loss for _, loss in self._losses]
        checked = losses or [torch.zeros((), device=pl_module.device)]  # none: the task has given no loss
        if not has_scaler(trainer):
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            own = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
            if own := [grad for grad in own if grad.numel()]:  # a process of FSDP2 may have none
                checked = [*checked, torch.stack(torch._foreach_norm(own, math.inf)).max().float()]
        bad = trainer.strategy.reduce((~torch.stack(checked).isfinite()).any().float(), reduce_op="sum")
        bad, *losses = torch.stack([bad, *losses]).tolist()  # waits for the device
        self._losses, self._loss = [], sum(losses)  # Lightning has divided them by the number of batches
        if bad:
            self._skip(trainer, optimizer, list(zip(batches, losses, strict=True)))

    def _skip(self, trainer: Trainer, optimizer: Optimizer, losses: list[tuple[int, float]]) -> None:
        what, names = self._describe(trainer, losses)
        stop = self._anomaly or self.skipped >= self.max_skipped
        count = f"{self.skipped + 1} of at most {self.max_skipped}"
        if trainer.is_global_zero:
            self._log(trainer, what, "training stops" if stop else f"the step is skipped ({count})", names)
        if stop:
            after = f" after {self.skipped} skipped steps" if self.skipped else ""
            self._stop(trainer, what, after, f"; its samples: {listed(names, 16)}")
        self.skipped, self.last_skipped = self.skipped + 1, trainer.global_step
        for buffer, before in self._statistics:
            buffer.copy_(before)
        if has_scaler(trainer) and not getattr(optimizer, "_step_supports_amp_scaling", False):
            trainer.precision_plugin.scaler.update()  # it has unscaled the gradients, and expects a step to follow
        raise SkippedStep

    def _describe(self, trainer: Trainer, losses: list[tuple[int, float]]) -> tuple[str, list[str]]:
        """What is not finite, and the names of the samples with that loss, or of the whole step; of all processes."""
        bad = [batch for batch, loss in losses if not math.isfinite(loss)]
        mine = (losses, [batch_names(trainer, batch) for batch in bad or (batch for batch, _ in losses)], bool(bad))
        found = [mine]
        if trainer.world_size > 1:
            found = [None] * trainer.world_size
            dist.all_gather_object(found, mine)
        guilty = [part for part in found if part[2]] or found
        names = [name for _, batches, _ in guilty for batch in batches for name in batch]
        values = [loss for part, _, _ in guilty for _, loss in part]
        wrong = [loss for loss in values if not math.isfinite(loss)]
        if wrong:
            return f"training loss is {wrong[0]}", names
        return f"gradient is not finite, training loss is {sum(values) / len(found):.4g}", names

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._loss is not None:
            log_number(pl_module, "loss", self._loss, prog_bar=True, logger=False)
        log_number(pl_module, "skipped_steps", self.skipped)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._anomaly and self._losses and isinstance(exception, RuntimeError):  # raised in a backward pass
            batch, loss = self._losses[-1]
            self._log(trainer, f"training loss is {float(loss)}", "training stops", batch_names(trainer, batch))

    # ---- validation and checkpoints

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        weights = {name: value for name, value in checkpoint["state_dict"].items() if value.is_floating_point()}
        bad = next((name for name, value in weights.items() if not value.isfinite().all()), None)
        # under FSDP2 only the first process has them, and the others must stop with it
        if trainer.strategy.reduce_boolean_decision(bad is not None, all=False):
            self._stop(trainer, f"{bad or 'a weight'} has values that are not finite")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # before ModelCheckpoint, which Lightning runs last
        loss = trainer.callback_metrics.get("val_loss")
        if loss is not None and not math.isfinite(loss):
            self._stop(trainer, f"validation loss is {float(loss)}")

    @staticmethod
    def _log(trainer: Trainer, what: str, done: str, names: list[str]) -> None:
        where = f"at step {trainer.global_step} (epoch {trainer.current_epoch})"
        _logger.warning(f"{what} {where}: {done}; its samples: {', '.join(names)}")

    @staticmethod
    def _stop(trainer: Trainer, what: str, after: str = "", samples: str = "") -> None:
        checkpoint = last_checkpoint(trainer)
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint had been written yet"
        step = f"step {trainer.global_step} (epoch {trainer.current_epoch})"
        raise NonFiniteLossError(f"{what} at {step}: training stopped{after}, {kept}{samples}")


def has_scaler(trainer: Trainer) -> bool:
    """Whether a gradient scaler leaves out steps whose scaled gradients overflow."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def batch_names(trainer: Trainer, batch_idx: int) -> list[str]:
    """The files of the samples in a training batch of the current epoch, in this process.

    Samples that are no files have their index in the training split. Where that is not known, as in a stream, one entry
    names the batch.
    """
    loader, epoch = trainer.train_dataloader, trainer.current_epoch
    indices = batch_indices(loader, epoch, batch_idx)
    if indices is None:
        process = f" in process {trainer.global_rank}" if trainer.world_size > 1 else ""
        return [f"batch {batch_idx} of epoch {epoch}{process}"]
    return [printable(sample_name(loader.dataset, index)) for index in indices]
