"""Exact resume: what Lightning's checkpoint lacks, and finding the run to resume.

A checkpoint of Lightning has the weights, the optimizer and the loops' counters, and the schedule and every batch are
functions of these and of the seed. What is left is the state of the random generators (dropout draws from them) and the
means of the epoch so far, which the task keeps.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import json
import os
import pickle
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

import luna_vision
from luna_vision.images.find import listed
from luna_vision.utils.files import remove_leftovers, write_json
from luna_vision.utils.text import printable

from .checkpoints import is_exact, read_checkpoint

RUN_FILE, LOCK_FILE = "run.json", ".run.lock"
RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")  # of this job, in the environment


def random_states() -> dict[str, Any]:
    """The states of the generators of torch (CPU and current GPU), numpy and Python, as plain data."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None,
        "numpy": (name, keys.tolist(), *rest),
        "python": random.getstate(),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put back what `random_states` has given."""
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
    np.random.set_state(states["numpy"])  # noqa: NPY002
    random.setstate(states["python"])


class ExactResume(Callback):
    """Keep in each checkpoint, and put back, what Lightning's lacks; and say in the run's folder what the run is.

    The random generators are those of all processes, in the order of their numbers; with another number of processes
    than before, they are left as they are seeded. A warning says in what a checkpoint differs from the run that resumes
    it: configuration, code, number of processes. The folder has ``run.json``, with the configuration and whether the
    run has finished, and a lock while a process is at work.

    Args:
        config: The configuration, as plain data.

    Raises:
        ValueError: When a fit begins: another process is at work in the run's folder, or the processes of this run
            would not resume from the same checkpoint.
    """

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.config, self._code = config or {}, code_versions()
        self._trainer: Trainer | None = None
        self._random: dict[str, Any] | None = None
        self._folder: Path | None = None
        self._lock: FileLock | None = None

    def begin(self, folder: Path) -> None:
        """Note that a run is at work in ``folder``. To be called by the first process."""
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / LOCK_FILE)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(f"another process is at work on {folder}") from error
        remove_leftovers(folder / "checkpoints")  # of a process that was killed: the lock says that there is no other
        self._folder = folder
        self.note(finished=False)

    def note(self, finished: bool) -> None:
        """Write whether there is nothing left to resume."""
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
        """Called on all ranks whenever a checkpoint is made."""
        mine, trainer = random_states(), self._trainer
        states = [mine]
        if trainer.world_size > 1 and dist.is_initialized():
            states = [None] * trainer.world_size
            dist.all_gather_object(states, mine)
        return {**self._about(), "exact": is_exact(trainer), "random": states}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        state, about = checkpoint["callbacks"].get(self.state_key, {}), self._about()
        if "config" not in state:
            found = ["what it does not say"]
        else:
            found = differences({name: state[name] for name in about}, about)
            found += [] if state["exact"] else ["the moment, from which no run goes on exactly"]
            if len(state["random"]) == trainer.world_size:
                self._random = state["random"][trainer.global_rank]
        if found:
            rank_zero_warn(printable(f"{trainer.ckpt_path} is not of this run as it is now: {listed(found, 3)}"))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._random is not None:
            set_random_states(self._random)
        self._random = None


def code_versions() -> dict[str, str]:
    """The versions of what a training computes with; of this package with a checksum of its source."""
    folder, source = Path(luna_vision.__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        source.update(path.read_bytes())
    versions = {name: importlib.metadata.version(name) for name in ("torch", "timm", "lightning")}
    return {"luna_vision": f"{luna_vision.__version__} {source.hexdigest()[:8]}", **versions}


def differences(there: Any, here: Any, name: str = "") -> list[str]:
    """In what plain data differs, such as "model.lr (0.1 there, 0.2 here)"."""
    if isinstance(there, list) and isinstance(here, list):
        there, here = dict(enumerate(there)), dict(enumerate(here))
    if isinstance(there, dict) and isinstance(here, dict):
        parts = ((there.get(part), here.get(part), f"{name}.{part}".lstrip(".")) for part in {**here, **there})
        return [difference for part in parts for difference in differences(*part)]
    return [] if repr(there) == repr(here) else [f"{name} ({there!r:.50} there, {here!r:.50} here)"]  # NaN is NaN


# ---- which run


def resume(trainer: Trainer, config: dict[str, Any], asked: bool) -> str | None:
    """Have a trainer resume the newest unfinished run of a configuration, beside the place where a new one would be.

    That is if it was asked for, or if SLURM has requeued this job or torchrun has started these processes again;
    otherwise a line says that there is such a run. All processes find the same.

    Args:
        trainer: With an `ExactResume`, before it has begun: its loggers have made no folder.
        config: The configuration.
        asked: Whether the user wants it.

    Returns:
        The newest checkpoint that is complete; None where there is none, or the run is a new one.

    Raises:
        ValueError: Another process is at work on the run; or it was asked for, and all unfinished runs are of other
            configurations.
    """
    runs = unfinished_runs(trainer)
    run = next((folder for folder, known in runs if not differences(known, config)), None)
    if not asked and not any(int(os.environ.get(name) or 0) for name in RESTARTS):
        if run is not None:
            rank_zero_info(printable(f"{run} is an unfinished run of this configuration: --resume goes on with it"))
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
    """Folders and configurations of the runs that have not finished, beside the place of a new one; newest first.

    A warning names those with links in their folders, which would lead a run out of them.
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
    """The loggers that have a folder for each run, which a resumed run has under the same name in all of them; none if
    the first logger is another one."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, CSVLogger | TensorBoardLogger)]
    return loggers if loggers[:1] == trainer.loggers[:1] else []


def keep_rows(logger: CSVLogger) -> None:
    """Have a CSV logger write after the rows of its file, which it would delete; without one that a kill cut off."""
    file = Path(logger.log_dir, "metrics.csv")
    kept = file.with_name("metrics.kept.csv")
    if file.is_file():
        os.replace(file, kept)
    with warnings.catch_warnings(action="ignore"):  # that they are deleted
        writer = logger.experiment
    if kept.is_file():  # from now, or since a resume that was killed here
        with kept.open("r+b") as opened:
            opened.truncate(opened.read().rfind(b"\n") + 1)
        os.replace(kept, file)
        with file.open(newline="", encoding="utf-8") as opened:
            writer.metrics_keys = next(csv.reader(opened), [])


def latest_complete(trainer: Trainer, run: Path, config: dict[str, Any]) -> str | None:
    """The last written checkpoint of a run that can be read and from which it goes on exactly.

    A warning names those that cannot be read.
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
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            rank_zero_warn(printable(f"{path} is left out, as it cannot be resumed from ({reason})"))
    return None


def log_dir(trainer: Trainer) -> Path:
    """Where this run writes: the first logger's folder, or the trainer's where there is no logger."""
    first = getattr(trainer.loggers[0], "log_dir", None) if trainer.loggers else None
    return Path(first or trainer.default_root_dir)
