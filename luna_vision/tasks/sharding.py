"""Weights, gradients and optimizer state cut up between the processes: FSDP2, as a strategy of Lightning.

Its checkpoints are folders, in which every process writes what it holds (``torch.distributed.checkpoint``), and beside
that ``meta.pt`` with all the rest. They are read here without a process group, too, which is how they are exported.
"""

from __future__ import annotations

import os
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer

from luna_vision.utils.files import beside, remove_own, to_disk

from .folder import check_whole, load_folder, read_index
from .plain import load_plain

REST = "meta.pt"  # Lightning's name of what is not cut up
FILES = r"\.metadata|meta\.pt|__\d+_\d+\.distcp"  # what is in such a folder
WEIGHTS = "state_dict."  # what the names of weights begin with in a folder


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

    Lightning's strategy, with two gaps closed: by default it shares data between machines only, and it writes a
    checkpoint over the one that was there, which a kill leaves half overwritten. Here a checkpoint gets its name when
    all processes have written their share. A folder cannot replace another in one move: for the moment between two
    moves, the old one is called ``NAME.previous.ckpt``, where a resume finds it.

    Args:
        process_group_backend: By default NCCL on GPUs, Gloo on CPUs.
        timeout: Of collective operations, for Gloo and, where it is told to wait, NCCL.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = timedelta(minutes=30)
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=True,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        self._data_parallel_size = self.world_size
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        path = Path(self.broadcast(str(filepath)))
        partial = Path(self.broadcast(str(beside(path))))
        try:
            super().save_checkpoint(checkpoint, partial, storage_options)
            for file in partial.glob(f"__{self.global_rank}_*"):
                to_disk(file)
            self.barrier()
            if self.is_global_zero:
                to_disk(partial / REST)
                _replace(path, partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self.barrier()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """As Lightning's, but for the reading: whatever ``weights_only`` says, each file is read once, and nothing but
        tensors and plain data of it.

        Raises:
            ValueError: There is more in it, or the weights of another model.
        """
        path = Path(self.broadcast(str(checkpoint_path)))
        return self._load_folder(path) if is_sharded(path) else self._load_file(path)

    def _load_folder(self, path: Path) -> dict[str, Any]:
        index = read_index(path)
        stored = {name: tuple(tensor.size) for name, tensor in _tensors(path, index).items()}
        check_same_weights(shapes(self.model.state_dict()), stored)  # before torch says it in a hundred lines
        rest = load_plain(path / REST, map_location="cpu")
        state = {WEIGHTS[:-1]: get_model_state_dict(self.model)}
        load_folder(path, index, state)
        self.model.load_state_dict(state[WEIGHTS[:-1]])
        for i, optimizer in enumerate(self.optimizers):
            state = {f"optimizer_{i}": get_optimizer_state_dict(self.model, optimizer)}
            load_folder(path, index, state)
            options = StateDictOptions(cpu_offload=True)
            set_optimizer_state_dict(self.model, optimizer, state[f"optimizer_{i}"], options=options)
        return rest

    def _load_file(self, path: Path) -> dict[str, Any]:
        checkpoint = load_plain(path, map_location="cpu", mmap=is_zipfile(path))
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


def _replace(path: Path, by: Path) -> None:
    """Put the folder ``by`` in the place of a file or folder; at any time one of the two has a checkpoint's name."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        os.rename(by, path)
        return
    if not is_sharded(path):
        raise OSError(f"{path} is a folder, and no checkpoint: it is left alone")
    previous = path.with_name(f"{path.stem}.previous{path.suffix}")
    if previous.exists():
        remove_own(previous, FILES)
    os.rename(path, previous)
    os.rename(by, path)
    shutil.rmtree(previous)


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


# ---- reading a checkpoint that is a folder, by one process


def is_sharded(path: str | Path) -> bool:
    """Whether ``path`` is a checkpoint that is a folder, or what is left of one."""
    return Path(path).is_dir() and Path(path, REST).is_file()


def _tensors(path: str | Path, index: Metadata) -> dict[str, TensorStorageMetadata]:
    stored = index.state_dict_metadata
    weights = {name.removeprefix(WEIGHTS): tensor for name, tensor in stored.items() if name.startswith(WEIGHTS)}
    for name, tensor in weights.items():
        if not isinstance(tensor, TensorStorageMetadata):
            raise ValueError(f"{str(path)!r} is not a checkpoint of weights: {name} is no tensor")
    return weights


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights in a checkpoint that is a folder, put together, on the CPU. Needs no other process.

    Raises:
        ValueError, OSError: As `read_index` and `load_folder`; or a weight is no tensor.
    """
    index = read_index(path)
    check_whole(path, index)  # before there is room for what may not be there
    tensors = _tensors(path, index).items()
    stored = {name: torch.empty(tensor.size, dtype=tensor.properties.dtype) for name, tensor in tensors}
    load_folder(path, index, {WEIGHTS[:-1]: stored}, no_dist=True)
    return stored
