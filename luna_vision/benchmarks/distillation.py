"""A student on Fashion-MNIST with and without its teacher: `python -m luna_vision.benchmarks.distillation --help`.

The parts are runs of `train.py`, one after the other: the teacher of `configs/fashion_mnist_teacher.yaml`, then the
student of `configs/fashion_mnist_distill.yaml` on the targets alone, with the teacher's logits, and with its layers,
too. What differs between the students is the loss, and nothing else: initial weights, images and order are the same.
"""

import argparse
import csv
import datetime
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml

from luna_vision._commands import Parser, at_least, run_command

from .record import machine, read_json, write_json

__all__ = ["main", "parts"]

COMMAND = "from luna_vision.tasks.cli import main; main()"  # what train.py is, wherever that is
TEACHERS_ARGUMENTS = ("teacher_", "temperature", "task_weight", "logit_weight", "feature_")


def parts(configs: Path, work: Path, root: Path, seeds: int, epochs: int | None) -> dict[str, dict[str, Any]]:
    """The runs by name, in order, as the configs that `train.py` is given.

    Args:
        configs: Folder of the project's configs.
        work: Folder that the runs write to.
        root: Folder of the data.
        seeds: So many of each student, all with the same teacher.
        epochs: Of every run; None takes what the configs say.
    """
    teacher = _read(configs / "fashion_mnist_teacher.yaml")
    distilled = _read(configs / "fashion_mnist_distill.yaml")
    arguments = distilled["model"]["init_args"]
    runs = {"teacher": _placed("teacher", teacher, work, root, epochs)}
    arguments["teacher_checkpoint"] = str(run_folder(runs["teacher"]) / "checkpoints" / "best.ckpt")
    plain = {name: value for name, value in arguments.items() if not name.startswith(TEACHERS_ARGUMENTS)}
    students = {
        "targets": {**distilled, "model": {"class_path": "luna_vision.tasks.ClassificationTask", "init_args": plain}},
        "logits": {**distilled, "model": {**distilled["model"], "init_args": {**arguments, "feature_layers": None}}},
        "logits-and-layers": distilled,
    }
    for seed in range(seeds):
        for name, config in students.items():
            seeded = {**config["data"], "init_args": {**config["data"]["init_args"], "seed": seed}}
            name = f"{name}-seed{seed}"
            config = {**config, "seed_everything": seed, "data": seeded}
            runs[name] = _placed(name, config, work, root, epochs)
    return runs


def run_folder(config: dict[str, Any]) -> Path:
    """Where a run writes."""
    logger = config["trainer"]["logger"][0]["init_args"]
    return Path(logger["save_dir"], logger["name"], f"version_{logger['version']}")


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: give --configs, the folder of the project's configs")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _placed(name: str, config: dict[str, Any], work: Path, root: Path, epochs: int | None) -> dict[str, Any]:
    """The config with its data in `root`, and all that it writes in a folder of `work` that no other config has."""
    data = {**config["data"], "init_args": {**config["data"]["init_args"], "root": str(root)}}
    trainer = {**config["trainer"], "default_root_dir": str(work)}
    if epochs is not None:
        trainer["max_epochs"] = epochs
    config = {**config, "data": data, "trainer": trainer}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
    place = {"save_dir": str(work), "name": f"{name}-{digest}", "version": 0}
    trainer["logger"] = [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": place}]
    return config


def train(config: Path) -> int:
    """`train.py fit` in a process of its own; its exit code."""
    return subprocess.run([sys.executable, "-c", COMMAND, "fit", "--config", str(config)]).returncode


def run_part(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Train and test, or go on with what was stopped.

    Raises:
        ValueError: The run has failed; what it said is on stderr.
    """
    folder = run_folder(config)
    resumed = folder.exists()
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.parent / "run.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
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


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, and print the accuracies. Returns the exit code."""
    parser = Parser(prog="python -m luna_vision.benchmarks.distillation", description=__doc__.partition("\n\n")[0])
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder that contains FashionMNIST/")
    parser.add_argument("--work", type=Path, default=Path("runs/distillation"), help="folder for the runs")
    parser.add_argument("--configs", type=Path, default=Path("configs"), help="folder of the project's configs")
    parser.add_argument("--seeds", type=at_least(1), default=1, help="so many of each student, with one teacher")
    parser.add_argument("--epochs", type=at_least(1), help="of every run; if left out, what the configs say")
    args = parser.parse_args(argv)
    root, work = (Path(os.path.abspath(path)) for path in (args.root, args.work))
    path = args.out / "results.json"
    runs = parts(args.configs, work, root, args.seeds, args.epochs)
    result = read_json(path)
    result.setdefault("parts", {})
    for name, config in runs.items():
        if result["parts"].get(name, {}).get("config") == _portable(config, work, root):
            print(f"{name}: done already", file=sys.stderr)
            continue
        row = run_part(name, config)
        about = {**machine(), "lightning": lightning.__version__, "threads": torch.get_num_threads()}
        row |= {"date": datetime.date.today().isoformat(), "machine": about, "config": _portable(config, work, root)}
        result["parts"][name] = row
        write_json(path, result)
    for name in runs:
        row = result["parts"][name]
        print(f"{name:<24} test accuracy {row['test_acc1']:.4f}  {row['seconds']:.0f} s")
    return 0


def _portable(config: Any, work: Path, root: Path) -> Any:
    """The config without the folders of this machine."""
    if isinstance(config, dict):
        return {key: _portable(value, work, root) for key, value in config.items()}
    if isinstance(config, list):
        return [_portable(value, work, root) for value in config]
    return config.replace(str(work), "WORK").replace(str(root), "DATA") if isinstance(config, str) else config


if __name__ == "__main__":
    run_command(main)
