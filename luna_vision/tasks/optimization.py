"""timm's optimizers and schedules from a task's hyperparameters."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from luna_vision.utils.errors import arguments_of


def build_optimizer(
    model: nn.Module,
    name: str,
    lr: float,
    weight_decay: float,
    layer_decay: float | None,
    arguments: dict[str, Any],
) -> torch.optim.Optimizer:
    """An optimizer by timm's name, with the parameter groups that weight decay and layer decay want.

    Args:
        model: the bare timm model, which timm asks for ``no_weight_decay()`` and ``group_matcher()``, or a module with
            such a model in it, whose ``no_weight_decay()`` counts too.
        name: from ``timm.optim.list_optimizers()``.
        lr: learning rate.
        weight_decay: not applied to biases, norms and what ``no_weight_decay()`` names.
        layer_decay: learning rate factor from each layer to the one below. NOTE it is a group's ``lr_scale``, on which
            timm's schedules act, and nothing else.
        arguments: further arguments of the optimizer.

    Raises:
        ValueError: no such optimizer, or it does not take these arguments.
    """
    groups = {}
    spared = [
        f"{prefix}.{parameter}"
        for prefix, module in model.named_modules()
        if prefix and hasattr(module, "no_weight_decay")
        for parameter in module.no_weight_decay()
    ]
    # timm asks the model itself and nothing in it; with groups of our own it would leave layer decay out
    if spared and not hasattr(model, "no_weight_decay") and layer_decay is None:
        groups["param_group_fn"] = partial(
            param_groups_weight_decay, weight_decay=weight_decay, no_weight_decay_list=spared
        )
    # an IndexError: of a list that is too short
    with arguments_of(f"optimizer {name}, optimizer_kwargs {arguments}", ArithmeticError, AssertionError, IndexError):
        return create_optimizer_v2(
            model, opt=name, lr=lr, weight_decay=weight_decay, layer_decay=layer_decay, **groups, **arguments
        )


def check_rates(**values: float) -> None:
    """Raise ``ValueError`` unless all of these learning rates and lengths are finite and not negative."""
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}")


def build_scheduler(
    optimizer: torch.optim.Optimizer,
    trainer: Trainer,
    name: str,
    by_epoch: bool,
    warmup_epochs: float,
    warmup_lr: float,
    min_lr: float,
    arguments: dict[str, Any],
) -> Scheduler:
    """A timm schedule over the whole run of ``trainer``, to ``max_epochs`` or, if that comes first, ``max_steps``.

    Args:
        optimizer: whose learning rates it moves.
        trainer: tells how many optimizer steps there are, accumulation counted.
        name: cosine, constant, step, multistep, poly, tanh, wsd, rsqrt.
        by_epoch: move once an epoch rather than once an optimizer step.
        warmup_epochs: length of the linear warm-up, part of the run.
        warmup_lr: learning rate at which the warm-up begins.
        min_lr: learning rate at the end.
        arguments: further arguments of ``create_scheduler_v2``; lengths in epochs.

    Raises:
        ValueError: no such schedule, arguments it does not take, or a run without end.
    """
    if trainer.train_dataloader is None:  # with max_steps alone, Lightning does not look at the data for an estimate
        trainer.fit_loop.setup_data()
    updates = trainer.estimated_stepping_batches
    if math.isinf(trainer.num_training_batches):
        raise ValueError("a schedule needs the length of an epoch, but it has none: set trainer.limit_train_batches")
    updates_per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    if not math.isfinite(updates) or updates < 0:
        raise ValueError("a schedule needs an end: set trainer.max_epochs or trainer.max_steps")
    with arguments_of(f"scheduler_kwargs {arguments} do not fit {name}", ArithmeticError, AssertionError):
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=name,
            num_epochs=updates / updates_per_epoch,
            warmup_epochs=warmup_epochs,
            warmup_lr=warmup_lr,
            min_lr=min_lr,
            step_on_epochs=by_epoch,
            updates_per_epoch=updates_per_epoch,
            **arguments,
        )
    if scheduler is None:
        raise ValueError(f"scheduler {name!r} is none of timm's; 'constant' keeps the learning rate as it is")
    return scheduler
