"""Which patches of a grid are computed, in which bands of rows, and in what order they are kept.

Patches that are not valid are left out everywhere: what is kept of a band are its valid patches, row by row. Where an
operation needs the grid (a 3x3 convolution, the stem), they are put back into *islands*, the columns that have valid
patches in these rows. Beyond an island all is invalid, which counts as zero, like what is beyond the image. So each
island can be computed alone.

Shapes: H', W' patch grid, n valid patches of some rows, C width.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Band", "Layout"]

GAP = 8  # columns without a valid patch that two islands have between them, at least: an island has a fixed cost


class Band(NamedTuple):
    """Rows of the patch grid that go through a layer together."""

    start: int
    stop: int
    top: int
    """First row of the bands above without a gap between them; the row above it has no valid patch."""


class Layout:
    """The valid patches of a grid, and its bands.

    Attributes:
        height, columns: H', W'.
        valid: (H', W') bool; None if all patches are valid.
        bands: From top to bottom. Each begins and ends with a row that has a valid patch.
        count: How many patches are valid.
        margin: As many patches as a band is computed from, and those of the row above it, at most.
    """

    def __init__(self, grid_size: tuple[int, int], rows: int, valid: np.ndarray | None = None) -> None:
        """
        Args:
            grid_size: H', W'.
            rows: Of a band in which all patches are valid. Others have more, but not more patches in their islands.
            valid: (H', W') bool, with at least one valid patch.
        """
        self.height, self.columns = grid_size
        self.valid = valid
        each = np.full(self.height, self.columns) if valid is None else valid.sum(axis=1)
        self.offsets = np.concatenate([[0], np.cumsum(each)]).tolist()
        self.bands = self._bands(rows)
        self.count = self.offsets[-1]
        self.margin = max(self.between(max(band.start - 1, 0), band.stop) for band in self.bands)

    def between(self, start: int, stop: int) -> int:
        """How many patches are valid in the rows [start, stop)."""
        return self.offsets[stop] - self.offsets[start]

    def _bands(self, rows: int) -> list[Band]:
        if self.valid is None:
            return [Band(start, min(start + rows, self.height), 0) for start in range(0, self.height, rows)]
        bands, stop = [], 0
        while (start := self._next_row(stop)) is not None:
            stop = start + 1
            occupied = self.valid[max(start - 2, 0) : stop + 1].any(axis=0)
            while stop < self.height:
                # with the rows that local mixing takes above and below
                occupied |= self.valid[min(stop + 1, self.height - 1)]
                width = sum(right - left for left, right in _runs(occupied))
                if (stop - start + 3) * width > (rows + 2) * self.columns:
                    break
                stop += 1
            while self.between(stop - 1, stop) == 0:
                stop -= 1
            bands.append(Band(start, stop, bands[-1].top if bands and bands[-1].stop == start else start))
        return bands

    def _next_row(self, start: int) -> int | None:
        """The first row from `start` on that has a valid patch."""
        return next((row for row in range(start, self.height) if self.between(row, row + 1)), None)

    def is_last(self, i: int) -> bool:
        """Whether the row below the band with this number has no valid patch, or is none."""
        return i + 1 == len(self.bands) or self.bands[i + 1].start > self.bands[i].stop

    def islands(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Columns [left, right) in which the rows [start, stop) have valid patches, from left to right."""
        return [(0, self.columns)] if self.valid is None else _runs(self.valid[start:stop].any(axis=0))

    def places(self, start: int, stop: int, left: int, right: int) -> tuple[Tensor, Tensor]:
        """Where the n valid patches of an island of the rows [start, stop) are: in the island, row by row, and among
        the valid patches of these rows."""
        rows = self.valid[start:stop]
        inside = rows[:, left:right]
        order = (np.cumsum(rows) - 1).reshape(rows.shape)[:, left:right][inside]
        return torch.from_numpy(np.flatnonzero(inside)), torch.from_numpy(order)

    def mask(self, start: int, stop: int, left: int, right: int) -> Tensor | None:
        """(1, (stop - start) * (right - left)) bool, the mask of a part of the grid; None if all is valid."""
        if self.valid is None:
            return None
        return torch.from_numpy(np.ascontiguousarray(self.valid[start:stop, left:right])).view(1, -1)

    def on_islands(
        self, x: Tensor, start: int, stop: int, function: Callable[[Tensor, tuple[int, int], Tensor | None], Tensor]
    ) -> Tensor:
        """Apply an operation that looks one patch far to the valid patches (1, n, C) of the rows [start, stop).

        Args:
            x: The patches.
            start, stop: Their rows.
            function: From patches (1, n', C) of a rectangle, its rows and columns, and its mask (1, n'), to patches
                of the same shape. It takes those that are invalid as zero.
        """
        if self.valid is None:
            return function(x, (stop - start, self.columns), None)
        out = torch.empty_like(x)
        for left, right in self.islands(start, stop):
            inside, order = (index.to(x.device) for index in self.places(start, stop, left, right))
            tile = x.new_zeros(1, (stop - start) * (right - left), x.shape[2])
            tile[:, inside] = x[:, order]
            mask = self.mask(start, stop, left, right).to(x.device)
            tile = function(tile, (stop - start, right - left), mask)
            out[:, order] = tile[:, inside]
        return out

    def on_grid(self, x: Tensor, start: int, stop: int) -> Tensor:
        """The rows [start, stop) as (stop - start, W', C), with zeros in place of what is invalid."""
        if self.valid is not None:
            inside, _ = self.places(start, stop, 0, self.columns)
            x = x.new_zeros((stop - start) * self.columns, x.shape[2]).index_copy_(0, inside.to(x.device), x[0])
        return x.view(stop - start, self.columns, -1)


def _runs(occupied: np.ndarray) -> list[tuple[int, int]]:
    """The parts [left, right) of a row that are True, joined where fewer than `GAP` are not between them."""
    edges = np.flatnonzero(np.diff(occupied.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    if not len(edges):
        return []
    apart = np.flatnonzero(edges[1:, 0] - edges[:-1, 1] >= GAP)
    lefts, rights = edges[[0, *(apart + 1)], 0], edges[[*apart, -1], 1]
    return list(zip(lefts.tolist(), rights.tolist(), strict=True))
