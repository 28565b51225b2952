"""Exact resume: what Lightning's checkpoint lacks, and finding the run to go on with.

A checkpoint of Lightning has the weights, the optimizer, the schedule and the loops' counters, and the data modules
here make every batch a function of (seed, epoch, sample). What is left is the state of the random generators (dropout
draws from them), the rows that the loggers have written, and the means of the epoch so far, which the task keeps.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

from luna_vision.utils.files import remove_leftovers, to_disk, write_json
from luna_vision.utils.text import printable

from .checkpoints import is_exact, read_checkpoint
from .csv_log import DurableCSVLogger, read_rows, write_rows

RUN_FILE = "run.json"
LOCK_FILE = ".run.lock"
INHERITED = "LUNA_VISION_RUN"  # environment: what the first process decided, for those that Lightning starts


def random_states() -> dict[str, Any]:
    """The states of the generators of torch (CPU and current GPU), numpy and Python, as plain data."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None,
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "python": (version, list(internal), gauss_next),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put back what `random_states` has given."""
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal), gauss_next))


class ExactResume(Callback):
    """Keep in the checkpoint, and put back, what Lightning's own lacks: random generators and the loggers' rows.

    Of all ranks, in the order of their numbers; with another number of processes than before, the generators are left
    as they are seeded. Rows of a CSVLogger that were written after the checkpoint are removed, as they will be written
    again; of a TensorBoardLogger they are marked so.

    Args:
        fingerprint: Names the configuration, so that no other run's checkpoint is taken for one of this.
    """

    def __init__(self, fingerprint: str = "") -> None:
        self.fingerprint = fingerprint
        self._random: dict[str, Any] | None = None
        self._trainer: Trainer | None = None
        self._old_rows: dict[int, tuple[list[str], list[dict[str, str]]]] | None = None  # of a run that goes on

    # ---- writing

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trainer = trainer
        # With max_steps, Lightning takes any checkpoint for one within an epoch, and counts a finished one once more.
        trainer.fit_loop._iteration_based_training = lambda: False
        first = trainer.strategy.broadcast(str(trainer.ckpt_path))
        if first != str(trainer.ckpt_path):
            raise ValueError(
                f"process {trainer.global_rank} would resume from {trainer.ckpt_path}, the first one from {first}: "
                "another run of this configuration seems to be at work; start this one with --resume false"
            )

    def state_dict(self) -> dict[str, Any]:
        """Called on all ranks whenever a checkpoint is made."""
        mine, trainer = random_states(), self._trainer
        states = [mine]
        if trainer.world_size > 1 and dist.is_initialized():
            states = [None] * trainer.world_size
            dist.all_gather_object(states, mine)
        return {
            "fingerprint": self.fingerprint,
            "exact": is_exact(trainer),
            "random": states,
            "rows": self._rows(),
            "unwritten": self._unwritten(),
        }

    def _rows(self) -> list[int]:
        """Rows in the file of each CSV logger, after writing them all."""
        counts = []
        for logger in csv_loggers(self._trainer):
            logger.save()
            file = rows_file(logger)
            if file.is_file():
                to_disk(file)  # as the checkpoint is
            counts.append(len(read_rows(file)[1]))
        return counts

    def _unwritten(self) -> dict[str, float] | None:
        """What the loggers are given right after the checkpoint, by what will not be done again."""
        trainer, loop = self._trainer, self._trainer.fit_loop.epoch_loop
        batches, epochs, step = loop.batch_progress, trainer.fit_loop.epoch_progress.current, loop._batches_that_stepped
        if batches.current.completed < batches.current.processed:  # at the end of a batch
            every = trainer.log_every_n_steps  # 0 is never
            if loop._should_accumulate() or not every or (step + 1) % every:
                return None
            metrics = loop._results.metrics(on_step=True)["log"]
        elif epochs.completed < epochs.ready and (batches.is_last_batch or epochs.processed == epochs.ready):
            # of an epoch, which max_steps may have cut short
            metrics = loop._results.metrics(on_step=False)["log"]
            step -= epochs.processed == epochs.ready  # by then Lightning has counted the last batch
        else:
            return None
        values = {name: float(value) for name, value in metrics.items()}
        return {**values, "epoch": trainer.current_epoch, "step": step} if values else None

    # ---- reading

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Called after `setup`. The loggers come first: a run that has nothing left to do never starts to train."""
        trainer = self._trainer
        if len(state["random"]) == trainer.world_size:
            self._random = state["random"][trainer.global_rank]
        if self._old_rows is not None:
            for i, count in enumerate(state["rows"]):
                logger, (names, rows) = csv_loggers(trainer)[i], self._old_rows[i]
                if len(rows) < count:
                    rank_zero_warn(
                        f"{rows_file(logger)} has lost {count - len(rows)} of the {count} rows logged so far"
                    )
                restore_rows(logger, names, rows[:count])
            if state["unwritten"] is not None:
                row = dict(state["unwritten"])
                step = int(row.pop("step"))
                for logger in trainer.loggers:
                    logger.log_metrics(row, step)
                    logger.save()
        self._old_rows = None

    def keep_rows(self, trainer: Trainer) -> None:
        """Remember what is in the CSV loggers' files, and let it stay there until it is put back."""
        self._old_rows = {}
        for i, logger in enumerate(csv_loggers(trainer)):
            self._old_rows[i] = read_rows(rows_file(logger))
            if isinstance(logger, DurableCSVLogger):
                logger.goes_on = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._random is not None:
            set_random_states(self._random)
        self._random = None


def csv_loggers(trainer: Trainer) -> list[CSVLogger]:
    """The loggers that write ``metrics.csv``."""
    return [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]


def rows_file(logger: CSVLogger) -> Path:
    """Where a CSV logger writes."""
    return Path(logger.log_dir, ExperimentWriter.NAME_METRICS_FILE)


def restore_rows(logger: CSVLogger, names: list[str], rows: list[dict[str, str]]) -> None:
    """Make a CSV logger go on after these rows."""
    writer = logger.experiment
    if not names:
        return
    write_rows(writer.metrics_file_path, names, rows)
    writer.metrics_keys = list(names)


# ---- which run


@dataclass
class Unfinished:
    """A run that was stopped.

    Attributes:
        versions: Of its loggers.
        checkpoint: The newest one that is whole, or None.
    """

    versions: list[Any]
    checkpoint: str | None


def fingerprint(config: str) -> str:
    """A name of a configuration, given as text."""
    return hashlib.sha256(config.encode()).hexdigest()[:16]


def log_dir(trainer: Trainer) -> Path:
    """Where this run writes: the first logger's folder, or the trainer's where there is no logger."""
    first = getattr(trainer.loggers[0], "log_dir", None) if trainer.loggers else None
    return Path(first or trainer.default_root_dir)


def find_unfinished(trainer: Trainer, name: str) -> Unfinished | None:
    """The newest unfinished run of this configuration beside the place where a new one would be.

    Args:
        trainer: Before it has begun, so that its loggers have made no folder.
        name: The configuration's fingerprint.

    Returns:
        None if there is none, or if a process is at work on it. All processes of a run find the same.
    """
    if not trainer.is_global_zero and INHERITED in os.environ:
        decided = json.loads(os.environ[INHERITED])
        return None if decided is None else Unfinished(*decided)
    run = _search(trainer, name)
    if trainer.is_global_zero:
        os.environ[INHERITED] = json.dumps(None if run is None else [run.versions, run.checkpoint])
    return run


def _search(trainer: Trainer, name: str) -> Unfinished | None:
    new = log_dir(trainer)
    found = [new / RUN_FILE] if not trainer.loggers else new.parent.glob(f"*/{RUN_FILE}")
    for path in sorted((p for p in found if p.is_file()), key=lambda p: p.stat().st_mtime_ns, reverse=True):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if record.get("fingerprint") != name or record.get("finished") is not False:
            continue
        if len(record.get("versions", [])) != len(trainer.loggers):
            continue
        # another rank of this run may hold the lock already: only the first asks
        if trainer.is_global_zero and is_locked(path.parent):
            continue
        return Unfinished(record["versions"], newest_whole(checkpoint_folders(trainer, path.parent), name))
    return None


def checkpoint_folders(trainer: Trainer, run: Path) -> list[Path]:
    """Where the checkpoints of the run in ``run`` are: there, and where a ModelCheckpoint is told to write."""
    told = {Path(c.dirpath) for c in trainer.callbacks if isinstance(c, ModelCheckpoint) and c.dirpath}
    return sorted({run / "checkpoints", *told})


def newest_whole(folders: list[Path], name: str) -> str | None:
    """The last written checkpoint of the configuration called ``name`` that can be read and allows an exact resume.

    A warning names those that cannot be read.
    """
    files = [p for folder in folders if folder.is_dir() for p in folder.glob("*.ckpt") if not p.name.startswith(".")]
    for path in sorted(files, key=lambda p: p.stat().st_mtime_ns, reverse=True):
        try:
            checkpoint = read_checkpoint(path, weights=False)
            state = checkpoint["callbacks"]["ExactResume"]
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
            first = printable(str(error).strip().split("\n")[0])
            rank_zero_warn(f"{path} is left out, as it cannot be resumed from ({type(error).__name__}: {first})")
            continue
        if state["fingerprint"] == name and state["exact"]:
            return str(path)
    return None


def go_on(trainer: Trainer, run: Unfinished) -> None:
    """Make the loggers write where that run has written."""
    for logger, version in zip(trainer.loggers, run.versions, strict=True):
        logger._version = version
    callback = next((c for c in trainer.callbacks if isinstance(c, ExactResume)), None)
    if callback is not None and run.checkpoint and trainer.is_global_zero:
        callback.keep_rows(trainer)
        step = read_checkpoint(run.checkpoint, weights=False)["global_step"]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger._kwargs["purge_step"] = step


class RunRecord(Callback):
    """Keep in the run's folder whose run it is and whether it has finished, and a lock while a process is at work.

    Args:
        fingerprint: Of the configuration.
    """

    def __init__(self, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self._lock: FileLock | None = None
        self._folder: Path | None = None

    @rank_zero_only
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or self._folder is not None:
            return
        folder = log_dir(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / LOCK_FILE)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            if trainer.loggers:  # which number the folders; without them all runs share one
                raise ValueError(f"another process has just begun to work on {folder}: start this one again") from error
        remove_leftovers(folder / "checkpoints")  # of a process that was killed: the lock says that there is no other
        self._folder = folder
        self._versions = [getattr(logger, "version", None) for logger in trainer.loggers]
        self._write(finished=False)

    def finish(self) -> None:
        """There is nothing left to go on with."""
        if self._folder is not None:
            self._write(finished=True)

    def _write(self, finished: bool) -> None:
        record = {"fingerprint": self.fingerprint, "finished": finished, "versions": self._versions}
        write_json(self._folder / RUN_FILE, record)


def is_locked(folder: Path) -> bool:
    """Whether a process is at work on the run in ``folder``."""
    if not (folder / LOCK_FILE).exists():
        return False
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False
