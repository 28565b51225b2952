"""One run of `experiments.compare`: training through the project's task and data modules, and tests at three sides.

A run is a function of its configuration, which is plain data and goes into its result: what a variant is given depends
on nothing else, so runs of one task and seed see the same images, augmented alike, in the same order.
"""

import datetime
import hashlib
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from timm.models import create_model
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

import luna_vision.data
from luna_vision._record import machine
from luna_vision.data import EpochSampler, ImageDataModule
from luna_vision.tasks import ClassificationTask, NonFiniteGuard
from luna_vision.utils.cost import count_macs, saved_bytes

MODEL = "luna_vit_tiny"  # whose arguments a run overrides
Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, eq=False)
class Run:
    """A run to do.

    Attributes:
        task, variant, seed: Its name.
        config: Everything that its numbers depend on, as it comes back in its result.
    """

    task: str
    variant: str
    seed: int
    config: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.task}-{self.variant}-seed{self.seed}"

    @property
    def work_name(self) -> str:
        """Another for each configuration, so that no run goes on from another one's checkpoint."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()
        return f"{self.name}-{digest[:8]}"


class BudgetSampler(Sampler):
    """Cuts an endless stream of shuffled passes over a data set into pieces, each of which is a Lightning epoch.

    So the budget is a number of samples whatever the size of the data set, and a run can go on exactly from the end of
    a piece. Yields (pass, index), which the augmentation depends on.

    Args:
        dataset: Of which only the length is used.
        seed: Of the shuffle.
        length: Samples in a piece.
    """

    def __init__(self, dataset: Dataset, seed: int, length: int) -> None:
        self.order = EpochSampler(dataset, seed=seed)
        self.length = length
        self.piece = 0

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """Lightning says which piece is next."""
        self.piece = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        keys, passes = [], None
        for position in range(self.piece * self.length, (self.piece + 1) * self.length):
            if position // len(self.order) != passes:
                passes = position // len(self.order)
                self.order.set_epoch(passes)
                keys = list(self.order)
            yield keys[position % len(self.order)]


class Ledger(Callback):
    """Notes the curve after each piece and reports it; keeps in the checkpoint what Lightning's own state lacks."""

    def __init__(self, report: Progress, samples: int) -> None:
        self.report, self.samples = report, samples
        self.curve: list[dict[str, float]] = []
        self.seconds = 0.0
        self._rng: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"curve": self.curve, "seconds": self.seconds, "rng": torch.get_rng_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.curve, self.seconds, self._rng = list(state["curve"]), state["seconds"], state["rng"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._rng is not None:
            torch.set_rng_state(self._rng)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds += time.perf_counter() - self._since
        values = {name: float(trainer.callback_metrics[f"train_{name}_epoch"]) for name in ("loss", "acc1")}
        self.curve.append({"samples": (trainer.current_epoch + 1) * self.samples, **values})
        left = self.seconds / len(self.curve) * (trainer.max_epochs - len(self.curve))
        self.report({"kind": "progress", "step": trainer.global_step, "accuracy": values["acc1"], "seconds_left": left})


def make_data(config: dict[str, Any], root: str, scale: int = 1, download: bool = False) -> ImageDataModule:
    """The data module of a configuration, at `scale` times the side of training; `download` fetches what is missing."""
    data = config["data"]
    arguments = dict(data["args"])
    for name in data["scaled"]:
        arguments[name] *= scale
    if data["has_root"]:
        arguments |= {"root": root, "download": download}
    shared = {"batch_size": config["batch_size"], "num_workers": 0, "seed": config["seed"]}
    return getattr(luna_vision.data, data["class"])(**arguments, **shared)


def make_task(config: dict[str, Any]) -> ClassificationTask:
    """The task with a freshly initialised model, a function of the seed."""
    seed_everything(config["seed"], verbose=False)
    arguments = {"num_classes": 10, "in_chans": config["data"]["args"]["in_chans"], "model_kwargs": config["model"]}
    return ClassificationTask(MODEL, **arguments, **config["optimization"])


def train_loader(config: dict[str, Any], data: ImageDataModule) -> DataLoader:
    """Training batches; a Lightning epoch is one piece of the budget."""
    dataset = data.dataset("train")
    sampler = BudgetSampler(dataset, config["seed"], config["steps"] // config["pieces"] * config["batch_size"])
    # with a generator of its own, the loader takes nothing from the global one, whose state a checkpoint keeps
    return DataLoader(dataset, config["batch_size"], sampler=sampler, generator=torch.Generator())


def train(
    config: dict[str, Any],
    task: ClassificationTask,
    loader: DataLoader,
    work: Path,
    report: Progress,
    callbacks: Sequence[Callback] = (),
) -> tuple[Trainer, Ledger]:
    """Train, or go on from the checkpoint in `work`.

    Args:
        config: Of which pieces, steps, batch_size, gradient_clip_val and accelerator (default: cpu) count.
        task, loader: What is trained, on what; an epoch of the loader is a piece.
        work: Folder of this run's checkpoint.
        report: Called after each piece of training with step, accuracy and seconds_left.
        callbacks: Others than those that every run has.
    """
    _be_quiet()
    ledger = Ledger(report, config["steps"] // config["pieces"] * config["batch_size"])
    keep_last = ModelCheckpoint(work, filename="last", enable_version_counter=False, save_on_train_epoch_end=True)
    trainer = Trainer(
        max_epochs=config["pieces"],
        gradient_clip_val=config["gradient_clip_val"],
        callbacks=[*callbacks, ledger, NonFiniteGuard(max_skipped=0), keep_last],
        accelerator=config.get("accelerator", "cpu"),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=work,
    )
    checkpoint = work / "last.ckpt"
    resume = {"ckpt_path": checkpoint, "weights_only": True} if checkpoint.exists() else {}
    trainer.fit(task, loader, **resume)
    return trainer, ledger


def execute(run: Run, root: str, work: Path, report: Progress) -> dict[str, Any]:
    """Train and test, or go on from the checkpoint in `work`.

    Args:
        run: What to do.
        root: Folder of the data.
        work: Folder of this run's checkpoint.
        report: Called after each piece of training with step, accuracy and seconds_left.

    Returns:
        The result, plain data.
    """
    config = run.config
    task = make_task(config)
    facts = describe(config)
    data = make_data(config, root)
    trainer, ledger = train(config, task, train_loader(config, data), work, report)
    since = time.perf_counter()
    accuracy = {}
    for scale, images in config["test_images"].items():
        accuracy[scale] = evaluate(trainer, task, make_data(config, root, int(scale)), images, int(scale))
    samples = config["steps"] * config["batch_size"]
    return {
        "task": run.task,
        "variant": run.variant,
        "seed": run.seed,
        "accuracy": accuracy,
        **facts,
        "train_seconds": round(ledger.seconds, 1),
        "train_images_per_s": round(samples / ledger.seconds, 1),
        "test_seconds": round(time.perf_counter() - since, 1),
        "curve": ledger.curve,
        "config": config,
        **provenance(config.get("accelerator", "cpu")),
    }


def evaluate(
    trainer: Trainer, task: ClassificationTask, data: ImageDataModule, images: int, scale: int
) -> dict[str, Any]:
    """Accuracy on the first test images (their order is random), with as many patches in a batch as in training."""
    dataset = data.dataset("test")
    images = min(images, len(dataset))
    loader = DataLoader(Subset(dataset, range(images)), max(1, data.batch_size // scale**2))
    correct = round(trainer.test(task, loader, verbose=False)[0]["test_acc1"] * images)
    return {"side": data.img_size[0], "images": images, "correct": correct, "accuracy": correct / images}


def describe(config: dict[str, Any]) -> dict[str, Any]:
    """Parameters, multiply-adds of an image, and bytes that autograd keeps for a training step."""
    task, side = make_task(config), config["model"]["img_size"]
    on_meta = create_model(MODEL, num_classes=10, in_chans=task.hparams.in_chans, device="meta", **config["model"])
    images = torch.randn(config["batch_size"], task.hparams.in_chans, side, side)
    model = task.model.train()
    return {
        "params": sum(p.numel() for p in task.model.parameters()),
        "macs": count_macs(on_meta, side, side),
        "saved_bytes": saved_bytes(lambda: model(images), model),
        "batch_size": config["batch_size"],
    }


def provenance(device: str = "cpu") -> dict[str, Any]:
    """Where and with what a number came about."""
    about = {**machine(device), "lightning": lightning.__version__, "threads": torch.get_num_threads()}
    return {"date": datetime.date.today().isoformat(), "machine": about}


def _be_quiet() -> None:
    """A line of progress is written for many runs at a time: Lightning's own would get lost among them."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
