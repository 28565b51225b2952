"""Where the slots of the memory look in an image of any size, as a map that lies over it.

The weights of a pack are a softmax over all patches. So the scores are kept in a file while the bands go by, and become
weights at the end.

Shapes: H', W' patch grid, H heads of the pack, L memory slots, n patches.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..images.maps import MapFile
from ..images.regions import Frame
from ..models import LunaVit
from .grid import Grid
from .layout import Layout
from .plan import BAND_PATCHES

__all__ = ["AttentionMap"]

ROWS = 128  # of the patch grid, a tile of the map


@dataclass
class _Cells:
    """The patch grid as an image, whose pixels are patches."""

    shape: tuple[int, int]
    frame: Frame


class AttentionMap:
    """A map of what one pack reads: a channel a slot, a pixel a patch, in multiples of the mean over the patches.

    Attributes:
        stage: The block that packs, as a place in `LunaVit.stages`.
    """

    def __init__(self, path: Path, model: LunaVit, layer: int | None = None) -> None:
        """
        Args:
            path: A file that ends as `luna_vision.images.maps.MAP_SUFFIXES` say.
            model: The model.
            layer: The block, from 0, or from the last if negative; None is the last pack: the final pack, if there is
                one.

        Raises:
            ValueError: Another suffix, there is no such block, or it packs by row.
        """
        depth = len(model.blocks)
        if layer is not None and not -depth <= layer < depth:
            raise ValueError(f"attention_layer {layer} does not exist: the model has {depth}, 0 to {depth - 1}")
        self.path, self.stage = path, len(model.stages()) - 1 if layer is None else layer % depth
        if model.stages()[self.stage].pack_by_row:
            raise ValueError("a map of the attention shows one softmax over all patches, and not pack_by_row")
        self.heads, self.slots = model.stages()[self.stage].attn.pack_heads, model.memory_len
        self.map = MapFile(path, channels=[f"slot {i}" for i in range(self.slots)])
        self.scores = Grid(path.with_name(f"{path.name}.scores.npy"))

    def described(self) -> Any:
        """What the map is, as plain data."""
        return [os.path.abspath(self.path), self.stage]

    def planned_bytes(self, grid_size: tuple[int, int]) -> int:
        """Bytes that are allocated at the end: scores and weights of the rows of a tile."""
        return 4 * min(ROWS, grid_size[0]) * grid_size[1] * self.heads * self.slots * 8

    def numbers(self, model: LunaVit) -> int:
        """Numbers of a patch in work, besides those of its block: keys and scores."""
        return 2 * model.embed_dim + 3 * self.heads * self.slots

    def open(self, layout: Layout, image: Any, patch_size: tuple[int, int], like: dict[str, Any], resume: bool) -> None:
        """Begin; arguments as in `luna_vision.execution.grid.Sink.open`, with the image and the sides of a patch.

        Raises:
            OSError: It cannot be written, or nothing is left to resume.
        """
        frame, (height, width), (p, q) = Frame.of(image), image.shape[:2], patch_size
        sides = frame.box[2] / width * q * layout.columns, frame.box[3] / height * p * layout.height
        frame = Frame(frame.size, (*frame.box[:2], *sides), frame.georeference, frame.mpp)
        self.layout, self.cells = layout, _Cells((layout.height, layout.columns), frame)
        self.scores.open(layout, self.heads * self.slots, like, 1, resume)

    def write(self, start: int, stop: int, scores: Tensor) -> None:
        """Take the scores (1, H, L, n) of the valid patches of the rows [start, stop)."""
        x, layout = scores.flatten(1, 2).transpose(1, 2).contiguous(), self.layout
        step = max(1, BAND_PATCHES // layout.columns)  # a band with few valid patches has many rows
        for first in range(start, stop, step):
            last = min(first + step, stop)
            part = x[:, layout.between(start, first) : layout.between(start, last)]
            self.scores.write(first, layout.on_grid(part, first, last))

    def sync(self) -> None:
        """Return when the scores would survive a loss of power."""
        self.scores.sync()

    def close(self) -> None:
        """Close files, also after an error."""
        self.scores.close()

    def discard(self) -> None:
        """Leave nothing of a map that nobody resumes."""
        self.scores.discard()
        self.map.discard()

    def is_finished(self) -> bool:
        """Whether the map is complete."""
        return self.path.exists() and not self.scores.partial.exists()

    def finish(self) -> None:
        """Make the map of the scores.

        Raises:
            OSError: There is no room; the scores stay.
        """
        largest, total = np.full((self.heads, self.slots), -math.inf), np.zeros((self.heads, self.slots))
        for start in range(0, self.layout.height, ROWS):
            scores, valid = self._read(start)
            if valid.any():
                scores = scores[:, :, valid]
                new = np.maximum(largest, scores.max(axis=2))
                total = total * np.exp(largest - new) + np.exp(scores - new[:, :, None]).sum(axis=2)
                largest = new
        self.map.open(self.cells, "float32", ROWS, resume=False)
        for start in range(0, self.layout.height, ROWS):
            scores, valid = self._read(start)
            if valid.any():
                weights = np.exp(scores - largest[:, :, None, None]) / total[:, :, None, None]
                weights = np.where(valid, weights.mean(axis=0) * self.layout.count, 0).astype(np.float32)
                for left in range(0, self.layout.columns, ROWS):
                    self.map.write(start, left, weights[:, :, left : left + ROWS])
        self.map.finish()
        self.scores.discard()

    def _read(self, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores (H, L, m, W') of the rows of a tile, and their mask (m, W')."""
        stop = min(start + ROWS, self.layout.height)
        rows = self.scores.rows.read(start, stop - start)
        scores = rows.view(stop - start, self.layout.columns, self.heads, self.slots).permute(2, 3, 0, 1)
        mask = self.layout.mask(start, stop, 0, self.layout.columns)
        valid = torch.ones(scores.shape[2:], dtype=torch.bool) if mask is None else mask.view(scores.shape[2:])
        return scores.double().numpy(), valid.numpy()
