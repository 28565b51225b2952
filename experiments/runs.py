"""Runs of `train.py`, each a recipe of `experiments/configs` with an overlay, in a process of its own, and done once.

A run is a function of its configuration, plain data that goes into its result: runs of one task and seed see the same
images, augmented alike, in the same order. Results go to `OUT/runs`, one JSON for each run. A run that was stopped goes
on from its last checkpoint, one that has finished is skipped.
"""

import argparse
import datetime
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader, Subset

import luna_vision.data
from luna_vision.cli.train import LunaCLI, build
from luna_vision.data import ImageDataModule
from luna_vision.utils.files import write_json, write_text

from .command import Parser, at_least, markdown_table, measured_on, quiet_lightning
from .mosaics import mosaic_dataset

CONFIGS = Path(__file__).parent / "configs"
HEAD_WIDTH = 32
PIECES = 20  # of a run: after each there is a line of progress and a point of the curve; the warm-up is the first
ELSEWHERE = ("root", "download", "batch_size", "num_workers", "seed")  # arguments of the data that say nothing of it
TESTED = ("split", "test_images")  # of a configuration, what does not bear on training
OPTIMIZATION = ("optimizer", "lr", "weight_decay", "scheduler", "warmup_lr", "min_lr")
Config = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Run:
    """A run to do.

    Attributes:
        task, variant, seed: Its name. The task is also that of its recipe.
        config: Everything that its numbers depend on, as it comes back in its result.
    """

    task: str
    variant: str
    seed: int
    config: Config

    @property
    def name(self) -> str:
        return f"{self.task}-{self.variant}-seed{self.seed}"

    @property
    def work_name(self) -> str:
        """Another for each configuration of training, so that no run goes on from another one's checkpoint."""
        trained = {name: value for name, value in self.config.items() if name not in TESTED}
        digest = hashlib.sha256(json.dumps(trained, sort_keys=True).encode()).hexdigest()
        return f"{self.name}-{digest[:8]}"


def recipe(task: str) -> Config:
    """The recipe of a task."""
    return yaml.safe_load((CONFIGS / f"{task}.yaml").read_text(encoding="utf-8"))


def configuration(
    args: argparse.Namespace,
    task: str,
    seed: int,
    model: Config,
    data: Config | None = None,
    scaled: Sequence[str] = (),
) -> Config:
    """Everything that the numbers of a run depend on.

    Args:
        args: Of which those of `add_run_arguments` count.
        task: Of the recipe.
        seed: Of weights, order and augmentation.
        model, data: Arguments that differ from the recipe's.
        scaled: Arguments of the data that are multiplied for tests at a larger side.

    Raises:
        ValueError: A number out of its range.
    """
    if args.width % HEAD_WIDTH:
        raise ValueError(f"--width must be a multiple of {HEAD_WIDTH}, got {args.width}")
    if args.lr is not None and not args.lr > 0:
        raise ValueError(f"--lr must be above 0, got {args.lr}")
    base = recipe(task)
    trained, source, trainer = base["model"]["init_args"], base["data"], base["trainer"]
    batch_size = args.batch_size or source["init_args"]["batch_size"]
    steps = (args.samples or trainer["max_steps"] * source["init_args"]["batch_size"]) // batch_size
    pieces = min(PIECES, steps)
    if not pieces:
        raise ValueError(f"--samples must be at least one batch, {batch_size} for {task}")
    arguments = {name: value for name, value in source["init_args"].items() if name not in ELSEWHERE}
    shell = {"embed_dim": args.width, "depth": args.depth, "num_heads": args.width // HEAD_WIDTH}
    config = {
        "data": {
            "class": source["class_path"].rpartition(".")[2],
            "args": arguments | (data or {}),
            "scaled": list(scaled),
            "has_root": "root" in source["init_args"],
            **({"folder": folder} if (folder := _folder(source["init_args"])) else {}),
        },
        "model": trained["model_kwargs"] | shell | model,
        # the warm-up is counted in pieces
        "optimization": {
            **{name: trained[name] for name in OPTIMIZATION},
            **({"lr": args.lr} if args.lr else {}),
            "warmup_epochs": pieces / PIECES,
        },
        "gradient_clip_val": trainer["gradient_clip_val"],
        "batch_size": batch_size,
        "steps": steps // pieces * pieces,
        "pieces": pieces,
        "seed": seed,
        **({"accelerator": args.device} if args.device != "cpu" else {}),
        **({"precision": args.precision} if args.precision != "32-true" else {}),
        **({"num_classes": trained["num_classes"]} if trained["num_classes"] != 10 else {}),
    }
    return json.loads(json.dumps(config))  # as it comes back from a result


def _folder(arguments: Config) -> str:
    """The folder that a recipe's data has of its own, below that of all data; empty if it has none."""
    return str(arguments.get("root", "")).removeprefix("data").removeprefix("/")


# ---- one run


class Ledger(Callback):
    """Keeps the curve and the seconds of training, in the checkpoint too, and prints a line after each piece of a run.

    Attributes:
        curve: Samples so far, and the means of loss and, of classifiers, accuracy over a piece.
        validation: Accuracies, mean average precisions or mean IoUs, if there is a validation.
        seconds: Of training, and of what lies between its batches.
        samples: That were trained on.
    """

    def __init__(self) -> None:
        self.curve: list[dict[str, float]] = []
        self.validation: list[float] = []
        self.seconds, self.samples = 0.0, 0
        self.sums = torch.zeros(2)  # of the piece so far

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("curve", "validation", "seconds", "samples", "sums")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._fits:  # a test would bring back the curve up to the best checkpoint
            vars(self).update(state)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._fits = stage == "fit"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since, self.sums = time.perf_counter(), self.sums.to(pl_module.device)
        self._steps = int(trainer.estimated_stepping_batches)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now
        self.samples += len(batch[0])
        found = {name: trainer.callback_metrics.get(f"train_{name}") for name in ("loss", "acc1")}
        self.sums += torch.stack([torch.zeros_like(found["loss"]) if x is None else x.detach() for x in found.values()])
        piece = self._steps // min(PIECES, self._steps)
        if trainer.global_step % piece:
            return
        loss, accuracy = (self.sums / piece).tolist()
        classifies = found["acc1"] is not None
        self.curve.append({"samples": self.samples, "loss": loss, **({"acc1": accuracy} if classifies else {})})
        self.sums = torch.zeros_like(self.sums)
        left = self.seconds / trainer.global_step * (self._steps - trainer.global_step)
        left = f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min"
        step = f"step {trainer.global_step}/{self._steps}"
        score = f"training accuracy {accuracy:.3f}" if classifies else f"training loss {loss:.3f}"
        say(Path(trainer.default_root_dir).name, f"{step}, {score}, {left} left")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            scores = (trainer.callback_metrics.get(name) for name in ("val_acc1", "val_map", "val_miou"))
            self.validation.append(next(float(score) for score in scores if score is not None))


def make_data(config: Config, root: str, scale: int = 1, download: bool = False) -> ImageDataModule:
    """The data module of a configuration, at `scale` times the side of training; `download` fetches what is missing,
    of data that can be fetched."""
    data = config["data"]
    arguments = {name: value * scale if name in data["scaled"] else value for name, value in data["args"].items()}
    if "folder" in data:
        arguments["root"] = str(Path(root, data["folder"]))
    elif data["has_root"]:
        arguments |= {"root": root, "download": download}
    shared = {"batch_size": config["batch_size"], "num_workers": 0, "seed": config["seed"]}
    return getattr(luna_vision.data, data["class"])(**arguments, **shared)


@quiet_lightning()
def fit(configs: Sequence[Path | Config], folder: Path) -> tuple[LunaCLI, Ledger]:
    """`train.py fit` of a config with overlays, in this process; goes on from the checkpoint in `folder`.

    The last checkpoint of a run that has finished is loaded, and nothing is left to train.

    Args:
        configs: Files or what would be in them, each laid over those before it; one of them names the `Ledger`.
        folder: Of this run's checkpoints.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = ["fit"]
    for i, config in enumerate([*configs, {"trainer": {"default_root_dir": str(folder)}}]):
        file = config if isinstance(config, Path) else folder / f"overlay{i}.yaml"
        if file is not config:
            file.write_text(yaml.safe_dump(config), encoding="utf-8")
        words += ["--config", str(file)]
    checkpoint = folder / "checkpoints" / "last.ckpt"
    if checkpoint.exists():
        words += ["--ckpt_path", str(checkpoint)]
    cli = build(words)
    return cli, next(callback for callback in cli.trainer.callbacks if isinstance(callback, Ledger))


def train(run: Run, root: str, work: Path, overlays: Sequence[Config] = ()) -> tuple[LunaCLI, dict[str, Any]]:
    """Train, or go on from the checkpoint in `work`.

    Args:
        run: What to do.
        root: Folder of the data.
        work: Folder of this run's checkpoint.
        overlays: What else differs from the recipe.

    Returns:
        What was built, and of a result what is known of training.
    """
    config = run.config
    data = {**config["data"]["args"], **{name: config[name] for name in ("batch_size", "seed")}}
    if config["data"]["has_root"]:
        data["root"] = str(Path(root, config["data"].get("folder", "")))
    rates = dict(config["optimization"])
    passes = config["steps"] / len(make_data(config, root).train_dataloader())
    rates["warmup_epochs"] *= passes / config["pieces"]  # of passes over the data here
    overlay = {
        "seed_everything": config["seed"],
        "model": {"init_args": {"model_kwargs": config["model"], **rates}},
        "data": {"init_args": data},
        "trainer": {
            "max_steps": config["steps"],
            "accelerator": config.get("accelerator", "cpu"),
            "precision": config.get("precision", "32-true"),
        },
    }
    cli, ledger = fit([CONFIGS / f"{run.task}.yaml", overlay, *overlays], work)
    rate = round(ledger.samples / ledger.seconds, 1)
    return cli, {"train_seconds": round(ledger.seconds, 1), "train_images_per_s": rate, "curve": ledger.curve}


def evaluate(
    cli: LunaCLI, data: ImageDataModule, images: int, scale: int = 1, split: str = "test", mosaics: bool = False
) -> dict[str, Any]:
    """Accuracy on images of a split that are spread over it evenly, as it may be in the order of its classes.

    Args:
        cli: What was trained.
        data: The images.
        images: How many, at most.
        scale: Of their side over that of training: batches have as many patches as in training.
        split: "val" or "test".
        mosaics: Test on mosaics of these images, see `experiments.mosaics`.
    """
    dataset = mosaic_dataset(data, split) if mosaics else data.dataset(split)
    images = min(images, len(dataset))
    spread = [i * len(dataset) // images for i in range(images)]
    loader = DataLoader(Subset(dataset, spread), max(1, data.batch_size // scale**2))
    correct = round(cli.trainer.test(cli.model, loader, verbose=False)[0]["test_acc1"] * images)
    return {"side": data.img_size[0], "images": images, "correct": correct, "accuracy": correct / images}


def provenance(device: str = "cpu") -> dict[str, Any]:
    """Where and with what a number came about."""
    about = measured_on(device)
    about["machine"] |= {"lightning": lightning.__version__, "threads": torch.get_num_threads()}
    return about


def say(name: str, text: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')}  {name}: {text}", flush=True)


# ---- many runs

# does a run: given it, the folder of the data and one for its checkpoint, returns what it has found
Execute = Callable[[Run, str, Path], dict[str, Any]]


def add_run_arguments(parser: argparse.ArgumentParser, name: str, depth: int) -> None:
    """Arguments of runs: seeds, budget, shell and folders."""
    whole = at_least(1)
    parser.add_argument("--seeds", nargs="+", type=at_least(0), default=[0], metavar="SEED")
    parser.add_argument("--samples", type=whole, help="training images of a run; by default the task's")
    parser.add_argument("--batch-size", type=whole, help="by default the task's")
    parser.add_argument("--lr", type=float, help="peak learning rate; by default the task's")
    parser.add_argument("--width", type=whole, default=96, help=f"a multiple of {HEAD_WIDTH}")
    parser.add_argument("--depth", type=whole, default=depth, help="blocks")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of all runs")
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true", help="Lightning's, of all")
    add_folder_arguments(parser, name)


def add_folder_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Arguments of how runs are done, on which no number depends."""
    parser.add_argument("--jobs", type=at_least(1), default=1, help="runs at a time, one thread each")
    parser.add_argument("--root", default="data", help="folder of Fashion-MNIST, fetched if missing")
    parser.add_argument("--out", type=Path, default=Path(f"runs/{name}/results"), help="folder of the results")
    parser.add_argument("--work", type=Path, default=Path(f"runs/{name}/work"), help="folder of the checkpoints")
    parser.add_argument("--report-only", action="store_true", help="only make the report from what there is")


def write_table(
    out: Path, name: str, heads: Sequence[str], rows: Sequence[Sequence[str]], about: str, results: list[dict[str, Any]]
) -> str:
    """Write `NAME.md`, a table and a sentence about it, and `NAME.json`, the results; returns the text."""
    text = f"{markdown_table(heads, rows)}\n\n{about}\n"
    write_text(out / f"{name}.md", text)
    write_json(out / f"{name}.json", {"date": datetime.date.today().isoformat(), "runs": results})
    return text


def do_runs(
    parser: Parser,
    args: argparse.Namespace,
    plan: Callable[[argparse.Namespace], list[Run]],
    execute: Execute,
    report: Callable[[Path], str],
    data: Callable[[Config, str], LightningDataModule] | None = None,
) -> int:
    """Do what has not finished yet, and print the report.

    Args:
        parser: Says what is wrong with the arguments.
        args: With what `add_run_arguments` adds.
        plan: The runs that the arguments ask for; a `ValueError` says what is wrong with them.
        execute: Does one.
        report: Writes the report into a folder, and returns its text.
        data: The data module of a configuration with the folder of the data; `make_data` if None.

    Returns:
        The exit code: 1 if a run failed, 130 after Ctrl-C.
    """
    try:
        runs = plan(args)
        todo = [] if args.report_only else unfinished(runs, args.out)
        for run in {run.task: run for run in todo}.values():  # so that mistakes show before the first worker starts
            module = data(run.config, args.root) if data else make_data(run.config, args.root, download=True)
            module.prepare_data()
            module.setup("fit")
    except (ValueError, OSError) as error:
        parser.error(error)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if not args.report_only:
        print(f"{len(runs)} runs, of which {len(runs) - len(todo)} have finished before", flush=True)
    try:
        code = int(run_all(todo, args.jobs, args.root, args.out, args.work, execute) > 0)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        code = 130
    print(report(args.out))
    return code


def result_path(out: Path, run: Run) -> Path:
    """Where the result of a run is written."""
    return out / "runs" / f"{run.name}.json"


def measured_path(out: Path, run: Run) -> Path:
    """Where the times of a run's task and variant are written."""
    return out / "measured" / f"{run.task}-{run.variant}.json"


def finished(out: Path) -> list[dict[str, Any]]:
    """The results in a folder, without those that are errors."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "runs").glob("*.json"))]
    return [result for result in results if "error" not in result]


def unfinished(runs: Sequence[Run], out: Path) -> list[Run]:
    """The runs that have no result yet, or failed.

    Raises:
        ValueError: A result of one of their tasks and variants, of whatever seed, was made with another configuration,
            so that the report would take one for the other.
    """
    done = set()
    for run in runs:
        others = (out / "runs").glob(f"{run.task}-{run.variant}-seed*.json")
        for path in [*sorted(others), measured_path(out, run)]:
            result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"error": "not there"}
            if "error" in result:
                continue
            expected = {**run.config, "seed": result["config"].get("seed")}
            names = [n for n in {**expected, **result["config"]} if expected.get(n) != result["config"].get(n)]
            if names:
                what = " and ".join(names)
                raise ValueError(f"{path} was made with another {what}: give another --out, or remove it")
            done.add(path)
    return [run for run in runs if result_path(out, run) not in done]


def run_all(runs: Sequence[Run], jobs: int, root: str, out: Path, work: Path, execute: Execute) -> int:
    """Do all runs, `jobs` at a time, and write a result for each: what it has found, or the error it ended with.

    However this function is left, no worker is left running: their results and checkpoints are written in one move, so
    they can be ended at any time.

    Args:
        runs: What to do.
        jobs: Workers at a time.
        root: Folder of the data.
        out, work: Folders of results and of checkpoints.
        execute: Does a run.

    Returns:
        The number of runs that failed.
    """
    # read when a worker imports torch, which is before any code of ours
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    before = {name: os.environ.get(name) for name in threads}
    os.environ |= threads
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads in any state
    waiting, active, ended, failed = deque(runs), {}, 0, 0
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                run = waiting.popleft()
                process = context.Process(target=_work, args=(run, root, out, work, execute))
                process.start()
                active[process.sentinel] = run, process
                say(run.name, "started")
            for sentinel in wait(list(active)):
                run, process = active.pop(sentinel)
                process.join()
                ended += 1
                if process.exitcode:
                    _write_error(out, run, f"the worker ended with exit code {process.exitcode}")
                failed += "error" in json.loads(result_path(out, run).read_text(encoding="utf-8"))
                print(f"{ended} of {len(runs)} runs ended, {failed} of them failed", flush=True)
    finally:
        for _, process in active.values():
            process.kill()
            process.join()
        for name, value in before.items():
            os.environ.pop(name)
            os.environ |= {} if value is None else {name: value}
    return failed


def _work(run: Run, root: str, out: Path, work: Path, execute: Execute) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of the terminal: the parent ends us
    torch.set_num_threads(1)
    try:
        found = execute(run, root, work / run.work_name)
    except Exception as error:  # whatever a variant does wrong is its own row, not the end of the others
        traceback.print_exc()
        _write_error(out, run, f"{type(error).__name__}: {' '.join(str(error).split())}")
        return
    _write(out, run, found)
    say(run.name, "done")


def _write_error(out: Path, run: Run, error: str) -> None:
    _write(out, run, {"error": error})
    say(run.name, f"failed: {error}")


def _write(out: Path, run: Run, found: dict[str, Any]) -> None:
    names = {"task": run.task, "variant": run.variant, "seed": run.seed}
    about = provenance(run.config.get("accelerator", "cpu"))
    write_json(result_path(out, run), {**names, **found, "config": run.config, **about})
