"""Checkpoints: the newest state for resuming, written in one move, and where the best and the last one are."""

from __future__ import annotations

import io
import math
import time
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from fsspec.utils import get_protocol
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from luna_vision.models.checkpoints import not_plain
from luna_vision.utils.files import new_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its place and move it there when it is on the disk.

    Lightning collects a checkpoint in the system's temporary folder, and moves it: on another file system that is a
    copy, which a kill or a full disk cuts off half way, over the checkpoint that was there.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """
        Raises:
            OSError: It cannot be written, for instance as the disk is full. What was at ``path`` is as it was.
        """
        if "://" in str(path):  # object storage is written whole or not at all
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        memory = io.BytesIO()  # written to a file, torch would make a RuntimeError of a full disk, and of Ctrl-C
        torch.save(checkpoint, memory)
        with new_file(path) as file:
            file.write(memory.getbuffer())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Whatever ``weights_only`` says, nothing but plain data is loaded, see `read_checkpoint`."""
        return read_checkpoint(path, mmap=False)


def read_checkpoint(path: str | Path, mmap: bool = True) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Only tensors and plain data are unpickled, anything else is refused.

    Args:
        path: A file.
        mmap: Read each tensor from the disk when it is used.

    Raises:
        IsADirectoryError: ``path`` is a folder.
        ValueError: The file is no checkpoint, or holds other objects, which could run code.
        OSError: The file cannot be read.
    """
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # reading a file that is no checkpoint raises nearly anything
        raise ValueError(not_plain(path, error)) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{str(path)!r} is not a checkpoint: it holds a {type(checkpoint).__name__}")
    return checkpoint


def check_deletions(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """To be called before the state of the callbacks is put back: a ModelCheckpoint deletes what a checkpoint says is
    no longer among its best, a folder with all that is in it. Lightning lets it do so below its own folder alone, but
    takes the dots of ``FOLDER/../..`` for a name, and every address with a protocol for one of its own.

    Raises:
        ValueError: The checkpoint names such a path.
    """
    states = [x for name, x in checkpoint.get("callbacks", {}).items() if name.startswith(ModelCheckpoint.__name__)]
    for folder in (str(c.dirpath) for c in trainer.callbacks if isinstance(c, ModelCheckpoint)):
        for state in states:
            paths = [path for name, path in state.items() if name.endswith("_path")]
            for path in map(str, [*paths, *state.get("best_k_models", {})]):
                below = Path(folder).absolute() in Path(path).absolute().parents
                really = Path(folder).resolve() in Path(path).resolve().parents
                if get_protocol(path) != get_protocol(folder) or (below and not really):
                    raise ValueError(f"the checkpoint would have another file deleted, {path!r}")


def check_checkpoint(path: str | Path) -> dict[str, Any]:
    """What is given as ``--ckpt_path``.

    Raises:
        ValueError: It is not Lightning's, or as `read_checkpoint`.
    """
    checkpoint = read_checkpoint(path)
    if "pytorch-lightning_version" not in checkpoint:  # what Lightning looks at first
        raise ValueError(
            f"--ckpt_path: {path} is not a checkpoint of a training; weights alone are given as --model.checkpoint"
        )
    return checkpoint


def is_exact(trainer: Trainer) -> bool:
    """Whether Lightning can go on exactly from a checkpoint that is made now.

    Not between the batches of one optimizer step, whose gradients are in no checkpoint, and not where the end of an
    epoch or, right after a batch, a validation is still to come that Lightning would leave out.
    """
    fit = trainer.fit_loop
    loop, epochs = fit.epoch_loop, fit.epoch_progress.current
    out_of_steps = 0 <= trainer.max_steps <= trainer.global_step and epochs.processed < epochs.ready
    if out_of_steps or loop._should_accumulate():
        return False
    at_batch_end = loop.batch_progress.current.completed < loop.batch_progress.current.processed
    return not at_batch_end or not (loop._num_ready_batches_reached() or loop._should_check_val_fx(fit._data_fetcher))


class BestCheckpoint(ModelCheckpoint):
    """Keep the best checkpoint in ``checkpoints/best.ckpt``: Lightning's ModelCheckpoint with other defaults.

    Args:
        monitor: the metric that is to be large; by default that of the validation that sums up the task (``headline``).
        mode: "min" where it is to be small.
        filename: without its ending.
        **kwargs: the other arguments of ModelCheckpoint.
    """

    def __init__(self, monitor: str | None = None, mode: str = "max", filename: str = "best", **kwargs) -> None:
        super().__init__(monitor=monitor, mode=mode, filename=filename, **kwargs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.monitor is None:
            self.monitor = pl_module.headline[0].replace("test_", "val_")
        super().setup(trainer, pl_module, stage)

    @property
    def state_key(self) -> str:
        """By which a state is found in a checkpoint: that of its base, whose state it is."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)


class LastCheckpoint(Checkpoint):
    """Keep the newest state of training in ``checkpoints/last.ckpt``, for resuming.

    Written at the end of every epoch and, within one, after so many steps or minutes. Lightning's ModelCheckpoint does
    not do: it has one of these triggers, its ``save_last`` waits for the monitored metric to improve, and within an
    epoch it would write between the batches of a step or before a validation, from where no run goes on exactly
    (`is_exact`), and over the checkpoint from which it would.

    Args:
        every_n_steps: Optimizer steps from one to the next within an epoch; None is no limit.
        every_minutes: Minutes from one to the next within an epoch; None is no limit.

    Raises:
        ValueError: One of them is not above 0.
    """

    def __init__(self, every_n_steps: int | None = None, every_minutes: float | None = 10.0) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("every_minutes", every_minutes)):
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        self.every_n_steps = every_n_steps or math.inf
        self.every_minutes = every_minutes or math.inf
        self.path = ""  # of what this run has written
        self._step, self._time, self._late = 0, time.monotonic(), False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step, self._time = trainer.global_step, time.monotonic()

    def on_before_optimizer_step(self, trainer: Trainer, *args: Any) -> None:
        # clocks differ; asked where the guard has just waited for the device
        late = time.monotonic() - self._time >= self.every_minutes * 60
        self._late = self.every_minutes < math.inf and trainer.strategy.reduce_boolean_decision(late, all=False)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        steps = trainer.global_step - self._step
        if steps and (self._late or steps >= self.every_n_steps) and is_exact(trainer):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A progress bar, which only the first process has, has asked for the epoch's means by now and waits for the
        # others to add theirs: they do that here, before they exchange anything else.
        _ = trainer.callback_metrics
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:
            return
        folder = trainer.loggers[0].log_dir if trainer.loggers else None
        path = Path(trainer.strategy.broadcast(folder or trainer.default_root_dir), "checkpoints", "last.ckpt")
        trainer.save_checkpoint(path, weights_only=False)
        self.path, self._step, self._time, self._late = str(path), trainer.global_step, time.monotonic(), False


def model_checkpoint(trainer: Trainer) -> ModelCheckpoint | None:
    """The callback that looks for the best checkpoint."""
    return next((c for c in trainer.callbacks if isinstance(c, ModelCheckpoint)), None)


def best_checkpoint(trainer: Trainer) -> str:
    """Path of the best checkpoint of this run; of the last where nothing was monitored (no validation); '' for none."""
    callback = model_checkpoint(trainer)
    return (callback.best_model_path if callback else "") or last_checkpoint(trainer)


def last_checkpoint(trainer: Trainer) -> str:
    """Path of the newest checkpoint this run has written or was resumed from, or ''."""
    paths = [c.path for c in trainer.callbacks if isinstance(c, LastCheckpoint)]
    if (callback := model_checkpoint(trainer)) is not None:
        # Lightning notes the path before it writes the file, which the guard may prevent
        paths += [callback.last_model_path, callback.best_model_path]
    return next((path for path in [*paths, trainer.ckpt_path] if path and Path(path).exists()), "")
