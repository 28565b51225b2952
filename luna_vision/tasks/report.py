"""The report of a run: a page of what a test found, with its pictures."""

from __future__ import annotations

import math
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning_utilities.core.imports import package_available
from PIL import Image
from torch.utils.data import DataLoader, SequentialSampler

from luna_vision.data.images import sample_name
from luna_vision.data.sampling import EvalSampler

from .base import TimmTask
from .outcomes import Outcome
from .pictures import check_outcome, draw_outcome

SHOWN = 6  # of the best images, and of the worst


class Example(NamedTuple):
    """An image of a report."""

    score: float  # larger is better
    number: int  # its place in the test
    name: str  # its file
    words: str  # how well the model does on it
    picture: Image.Image  # with labels and predictions


class Report(Callback):
    """Write ``report/`` into the folder of a run when a test ends: report.html, which needs no other file, and PNGs.

    It has the scores, the curves of the training, a table of the classes, what is taken for what, calibration, and the
    best and the worst images.

    Args:
        run: The folder of the run, whose ``metrics.csv`` has the curves; by default that of the logger.

    Raises:
        ValueError: When a run starts: the task has no report, or matplotlib is not installed.
    """

    def __init__(self, run: str | None = None) -> None:
        self.run = run
        self.outcome: Outcome | None = None
        self._best: list[Example] = []
        self._worst: list[Example] = []

    def setup(self, trainer: Trainer, pl_module: TimmTask, stage: str) -> None:
        check_outcome(self, pl_module)
        if not package_available("matplotlib"):
            raise ValueError("Report needs matplotlib: pip install 'luna-vision[downstream]'")

    def on_test_start(self, trainer: Trainer, pl_module: TimmTask) -> None:
        self.outcome = None  # only at the first batch does the task know the names of its weights
        self._best, self._worst = [], []
        self._order = _order(trainer.test_dataloaders)
        self._numbers = count()

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: TimmTask, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.outcome is None:
            self.outcome = pl_module.outcome(pl_module, pl_module.class_labels())
        for image, target, found in zip(*batch[:2], outputs["found"], strict=True):
            rated = self.outcome.add(target, found)
            at = next(self._numbers)
            number = at if self._order is None else self._order[at]
            kept = [some for some, sign in ((self._best, -1), (self._worst, 1)) if _belongs(rated.score, some, sign)]
            if not kept:
                continue
            loader = trainer.test_dataloaders
            name = str(number) if self._order is None else sample_name(loader.dataset, number)
            example = Example(rated.score, number, name, rated.words, draw_outcome(pl_module, image, target, found))
            for examples in kept:
                examples.append(example)
            self._sort()

    def _sort(self) -> None:
        self._best = sorted(self._best, key=lambda one: (-one.score, one.number))[:SHOWN]
        self._worst = sorted(self._worst, key=lambda one: (one.score, one.number))[:SHOWN]

    def on_test_end(self, trainer: Trainer, pl_module: TimmTask) -> None:
        if self.outcome is None:
            return  # there are no test images
        if trainer.world_size > 1:
            self._gather(trainer.world_size)
        if not trainer.is_global_zero:
            return
        from .report_page import write_report  # which takes matplotlib

        run = Path(self.run or trainer.log_dir or trainer.default_root_dir)
        half = len({one.number for one in self._best + self._worst}) / 2  # no image of a few is on both sides
        best, worst = self._best[: math.ceil(half)], self._worst[: math.floor(half)]
        path = write_report(run, trainer, pl_module, self.outcome, best, worst)
        print(f"report: {path}")

    def _gather(self, world_size: int) -> None:
        """Add what the other processes have found."""
        all_of: list[Any] = [None] * world_size
        dist.all_gather_object(all_of, (self.outcome.sums(), self._best, self._worst))
        for own, *others in zip(self.outcome.sums(), *(sums for sums, _, _ in all_of), strict=True):
            own[...] = sum(others)
        self._best = [one for _, best, _ in all_of for one in best]
        self._worst = [one for _, _, worst in all_of for one in worst]
        self._sort()


def _belongs(score: float, kept: list[Example], sign: int) -> bool:
    """Whether a score is among the best (sign -1) or the worst (1)."""
    return len(kept) < SHOWN or sign * score < sign * kept[-1].score


def _order(loader: Any) -> list[int] | None:
    """The places of the images in the data set, as the test comes to them; None where they have none, as in streams."""
    sampler = getattr(loader, "sampler", None)
    known = isinstance(loader, DataLoader) and isinstance(sampler, EvalSampler | SequentialSampler)
    return list(sampler) if known else None
