"""Run a Luna ViT on an image of any size, exactly, one band of its patches at a time.

A sweep takes all bands from one pack to the next: through the second half of a block (unpack, MLP), where the patches
read the memory that the sweep before has packed, and through the first half of the next block (local mixing, pack). The
first sweep begins with the patch embedding, the last ends with the pooling. A model of D blocks needs D + 1 sweeps, and
each sweep reads and writes every patch once. Patches that are not valid are neither embedded nor kept nor computed,
except where a convolution needs a rectangle (see `luna_vision.execution.layout`).

Shapes: H', W' patch grid, n valid patches of a band, L memory slots, C width.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ..functional import PackState
from ..images.pixels import Pixels
from ..layers import LunaBlock
from ..layers.pos_embed import grid_coords
from ..models import LunaVit
from ..utils.device import to_device
from .attention import AttentionMap
from .grid import Sink
from .layout import Band, Layout
from .store import Ring

__all__ = ["Engine", "State"]


@dataclass
class State:
    """The state between two bands, except for the patches, which are in the ring."""

    sweep: int
    row: int
    """Rows of the patch grid that this sweep has finished."""
    memory: Tensor
    """(1, L, C), before the block that packs in this sweep; in the last sweep, after the last block."""
    read: Tensor | None = None
    """(1, L, C), the packed memory that the patches read in this sweep."""
    tail: Tensor | None = None
    """The patches of the last two rows of a band, (1, n, C), which local mixing needs again with the next band."""
    pack: dict[str, Tensor] = field(default_factory=dict)
    """The `PackState` of this sweep's bands so far: maximum, total, weighted."""
    pool: dict[str, Tensor] = field(default_factory=dict)
    """The parts of the pooling so far."""
    broken: list[tuple[int, int, int, int]] = field(default_factory=list)
    """The tiles of the image that could not be read so far, see `Pixels.broken`."""
    turn: int = 0
    """The pass of the last sweep, which only reads the ring, and comes again for a `Sink` with several passes."""


class Engine:
    """Runs a model on an image, from a state on."""

    def __init__(
        self,
        model: LunaVit,
        pixels: Pixels,
        layout: Layout,
        rows: int,
        ring: Ring,
        state: State,
        grid: Sink | None = None,
        attention: AttentionMap | None = None,
    ) -> None:
        """
        Args:
            model: In eval mode.
            pixels: The image.
            layout: The patches to compute, and their bands.
            rows: Rows of patches whose pixels are read together.
            ring: The store of the patches, as it was at `state`.
            state: The state to start from.
            grid: Takes the patches after the final norm.
            attention: Takes the scores of one pack.
        """
        self.model, self.pixels, self.layout, self.rows = model, pixels, layout, rows
        self.ring, self.state, self.grid, self.attention = ring, state, grid, attention
        parameter = next(model.parameters())
        self.like = {"device": parameter.device, "dtype": parameter.dtype}
        valid = layout.mask(0, layout.height, 0, layout.columns)
        on_cpu = torch.empty(0, dtype=parameter.dtype)  # as the mask is
        self.coords = grid_coords((layout.height, layout.columns), on_cpu, valid)
        self.coords = tuple(axis.to(parameter.device) for axis in self.coords)
        self.pool = model.new_pool(state.pool)
        # no last sweep if nothing reads the patches after the last block: its pack has all that is needed
        self.stages = model.stages()
        self.sweeps = len(self.stages) + (1 if self.pool.reads_patches or grid is not None else 0)

    def run(self, after_band: Callable[[State, int], None]) -> tuple[Tensor | None, Tensor]:
        """Run all remaining sweeps.

        Args:
            after_band: Called after each band with the state, from which a run can be resumed, and the number of rows.

        Returns:
            The embedding (1, C), None without pooling, and the memory (1, L, C) after the last block.
        """
        while self.state.sweep < self.sweeps:
            self._sweep(after_band)
            self._next_sweep()
        embedding = self.pool.finish(self.model.norm(self.state.memory), self.layout.count)
        return embedding, self.state.memory

    def _block(self, i: int) -> LunaBlock | None:
        return self.stages[i] if 0 <= i < len(self.stages) else None

    def _sweep(self, after_band: Callable[[State, int], None]) -> None:
        state = self.state
        self.ring.sweep = state.sweep
        behind, ahead = self._block(state.sweep - 1), self._block(state.sweep)
        with closing(self.pixels.ahead(self._spans() if behind is None else ())) as self.raws:
            for i, band in enumerate(self.layout.bands):
                if band.start < state.row:
                    continue
                x = self._embed(band) if behind is None else self._unpack(behind, band)
                if ahead is not None:
                    self._pack(ahead, x, band, self.layout.is_last(i))
                else:
                    self._pool(self.model.norm(x), band)
                del x  # free it before the next band
                state.row = band.stop
                after_band(state, band.stop - band.start)

    def _next_sweep(self) -> None:
        """Finish the pack and update the memory."""
        block = self._block(self.state.sweep)
        if block is None:
            if self.grid is not None and self.state.turn + 1 < self.grid.passes:
                self.grid.next_pass()
                self.state = replace(self.state, row=0, turn=self.state.turn + 1)
            else:
                self.state.sweep += 1
            return
        if self.state.sweep == 0:
            self.pixels.check_broken()
        memory, read = block.close_pack(self.state.memory, PackState(**self.state.pack))
        self.state = State(self.state.sweep + 1, 0, memory, read, broken=self.state.broken)

    def _parts(self, band: Band) -> list[tuple[int, int]]:
        """Rows [start, stop) of a band whose pixels are read together: few, however many it has."""
        starts = range(band.start, band.stop, self.rows)
        parts = [(start, min(start + self.rows, band.stop)) for start in starts]
        return [part for part in parts if self.layout.between(*part)]

    def _spans(self) -> Iterator[tuple[int, int]]:
        """The rows of pixels that are left to read, in the order of `_embed`."""
        side, height, row = self.model.patch_embed.patch_size[0], self.pixels.shape[0], self.state.row
        for band in self.layout.bands:
            if band.start >= row:
                for start, stop in self._parts(band):
                    yield (start - min(self.model.embed_halo, start)) * side, min(stop * side, height)

    def _embed(self, band: Band) -> Tensor:
        """Embed the pixels of a band: (1, n, C)."""
        parts = [self._embed_rows(*part) for part in self._parts(band)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _embed_rows(self, start: int, stop: int) -> Tensor:
        layout, model = self.layout, self.model
        above, across = min(model.embed_halo, start), model.patch_embed.patch_size[1]
        raw, broken = next(self.raws)
        self.state.broken = sorted(broken)
        if layout.valid is None:
            return self._embed_tile(raw, start, stop, above, 0, layout.columns)
        out = torch.empty(1, layout.between(start, stop), model.embed_dim, **self.like)
        for left, right in layout.islands(start - above, stop):
            x = self._embed_tile(raw[:, left * across : right * across], start, stop, above, left, right)
            inside, order = (index.to(x.device) for index in layout.places(start, stop, left, right))
            out[:, order] = x[:, inside].to(out.dtype)
        return out

    def _embed_tile(self, raw: np.ndarray, start: int, stop: int, above: int, left: int, right: int) -> Tensor:
        """All patches of the rows [start, stop) and the columns [left, right), given their pixels."""
        side, across = self.model.patch_embed.patch_size
        x = self.pixels.normalised(raw, (start - above) * side, left * across).to(self.like["dtype"])
        mask = self.layout.mask(start - above, stop, left, right)
        if mask is not None:
            mask = mask.to(x.device)
            x = x.masked_fill(x.isnan(), 0.0)  # the mean
        rows, columns = self.coords
        return self.model.embed_tile(x, rows[..., start:stop], columns[..., left:right], above, mask).flatten(1, 2)

    def _unpack(self, block: LunaBlock, band: Band) -> Tensor:
        """A band, (1, n, C), after a block."""
        layout, read = self.layout, self.state.read
        top, bottom = max(band.start - block.unpack_halo, 0), min(band.stop + block.unpack_halo, layout.height)
        x = to_device(self.ring.read(layout.offsets[top], layout.offsets[bottom]), **self.like)
        if not block.unpack_halo:  # each patch for itself
            return block.unpack_tile(x, block.norm_tile(x), read)
        x = layout.on_islands(x, top, bottom, lambda x, *grid: block.unpack_tile(x, block.norm_tile(x), read, *grid))
        first = layout.between(top, band.start)
        return x[:, first : first + layout.between(band.start, band.stop)]

    def _pack(self, block: LunaBlock, x: Tensor, band: Band, is_last: bool) -> None:
        """Start a block on a band, (1, n, C): mix it locally, pack it and keep it.

        Local mixing needs the rows below, so the last rows of a band wait in `tail` for the next band, unless there is
        nothing below (`is_last`).
        """
        state, layout, halo = self.state, self.layout, block.mix_halo
        first, last = max(band.start - halo, band.top), band.stop if is_last else band.stop - halo
        if halo:
            top = max(band.start - 2 * halo, band.top)
            if state.tail is not None:
                x = torch.cat([state.tail, x], dim=1)
            waits = layout.between(top, max(band.stop - 2 * halo, top))
            state.tail = None if is_last else x[:, waits:].clone()
            x = layout.on_islands(x, top, band.stop, block.mix_tile)
            x = x[:, layout.between(top, first) : layout.between(top, last)]
        if x.shape[1]:
            h = block.norm_tile(x)
            if self.attention is not None and self.attention.stage == state.sweep:
                self.attention.write(first, last, block.pack_scores(h, state.memory))
            rows: int | list[int] = last - first
            if layout.valid is not None:
                rows = [count for row in range(first, last) if (count := layout.between(row, row + 1))]
            tile = block.pack_tile(h, block.pack_query(state.memory), rows=rows)
            del h
            state.pack = (PackState(**state.pack).merge(tile) if state.pack else tile)._asdict()
            self.ring.write(layout.offsets[first], x)

    def _pool(self, x: Tensor, band: Band) -> None:
        """Read a band, (1, n, C), after the final norm."""
        if self.state.turn == 0:
            self.pool.add(x)
            self.state.pool = self.pool.parts
        if self.grid is not None:
            for start in range(band.start, band.stop, self.rows):
                stop, layout = min(start + self.rows, band.stop), self.layout
                part = x[:, layout.between(band.start, start) : layout.between(band.start, stop)]
                self.grid.write(start, layout.on_grid(part, start, stop))
