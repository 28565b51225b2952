"""Runs of `train.py` that belong together: each in a folder of its own, done once, with its result in one JSON."""

import contextlib
import csv
import datetime
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml

from luna_vision._record import machine, read_json
from luna_vision.benchmarks._command import Parser, at_least
from luna_vision.utils.files import save_figure, write_json, write_text

__all__ = ["complete", "figure_file", "parser", "place", "read_config", "run_folder"]

COMMAND = "from luna_vision.cli.train import main; main()"  # what train.py is, wherever that is
Config = dict[str, Any]


def parser(name: str, description: str) -> Parser:
    """The arguments that all benchmarks of runs have."""
    out = Parser(prog=f"python -m luna_vision.benchmarks.{name}", description=description)
    out.formatter_class = ArgumentDefaultsHelpFormatter
    out.add_argument("--out", type=Path, required=True, help="folder for results.json")
    out.add_argument("--root", type=_absolute, default="data", help="folder that contains FashionMNIST/")
    out.add_argument("--work", type=_absolute, default=f"runs/{name}", help="folder for the runs")
    out.add_argument("--configs", type=Path, default="configs", help="folder of the project's configs")
    out.add_argument("--epochs", type=at_least(1), help="of every run; if left out, what the configs say")
    return out


def _absolute(text: str) -> Path:
    return Path(os.path.abspath(text))


def read_config(path: Path) -> Config:
    """A config of the project.

    Raises:
        FileNotFoundError: It is not there.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: give --configs, the folder of the project's configs")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def place(name: str, config: Config, work: Path, root: Path, epochs: int | None = None) -> Config:
    """The config with its data in `root`, and all that it writes in a folder of `work` that no other config has.

    Args:
        name: Of the run.
        config: What `train.py` would be given.
        work: Absolute path.
        root: Absolute path.
        epochs: Of training; None leaves what the config says.
    """
    data = {**config["data"], "init_args": {**config["data"]["init_args"], "root": str(root)}}
    trainer = {**config["trainer"], "default_root_dir": str(work)}
    if epochs is not None:
        trainer["max_epochs"] = epochs
    config = {**config, "data": data, "trainer": trainer}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
    where = {"save_dir": str(work), "name": f"{name}-{digest}", "version": 0}
    trainer["logger"] = [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": where}]
    return config


def run_folder(config: Config) -> Path:
    """Where a run writes."""
    logger = config["trainer"]["logger"][0]["init_args"]
    return Path(logger["save_dir"], logger["name"], f"version_{logger['version']}")


def train(config: Path) -> int:
    """`train.py fit` in a process of its own; its exit code."""
    return subprocess.run([sys.executable, "-c", COMMAND, "fit", "--config", str(config)]).returncode


def run(name: str, config: Config) -> dict[str, Any]:
    """Train and test, or go on with what was stopped.

    Raises:
        ValueError: The run has failed; what it said is on stderr.
    """
    folder = run_folder(config)
    resumed = folder.exists()
    path = folder.parent / "run.yaml"
    write_text(path, yaml.safe_dump(config, sort_keys=False))
    started = time.perf_counter()
    rows = _rows(folder)
    if not rows or not rows[-1].get("test_acc1"):
        code = train(path)
        if code == 130:
            raise KeyboardInterrupt
        if code:
            raise ValueError(f"the run {name} ended with code {code}")
        rows = _rows(folder)
    scores = {key: float(rows[-1][key]) for key in ("test_acc1", "test_loss")}
    curve = [float(row["val_acc1"]) for row in rows if row["val_acc1"]]
    seconds = round(time.perf_counter() - started, 1)
    return {**scores, "val_acc1": curve, "seconds": seconds, "resumed": resumed}


def _rows(folder: Path) -> list[dict[str, str]]:
    path = folder / "metrics.csv"
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def complete(
    path: Path, runs: dict[str, Config], work: Path, root: Path, more: Callable[[Config], dict[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """Do the runs that a results file lacks, and write it after each.

    Args:
        path: The results file.
        runs: By name, in order, as `place` gives them.
        work: As it was given to `place`.
        root: As it was given to `place`.
        more: What else to note of a run that is done.

    Returns:
        The results by name; what was in the file of other names stays there.

    Raises:
        ValueError: A run has failed, or matplotlib is not installed, which draws the results.
    """
    if importlib.util.find_spec("matplotlib") is None:  # before the work, and not after it
        raise ValueError("the picture of the results needs matplotlib: pip install matplotlib")
    result = read_json(path)
    done = result.setdefault("runs", {})
    for name, config in runs.items():
        portable = _portable(config, work, root)
        if done.get(name, {}).get("config") == portable:
            print(f"{name}: done already", file=sys.stderr)
            continue
        row = run(name, config) | (more(config) if more else {})
        about = {**machine(), "lightning": lightning.__version__, "threads": torch.get_num_threads()}
        done[name] = {**row, "date": datetime.date.today().isoformat(), "machine": about, "config": portable}
        write_json(path, result)
    return {name: done[name] for name in runs}


@contextlib.contextmanager
def figure_file(out: Path, size: tuple[float, float]) -> Iterator[Any]:
    """Axes to draw on, written to `out` at the end, with a grid and a legend.

    Args:
        out: The picture.
        size: Width and height, inches.
    """
    from matplotlib.figure import Figure  # here, as training does without

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    yield axes
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    save_figure(figure, out, dpi=120)


def _portable(config: Any, work: Path, root: Path) -> Any:
    """The config without the folders of this machine."""
    if isinstance(config, dict):
        return {key: _portable(value, work, root) for key, value in config.items()}
    if isinstance(config, list):
        return [_portable(value, work, root) for value in config]
    return config.replace(str(work), "WORK").replace(str(root), "DATA") if isinstance(config, str) else config
