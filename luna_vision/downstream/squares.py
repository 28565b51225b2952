"""A head that looks a few patches far, on an image of any size: in squares with what they look at around them.

Patches after the final norm come row by row from the streaming engine. A window keeps the rows that a row of squares
looks at; squares share no result, and each pixel, or cell of a map, belongs to one of them.

Shapes: H', W' patch grid, D width of the backbone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luna_vision.execution.grid import Sink
from luna_vision.execution.layout import Layout
from luna_vision.images.values import model_values, type_range

__all__ = ["SquareSink", "itemsize", "pixel_arguments"]

TILE = 512  # pixels, the side of a square at least


class SquareSink(Sink):
    """Runs a head on squares. A subclass says what it is, in `square`.

    Attributes:
        patches, tile: Side of a square in patches and in pixels.
        row: The first row of the squares that come next.
        everywhere: Whether squares without a valid patch are not left out.
    """

    everywhere = False

    def __init__(self, side: int, halo: int, align: int = 1, pads: bool = False) -> None:
        """
        Args:
            side: Of a patch, pixels.
            halo: Patches around a square that the head looks at, a multiple of `align`.
            align: Squares begin at multiples of so many patches.
            pads: Whether the grid is padded with zeros to a multiple of `align`, and the padding belongs to squares.
        """
        self.side, self.halo, self.align, self.pads = side, halo, align, pads
        self.patches = -(-max(TILE // side, 4 * halo) // align) * align
        self.tile = self.patches * side

    def square(self, top: int, bottom: int, left: int, right: int, valid: Tensor | None) -> None:
        """Run the head on the rows [top, bottom) and the columns [left, right) of the patch grid.

        Args:
            valid: (bottom - top, right - left) bool, the patches that were looked at; None for all. Squares without
                any are left out, unless `everywhere`.
        """
        raise NotImplementedError

    def end_row(self) -> None:
        """A row of squares is done; called before the next one begins."""

    def _grid(self, grid_size: tuple[int, int]) -> tuple[int, int]:
        """The patch grid with its padding."""
        align = self.align if self.pads else 1
        return tuple(-(-n // align) * align for n in grid_size)

    def planned_bytes(self, grid_size: tuple[int, int], model: nn.Module) -> int:
        """Of the window; a subclass adds its head."""
        height, columns = self._grid(grid_size)
        return min(self.patches + 2 * self.halo, height) * columns * model.embed_dim * itemsize(model)

    def open(self, layout: Layout, embed_dim: int, like: dict[str, Any], band: int, resume: bool) -> None:
        self.layout = layout
        self.height, self.columns = self._grid((layout.height, layout.columns))
        self.begin(self.halo, torch.empty(0, 0, embed_dim, **like))

    def begin(self, halo: int, like: Tensor | None = None) -> None:
        """Begin with the first row of squares, and so many patches around them."""
        self.row, self.halo = 0, halo
        rows = min(self.patches + 2 * halo, self.height)
        window = self.window if like is None else like
        self.window = window.new_zeros(rows, self.columns, window.shape[2])

    @property
    def top(self) -> int:
        """The first row of the window."""
        return max(self.row - self.halo, 0)

    @property
    def bottom(self) -> int:
        """Where its last row ends."""
        return min(self.row + self.patches + self.halo, self.height)

    def _ready(self, row: int) -> bool:
        """Whether the next squares can be done once all rows above this one are there."""
        return self.row < self.height and min(self.bottom, self.layout.bands[-1].stop) <= row

    def rewind(self, row: int, turn: int) -> int:
        while self._ready(row):
            self.row += self.patches
        return min(self.top, row)

    def write(self, start: int, x: Tensor) -> None:
        stop = start + len(x)
        while self.row < self.height:
            first, last = max(start, self.top), min(stop, self.bottom)
            if first < last:
                self.window[first - self.top : last - self.top, : x.shape[1]] = x[first - start : last - start]
            if not self._ready(stop):
                return
            self._next()

    def sync(self) -> None:
        pass  # what is finished is in files, which survive a kill

    def close(self) -> None:
        pass

    def finish(self) -> None:
        pass  # all squares were done with the last row

    def _next(self) -> None:
        """Do a row of squares, and go to the next."""
        stop, top = min(self.row + self.patches, self.height), self.top
        for left in range(0, self.columns, self.patches):
            right = min(left + self.patches, self.columns)
            valid = self._valid(stop, left, right)
            if self.everywhere or valid is None or valid.any():
                self.square(self.row, stop, left, right, valid)
        self.end_row()
        self.row += self.patches
        kept = self.window[max(self.top - top, 0) : self.bottom - top].clone()
        self.window.zero_()
        if self.row < self.height:
            self.window[: len(kept)] = kept[: len(self.window)]

    def _valid(self, stop: int, left: int, right: int) -> Tensor | None:
        """The mask of a square; nothing in the padding is valid."""
        bottom, end = min(stop, self.layout.height), min(right, self.layout.columns)
        if bottom <= self.row or end <= left:  # padding alone
            none = torch.zeros(stop - self.row, right - left, dtype=torch.bool)
            return None if self.layout.valid is None else none
        mask = self.layout.mask(self.row, bottom, left, end)
        if mask is None:
            return None
        return F.pad(mask.view(bottom - self.row, end - left), (0, right - end, 0, stop - bottom))

    def around(self, top: int, bottom: int, left: int, right: int, halo: int) -> tuple[Tensor, int, int]:
        """The patches of a square of the row in work and `halo` more to each side, (1, D, n, m), and the row and the
        column of the first one."""
        top, left = max(top - halo, 0), max(left - halo, 0)
        return self.crop(top, min(bottom + halo, self.height), left, min(right + halo, self.columns)), top, left

    def crop(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        """The patches (1, D, n, m) of a rectangle, whose rows are in the window."""
        return self.window[top - self.top : bottom - self.top, left:right].permute(2, 0, 1)[None]


def pixel_arguments(
    body: nn.Module,
    image: Any,
    value_range: str | Sequence[float] | None = None,
    nodata: float | None = None,
    fill: float | str | None = None,
) -> dict[str, Any]:
    """The options as arguments of `encode`, for a model of pixels in [0, 1] that normalises them itself: training
    filled what is missing in the middle of the range, see `luna_vision.data.dense`.

    Args:
        body: The backbone, whose `pretrained_cfg` says what training had.
    """
    meant = model_values(body.pretrained_cfg, (0.5,), value_range, nodata, fill)
    if meant.fill == "mean":
        low, high = meant.value_range or type_range(np.dtype(image.dtype), getattr(image, "top", None))
        fill = (low + high) / 2
    return {"value_range": value_range, "nodata": nodata, "fill": fill}


def itemsize(model: nn.Module) -> int:
    """Bytes of a number in work: a CPU may compute half precision in float32."""
    return max(4, next(model.parameters()).dtype.itemsize)
