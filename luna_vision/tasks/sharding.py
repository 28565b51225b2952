"""FSDP2 as a Lightning strategy: weights, gradients and optimizer state are sharded over the processes."""

from __future__ import annotations

from collections.abc import Mapping
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
    """Shard a model's weights in place; names and order of the parameters stay.

    Each block (of a list or sequence called ``blocks``, as in timm's models) is gathered while it computes. Weights
    outside of blocks are gathered once for the whole model.

    Args:
        model: The same on all processes. All take the values of the first process.
        mesh: The processes, in one dimension.
        device: Of this process.

    Raises:
        ValueError: The model runs in bands.
    """
    if isinstance(model, FSDPModule):
        return
    if any(getattr(module, "block_runner", None) for module in model.modules()):
        raise ValueError("bands run parts of a block, but fsdp2 gathers weights for whole blocks: set band_rows to 0")
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

    Lightning's strategy shards within a machine only by default. Checkpoints are files as with any other strategy: the
    first process gathers weights and optimizer state in CPU memory.

    Args:
        **kwargs: ``process_group_backend`` and ``timeout`` of Lightning's strategy.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **kwargs)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.world_size
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load as Lightning does, but read with `read_checkpoint`, and match optimizer states by the weights' names.

        Raises:
            ValueError: The file holds other objects than plain data, or the weights of another model.
        """
        checkpoint = read_checkpoint(self.broadcast(str(checkpoint_path)))
        weights, options = checkpoint.pop("state_dict", {}), StateDictOptions(full_state_dict=True)
        check_same_weights(self.model.state_dict(), weights)
        set_model_state_dict(self.model, weights, options=options)
        # a test has no optimizer, exported weights have no state
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", []), strict=False):
            set_optimizer_state_dict(self.model, optimizer, self._by_name(optimizer, state), options=options)
        return checkpoint

    def _by_name(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """The state of an optimizer with names of weights in place of their numbers."""
        names = {weight: name for name, weight in self.model.named_parameters()}
        groups = zip(optimizer.param_groups, state["param_groups"], strict=True)
        pairs = [pair for own, saved in groups for pair in zip(own["params"], saved["params"], strict=True)]
        named = {number: names[weight] for weight, number in pairs}
        return {
            "state": {named[number]: values for number, values in state["state"].items()},
            "param_groups": [{**g, "params": [named[number] for number in g["params"]]} for g in state["param_groups"]],
        }


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="Fully sharded data parallelism, of torch's fully_shard")


def check_same_weights(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError``, with one line, where a checkpoint's weights differ from the model's in names or shapes."""
    here, there = ({name: tuple(value.shape) for name, value in weights.items()} for weights in (own, given))
    differing = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if differing:
        name = differing[0]
        raise ValueError(
            f"the checkpoint holds another model's weights: {len(differing)} of {len(here)} differ, such as {name} "
            f"(here {here.get(name)}, there {there.get(name)}); use the config.yaml of the run that wrote it"
        )
