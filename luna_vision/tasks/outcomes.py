"""What a test says besides its scores: which class is taken for which, how sure the model is, and how each image does.

Shapes: K classes, H x W pixels, n objects of an image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from luna_vision.data.dense import IGNORE

if TYPE_CHECKING:
    from .base import TimmTask

SURE = 0.5  # the score from which a box counts as found, and the probability from which a label does
OVERLAP = 0.5  # the intersection over union from which a box is on an object
NOTHING = "nothing"  # what is there where a box is wrong, and what is found where an object is missed


class Rated(NamedTuple):
    """How well the model does on an image."""

    score: float  # larger is better
    words: str  # the same in words


class Calibration:
    """How often what is predicted with some confidence is right, in bins of equal width.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017 (arXiv 1706.04599).

    Attributes:
        sums: float64 (3, BINS): predictions, sum of their confidences, and how many of them are right.
    """

    BINS = 15

    def __init__(self) -> None:
        self.sums = np.zeros((3, self.BINS))

    def add(self, confidence: Tensor, right: Tensor) -> None:
        """Count predictions: confidences in [0, 1] and whether each is right, of one shape."""
        confidence, right = confidence.detach().flatten().double().cpu(), right.flatten().double().cpu()
        bins = (confidence * self.BINS).long().clamp(0, self.BINS - 1)
        for row, weights in enumerate((torch.ones_like(confidence), confidence, right)):
            self.sums[row] += torch.bincount(bins, weights, minlength=self.BINS).numpy()

    @property
    def error(self) -> float:
        """The expected calibration error: the mean distance of confidence and share of right ones, by prediction."""
        count, confidence, right = self.sums
        return float(np.abs(confidence - right).sum() / max(count.sum(), 1))


class Outcome:
    """The base: sums over the images of a test, which those of other processes are added to.

    Attributes:
        names: Of the rows of `confusion`.
        confusion: int64 (K, K), what is there by what is predicted.
        calibration: Of `confident`.
    """

    counted = "images"  # the unit of `confusion`, in words
    confident = "the most probable class of an image"  # what has the confidences, in words
    shown = ""  # what a picture of an image shows, in words
    first_color: int | None = None  # of the first name in the palette of masks and boxes; None without colours

    def __init__(self, task: TimmTask, names: list[str]) -> None:
        self.names = self.row_names(task, names)
        self.confusion = np.zeros((len(self.names),) * 2, np.int64)
        self.calibration = Calibration()

    @staticmethod
    def row_names(task: TimmTask, names: list[str]) -> list[str]:
        return list(names)

    def add(self, target: Any, found: Any) -> Rated:
        """Count an image.

        Args:
            target: What the batch has of it.
            found: What `TimmTask.evaluate` gives for it.
        """
        raise NotImplementedError

    @staticmethod
    def predicted(found: Any) -> Any:
        """What is found in an image, in the form of its target."""
        return found.argmax(0)

    def sums(self) -> tuple[np.ndarray, ...]:
        """All sums, in place."""
        return self.confusion, self.calibration.sums

    def _confuse(self, truth: Tensor, predicted: Tensor) -> None:
        size = len(self.names)
        pairs = (truth.long() * size + predicted.long()).flatten().cpu()
        self.confusion += torch.bincount(pairs, minlength=size * size).view(size, size).numpy()


class ClassOutcome(Outcome):
    """Of images with one label: targets are its number, and what is found are logits (K,)."""

    def __init__(self, task: TimmTask, names: list[str]) -> None:
        super().__init__(task, names)
        self._single = task.hparams.get("loss") == "bce"  # each class has a probability of its own

    def add(self, target: Tensor, found: Tensor) -> Rated:
        found = found.float()
        probabilities = found.sigmoid() if self._single else found.softmax(0)
        confidence, label = probabilities.max(0)
        self._confuse(target, label)
        self.calibration.add(confidence, label == target)
        own = float(probabilities[target])
        taken = "" if label == target else f", taken for {self.names[int(label)]} ({float(confidence):.2f})"
        return Rated(own, f"{self.names[int(target)]} ({own:.2f}){taken}")


class LabelsOutcome(Outcome):
    """Of images with any number of labels: targets are (K,) of 0 and 1, and what is found are logits (K,).

    `confusion` is (K, 2, 2): by class, whether an image has it, and whether it is found.
    """

    confident = "the probability of each class of an image"

    def __init__(self, task: TimmTask, names: list[str]) -> None:
        super().__init__(task, names)
        self.confusion = np.zeros((len(self.names), 2, 2), np.int64)

    @staticmethod
    def predicted(found: Tensor) -> Tensor:
        return (found.float().sigmoid() >= SURE).long()

    def add(self, target: Tensor, found: Tensor) -> Rated:
        probabilities = found.float().sigmoid()
        there, predicted = target > 0, probabilities >= SURE
        at = (torch.arange(len(there)).numpy(), there.long().cpu().numpy(), predicted.long().cpu().numpy())
        np.add.at(self.confusion, at, 1)
        self.calibration.add(probabilities, there)
        loss = float(F.binary_cross_entropy_with_logits(found.float(), target.float()))
        missed = [name for name, a, b in zip(self.names, there, predicted, strict=True) if a and not b]
        wrong = [name for name, a, b in zip(self.names, there, predicted, strict=True) if b and not a]
        words = "; ".join(
            f"{said} {', '.join(names[:3])}" for said, names in (("missed", missed), ("wrong", wrong)) if names
        )
        return Rated(-loss, f"loss {loss:.3f}" + f": {words}" * bool(words))


class MaskOutcome(Outcome):
    """Of images with a class for each pixel: targets are masks (H, W), and what is found are logits (K, H, W)."""

    counted = "pixels"
    shown = "Left: the mask. Right: what is predicted. What is ignored is white."
    confident = "the most probable class of a pixel"

    def __init__(self, task: TimmTask, names: list[str]) -> None:
        super().__init__(task, names)
        self.first_color = int(not task.hparams.background)

    @staticmethod
    def row_names(task: TimmTask, names: list[str]) -> list[str]:
        return ["background"] * task.hparams.background + list(names)

    def add(self, target: Tensor, found: Tensor) -> Rated:
        before = self.confusion.copy()
        confidence, label = found.float().softmax(0).max(0)
        counted = target != IGNORE
        truth, label = target[counted], label[counted]
        self._confuse(truth, label)
        self.calibration.add(confidence[counted], label == truth)
        own = self.confusion - before
        hits, union = own.diagonal(), own.sum(0) + own.sum(1) - own.diagonal()
        iou = float(np.mean(hits[union > 0] / union[union > 0])) if union.any() else 1.0
        return Rated(iou, f"mean IoU {iou:.2f}")


class BoxOutcome(Outcome):
    """Of images with boxes: what is found are dicts of boxes (n, 4), labels (n,) from 1, and scores (n,), which fall.

    A box with a score of `SURE` is of an object where the two overlap by `OVERLAP`. Boxes of an object's class, and of
    higher scores, choose first. In `confusion`, the last row and column are `NOTHING`.
    """

    counted = "objects"
    first_color = 1
    shown = f"Left: what is there. Right: the boxes with a score of {SURE} and more."
    confident = "each box"

    @staticmethod
    def row_names(task: TimmTask, names: list[str]) -> list[str]:
        return [*names, NOTHING]

    @staticmethod
    def predicted(found: dict[str, Tensor]) -> dict[str, Tensor]:
        sure = found["scores"] >= SURE
        return {name: value[sure] for name, value in found.items()}

    def add(self, target: dict[str, Tensor], found: dict[str, Tensor]) -> Rated:
        found = {name: value.cpu() for name, value in found.items()}
        target = {name: value.cpu() for name, value in target.items()}
        crowd = target.get("iscrowd", torch.zeros_like(target["labels"])) > 0
        ious = box_iou(found["boxes"].float(), target["boxes"].float())
        counted = ~(ious[:, crowd] >= OVERLAP).any(1)
        labels, scores = found["labels"][counted], found["scores"][counted]
        ious, truth = ious[counted][:, ~crowd], target["labels"][~crowd]
        same = labels[:, None] == truth[None]
        at = _match(ious * same)
        self.calibration.add(scores, at >= 0)
        sure = scores >= SURE
        at, left = at[sure], ious[sure]
        hits = int((at >= 0).sum())
        left[:, at[at >= 0]] = 0
        at = torch.where(at >= 0, at, _match(left * (at < 0)[:, None]))
        taken = torch.zeros(len(truth), dtype=torch.bool)
        taken[at[at >= 0]] = True
        nothing = len(self.names) - 1
        there = torch.full_like(at, nothing)
        there[at >= 0] = truth[at[at >= 0]] - 1
        self._confuse(there, labels[sure] - 1)
        missed = truth[~taken] - 1
        self._confuse(missed, torch.full_like(missed, nothing))
        total = len(truth) + int(sure.sum())
        f1 = 2 * hits / total if total else 1.0
        # of images that are equally right, the one with more objects is the better one
        return Rated(f1 + 1e-6 * hits - 1e-9 * total, f"{hits} of {len(truth)} found, {int(sure.sum()) - hits} wrong")


def _match(ious: Tensor) -> Tensor:
    """int64 (n,): the column that each row takes, -1 for none; rows choose in turn, the best of what is left."""
    taken = torch.full((len(ious),), -1)
    left = ious.clone()
    for row in range(len(left)) if left.shape[1] else ():
        overlap, column = left[row].max(0)
        if overlap >= OVERLAP:
            taken[row] = column
            left[:, column] = 0
    return taken
