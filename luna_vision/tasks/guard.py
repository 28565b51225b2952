"""The guard against losses, gradients and weights that are NaN or infinite."""

from __future__ import annotations

import copy
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
from luna_vision.utils.errors import UserError

from .checkpoints import last_checkpoint

_logger = logging.getLogger(__name__)
_NAMED_IN_ERROR = 16


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
        self._counters: list[dict[str, Any]] | None = None
        self._anomaly = False
        self._statistics: list[tuple[Tensor, Tensor]] = []

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "last_skipped": self.last_skipped}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped, self.last_skipped = state["skipped"], state["last_skipped"]

    # ---- a training step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._losses, self._counters = [], None
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
        values = [loss for _, loss in self._losses]
        if not has_scaler(trainer):
            parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            gradients = [_own(p.grad) for p in parameters]
            if gradients := [gradient for gradient in gradients if gradient.numel()]:
                values.append(torch.stack(torch._foreach_norm(gradients, math.inf)).max().float())
        bad = torch.zeros((), device=pl_module.device)
        if values:
            bad = (~torch.stack(values).isfinite()).any().float()
        if float(trainer.strategy.reduce(bad, reduce_op="sum")) > 0:
            self._skip(trainer, optimizer)
        self._losses.clear()

    def _skip(self, trainer: Trainer, optimizer: Optimizer) -> None:
        step, epoch = trainer.global_step, trainer.current_epoch
        what, names = self._describe(trainer)
        where = f"{what} at step {step} (epoch {epoch})"
        stop = self._anomaly or self.skipped >= self.max_skipped
        if trainer.is_global_zero:
            count = f"{self.skipped + 1} of at most {self.max_skipped}"
            done = "training stops" if stop else f"the step is skipped ({count})"
            _logger.warning(f"{where}: {done}; its samples: {', '.join(names)}")
        if stop:
            shown = ", ".join(names[:_NAMED_IN_ERROR])
            more = f" and {len(names) - _NAMED_IN_ERROR} more" if len(names) > _NAMED_IN_ERROR else ""
            after = f" after {self.skipped} skipped steps" if self.skipped else ""
            self._stop(trainer, what, after, f"; its samples: {shown}{more}")
        self.skipped, self.last_skipped = self.skipped + 1, step
        # Optimizers leave out parameters without a gradient, weight decay and moments included; some of timm's count
        # their steps by group all the same.
        self._counters = [
            copy.deepcopy({name: value for name, value in group.items() if name.endswith("step")})
            for group in optimizer.param_groups
        ]
        # A fused optimizer would look for overflow, and find nothing to look at, in its step; it skips what it finds.
        scaled_in_step = has_scaler(trainer) and getattr(optimizer, "_step_supports_amp_scaling", False)
        for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
            if scaled_in_step:
                parameter.grad.fill_(math.nan)
            else:
                parameter.grad = None
        for buffer, before in self._statistics:
            buffer.copy_(before)

    def _describe(self, trainer: Trainer) -> tuple[str, list[str]]:
        """What is not finite, and the samples of the batches where the loss is not, or of all; from all processes."""
        losses = [(batch, float(loss)) for batch, loss in self._losses]
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
        if self._counters is not None:
            for group, counters in zip(trainer.optimizers[0].param_groups, self._counters, strict=True):
                for name in [name for name in group if name.endswith("step")]:  # the first step adds it
                    del group[name]
                group.update(counters)
            self._counters = None
        pl_module.log("skipped_steps", float(self.skipped), batch_size=1)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._anomaly and self._losses and isinstance(exception, RuntimeError):  # of a backward pass
            batch, loss = self._losses[-1]
            where = f"training loss is {float(loss)} at step {trainer.global_step} (epoch {trainer.current_epoch})"
            _logger.error(f"{where}: training stops; its samples: {', '.join(batch_names(trainer, batch))}")

    # ---- what cannot be skipped

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        bad = ""
        for name, value in checkpoint["state_dict"].items():
            own = _own(value)
            if not bad and own.is_floating_point() and not bool(own.isfinite().all()):
                bad = name
        # under FSDP2 it may be in the part of another process, and none may wait for one that has stopped
        if trainer.strategy.reduce_boolean_decision(bool(bad), all=False):
            self._stop(trainer, f"{bad or 'the part of another process'} has values that are not finite")

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
    return [sample_name(loader.dataset, index) for index in indices]


def _own(value: Tensor) -> Tensor:
    """What this process holds of a weight or gradient, which under FSDP2 may be nothing."""
    return value.to_local() if isinstance(value, DTensor) else value
