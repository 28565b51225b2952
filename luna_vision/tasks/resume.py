"""Exact resume: the state that Lightning's checkpoints lack, and the search for the run to resume.

A checkpoint of Lightning has weights, optimizer and counters, and the schedule and every batch depend on these and on
the seed alone. The states of the random generators are added here, the means of the epoch so far by the task.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

import luna_vision
from luna_vision.images.find import listed
from luna_vision.utils.files import remove_leftovers, write_json
from luna_vision.utils.text import printable

from .base import TUNERS
from .checkpoints import is_exact, read_checkpoint

RUN_FILE, LOCK_FILE = "run.json", ".run.lock"
RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")  # of this job, in the environment


def random_states() -> dict[str, Any]:
    """The states of the generators of torch (CPU and current GPU), numpy and Python, as plain data."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "numpy": (name, keys.tolist(), *rest),
        "python": random.getstate(),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Restore the states of `random_states`."""
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
    np.random.set_state(states["numpy"])  # noqa: NPY002
    random.setstate(states["python"])


class ExactResume(Callback):
    """Add to each checkpoint what an exact resume needs, restore it, and keep a record of the run in its folder.

    Checkpoints get the random generators of all processes. With another number of processes they are seeded anew. A
    warning says how a checkpoint differs from the run that resumes it: number of processes, code, configuration. The
    folder has ``run.json``, with the configuration and whether the run has finished, and a lock while a process runs.

    Args:
        config: The configuration, as plain data.

    Raises:
        ValueError: When a fit begins: another process uses the run's folder, or the processes of this run would not
            resume from the same checkpoint.
    """

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.config, self._code = config or {}, code_versions()
        self._trainer: Trainer | None = None
        self._random: dict[str, Any] | None = None
        self._folder: Path | None = None
        self._lock: FileLock | None = None

    def begin(self, folder: Path) -> None:
        """Lock the folder of a run, and note that it has not finished. The first process calls this."""
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / LOCK_FILE)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(f"another process is at work on {folder}") from error
        remove_leftovers(folder / "checkpoints")  # of a killed process; the lock excludes another one
        self._folder = folder
        self.note(finished=False)

    def note(self, finished: bool) -> None:
        """Write ``run.json``."""
        if self._folder is not None:
            write_json(self._folder / RUN_FILE, {"finished": finished, "config": self.config})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._trainer = trainer
        # With max_steps, Lightning takes any checkpoint for one within an epoch, and counts a finished one once more.
        trainer.fit_loop._iteration_based_training = lambda: False
        first = trainer.strategy.broadcast(str(trainer.ckpt_path))
        if first != str(trainer.ckpt_path):
            raise ValueError(f"process {trainer.global_rank} finds {trainer.ckpt_path} to resume, the first {first}")
        if trainer.is_global_zero and self._folder is None:
            self.begin(log_dir(trainer))

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        if self._lock is not None:
            self._lock.release()

    on_exception = teardown

    def _about(self) -> dict[str, Any]:
        return {"processes": self._trainer.world_size, "code": self._code, "config": self.config}

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint; all processes call this."""
        mine, trainer = random_states(), self._trainer
        states = [mine]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            dist.all_gather_object(states, mine)
        tuned = {"lr": trainer.lightning_module.hparams.get("lr")}
        tuned["batch_size"] = getattr(trainer.datamodule, "batch_size", None)
        return {**self._about(), "exact": is_exact(trainer), "random": states, "tuned": tuned}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        state, about = checkpoint["callbacks"].get(self.state_key), self._about()
        if state is None:
            found = ["it does not say in what"]
        else:
            found = differences({name: state[name] for name in about}, about)
            found += [] if state["exact"] else ["the moment, from which no exact resume is possible"]
            if len(state["random"]) == trainer.world_size:
                self._random = state["random"][trainer.global_rank]
        if found:
            rank_zero_warn(printable(f"{trainer.ckpt_path} is not of this run as it is now: {listed(found, 3)}"))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._random is not None:
            set_random_states(self._random)
        self._random = None


def code_versions() -> dict[str, str]:
    """Versions of the packages that decide the result; for this package with a checksum of its source."""
    folder, source = Path(luna_vision.__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        source.update(path.read_bytes())
    versions = {name: importlib.metadata.version(name) for name in ("torch", "timm", "lightning")}
    return {"luna_vision": f"{luna_vision.__version__} {source.hexdigest()[:8]}", **versions}


def differences(there: Any, here: Any, name: str = "") -> list[str]:
    """How plain data differs, such as "model.lr (0.1 there, 0.2 here)"."""
    if isinstance(there, list) and isinstance(here, list):
        there, here = dict(enumerate(there)), dict(enumerate(here))
    if isinstance(there, dict) and isinstance(here, dict):
        parts = ((there.get(part), here.get(part), f"{name}.{part}".lstrip(".")) for part in {**here, **there})
        return [difference for part in parts for difference in differences(*part)]
    return [] if repr(there) == repr(here) else [f"{name} ({there!r:.50} there, {here!r:.50} here)"]  # NaN equals NaN


# ---- which run


def resume(trainer: Trainer, config: dict[str, Any], asked: bool) -> str | None:
    """Have a trainer resume the newest unfinished run of a configuration, in the folder where a new run would be.

    It does so if asked, or if SLURM has requeued this job or torchrun has restarted these processes. Otherwise a line
    says that there is such a run. All processes find the same run.

    Args:
        trainer: With an `ExactResume` that has not begun; its loggers have made no folder.
        config: The configuration.
        asked: Whether the user gave --resume.

    Returns:
        The newest complete checkpoint; None where there is none, or the run is a new one.

    Raises:
        ValueError: Another process is at work on the run; or the user gave --resume, and all unfinished runs are of
            other configurations.
        IsADirectoryError: The newest checkpoint is a folder.
    """
    runs = unfinished_runs(trainer)
    run = next((folder for folder, known in runs if not differences(known, config)), None)
    if not asked and not any(int(os.environ.get(name) or 0) for name in RESTARTS):
        if run is not None:
            rank_zero_info(printable(f"{run} is an unfinished run of this configuration: --resume continues it"))
        return None
    if run is None:
        if asked and runs:
            other, known = runs[0]
            raise ValueError(
                f"--resume: the unfinished run in {other} is of another configuration: "
                f"{listed(differences(known, config), 3)}; --ckpt_path begins a new run from its checkpoint"
            )
        rank_zero_info("there is no unfinished run of this configuration: this is a new one")
        return None
    if trainer.is_global_zero:
        next(callback for callback in trainer.callbacks if isinstance(callback, ExactResume)).begin(run)
    checkpoint = latest_complete(trainer, run, config)
    for logger in versioned_loggers(trainer):
        logger._version = run.name
        if isinstance(logger, CSVLogger) and trainer.is_global_zero:
            keep_rows(logger)
    start = f"from {checkpoint}" if checkpoint else "from its beginning: it has no checkpoint"
    rank_zero_info(printable(f"resuming the unfinished run in {run}, {start}"))
    return checkpoint


def unfinished_runs(trainer: Trainer) -> list[tuple[Path, dict[str, Any]]]:
    """Folders and configurations of unfinished runs, in the folder where a new run would be; newest first.

    A run with links in its folders is left out, with a warning: they would lead the run out of its folders.
    """
    new, loggers, runs = log_dir(trainer), versioned_loggers(trainer), []
    found = [path for path in (new.parent.glob(f"*/{RUN_FILE}") if loggers else [new / RUN_FILE]) if path.is_file()]
    for path in sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        config = record.get("config") if isinstance(record, dict) else None
        if not isinstance(config, dict) or record.get("finished") is not False:
            continue
        folders = [path.parent, *(Path(logger.root_dir, path.parent.name) for logger in loggers)]
        if any(inside.is_symlink() for folder in folders for inside in (folder, *folder.rglob("*"))):
            rank_zero_warn(printable(f"{path.parent} is left out: there are links in the folders of this run"))
            continue
        runs.append((path.parent, config))
    return runs


def versioned_loggers(trainer: Trainer) -> list[CSVLogger | TensorBoardLogger]:
    """The loggers with a folder for each run, of the same name in all of them; none if the first logger has none."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, CSVLogger | TensorBoardLogger)]
    return loggers if loggers[:1] == trainer.loggers[:1] else []


class _AppendingWriter(ExperimentWriter):
    """The writer of a CSV logger, which would delete the rows in its file."""

    def _check_log_dir_exists(self) -> None:
        pass


def keep_rows(logger: CSVLogger) -> None:
    """Have a CSV logger append to its file, without the row that a kill cut off."""
    writer = logger._experiment = _AppendingWriter(logger.log_dir)
    file = Path(writer.metrics_file_path)
    if file.is_file():
        with file.open("r+b") as opened:
            opened.truncate(opened.read().rfind(b"\n") + 1)
        with file.open(newline="", encoding="utf-8") as opened:
            writer.metrics_keys = next(csv.reader(opened), [])


def latest_complete(trainer: Trainer, run: Path, config: dict[str, Any]) -> str | None:
    """The newest checkpoint of a run that is readable, of this configuration, and allows an exact resume.

    A warning names those that cannot be read. Raises ``IsADirectoryError`` for a folder.
    """
    told = {Path(c.dirpath) for c in trainer.callbacks if isinstance(c, ModelCheckpoint) and c.dirpath}
    files = [path for folder in {run / "checkpoints", *told} for path in folder.glob("[!.]*.ckpt")]
    for path in sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            state = read_checkpoint(path)["callbacks"][ExactResume.__name__]
            if state["exact"] and not differences(state["config"], config):
                return str(path)
        except IsADirectoryError:
            raise
        except (OSError, KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            rank_zero_warn(printable(f"{path} is left out, as it cannot be resumed from ({reason})"))
    return None


def take_tuned(trainer: Trainer, task: LightningModule, data: LightningDataModule | None, checkpoint: str) -> None:
    """Take learning rate and batch size from a checkpoint in place of tuning them anew, where a run has a tuner."""
    tuners = [callback for callback in trainer.callbacks if isinstance(callback, TUNERS)]
    tuned = read_checkpoint(checkpoint)["callbacks"].get(ExactResume.__name__, {}).get("tuned") if tuners else None
    trainer.callbacks = [callback for callback in trainer.callbacks if callback not in tuners]
    tuned = tuned or {}
    if tuned.get("lr") is not None:
        task.hparams.lr = float(tuned["lr"])
    if tuned.get("batch_size") is not None:  # of a data module that has one
        data.batch_size = int(tuned["batch_size"])


def log_dir(trainer: Trainer) -> Path:
    """The folder of this run: the first logger's, or the trainer's where there is no logger."""
    first = getattr(trainer.loggers[0], "log_dir", None) if trainer.loggers else None
    return Path(first or trainer.default_root_dir)
