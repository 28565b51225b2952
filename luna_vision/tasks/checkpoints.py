"""Checkpoints: the newest state for resuming, written in one move, and where the best and the last one are."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import is_zipfile

import torch
from fsspec.utils import get_protocol
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from luna_vision.utils.files import new_file

from .folder import check_whole, read_index
from .plain import load_plain
from .sharding import REST, is_sharded, read_weights


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
        with new_file(path) as file:
            sink = _Sink(file)
            torch.save(checkpoint, sink)
            if sink.error is not None:
                raise sink.error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Whatever ``weights_only`` says, nothing but plain data is loaded, see `load_plain`.

        A folder that FSDP2 has written is read, too: without the optimizer, as for testing or prediction.
        """
        return read_checkpoint(path) if is_sharded(path) else load_plain(path, map_location=map_location)


class _Sink:
    """What torch.save writes to, which keeps the first error instead of raising it.

    torch's zip writer makes a RuntimeError about positions of any error, Ctrl-C included, and where it is left before
    its end it writes once more when it is deleted: to a closed file by then, and that ends the whole process.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.error = file, None

    def write(self, data: bytes | memoryview) -> int:
        if self.error is None and not self.file.closed:
            try:
                self.file.write(data)
            except BaseException as error:
                self.error = error
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Left to the owner of the file."""


def read_checkpoint(path: str | Path, weights: bool = True) -> dict[str, Any]:
    """A checkpoint as it was saved, on the CPU; one that is a folder without the optimizer.

    Args:
        path: A file, or a folder that FSDP2 has written.
        weights: Whether those of a folder are wanted, too; if not, it is made sure that they are all there.

    Raises:
        ValueError: As `load_plain`, `read_index` and `read_weights`.
        OSError: It cannot be read, or a file of the folder is missing or cut off.
    """
    if not is_sharded(path):
        return load_plain(path, map_location="cpu", mmap=is_zipfile(path))
    checkpoint = load_plain(Path(path, REST), map_location="cpu")
    if weights:
        return {**checkpoint, "state_dict": read_weights(path)}
    check_whole(path, read_index(path))
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
    """What is given as ``--ckpt_path``, of a folder without the weights.

    Raises:
        ValueError: It is not Lightning's, or as `load_plain`.
    """
    checkpoint = read_checkpoint(path, weights=False)
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

    Written at the end of every epoch and, within one, after so many steps or minutes. ModelCheckpoint's ``save_last``
    does not do: in Lightning 2.6 it is written only when the monitored metric has improved.

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
        self.every_n_steps, self.every_minutes = every_n_steps, every_minutes
        self.path = ""  # of what this run has written
        self._step, self._time = 0, time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step, self._time = trainer.global_step, time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if not is_exact(trainer) or trainer.global_step == self._step:
            return
        due = self.every_n_steps is not None and trainer.global_step - self._step >= self.every_n_steps
        if not due and self.every_minutes is not None:
            late = time.monotonic() - self._time >= self.every_minutes * 60
            due = trainer.strategy.broadcast(late)  # clocks differ
        if due:
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
        self.path, self._step, self._time = str(path), trainer.global_step, time.monotonic()


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
