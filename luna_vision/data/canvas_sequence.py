"""Sequences of crops that move over one large cued canvas: no crop alone tells the label, and two of them do.

The label of a cued canvas (:mod:`luna_vision.data.canvas`) is the class of the item in the frame of the cue's colour.
Here a camera that sees only a part of the canvas visits cue and items in random order, and never has the cue and any
part of an item in view at once. What it saw has to be remembered: items with the colours of their frames, or the cue.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from luna_vision.data.canvas import SPLITS, Canvas, CanvasSpec, make_canvas
from luna_vision.data.canvas_dense import CanvasModule
from luna_vision.data.canvas_module import ITEM_SOURCES

__all__ = ["CanvasSequenceDataModule", "CropSequence", "crop_sequence"]

MEAN, STD = 0.0, 0.5  # an empty canvas is zero, as in `CanvasDataModule`
TRIES = 100  # canvases that are drawn until one has a place for each crop; hardly ever more than a few


@dataclass(frozen=True)
class CropSequence:
    """Crops of one canvas, in the order in which the camera sees them.

    Attributes:
        canvas: What they are taken from.
        corners: int64 (T, 2), the (top, left) corner of each crop, in pixels.
        side: Side of a crop in pixels.
        known: The first crop (from 0) after which both the cue and the cued item have been in view as a whole.
    """

    canvas: Canvas
    corners: np.ndarray
    side: int
    known: int

    @property
    def crops(self) -> np.ndarray:
        """uint8 (T, side, side, 3)."""
        s = self.side
        return np.stack([self.canvas.image[top : top + s, left : left + s] for top, left in self.corners])


def crop_sequence(
    rng: np.random.Generator,
    images: np.ndarray,
    labels: np.ndarray,
    spec: CanvasSpec,
    side: int,
    length: int,
    cue_first: bool = False,
) -> CropSequence:
    """Draw a canvas and a way of the camera over it, a function of the state of ``rng``.

    At random moments and in random order the camera stands where it has one thing, the cue or an item, in view as a
    whole. In between it moves on a straight line, and stays where it is while that would have both cue and an item in
    view.

    Args:
        rng: Source of all randomness.
        images: uint8 (m, h, w), the items to draw from.
        labels: int64 (m,), their classes.
        spec: What to draw; cued.
        side: Side of a crop in pixels.
        length: T, crops in a sequence, at least one for each item and one for the cue.
        cue_first: The camera stands at the cue before it stands at any item.

    Raises:
        ValueError: The crops are too large for the canvas: 100 canvases had no place for them.
    """
    for _ in range(TRIES):
        canvas = make_canvas(rng, images, labels, spec)
        things = np.concatenate([canvas.cue_box[None], canvas.frames])
        places = [_place(rng, things, i, spec, side) for i in range(len(things))]
        if all(place is not None for place in places):
            break
    else:
        raise ValueError(
            f"crops of {side} pixels do not find the cue alone on canvases of {spec.side} with {spec.num_items} items: "
            "make them smaller"
        )
    order = rng.permutation(len(things))
    if cue_first:
        order = np.concatenate([[0], order[order != 0]])
    moments = np.sort(rng.choice(length, len(things), replace=False))
    stops = np.array([places[i] for i in order])
    way = np.stack([np.interp(np.arange(length), moments, stops[:, axis]) for axis in (0, 1)], axis=1)
    corners = np.round(way / spec.grid).astype(np.int64) * spec.grid
    corners[moments] = stops
    for t in range(length):
        if _mixed(corners[t], things, side):
            corners[t] = corners[t - 1]  # the first is a stop's, which has no such view
    seen = [t for t in range(length) if _whole(corners[t], things[0], side)]
    item = [t for t in range(length) if _whole(corners[t], things[1 + canvas.cued_item], side)]
    return CropSequence(canvas, corners, side, max(seen[0], item[0]))


def _place(rng: np.random.Generator, things: np.ndarray, i: int, spec: CanvasSpec, side: int) -> tuple[int, int] | None:
    """A corner of a crop with thing i in view as a whole, and not with the cue and an item in it; None if there is
    none, or none found."""
    left, top, right, bottom = things[i]
    ranges = [
        np.arange(-(-max(0, end - side) // spec.grid), min(start, spec.side - side) // spec.grid + 1) * spec.grid
        for start, end in ((top, bottom), (left, right))
    ]
    if not all(map(len, ranges)):
        return None
    for _ in range(20):
        corner = np.array([rng.choice(r) for r in ranges])
        if not _mixed(corner, things, side):
            return int(corner[0]), int(corner[1])
    return None


def _in_view(corner: np.ndarray, boxes: np.ndarray, side: int) -> np.ndarray:
    """Which boxes a crop has a pixel of."""
    top, left = corner
    return (boxes[:, 0] < left + side) & (boxes[:, 2] > left) & (boxes[:, 1] < top + side) & (boxes[:, 3] > top)


def _mixed(corner: np.ndarray, things: np.ndarray, side: int) -> bool:
    """Whether a crop shows the cue, which comes first, and anything of an item."""
    cue, *items = _in_view(corner, things, side)
    return bool(cue and any(items))


def _whole(corner: np.ndarray, box: np.ndarray, side: int) -> bool:
    """Whether a crop has a box in it as a whole."""
    top, left = corner
    return bool(left <= box[0] and top <= box[1] and box[2] <= left + side and box[3] <= top + side)


class CropSequences(Dataset):
    """(crops float32 (T, 3, s, s), label, known) of sequences; keys are (epoch, index), or indices in epoch 0.

    Each is a function of (seed, split, epoch, index): there are new ones in every epoch.

    Args:
        images, labels: As in `crop_sequence`.
        spec: What to draw; cued.
        side, steps: Side of a crop in pixels, and how many there are, T.
        length: Sequences in an epoch.
        seed: Seed of the sequences.
        split: "train", "val" or "test".
        cue_first: As in `crop_sequence`.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        spec: CanvasSpec,
        side: int,
        steps: int,
        length: int,
        seed: int = 0,
        split: str = "train",
        cue_first: bool = False,
    ) -> None:
        self.cue_first = cue_first
        self.images, self.labels, self.spec, self.side, self.steps = images, labels, spec, side, steps
        self.length, self.key = length, (seed, SPLITS.index(split))

    def __len__(self) -> int:
        return self.length

    def sequence(self, index: int, epoch: int = 0) -> CropSequence:
        """The sequence with its canvas and the truth about it."""
        if not 0 <= index < self.length:
            raise IndexError(f"sequence {index} of {self.length}")
        rng = np.random.default_rng((*self.key, epoch, index))
        return crop_sequence(rng, self.images, self.labels, self.spec, self.side, self.steps, self.cue_first)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int, int]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        sequence = self.sequence(index, epoch)
        crops = (sequence.crops.transpose(0, 3, 1, 2).astype(np.float32) / 255 - MEAN) / STD
        return torch.from_numpy(crops), sequence.canvas.label, sequence.known


class CanvasSequenceDataModule(CanvasModule):
    """Crops that move over cued canvases. Batches are (crops (B, T, 3, s, s), labels (B,), known (B,) int64).

    From crop `known` on the label can be told: cue and cued item have been in view. Items of training, validation and
    test are disjoint. There is no augmentation: there are as many sequences as are wanted, new ones in every epoch.

    Attributes:
        num_classes: 10.
        class_names: A name for each class.
        img_size: (s, s), of a crop.

    Args:
        source: Where items come from: "digits" or "fashion_mnist".
        root: Folder that contains FashionMNIST/raw; of no use to digits.
        download: Fetch Fashion-MNIST if it is missing.
        side: Side of the canvas in pixels.
        crop_size: Side s of a crop in pixels.
        steps: T, crops in a sequence, at least one for each item and one for the cue.
        num_items: Items on a canvas, at least two.
        item_size: Side of an item in pixels.
        frame: Thickness of frames, and of the gap between frame and item, in pixels; by default a 14th of the item.
        cue_size: Side of the cue in pixels; by default a quarter of the item.
        grid: What stands on a canvas, and the camera, does so at multiples of so many pixels.
        cue_first: The camera sees the cue before any item, so that one colour is all that has to be remembered until
            the item is found; otherwise they come in random order.
        num_train: Sequences in an epoch of training.
        num_val: Sequences for validation.
        num_test: Sequences for testing.
        canvas_seed: Seed of the sequences.
        batch_size: Sequences in a batch, on each device.
        eval_batch_size: The same for validation and test; ``batch_size`` if None.
        num_workers: Processes that draw sequences; 0 draws in the main process.
        seed: Seed of the shuffle.

    Raises:
        ValueError: An argument is out of range.
        FileNotFoundError: On setup: the data is not under ``root``.
    """

    def __init__(
        self,
        source: str = "digits",
        root: str = "data",
        download: bool = False,
        side: int = 192,
        crop_size: int = 64,
        steps: int = 4,
        num_items: int = 2,
        item_size: int = 16,
        frame: int | None = 4,
        cue_size: int | None = 16,
        grid: int = 16,
        cue_first: bool = False,
        num_train: int = 10_000,
        num_val: int = 1000,
        num_test: int = 2000,
        canvas_seed: int = 0,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 2,
        seed: int = 0,
    ) -> None:
        arguments = (source, root, download, side, num_items, item_size, 0.0, num_train, num_val, num_test)
        super().__init__(*arguments, canvas_seed, 3, batch_size, eval_batch_size, num_workers, seed)
        if num_items < 2:
            raise ValueError(f"num_items must be at least 2, as one item alone tells the label, got {num_items}")
        if steps < num_items + 1:
            raise ValueError(f"steps must be at least {num_items + 1}, for each item and the cue one, got {steps}")
        self.spec = CanvasSpec(side, num_items, item_size, True, 0.0, frame, cue_size, grid)
        if not self.spec.outer <= crop_size <= side:
            raise ValueError(
                f"crop_size must be {self.spec.outer}, an item with its frame, to {side}, the canvas, got {crop_size}"
            )
        self.crop_size, self.steps, self.cue_first = crop_size, steps, cue_first
        self.img_size = (crop_size, crop_size)

    def timm_cfg(self) -> dict[str, Any]:
        """What a model that was trained on this data expects of a crop, in the words of timm's `pretrained_cfg`."""
        size = {"input_size": (3, *self.img_size), "mean": (MEAN,) * 3, "std": (STD,) * 3, "crop_pct": 1.0}
        return {**size, "num_classes": self.num_classes, "label_names": list(self.class_names)}

    def make_dataset(self, split: str) -> CropSequences:
        items = ITEM_SOURCES[self.source](self.root)[split]
        size = (self.spec, self.crop_size, self.steps, self.lengths[split])
        return CropSequences(*items, *size, self.canvas_seed, split, self.cue_first)
