"""Run a Luna ViT on an image of any size, exactly, one band of its patches at a time.

A sweep takes all bands from one pack to the next: through the second half of a block (unpack, MLP), where the patches
read the memory that the sweep before has packed, and through the first half of the next block (local mixing, pack). The
first sweep begins with the patch embedding, the last ends with the pooling. A model of D blocks needs D + 1 sweeps, and
each sweep reads and writes every patch once.

Shapes: H', W' patch grid, N = H' * W' patches, n patches of a band, L memory slots, C width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..functional import PackState
from ..images.pixels import Pixels
from ..layers import LunaBlock
from ..models import LunaVit
from .grid import Grid
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
    """(1, up to 2 W', C), the last rows of a band, which local mixing needs again with the next band."""
    pack: dict[str, Tensor] = field(default_factory=dict)
    """The `PackState` of this sweep's bands so far: maximum, total, weighted."""
    pool: dict[str, Tensor] = field(default_factory=dict)
    """The parts of the pooling so far."""


class Engine:
    """Runs a model on an image, from a state on."""

    def __init__(
        self,
        model: LunaVit,
        pixels: Pixels,
        grid_size: tuple[int, int],
        band: int,
        ring: Ring,
        state: State,
        grid: Grid | None = None,
        patch_valid: Tensor | None = None,
    ) -> None:
        """
        Args:
            model: In eval mode.
            pixels: The image.
            grid_size: H', W'.
            band: Rows of patches that go through a layer together.
            ring: The store of the patches, as it was at `state`.
            state: The state to start from.
            grid: File for the patches after the final norm.
            patch_valid: (1, N) bool, False where a patch is missing.
        """
        self.patch_valid = None if patch_valid is None else patch_valid.to(next(model.parameters()).device)
        self.model, self.pixels, self.band, self.ring, self.state, self.grid = model, pixels, band, ring, state, grid
        self.height, self.columns = grid_size
        parameter = next(model.parameters())
        self.like = {"device": parameter.device, "dtype": parameter.dtype}
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
        count = self.height * self.columns if self.patch_valid is None else int(self.patch_valid.sum())
        embedding = self.pool.finish(self.model.norm(self.state.memory), count)
        return embedding, self.state.memory

    def _block(self, i: int) -> LunaBlock | None:
        return self.stages[i] if 0 <= i < len(self.stages) else None

    def _sweep(self, after_band: Callable[[State, int], None]) -> None:
        state = self.state
        self.ring.sweep = state.sweep
        behind, ahead = self._block(state.sweep - 1), self._block(state.sweep)
        for start in range(state.row, self.height, self.band):
            stop = min(start + self.band, self.height)
            x = self._embed(start, stop) if behind is None else self._unpack(behind, start, stop)
            if ahead is not None:
                self._pack(ahead, x, start, stop)
            else:
                x = self.model.norm(x)
                self.pool.add(x, self._valid(start, stop))
                state.pool = self.pool.parts
                if self.grid is not None:
                    self.grid.write(start, x.view(stop - start, self.columns, -1))
            del x  # free it before the next band
            state.row = stop
            after_band(state, stop - start)

    def _next_sweep(self) -> None:
        """Finish the pack and update the memory."""
        block = self._block(self.state.sweep)
        if block is None:
            self.state.sweep += 1
            return
        memory, read = block.close_pack(self.state.memory, PackState(**self.state.pack))
        self.state = State(self.state.sweep + 1, 0, memory, read)

    def _valid(self, start: int, stop: int) -> Tensor | None:
        """The mask (1, n) of the rows [start, stop)."""
        return None if self.patch_valid is None else self.patch_valid[:, start * self.columns : stop * self.columns]

    def _embed(self, start: int, stop: int) -> Tensor:
        """Embed the pixels of the rows [start, stop): (1, n, C)."""
        above = min(self.model.embed_halo, start)
        side = self.model.patch_embed.patch_size[0]
        x = self.pixels.rows((start - above) * side, min(stop * side, self.pixels.shape[0]))
        x = x.to(self.like["dtype"])
        if self.patch_valid is not None:
            x = x.masked_fill(x.isnan(), 0.0)  # the mean
        grid_size = self.height, self.columns
        return self.model.embed_tile(x, start, grid_size, above, self.patch_valid).flatten(1, 2)

    def _unpack(self, block: LunaBlock, start: int, stop: int) -> Tensor:
        """The rows [start, stop), (1, n, C), after a block."""
        top, bottom = max(start - block.unpack_halo, 0), min(stop + block.unpack_halo, self.height)
        x = self.ring.read(top, bottom).to(**self.like)
        grid_size, valid = (bottom - top, self.columns), self._valid(top, bottom)
        x = block.unpack_tile(x, block.norm_tile(x), self.state.read, grid_size, valid)
        return x[:, (start - top) * self.columns : (stop - top) * self.columns]

    def _pack(self, block: LunaBlock, x: Tensor, start: int, stop: int) -> None:
        """Start a block on the rows [start, stop), (1, n, C): mix them locally, pack them and keep them.

        Local mixing needs the rows below, so the last rows of a band wait in `tail` for the next band.
        """
        state, W, halo = self.state, self.columns, block.mix_halo
        waiting = 0 if state.tail is None else state.tail.shape[1] // W
        if state.tail is not None:
            x = torch.cat([state.tail, x], dim=1)
        first = max(start - halo, 0)
        last = stop if stop == self.height else stop - halo
        if halo:
            state.tail = x[:, -min(2 * halo * W, x.shape[1]) :].clone()
        x = block.mix_tile(x, (x.shape[1] // W, W), self._valid(start - waiting, stop))
        above = first - (start - waiting)
        x = x[:, above * W : (above + last - first) * W]
        if x.shape[1]:
            tile = block.pack_tile(block.norm_tile(x), block.pack_query(state.memory), self._valid(first, last))
            state.pack = (PackState(**state.pack).merge(tile) if state.pack else tile)._asdict()
            self.ring.write(first, x)
