"""Megapixel canvases: a few small items on a large empty canvas, with labels, boxes and masks known exactly.

The plain canvas is the "megapixel MNIST" of Katharopoulos and Fleuret 2019 (arXiv 1905.03711), without its noise
patterns. The label is the class of most items, which a bag of local features can count. On a *cued* canvas, each item
stands in a frame of its own colour, and a small square, the cue, has one of these colours, far from its item. The label
is the class of the item in the frame of that colour: information from two distant places has to meet.
"""

import copy
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from luna_vision.utils.checks import check_at_least

FRAME_COLORS = np.array(
    [
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (255, 255, 0),
        (255, 0, 255),
        (0, 255, 255),
        (255, 128, 0),
        (128, 0, 255),
    ],
    dtype=np.uint8,
)
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Canvas:
    """One canvas and the truth about it. Boxes are (left, top, right, bottom) in pixels, right and bottom exclusive.

    Attributes:
        image: uint8 (S, S), or (S, S, 3) if cued.
        label: The class to predict.
        classes: int64 (n,), the class of each item.
        boxes: int64 (n, 4), the tight box of each item's mask, without the frame.
        instances: uint8 (S, S): 0 is background, i + 1 the pixels that item i lights. Items do not overlap.
        cued_item: Position of the item whose class is the label, None if not cued.
        cue_box: int64 (4,), the square that names the colour, None if not cued.
        frames: int64 (n, 4), the box of each item with its frame; of its whole square if not cued.
    """

    image: np.ndarray
    label: int
    classes: np.ndarray
    boxes: np.ndarray
    instances: np.ndarray
    cued_item: int | None = None
    cue_box: np.ndarray | None = None
    frames: np.ndarray | None = None

    @property
    def masks(self) -> np.ndarray:
        """bool (n, S, S), one mask for each item."""
        return self.instances == np.arange(1, len(self.classes) + 1, dtype=np.uint8)[:, None, None]


@dataclass(frozen=True)
class CanvasSpec:
    """Geometry of canvases.

    Attributes:
        side: Side S of the canvas in pixels.
        num_items: Items on a canvas.
        item_size: Side of an item in pixels.
        cued: Frames, a cue, and the class of the cued item as the label; else the class of the majority.
        noise: Standard deviation of Gaussian noise over the whole canvas, in grey levels of 0 to 255.
        frame: Thickness of a frame, and of the gap between frame and item, in pixels; by default a 14th of the item.
        cue_size: Side of the cue in pixels, at most that of an item with its frame; by default a quarter of the item.
        grid: Items with their frames, and the cue, stand at multiples of this number of pixels.
    """

    side: int = 512
    num_items: int = 5
    item_size: int = 28
    cued: bool = False
    noise: float = 0.0
    frame: int | None = None
    cue_size: int | None = None
    grid: int = 1

    def __post_init__(self) -> None:
        most = len(FRAME_COLORS) if self.cued else 254
        if not 1 <= self.num_items <= most:
            raise ValueError(f"num_items must be 1 to {most}{' on a cued canvas' * self.cued}, got {self.num_items}")
        check_at_least(4, item_size=self.item_size)
        check_at_least(0, noise=self.noise)
        check_at_least(1, grid=self.grid)
        for name in ("frame", "cue_size"):
            if (value := getattr(self, name)) is not None:
                check_at_least(1, **{name: value})
                if not self.cued:
                    raise ValueError(f"{name} is for cued canvases alone, got {value}")
        if self.cued and self.cue > self.outer:
            raise ValueError(f"cue_size must be at most {self.outer}, an item with its frame, got {self.cue_size}")
        # each placed square blocks a bounded number of positions: with some left, drawing until one is free ends soon
        taken = (self.num_items + self.cued) * (2 * ((self.outer - 1) // self.grid) + 1) ** 2
        free = ((self.side - self.outer) // self.grid + 1) ** 2
        # the worst place for an item is the middle, which leaves the corners for the cue
        cue_fits = not self.cued or self.cue + (self.side - self.cue) % self.grid <= self.side / 3
        if self.side <= self.outer or taken > 0.9 * free or not cue_fits:
            grid = f", on a grid of {self.grid}," if self.grid > 1 else ""
            raise ValueError(
                f"{self.num_items} items of {self.item_size} pixels{grid} do not fit loosely on a canvas of side "
                f"{self.side}"
            )

    @property
    def border(self) -> int:
        """Thickness of a frame, and of the gap between frame and item, in pixels; 0 if not cued."""
        return (self.frame or max(1, self.item_size // 14)) if self.cued else 0

    @property
    def outer(self) -> int:
        """Side of an item with its frame."""
        return self.item_size + 4 * self.border

    @property
    def cue(self) -> int:
        """Side of the cue, which is at least ``side / 3`` away from its item (between centres, along one axis)."""
        return self.cue_size or max(3, self.item_size // 4)


def make_canvas(rng: np.random.Generator, images: np.ndarray, labels: np.ndarray, spec: CanvasSpec) -> Canvas:
    """Draw one canvas, a function of the state of ``rng``.

    On a cued canvas all items have different classes (if there are enough), so counting items does not tell the label.
    On a plain one more than half of the items are of one class.

    Args:
        rng: Source of all randomness.
        images: uint8 (m, h, w), the items to draw from.
        labels: int64 (m,), their classes.
        spec: What to draw.
    """
    present = np.flatnonzero(np.bincount(labels))  # twenty times faster here than np.unique
    n = spec.num_items
    if spec.cued:
        classes = rng.choice(present, n, replace=n > len(present))
        target = int(rng.integers(n))
        label = int(classes[target])
    else:
        majority = n // 2 + 1
        target = None
        label = int(rng.choice(present))
        others = present[present != label]
        classes = np.full(n, label) if not len(others) else rng.choice(others, n)
        classes[rng.permutation(n)[:majority]] = label
    corners, cue_corner = _place(rng, spec, target)

    image = np.zeros((spec.side, spec.side, 3) if spec.cued else (spec.side, spec.side), np.uint8)
    instances = np.zeros((spec.side, spec.side), np.uint8)
    colors = FRAME_COLORS[rng.permutation(len(FRAME_COLORS))[:n]] if spec.cued else None
    boxes = np.empty((n, 4), np.int64)
    for i, (top, left) in enumerate(corners):
        if spec.cued:
            _fill(image, top, left, spec.outer, colors[i])
            _fill(image, top + spec.border, left + spec.border, spec.outer - 2 * spec.border, 0)
        top, left = top + 2 * spec.border, left + 2 * spec.border
        area = slice(top, top + spec.item_size), slice(left, left + spec.item_size)
        item = _resized(images[rng.choice(np.flatnonzero(labels == classes[i]))], spec.item_size)
        image[area] = item[:, :, None] if spec.cued else item
        instances[area][item > 0] = i + 1
        rows, columns = np.flatnonzero(item.any(1)), np.flatnonzero(item.any(0))
        boxes[i] = left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1
    cue_box = None
    if spec.cued:
        top, left = cue_corner
        _fill(image, top, left, spec.cue, colors[target])
        cue_box = np.array([left, top, left + spec.cue, top + spec.cue])
    if spec.noise:
        noise = rng.standard_normal(image.shape, dtype=np.float32) * spec.noise
        image = np.clip(image + noise, 0, 255).round().astype(np.uint8)
    frames = np.concatenate([corners[:, ::-1], corners[:, ::-1] + spec.outer], axis=1)
    return Canvas(image, label, classes.astype(np.int64), boxes, instances, target, cue_box, frames)


def _place(rng: np.random.Generator, spec: CanvasSpec, target: int | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Top left corners (n, 2) of items with their frames, and of the cue, none overlapping."""
    corners = np.full((spec.num_items, 2), -1)
    placed: list[tuple[np.ndarray, int]] = []

    def draw(size: int, far_from: np.ndarray | None = None) -> np.ndarray:
        while True:
            corner = rng.integers(0, (spec.side - size) // spec.grid + 1, 2) * spec.grid
            overlaps = any((corner < c + s).all() and (c < corner + size).all() for c, s in placed)
            far = far_from is None or np.abs(corner + size / 2 - far_from).max() >= spec.side / 3
            if far and not overlaps:
                placed.append((corner, size))
                return corner

    cue = None
    if target is not None:  # first, while there is room far off for the cue
        corners[target] = draw(spec.outer)
        cue = draw(spec.cue, far_from=corners[target] + spec.outer / 2)
    for i in range(spec.num_items):
        if i != target:
            corners[i] = draw(spec.outer)
    return corners, cue


def _fill(image: np.ndarray, top: int, left: int, size: int, color: np.ndarray | int) -> None:
    image[top : top + size, left : left + size] = color


def _resized(item: np.ndarray, size: int) -> np.ndarray:
    # bilinear: cubic interpolation would light pixels around the item, and so widen its mask
    return np.asarray(Image.fromarray(item).resize((size, size), Image.Resampling.BILINEAR))


class CanvasDataset:
    """Canvases drawn on access, each a function of (seed, split, index) and of the items.

    Args:
        images: uint8 (m, h, w), the items.
        labels: int64 (m,), their classes.
        spec: What to draw.
        length: Number of canvases.
        seed: Seed of this set of canvases.
        split: "train", "val" or "test", which gives different canvases for the same seed.
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, spec: CanvasSpec, length: int, seed: int = 0, split: str = "train"
    ) -> None:
        self.images, self.labels, self.spec, self.length = images, labels, spec, length
        self.key = (seed, SPLITS.index(split))

    def __len__(self) -> int:
        return self.length

    def at(self, size: tuple[int, int]) -> "CanvasDataset":
        """Canvases of another (height, width), which must be equal, with as many items of the same size."""
        other = copy.copy(self)
        other.spec = replace(self.spec, side=size[0])
        return other

    def canvas(self, index: int) -> Canvas:
        """The canvas with its boxes and masks."""
        if not 0 <= index < self.length:
            raise IndexError(f"canvas {index} of {self.length}")
        return make_canvas(np.random.default_rng((*self.key, index)), self.images, self.labels, self.spec)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        canvas = self.canvas(index)
        return canvas.image, canvas.label
