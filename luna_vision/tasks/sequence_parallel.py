"""Training on images that are split into strips over several processes: a Lightning strategy."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from luna_vision.data.slides import Slide
from luna_vision.execution.collectives import from_all
from luna_vision.execution.sequence_parallel import SequenceParallel, split_rows

from .base import leaves_missing
from .classification import ClassificationTask
from .slides import SlideTask


class SequenceParallelStrategy(DDPStrategy):
    """DDP in which ``processes`` neighbouring processes share each image, and compute a strip of it each.

    A classification task trains, validates and tests as on one process with the same batch, up to rounding. n processes
    work on n / ``processes`` batches at a time. All that share an image load it, and move their strip to their device;
    of a slide they read their strip alone. See docs/sequence_parallel.md.

    Args:
        processes: How many processes share an image.
        **kwargs: Arguments of Lightning's ``DDPStrategy``.

    Raises:
        ValueError: ``processes`` is not at least 2; when a run starts: it does not divide the number of processes, a
            model or a task that cannot be split, or data that gives processes of one image different samples.
    """

    def __init__(self, processes: int = 2, **kwargs: Any) -> None:
        if processes < 2:
            raise ValueError(f"SequenceParallelStrategy: processes must be at least 2, got {processes}")
        super().__init__(**kwargs)
        self.processes = processes
        self._mesh: DeviceMesh | None = None
        self._parallel: SequenceParallel | None = None
        self._compared = False

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """This process's part of the data, which is the same for all processes of an image."""
        shares = self.world_size // self.processes
        return {"num_replicas": shares, "rank": self.global_rank // self.processes}

    def setup_environment(self) -> None:
        if self.world_size % self.processes:
            raise ValueError(
                f"{self.processes} processes are to share an image, but the {self.world_size} of this run cannot be "
                "divided by that: change --trainer.devices (or num_nodes) or the strategy's processes"
            )
        self._check_task()
        super().setup_environment()
        shape = (self.world_size // self.processes, self.processes)
        if self._mesh is None:
            self._mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=("data", "seq"))
        parallel = SequenceParallel(self.lightning_module.model, self._mesh["seq"])
        if self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            parallel.check_training()
        self._parallel = parallel

    def _check_task(self) -> None:
        task = self.lightning_module
        if type(task) not in (ClassificationTask, SlideTask):  # others use batches differently
            raise ValueError(
                f"sequence parallelism trains a ClassificationTask or a SlideTask, got {type(task).__name__}"
            )
        if not isinstance(task, SlideTask) and leaves_missing(task.trainer.datamodule):
            raise ValueError("sequence parallelism takes no mask of missing pixels: give another fill than 'mask'")
        if task.mix is not None:
            raise ValueError("sequence parallelism cannot mix images: set mixup and cutmix to 0")
        if task.hparams.compile:
            raise ValueError("sequence parallelism runs the model part by part: set compile to false")
        if task.model.block_runner is not None:
            raise ValueError("sequence parallelism does not compute in bands: set band_rows to 0")
        if task.trainer.state.fn == TrainerFn.PREDICTING:
            raise ValueError(
                "prediction is for single processes: give --trainer.strategy=auto --trainer.devices=1, or encode very "
                "large images by luna-vision encode"
            )

    def setup(self, trainer: Trainer) -> None:
        # Replaces forward, so that weights keep their names. Callbacks, which may copy the model, are set up by now.
        if isinstance(self.lightning_module, SlideTask):
            self.lightning_module.group = self._parallel.group
        else:
            self.lightning_module.model.forward = self._parallel.forward
        self._compared = False
        super().setup(trainer)

    def teardown(self) -> None:
        if self.lightning_module is not None:
            vars(self.lightning_module.model).pop("forward", None)
            vars(self.lightning_module).pop("group", None)
        super().teardown()

    def batch_to_device(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        images, *rest = batch
        if not self._compared:
            self._compare(images)
        if isinstance(images, Tensor):
            images = split_rows(images, self.lightning_module.model.patch_embed.patch_size, self._mesh["seq"])
            images = images.contiguous()
        return super().batch_to_device([images, *rest], *args, **kwargs)

    def _compare(self, images: Tensor | list[Slide]) -> None:
        """Check in the first batch that the processes of an image have the same image."""
        if isinstance(images, Tensor):
            (total,) = struct.unpack("q", struct.pack("d", float(images.sum(dtype=torch.float64))))
        else:
            total = zlib.crc32(repr([(slide.row, slide.flip) for slide in images]).encode())
        sums = from_all([total], self._mesh["seq"].get_group(), self.root_device)
        if any(other != sums[0] for other in sums):
            raise ValueError(
                "the processes that share an image were given different ones: a data module must take its part of the "
                "data from trainer.distributed_sampler_kwargs, not from the rank"
            )
        self._compared = True
