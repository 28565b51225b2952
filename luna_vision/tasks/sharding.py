"""Weights, gradients and optimizer state cut up between the processes: FSDP2, as a strategy of Lightning."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer

from .checkpoints import read_checkpoint


def shard(model: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
    """Cut up a model's weights in place, block by block; names and the order of parameters stay.

    Every block (what is in a list or sequence called ``blocks``, as in timm's models) is gathered for the time it
    computes; what is in no block is gathered once for the whole model.

    Args:
        model: The same on all processes but for its values, which become those of the first.
        mesh: The processes, in one dimension.
        device: Where this process computes.

    Raises:
        ValueError: The model runs in bands.
    """
    if isinstance(model, FSDPModule):
        return
    if any(getattr(module, "block_runner", None) for module in model.modules()):
        raise ValueError(
            "bands run parts of a block, whose weights are gathered for the whole of it: set band_rows to 0"
        )
    for value in [*model.parameters(), *model.buffers()]:
        shared = value.detach().to(device)
        dist.broadcast(shared, 0)
        value.data.copy_(shared)
    for module in list(model.modules()):
        blocks = getattr(module, "blocks", None)
        if isinstance(blocks, (nn.ModuleList, nn.Sequential)):
            for block in blocks:
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


class FSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallelism (``fully_shard``) over all processes; ``--trainer.strategy=fsdp2``.

    Lightning's strategy, which by default shares data between machines only. Checkpoints are those of any other
    strategy: the first process puts weights and optimizer state together, a tensor after the other, in the memory of
    its CPU.

    Args:
        process_group_backend: By default NCCL on GPUs, Gloo on CPUs.
        timeout: Of collective operations, for Gloo and, where it is told to wait, NCCL.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = timedelta(minutes=30)
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        self._data_parallel_size = self.world_size
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """As Lightning's, but for the reading: see `read_checkpoint`.

        Raises:
            ValueError: There is more in it than plain data, the weights of another model, or no state of an optimizer.
        """
        path = Path(self.broadcast(str(checkpoint_path)))
        checkpoint = read_checkpoint(path)
        weights = checkpoint.pop("state_dict", {})
        check_same_weights(shapes(self.model.state_dict()), shapes(weights))
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, weights, options=options)
        states = checkpoint.get("optimizer_states", [])
        if len(states) < len(self.optimizers):
            raise ValueError(f"{path} has no state of the optimizer: give its weights as --model.checkpoint")
        for optimizer, state in zip(self.optimizers, states, strict=False):  # a test has no optimizer
            set_optimizer_state_dict(self.model, optimizer, self._by_name(optimizer, state), options=options)
        return checkpoint

    def _by_name(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """The state of an optimizer with the names of weights in place of their numbers."""
        names = {weight: name for name, weight in self.model.named_parameters()}
        groups = zip(optimizer.param_groups, state["param_groups"], strict=True)
        pairs = [pair for own, saved in groups for pair in zip(own["params"], saved["params"], strict=True)]
        named = {number: names[weight] for weight, number in pairs}
        return {
            "state": {named[number]: values for number, values in state["state"].items()},
            "param_groups": [{**g, "params": [named[number] for number in g["params"]]} for g in state["param_groups"]],
        }


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="Fully sharded data parallelism, of torch's fully_shard")


def shapes(state_dict: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Of the weights, by name; of one that is cut up, as a whole."""
    return {name: tuple(value.shape) for name, value in state_dict.items()}


def check_same_weights(own: dict[str, tuple[int, ...]], given: dict[str, tuple[int, ...]]) -> None:
    """
    Raises:
        ValueError: The shapes of a checkpoint's weights are not those of the model; says so in one line.
    """
    differing = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
    if differing:
        name = differing[0]
        raise ValueError(
            f"the checkpoint holds another model's weights: {len(differing)} of {len(own)} differ, such as {name} "
            f"(here {own.get(name)}, there {given.get(name)}); use the config.yaml of the run that wrote it"
        )
