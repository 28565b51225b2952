"""timm's optimizers and schedules from a task's hyperparameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from timm.models import group_parameters
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
    """Build an optimizer by timm's name, with parameter groups for weight decay and layer decay.

    Args:
        model: the bare timm model, which has ``no_weight_decay()`` and ``group_matcher()``, or a module that contains
            one, whose ``no_weight_decay()`` counts too.
        name: from ``timm.optim.list_optimizers()``.
        lr: learning rate.
        weight_decay: not applied to biases, norms and parameters in ``no_weight_decay()``.
        layer_decay: learning rate factor from each layer to the one below. NOTE it becomes a group's ``lr_scale``, on
            which only timm's schedules act.
        arguments: further arguments of the optimizer.

    Raises:
        ValueError: an unknown optimizer, or arguments that it does not take.
    """
    groups = {}
    spared = [
        f"{prefix}.{parameter}"
        for prefix, module in model.named_modules()
        if prefix and hasattr(module, "no_weight_decay")
        for parameter in module.no_weight_decay()
    ]
    # timm asks the outer module only. With groups of our own it would leave layer decay out.
    if spared and not hasattr(model, "no_weight_decay") and layer_decay is None:
        groups["param_group_fn"] = partial(
            param_groups_weight_decay, weight_decay=weight_decay, no_weight_decay_list=spared
        )
    # IndexError: of a list that is too short
    with arguments_of(f"optimizer {name}, optimizer_kwargs {arguments}", ArithmeticError, AssertionError, IndexError):
        return create_optimizer_v2(
            model, opt=name, lr=lr, weight_decay=weight_decay, layer_decay=layer_decay, **groups, **arguments
        )


def frozen_layers(model: nn.Module, blocks: int) -> set[str]:
    """The names of the parameters in the stem and the first blocks of a timm model, as layer decay counts them.

    Raises:
        ValueError: There are fewer blocks, or the model does not name its layers.
    """
    if not hasattr(model, "group_matcher"):
        raise ValueError(f"freeze: {type(model).__name__} has no group_matcher, which names its layers")
    layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    most = max(layers.values()) - (model.num_classes > 0)  # the head is the last layer
    if not 0 <= blocks <= most:
        raise ValueError(f"freeze must be 0 to {most}, the blocks of the model, got {blocks}")
    return {name for name, layer in layers.items() if layer <= blocks}


def freeze_layers(model: nn.Module, blocks: int) -> list[nn.Module]:
    """Freeze the stem and the first blocks of a timm model.

    Returns:
        The modules with frozen parameters only, which are to be in eval mode.
    """
    names = frozen_layers(model, blocks)
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(False)
    parameters = ((module, list(module.parameters())) for module in model.modules() if module is not model)
    return [module for module, own in parameters if own and not any(p.requires_grad for p in own)]


def check_rates(hp: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless the learning rates and lengths in a task's hyperparameters are at least 0."""
    for name in ("lr", "warmup_epochs", "warmup_lr", "min_lr", "layer_decay"):
        if not 0 <= (hp.get(name) or 0.0) < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {hp[name]}")


def build_scheduler(optimizer: torch.optim.Optimizer, trainer: Trainer, hp: Mapping[str, Any]) -> Scheduler:
    """Build a timm schedule over the whole run of ``trainer``, until ``max_epochs`` or, if earlier, ``max_steps``.

    Args:
        optimizer: its learning rates are set.
        trainer: gives the number of optimizer steps, with accumulation.
        hp: the hyperparameters of a `TimmTask`.

    Raises:
        ValueError: an unknown schedule, arguments that it does not take, or a run without end.
    """
    if trainer.train_dataloader is None:  # with max_steps alone, Lightning does not look at the data for an estimate
        trainer.fit_loop.setup_data()
    updates, batches = trainer.estimated_stepping_batches, trainer.num_training_batches
    if math.isinf(batches):
        raise ValueError("a schedule needs the length of an epoch, but it has none: set trainer.limit_train_batches")
    updates_per_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
    for callback in trainer.callbacks:
        if isinstance(callback, GradientAccumulationScheduler):  # trainer.estimated_stepping_batches ignores it
            epochs = max(trainer.max_epochs, 1)
            steps = sum(math.ceil(batches / callback.get_accumulate_grad_batches(epoch)) for epoch in range(epochs))
            updates, updates_per_epoch = min(updates, steps), steps / epochs
    if not math.isfinite(updates) or updates < 0:
        raise ValueError("a schedule needs an end: set trainer.max_epochs or trainer.max_steps")
    arguments = hp["scheduler_kwargs"] or {}
    with arguments_of(f"scheduler_kwargs {arguments} do not fit {hp['scheduler']}", ArithmeticError, AssertionError):
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=hp["scheduler"],
            num_epochs=updates / updates_per_epoch,
            step_on_epochs=hp["schedule_by"] == "epoch",
            updates_per_epoch=updates_per_epoch,
            **{name: hp[name] for name in ("warmup_epochs", "warmup_lr", "min_lr")},
            **arguments,
        )
    if scheduler is None:
        raise ValueError(
            f"scheduler {hp['scheduler']!r} is none of timm's; 'constant' keeps the learning rate as it is"
        )
    return scheduler
