"""Checkpoints: atomic writing, safe reading, the best and the last one."""

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
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins.io import TorchCheckpointIO

from luna_vision.models.checkpoints import not_plain
from luna_vision.utils.files import new_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its place and move it there when it is on the disk.

    Lightning writes to the system's temporary folder and moves the file. To another file system that is a copy, which a
    kill or a full disk can cut off after the former checkpoint was overwritten.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """
        Raises:
            OSError: It cannot be written, for instance on a full disk. The former file at ``path`` stays.
        """
        if "://" in str(path):  # object storage is atomic
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        memory = io.BytesIO()  # writing to a file, torch turns a full disk and Ctrl-C into a RuntimeError
        torch.save(checkpoint, memory)
        with new_file(path) as file:
            file.write(memory.getbuffer())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Load plain data only, whatever ``weights_only`` says; see `read_checkpoint`."""
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
    except Exception as error:  # torch raises errors of any type for files that are no checkpoints
        raise ValueError(not_plain(path, error)) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{str(path)!r} is not a checkpoint: it holds a {type(checkpoint).__name__}")
    return checkpoint


def check_deletions(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Refuse a checkpoint that would have files of others deleted. Call this before callbacks restore their states.

    A ModelCheckpoint deletes paths in its restored state that are no longer among the best, folders included. Lightning
    requires that they lie below its own folder, but does not resolve ``FOLDER/../..`` or other protocols.

    Raises:
        ValueError: The checkpoint names such a path.
    """
    states = [x for name, x in checkpoint.get("callbacks", {}).items() if name.startswith(ModelCheckpoint.__name__)]
    paths = [str(x) for state in states for name, x in state.items() if name.endswith("_path")]
    paths += [str(path) for state in states for path in state.get("best_k_models", {})]
    for folder in (str(c.dirpath) for c in trainer.callbacks if isinstance(c, ModelCheckpoint)):
        for path in paths:
            below = Path(folder).absolute() in Path(path).absolute().parents
            really = Path(folder).resolve() in Path(path).resolve().parents
            if get_protocol(path) != get_protocol(folder) or (below and not really):
                raise ValueError(f"the checkpoint would have another file deleted, {path!r}")


def check_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read the file of ``--ckpt_path``. Raises ``ValueError`` unless it is of a training, or as `read_checkpoint`."""
    checkpoint = read_checkpoint(path)
    if "pytorch-lightning_version" not in checkpoint:  # Lightning reads this first
        raise ValueError(
            f"--ckpt_path: {path} is not a checkpoint of a training; weights alone are given as --model.checkpoint"
        )
    return checkpoint


def is_exact(trainer: Trainer) -> bool:
    """Whether Lightning can resume exactly from a checkpoint of this moment.

    It cannot between the batches of an optimizer step, as gradients are in no checkpoint, and where the end of an epoch
    or (right after a batch) a validation is due, which a resume would leave out.
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
        monitor: the metric; by default the task's ``headline``, of the validation.
        mode: "max" or "min"; by default "min" for a loss.
        filename: without its ending.
        **kwargs: the other arguments of ModelCheckpoint.
    """

    def __init__(self, monitor: str | None = None, mode: str | None = None, filename: str = "best", **kwargs) -> None:
        super().__init__(monitor=monitor, mode=mode or "max", filename=filename, **kwargs)
        self._given_mode = mode

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.monitor is None:
            self.monitor = pl_module.headline[0].replace("test_", "val_")
        if self._given_mode is None and self.monitor.endswith("loss") and self.mode == "max":
            self.mode, self.kth_value = "min", torch.tensor(math.inf)
        super().setup(trainer, pl_module, stage)

    @property
    def state_key(self) -> str:
        """The key of the state in a checkpoint: that of ModelCheckpoint."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)


class LastCheckpoint(Checkpoint):
    """Keep the newest state of training in ``checkpoints/last.ckpt``, for resuming.

    Written at the end of every epoch and, within one, every few steps or minutes. ModelCheckpoint has one trigger only,
    its ``save_last`` waits for the monitored metric to improve, and within an epoch it also writes at moments that no
    run can resume from exactly (`is_exact`).

    Args:
        every_n_steps: Optimizer steps between two of them within an epoch; None is no limit.
        every_minutes: Minutes between two of them within an epoch; None is no limit.

    Raises:
        ValueError: One of them is not above 0.
    """

    def __init__(self, every_n_steps: int | None = None, every_minutes: float | None = 10.0) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("every_minutes", every_minutes)):
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        self.every_n_steps = every_n_steps or math.inf
        self.every_minutes = every_minutes or math.inf
        self.path = ""  # the one that this run has written
        self._step, self._time, self._late = 0, time.monotonic(), False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step, self._time = trainer.global_step, time.monotonic()

    def on_before_optimizer_step(self, trainer: Trainer, *args: Any) -> None:
        # Clocks differ, so processes must agree. The guard has just waited for the device.
        late = time.monotonic() - self._time >= self.every_minutes * 60
        self._late = self.every_minutes < math.inf and trainer.strategy.reduce_boolean_decision(late, all=False)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        steps = trainer.global_step - self._step
        if steps and (self._late or steps >= self.every_n_steps) and is_exact(trainer):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The progress bar of the first process has asked for the epoch's means, and waits for those of the others.
        # They must send them before they exchange anything else.
        _ = trainer.callback_metrics
        self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if averages_at_end(trainer):
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:
            return
        folder = trainer.loggers[0].log_dir if trainer.loggers else None
        path = Path(trainer.strategy.broadcast(folder or trainer.default_root_dir), "checkpoints", "last.ckpt")
        trainer.save_checkpoint(path, weights_only=False)
        self.path, self._step, self._time, self._late = str(path), trainer.global_step, time.monotonic(), False


def averages_at_end(trainer: Trainer) -> bool:
    """Whether the trained weights come at the very end, as an average, after the last validation."""
    return any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks)


def model_checkpoint(trainer: Trainer) -> ModelCheckpoint | None:
    """The callback that keeps the best checkpoint."""
    return next((c for c in trainer.callbacks if isinstance(c, ModelCheckpoint)), None)


def best_checkpoint(trainer: Trainer) -> str:
    """Path of the best checkpoint, or of the last one without validation or with weights averaged at the end, or ''."""
    callback = None if averages_at_end(trainer) else model_checkpoint(trainer)
    return (callback.best_model_path if callback else "") or last_checkpoint(trainer)


def last_checkpoint(trainer: Trainer) -> str:
    """Path of the newest checkpoint this run has written or was resumed from, or ''."""
    paths = [c.path for c in trainer.callbacks if isinstance(c, LastCheckpoint)]
    if (callback := model_checkpoint(trainer)) is not None:
        # Lightning notes the path before it writes the file, and the guard may prevent that
        paths += [callback.last_model_path, callback.best_model_path]
    return next((path for path in [*paths, trainer.ckpt_path] if path and Path(path).exists()), "")
