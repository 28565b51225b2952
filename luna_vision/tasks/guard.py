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
from luna_vision.utils.errors import UserError
from luna_vision.utils.text import printable

from .base import SkippedStep, log_number
from .checkpoints import last_checkpoint

_logger = logging.getLogger(__name__)


class NonFiniteLossError(UserError, ArithmeticError):
    """The training loss, its gradient, the validation loss or the weights are NaN or infinite."""


class NonFiniteGuard(Callback):
    """Skip optimizer steps whose loss or gradient is NaN or infinite; stop training when there are too many of them.

    A skipped step changes nothing: not the weights, not what the optimizer remembers and counts, not the average of
    :class:`~luna_vision.tasks.EMA`, not the statistics of batch norms. It does count as a step of the run, so that the
    learning rate goes on as if it had been done, and training ends where it would have ended. With accumulation one bad
    batch costs the whole step, with several processes all skip alike. Each is logged in a line that has the step, the
    loss and the files of the samples (their indices where they are no files), and as the metric ``skipped_steps``. The
    samples of a stream are not known: its line has the number of the batch.

    No optimizer can be told afterwards that a step was none, so the guard waits for the device once in a step, between
    the gradients and the optimizer. It reads the loss along with it, which the progress bar shows as ``loss``: nothing
    else in a step waits.

    With a gradient scaler (``16-mixed``), which looks for a good scale by trying ones that are too large, gradients
    that overflow are its business and not counted here; the loss is.

    Where the trainer has ``detect_anomaly``, training stops at the first such step: with autograd's own error, which
    says which operation of the forward pass it was, and the line of the step beside it.

    There is nothing to skip about a validation loss that is not finite, or about weights that are not finite when a
    checkpoint of them is to be written: these stop training at once. So no checkpoint has such weights.

    Args:
        max_skipped: Steps that may be skipped in a run in total; one more stops it. 0 stops it at the first. The count
            is kept in the checkpoints.

    Raises:
        ValueError: ``max_skipped`` is below 0.
        NonFiniteLossError: In training; says the step, its samples and the last good checkpoint.
    """

    def __init__(self, max_skipped: int = 10) -> None:
        if max_skipped < 0:
            raise ValueError(f"max_skipped must be at least 0, got {max_skipped}")
        self.max_skipped = max_skipped
        self.skipped = 0
        self.last_skipped = -1  # number of that optimizer step, from 0
        self._batch_idx = 0
        self._losses: list[tuple[int, Tensor]] = []  # of the batches of one step, with their numbers in the epoch
        self._loss: float | None = None  # of the last step
        self._anomaly = False
        self._statistics: list[tuple[Tensor, Tensor]] = []

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
        if not self._losses:  # the forward pass, which changes them, comes before anything is known
            for buffer, before in self._statistics:
                before.copy_(buffer)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._losses.append((self._batch_idx, loss.detach().float()))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        # After the last backward pass of a step, the averaging over processes and the unscaling; before clipping, which
        # would spread one NaN over all gradients. Costs one read of the gradients (a norm that cannot overflow), the
        # sum of one number over the processes, and one wait for the device per step.
        batches, losses = [batch for batch, _ in self._losses], [loss for _, loss in self._losses]
        checked = list(losses)
        if not has_scaler(trainer):
            weights = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            # of FSDP2, the part that this process has, which may be none
            gradients = [w.grad.to_local() if isinstance(w.grad, DTensor) else w.grad for w in weights]
            if gradients := [gradient for gradient in gradients if gradient.numel()]:
                checked.append(torch.stack(torch._foreach_norm(gradients, math.inf)).max().float())
        if not checked:  # the task has given no loss
            checked = [torch.zeros((), device=pl_module.device)]
        bad = trainer.strategy.reduce((~torch.stack(checked).isfinite()).any().float(), reduce_op="sum")
        bad, *losses = torch.stack([bad, *losses]).tolist()
        self._losses, self._loss = [], sum(losses)  # Lightning has divided them by the number of batches
        if bad:
            self._skip(trainer, optimizer, list(zip(batches, losses, strict=True)))

    def _skip(self, trainer: Trainer, optimizer: Optimizer, losses: list[tuple[int, float]]) -> None:
        step, epoch = trainer.global_step, trainer.current_epoch
        what, names = self._describe(trainer, losses)
        where = f"{what} at step {step} (epoch {epoch})"
        stop = self._anomaly or self.skipped >= self.max_skipped
        if trainer.is_global_zero:
            count = f"{self.skipped + 1} of at most {self.max_skipped}"
            done = "training stops" if stop else f"the step is skipped ({count})"
            _logger.warning(f"{where}: {done}; its samples: {', '.join(names)}")
        if stop:
            after = f" after {self.skipped} skipped steps" if self.skipped else ""
            self._stop(trainer, what, after, f"; its samples: {listed(names, 16)}")
        self.skipped, self.last_skipped = self.skipped + 1, step
        for buffer, before in self._statistics:
            buffer.copy_(before)
        if has_scaler(trainer) and not getattr(optimizer, "_step_supports_amp_scaling", False):
            trainer.precision_plugin.scaler.update()  # it has unscaled the gradients, and expects a step to follow
        raise SkippedStep

    def _describe(self, trainer: Trainer, losses: list[tuple[int, float]]) -> tuple[str, list[str]]:
        """What is not finite, and the samples of the batches where the loss is not, or of all; from all processes."""
        bad = [batch for batch, loss in losses if not math.isfinite(loss)]
        mine = (losses, [batch_names(trainer, batch) for batch in bad or (batch for batch, _ in losses)], bool(bad))
        found = [mine]
        if trainer.world_size > 1 and dist.is_initialized():
            found = [None] * trainer.world_size
            dist.all_gather_object(found, mine)
        guilty = [part for part in found if part[2]] or found
        names = [name for _, batches, _ in guilty for batch in batches for name in batch]
        values = [loss for part, _, _ in guilty for _, loss in part]
        wrong = [loss for loss in values if not math.isfinite(loss)]
        if wrong:
            return f"training loss is {wrong[0]}", names
        # Lightning has divided them by the number of batches
        return f"gradient is not finite, training loss is {sum(values) / len(found):.4g}", names

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._loss is not None:
            log_number(pl_module, "loss", self._loss, prog_bar=True, logger=False)
        log_number(pl_module, "skipped_steps", self.skipped)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._anomaly and self._losses and isinstance(exception, RuntimeError):  # of a backward pass
            batch, loss = self._losses[-1]
            where = f"training loss is {float(loss)} at step {trainer.global_step} (epoch {trainer.current_epoch})"
            _logger.error(f"{where}: training stops; its samples: {', '.join(batch_names(trainer, batch))}")

    # ---- what cannot be skipped

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        weights = {name: value for name, value in checkpoint["state_dict"].items() if value.is_floating_point()}
        bad = next((name for name, value in weights.items() if not value.isfinite().all()), None)
        # under FSDP2 the first process has them all, and no other may wait for one that has stopped
        if trainer.strategy.reduce_boolean_decision(bad is not None, all=False):
            self._stop(trainer, f"{bad or 'a weight'} has values that are not finite")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # before ModelCheckpoint, which Lightning runs last
        loss = trainer.callback_metrics.get("val_loss")
        if loss is not None and not math.isfinite(loss):
            self._stop(trainer, f"validation loss is {float(loss)}")

    @staticmethod
    def _stop(trainer: Trainer, what: str, after: str = "", samples: str = "") -> None:
        checkpoint = last_checkpoint(trainer)
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint had been written yet"
        step = f"step {trainer.global_step} (epoch {trainer.current_epoch})"
        raise NonFiniteLossError(f"{what} at {step}: training stopped{after}, {kept}{samples}")


def has_scaler(trainer: Trainer) -> bool:
    """Whether gradients are scaled, and steps whose scaled gradients overflow are left out."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def batch_names(trainer: Trainer, batch_idx: int) -> list[str]:
    """What the samples of a training batch of the current epoch are called, in this process.

    Args:
        trainer: In training.
        batch_idx: Number of the batch in the epoch.

    Returns:
        For each sample its file or, where samples are no files, its index in the training split; where that is not
        known, as in a stream, one entry for the batch.
    """
    loader, epoch = trainer.train_dataloader, trainer.current_epoch
    indices = batch_indices(loader, epoch, batch_idx)
    if indices is None:
        process = f" in process {trainer.global_rank}" if trainer.world_size > 1 else ""
        return [f"batch {batch_idx} of epoch {epoch}{process}"]
    return [printable(sample_name(loader.dataset, index)) for index in indices]
