"""Sequences of crops from one large cued canvas. No single crop tells the label: the model has to remember.

The label of a cued canvas (:mod:`luna_vision.data.canvas`) is the class of the item in the frame of the cue's colour.
A camera sees a part of the canvas at a time. It visits the cue and the items in random order, and never shows the cue
together with any part of an item.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from luna_vision.data.canvas import Canvas, CanvasDataset, CanvasSpec, make_canvas
from luna_vision.data.canvas_module import CanvasDataModule

TRIES = 100  # canvases to draw until one has a place for each crop; hardly ever more than a few


@dataclass(frozen=True)
class CropSequence:
    """Crops of one canvas, in the order in which the camera sees them.

    Attributes:
        canvas: The canvas of the crops.
        corners: int64 (T, 2), the (top, left) corner of each crop, in pixels.
        side: Side of a crop in pixels.
        known: The first crop (from 0) after which the whole cue and the whole cued item have been in view.
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
    """Draw a canvas and a path of the camera over it, a function of the state of ``rng``.

    At random moments and in random order the camera shows the whole cue or a whole item. In between it moves on a
    straight line, and stops while the next crop would show both the cue and an item.

    Args:
        rng: Source of all randomness.
        images: uint8 (m, h, w), the items to draw from.
        labels: int64 (m,), their classes.
        spec: What to draw; cued.
        side: Side of a crop in pixels.
        length: T, crops in a sequence, at least one for each item and one for the cue.
        cue_first: The camera shows the cue before any item.

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
    """The corner of a crop that shows the whole of thing i, but not the cue with an item; None if none was found."""
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
    """Which boxes have a pixel in a crop."""
    top, left = corner
    return (boxes[:, 0] < left + side) & (boxes[:, 2] > left) & (boxes[:, 1] < top + side) & (boxes[:, 3] > top)


def _mixed(corner: np.ndarray, things: np.ndarray, side: int) -> bool:
    """Whether a crop shows the cue, which comes first, and anything of an item."""
    cue, *items = _in_view(corner, things, side)
    return bool(cue and any(items))


def _whole(corner: np.ndarray, box: np.ndarray, side: int) -> bool:
    """Whether a crop contains the whole of a box."""
    top, left = corner
    return bool(left <= box[0] and top <= box[1] and box[2] <= left + side and box[3] <= top + side)


class CropSequences(Dataset):
    """(crops float32 (T, 3, s, s), label, known) of sequences; keys are (epoch, index), or indices in epoch 0.

    Each sequence is a function of (seed, split, epoch, index): every epoch has new ones.

    Args:
        source: The images and labels of the items, what to draw, the number of sequences and their seed.
        side: Side s of a crop in pixels.
        steps: T, crops in a sequence.
        cue_first: As in `crop_sequence`.
        mean, std: Of the normalisation, for pixels in [0, 1].
    """

    def __init__(self, source: CanvasDataset, side: int, steps: int, cue_first: bool, mean: float, std: float) -> None:
        self.source, self.side, self.steps, self.cue_first = source, side, steps, cue_first
        self.mean, self.std = mean, std

    def __len__(self) -> int:
        return len(self.source)

    def sequence(self, index: int, epoch: int = 0) -> CropSequence:
        """The sequence with its canvas and the truth about it."""
        items = self.source
        if not 0 <= index < len(items):
            raise IndexError(f"sequence {index} of {len(items)}")
        rng = np.random.default_rng((*items.key, epoch, index))
        return crop_sequence(rng, items.images, items.labels, items.spec, self.side, self.steps, self.cue_first)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int, int]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        sequence = self.sequence(index, epoch)
        crops = (sequence.crops.transpose(0, 3, 1, 2).astype(np.float32) / 255 - self.mean) / self.std
        return torch.from_numpy(crops), sequence.canvas.label, sequence.known


class CanvasSequenceDataModule(CanvasDataModule):
    """Crops that move over cued canvases. Batches are (crops (B, T, 3, s, s), labels (B,), known (B,) int64).

    From crop `known` on, the cue and the cued item have both been in view. There is no augmentation: every epoch draws
    new sequences. Arguments not listed here are those of :class:`CanvasDataModule`.

    Args:
        crop_size: Side s of a crop in pixels; ``img_size`` is this side.
        steps: T, crops in a sequence, at least one for each item and one for the cue.
        num_items: Items on a canvas, at least two.
        grid: Items, cue and camera stand at multiples of this number of pixels.
        cue_first: The camera shows the cue before any item, so the model has to remember one colour only. By default
            the order is random.
        num_train, num_val, num_test: Sequences for training (in an epoch), validation and testing.
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
        canvas = {"cued": True, "frame": frame, "cue_size": cue_size, "grid": grid, "canvas_seed": canvas_seed}
        lengths = {"num_train": num_train, "num_val": num_val, "num_test": num_test}
        batches = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "num_workers": num_workers}
        super().__init__(source, root, download, side, num_items, item_size, **canvas, **lengths, **batches, seed=seed)
        if num_items < 2:
            raise ValueError(f"num_items must be at least 2, as one item alone tells the label, got {num_items}")
        if steps < num_items + 1:
            raise ValueError(f"steps must be at least {num_items + 1}, for each item and the cue one, got {steps}")
        if not self.spec.outer <= crop_size <= side:
            raise ValueError(
                f"crop_size must be {self.spec.outer}, an item with its frame, to {side}, the canvas, got {crop_size}"
            )
        self.steps, self.cue_first = steps, cue_first
        self.img_size = (crop_size, crop_size)

    def predict_dataloader(self) -> None:
        raise ValueError("CanvasSequenceDataModule has no images to predict")

    def _tensors(self, source: CanvasDataset, split: str) -> CropSequences:
        return CropSequences(source, self.img_size[0], self.steps, self.cue_first, self.mean[0], self.std[0])
