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
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from luna_vision.utils.files import beside, remove_own, to_disk

from .plain import check_entries, load_plain, read_index

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
    if any(getattr(module, "band_rows", 0) for module in model.modules()):
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
        path = Path(self.broadcast(str(checkpoint_path)))
        if is_sharded(path):
            stored = {name: tuple(tensor.size) for name, tensor in _tensors(path).items()}
            check_same_weights(shapes(self.model.state_dict()), stored)  # before torch says it in a hundred lines
            check_entries(path)
            load_plain(path / REST, map_location="cpu")
        else:
            load_plain(path, map_location="cpu", mmap=is_zipfile(path))
        # what has been found to be plain here is read once more there; errors of that reading have many lines
        return super().load_checkpoint(path, weights_only=True)


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


def check_whole(path: str | Path) -> None:
    """
    Raises:
        OSError: A file of the folder is missing, or shorter than what is noted to be in it.
    """
    for stored in read_index(path).storage_data.values():
        file = Path(path, stored.relative_path)
        if not file.is_file() or file.stat().st_size < stored.offset + stored.length:
            raise OSError(f"{file} is missing or cut off")


def _tensors(path: str | Path) -> dict[str, TensorStorageMetadata]:
    stored = read_index(path).state_dict_metadata
    weights = {name.removeprefix(WEIGHTS): tensor for name, tensor in stored.items() if name.startswith(WEIGHTS)}
    for name, tensor in weights.items():
        if not isinstance(tensor, TensorStorageMetadata):  # which PyTorch would unpickle
            raise ValueError(f"{str(path)!r} is not a checkpoint of weights: {name} is no tensor")
    return weights


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights in a checkpoint that is a folder, put together, on the CPU. Needs no other process."""
    stored = {name: torch.empty(tensor.size, dtype=tensor.properties.dtype) for name, tensor in _tensors(path).items()}
    dcp.load({WEIGHTS[:-1]: stored}, checkpoint_id=path, no_dist=True)
    return stored
