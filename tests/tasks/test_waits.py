"""A training step waits for the device no more than once: tried on a CPU, by what would have to be waited for."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from luna_vision.tasks import EMA, ImagesPerSecond, LastCheckpoint, NestedMemory, NonFiniteGuard, SegmentationTask

from .conftest import SyntheticData, tiny_task, tiny_trainer

READS = {f"aten::{name}" for name in ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2")}


class Device(TorchDispatchMode):
    """Takes a task's weights, the batches and all that is computed from them for what a device holds, and counts how
    often one of these values is looked at, or a number is sent there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.held, self.waits = {}, 0
        for name in ("tolist", "numpy", "cpu"):  # which read the memory of a CPU as it is
            monkeypatch.setattr(torch.Tensor, name, self.counted(getattr(torch.Tensor, name)))
        log = LightningModule.log

        def logged(task, name, value, *args, **kwargs):
            self.waits += not isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Module)
            return log(task, name, value, *args, **kwargs)

        monkeypatch.setattr(LightningModule, "log", logged)

    def counted(self, function):
        def call(tensor, *args, **kwargs):
            self.waits += id(tensor) in self.held
            return function(tensor, *args, **kwargs)

        return call

    def hold(self, *values) -> None:
        self.held |= {id(value): value for value in tree_leaves(values) if isinstance(value, torch.Tensor)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(id(value) in self.held for value in tree_leaves((args, kwargs))):
            self.waits += func.name().partition(".")[0] in READS
            self.hold(out)
        return out


class Count(Callback):
    """Of each batch, from when it is on the device to when the next one is to be."""

    def __init__(self, device: Device) -> None:
        self.device, self.waits = device, []

    def on_train_start(self, trainer, task):
        self.device.hold(task.state_dict(), list(task.parameters()), list(task.buffers()))
        self.device.__enter__()
        self.device.waits = 0

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        self.device.hold(batch)
        self.waits.append(self.device.waits)
        self.device.waits = 0

    def on_train_epoch_end(self, trainer, task):
        self.waits.append(self.device.waits)
        self.device.__exit__(None, None, None)


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.8, "cutmix": 1.0}])
@pytest.mark.parametrize(("guarded", "accumulate"), [(False, 1), (True, 1), (True, 2)])
def test_a_step_waits_for_the_device_once(tmp_path, monkeypatch, guarded, accumulate, mixing):
    """Without a guard not at all; where a row is logged, for its values, too."""
    count = Count(Device(monkeypatch))
    callbacks = [EMA(), ImagesPerSecond(), NestedMemory(), LastCheckpoint(), *[NonFiniteGuard()] * guarded, count]
    settings = {"gradient_clip_val": 1.0, "accumulate_grad_batches": accumulate, "limit_val_batches": 0}
    settings |= {"callbacks": callbacks, "enable_checkpointing": True, "max_epochs": 1}
    logging = {"logger": CSVLogger(tmp_path), "log_every_n_steps": 4 // accumulate}
    trainer = tiny_trainer(tmp_path, enable_progress_bar=True, **settings, **logging)
    trainer.fit(tiny_task(warmup_epochs=0.5, model_kwargs=MODEL, **mixing), SyntheticData(count=64, batch_size=8))
    waits = count.waits[1:]  # of each batch
    steps = [guarded * ((batch + 1) % accumulate == 0) for batch in range(8)]
    rows = [2 * (batch in (3, 7)) for batch in range(8)]  # a loss and an accuracy
    assert waits[:7] == [step + row for step, row in zip(steps, rows, strict=True)][:7]


@pytest.mark.parametrize("sizes", ["one size", "mixed sizes"])
def test_a_step_of_segmentation_waits_for_the_device_once(tmp_path, monkeypatch, sizes):
    """For the guard; padding and its masks are made from sizes that the host knows."""
    count = Count(Device(monkeypatch))
    task = SegmentationTask("test_luna_vit", 3, 1, model_kwargs=MODEL | {"patch_size": 8}, pyramid_channels=8)
    sides = [(32, 32)] * 8 if sizes == "one size" else [(32, 24), (16, 32)] * 4
    data = [(torch.rand(1, *side), torch.randint(4, side)) for side in sides]
    loader = DataLoader(data, 2, collate_fn=lambda batch: tuple(map(list, zip(*batch, strict=True))))
    trainer = tiny_trainer(tmp_path, max_epochs=1, callbacks=[NonFiniteGuard(), EMA(), count])
    trainer.fit(task, loader)
    assert count.waits[1:4] == [1, 1, 1]


MODEL = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "drop_path_rate": 0.2}
