"""A Luna block in bands of rows, forward and backward. Autograd keeps only the input of each block.

A checkpointed block still exists as a whole when it is computed again, and the hidden layer of its MLP alone is four
times as large as the patches. Here both passes take a few rows of the patch grid at a time. Patches exchange
information in two ways only: through the pack, whose softmax merges exactly (`PackState`), and by local mixing, for
which a band is computed with one more row on each side. So gradients are those of the ordinary step, up to rounding.

The backward pass of one block, in the order of the chain rule:

    unpack  band by band: recompute unpack and MLP; gives the gradients of the mixed patches and of the packed memory
    close   once: the memory's part; gives the gradients of the pack's sums
    pack    band by band: recompute local mixing and the band's part of the pack, measured against the final maximum;
            gives the gradients of the input and of the memory's query

Shapes: B batch, H', W' patch grid, N = H' * W' patches, n patches of a band, L memory slots, C width.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..functional import PackState, autocasts
from ..layers import LunaBlock
from ..models import LunaVit
from .check import check_model
from .collectives import shared_sum, swap
from .sequence_parallel import merge_over
from .store import disk_tensor

__all__ = ["Strip", "block_by_bands", "check_bands", "set_band_checkpointing"]


def check_bands(model: LunaVit, execution: str = "band checkpointing") -> None:
    """Raise a ValueError unless a model can be trained in bands."""
    check_model(model, execution)
    if any(block.drops_values for block in model.stages()):
        raise ValueError("bands need attn_drop_rate=0 and proj_drop_rate=0 (drop_path_rate may be above)")


def set_band_checkpointing(model: LunaVit, rows: int, store_dtype: torch.dtype | None = None) -> None:
    """Run every block of a model a few rows of patches at a time, forward and backward.

    The inputs of all blocks are kept, as by `set_grad_checkpointing`; all other activations exist for one band only.
    Results and gradients are the same up to rounding. Compiled, traced and exported models run without bands.

    Args:
        model: A Luna ViT.
        rows: Rows of the patch grid in a band; 0 switches bands off. A band of about 4,096 patches is large enough.
        store_dtype: Type in which inputs are kept. `torch.bfloat16` halves their memory; gradients are then computed
            at inputs that are rounded to 8 bits.

    Raises:
        ValueError: Fewer than 0 rows, a type that is not floating-point, a mixer without memory, or dropout of
            activations or attention weights, whose masks the bands do not keep.
    """
    if rows < 0:
        raise ValueError(f"rows must be at least 0, got {rows}")
    if store_dtype is not None and not store_dtype.is_floating_point:
        raise ValueError(f"store_dtype must be a floating-point type, got {store_dtype}")
    if rows:
        check_bands(model)
    model.block_runner = partial(block_by_bands, rows=rows, store_dtype=store_dtype) if rows else None


class Strip(NamedTuple):
    """The rows [start, stop) of a patch grid that this process computes: all of them, unless processes share an image.

    Then patches (B, n, C) are those of the strip and of a row of each neighbour. Whoever computes patches fetches these
    rows; whoever computes gradients of them gives these back, and what is left there has no meaning.
    """

    start: int
    stop: int
    columns: int
    group: dist.ProcessGroup | None = None
    """The processes, from top to bottom."""

    def bands(self, rows: int) -> Iterator[tuple[int, int]]:
        """The strip in parts of so many rows."""
        for start in range(self.start, self.stop, rows):
            yield start, min(start + rows, self.stop)

    def fetch(self, x: Tensor) -> None:
        """Fill in the rows of the neighbours, from them."""
        if self.group is None:
            return
        rows = x.unflatten(1, (-1, self.columns))
        up, down = rows[:, self.start : self.start + 1], rows[:, self.stop - 1 : self.stop]
        rows[:, : self.start], rows[:, self.stop :] = swap(up, down, 1, 1, 1, self.group)

    def give_back(self, d_x: Tensor) -> None:
        """Send the gradients of the neighbours' rows to them, and add theirs."""
        if self.group is None:
            return
        rows = d_x.unflatten(1, (-1, self.columns))
        above, below = swap(rows[:, : self.start], rows[:, self.stop :], 1, 1, 1, self.group)
        rows[:, self.start : self.start + above.shape[1]] += above
        rows[:, self.stop - below.shape[1] : self.stop] += below


def block_by_bands(
    block: LunaBlock,
    x: Tensor,
    memory: Tensor,
    grid_size: tuple[int, int],
    patch_valid: Tensor | None,
    rows: int,
    store_dtype: torch.dtype | None = None,
    store: Path | None = None,
    strip: Strip | None = None,
) -> tuple[Tensor, Tensor]:
    """`block(x, memory, grid_size, patch_valid)`, a few rows of patches at a time, in both passes.

    Args:
        block, x, memory, grid_size, patch_valid: As in `LunaBlock.forward`.
        rows: Rows of the patch grid in a band.
        store_dtype: Type in which x is kept for the backward pass; None keeps it as it is.
        store: A folder on a disk for x and, on a CPU, for all tensors of the size of x; x itself lies there already.
        strip: The rows of one image that this process computes, of which patches that are not valid are skipped, and
            have no meaning in the result. None computes all rows and patches.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return block(x, memory, grid_size, patch_valid)
    params = [p for p in block.parameters() if p.requires_grad]
    bands = _Bands(block, grid_size, rows, patch_valid, store_dtype, store, strip, x, params)
    return _ByBands.apply(bands, x, memory, *params)


def kept_autocast(x: Tensor) -> Callable[[], torch.autocast]:
    """Makes autocast as it is now, without its cache, whose copies of the weights have no gradients."""
    on, kind = autocasts(x), x.device.type
    dtype = torch.get_autocast_dtype(kind) if on else None
    return lambda: torch.autocast(kind, dtype, on, cache_enabled=False)


def zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device, store: Path | None) -> Tensor:
    """Zeros on a device or, where that is the CPU and a folder is given, on the disk."""
    if store is not None and device.type == "cpu":
        return disk_tensor(store, shape, dtype)
    return torch.zeros(shape, dtype=dtype, device=device)


class _Bands:
    """A block and the division of its patches into bands."""

    def __init__(
        self,
        block: LunaBlock,
        grid_size: tuple[int, int],
        rows: int,
        patch_valid: Tensor | None,
        store_dtype: torch.dtype | None,
        store: Path | None,
        strip: Strip | None,
        x: Tensor,
        params: list[Tensor],
    ) -> None:
        self.block, self.rows, self.valid, self.params = block, rows, patch_valid, params
        self.store_dtype, self.store = store_dtype or x.dtype, store
        self.height, self.columns = grid_size
        self.strip = strip or Strip(0, *grid_size)
        self.skips = strip is not None and patch_valid is not None
        self.x_dtype, self.device = x.dtype, x.device
        self.keeps = torch.is_grad_enabled()
        self.context = kept_autocast(x)
        # drop path: an image drops its path in all bands or in none
        self.draws = block.training and not isinstance(block.drop_path1, torch.nn.Identity)
        self.rng: list[Tensor] = []

    def __iter__(self) -> Iterator[tuple[int, int]]:
        yield from self.strip.bands(self.rows)

    def zeros(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A tensor of the size of x."""
        return zeros(shape, dtype, self.device, self.store)

    def kept(self, x: Tensor) -> Tensor:
        """x, as it is stored for the backward pass."""
        if self.store is None or (x.is_cpu and x.dtype == self.store_dtype):
            return x.to(self.store_dtype)
        return disk_tensor(self.store, x.shape, self.store_dtype).copy_(x)

    def part(self, x: Tensor | None, start: int, stop: int) -> Tensor | None:
        """Rows [start, stop) of the patches (B, N, C), or of a mask (B, N)."""
        return None if x is None else x[:, start * self.columns : stop * self.columns]

    def around(self, start: int, stop: int, halo: int) -> tuple[int, int]:
        return max(start - halo, 0), min(stop + halo, self.height)

    def mix(self, x: Tensor, top: int, bottom: int, start: int, stop: int) -> Tensor:
        """Rows [start, stop) after local mixing, from rows [top, bottom) of the block's input."""
        mixed = self.block.mix_tile(x, (bottom - top, self.columns), self.part(self.valid, top, bottom))
        return self.part(mixed, start - top, stop - top)

    def mixed(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Rows [start, stop) after local mixing, from the whole input, which may be stored in another type."""
        top, bottom = self.around(start, stop, self.block.mix_halo)
        return self.mix(self.part(x, top, bottom).to(self.device, self.x_dtype), top, bottom, start, stop)

    def places(self, start: int, stop: int) -> Tensor:
        """Where the valid patches of the rows [start, stop) are among these, at least one place."""
        places = self.part(self.valid, start, stop)[0].nonzero()[:, 0]
        return places if len(places) else places.new_zeros(1)

    def pack(self, query: Tensor, mixed: Tensor, start: int, stop: int) -> PackState:
        """Pack rows [start, stop)."""
        valid, rows = self.part(self.valid, start, stop), stop - start
        if self.skips:
            counts = [count for count in valid.view(rows, -1).sum(dim=1).tolist() if count]
            places = self.places(start, stop)
            mixed, valid, rows = mixed[:, places], None if counts else valid[:, places], counts or 1
        return self.block.pack_tile(self.block.norm_tile(mixed), query, valid, rows)

    def unpack(self, mixed: Tensor, read: Tensor, top: int, bottom: int) -> Tensor:
        """Rows [top, bottom) after the block; its outer rows are not valid, as they lack their neighbours."""
        if self.skips and not self.block.unpack_halo:  # each patch for itself
            places = self.places(top, bottom)
            x = mixed[:, places]
            x = self.block.unpack_tile(x, self.block.norm_tile(x), read)
            return x.new_zeros(mixed.shape).index_copy(1, places, x)
        grid_size, valid = (bottom - top, self.columns), self.part(self.valid, top, bottom)
        return self.block.unpack_tile(mixed, self.block.norm_tile(mixed), read, grid_size, valid)

    # ---- random numbers: the memory draws first, as in the ordinary step; then all bands draw the same

    def get_rng(self) -> Tensor:
        return torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.get_rng_state()

    def set_rng(self, state: Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state, self.device)
        else:
            torch.set_rng_state(state)

    def mark(self) -> None:
        if self.draws:
            self.rng.append(self.get_rng())

    def rewind(self, mark: int) -> None:
        if self.draws:
            self.set_rng(self.rng[mark])


class _ByBands(torch.autograd.Function):
    """The parameters are arguments, so that autograd gets one gradient for each, as DDP requires."""

    @staticmethod
    def forward(ctx: Any, bands: _Bands, x: Tensor, memory: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
        block = bands.block
        with bands.context():
            query, state = block.pack_query(memory), None
            for start, stop in bands:
                tile = bands.pack(query, bands.mixed(x, start, stop), start, stop)
                state = tile if state is None else state.merge(tile)
            if bands.strip.group is not None:
                state = merge_over(state, bands.strip.group)
            bands.mark()
            new_memory, read = block.close_pack(memory, state)
            bands.mark()
            out: Tensor | None = None
            for start, stop in bands:
                bands.rewind(1)
                top, bottom = bands.around(start, stop, block.unpack_halo)
                rows = bands.unpack(bands.mixed(x, top, bottom), read, top, bottom)
                if out is None:  # its type depends on autocast
                    out = bands.zeros(x.shape, rows.dtype)
                bands.part(out, start, stop).copy_(bands.part(rows, start - top, stop - top))
        bands.strip.fetch(out)
        ctx.bands = bands
        if bands.keeps:
            ctx.save_for_backward(bands.kept(x), memory, *state)
        ctx.set_materialize_grads(False)
        return out, new_memory

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_new_memory: Tensor | None) -> tuple[Tensor | None, ...]:
        bands: _Bands = ctx.bands
        now = bands.get_rng() if bands.draws else None
        with bands.context():
            grads = _backward(bands, *ctx.saved_tensors, d_out, d_new_memory)
        if now is not None:
            bands.set_rng(now)
        return None, *grads


def add_grads(totals: list[Tensor | None], grads: tuple[Tensor | None, ...]) -> None:
    """Add gradients to their totals; not in place, as autograd may use the first ones elsewhere."""
    for i, grad in enumerate(grads):
        if grad is not None:
            totals[i] = grad if totals[i] is None else totals[i] + grad


def grads_of(outputs: list[tuple[Tensor, Tensor | None]], inputs: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs from pairs of an output and its gradient, which is None if there is none."""
    given = [(y, d_y) for y, d_y in outputs if d_y is not None]
    if not given:
        return (None,) * len(inputs)
    return torch.autograd.grad([y for y, _ in given], inputs, [d_y for _, d_y in given], allow_unused=True)


def leaf(x: Tensor) -> Tensor:
    """The same numbers, at which gradients end."""
    return x.detach().requires_grad_()


def _backward(
    bands: _Bands,
    x: Tensor,
    memory: Tensor,
    maximum: Tensor,
    total: Tensor,
    weighted: Tensor,
    d_out: Tensor | None,
    d_new_memory: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, of the memory and of the parameters."""
    block, params = bands.block, bands.params
    d_params: list[Tensor | None] = [None] * len(params)
    d_memory: list[Tensor | None] = [None]
    memory, total, weighted = leaf(memory), leaf(total), leaf(weighted)
    bands.rewind(0)
    with torch.enable_grad():
        first = block.pack_query(memory)
        query = leaf(first)
        new_memory, read = block.close_pack(memory, PackState(maximum, total, weighted))

    d_mixed, d_read = _unpack_backward(bands, x, read, d_out, d_params)

    found = grads_of([(read, d_read), (new_memory, d_new_memory)], [memory, total, weighted, *params])
    add_grads(d_memory, found[:1])
    add_grads(d_params, found[3:])
    d_total, d_weighted = found[1:3]
    if bands.strip.group is not None and d_total is not None:
        d_total, d_weighted = (shared_sum(d, bands.strip.group) for d in (d_total, d_weighted))

    d_x, d_query = _pack_backward(bands, x, query, maximum, d_mixed, d_total, d_weighted, d_params)
    found = grads_of([(first, d_query)], [memory, *params])
    add_grads(d_memory, found[:1])
    add_grads(d_params, found[1:])
    return d_x, *d_memory, *d_params


def _unpack_backward(
    bands: _Bands, x: Tensor, read: Tensor, d_out: Tensor | None, d_params: list[Tensor | None]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the mixed patches (B, N, C), as a new tensor, and of the packed memory that they read."""
    if d_out is None:
        return None, None
    read = leaf(read)
    d_read: list[Tensor | None] = [None]
    d_mixed = bands.zeros(x.shape, bands.x_dtype)
    for start, stop in bands:
        bands.rewind(1)
        top, bottom = bands.around(start, stop, bands.block.unpack_halo)
        mixed = leaf(bands.mixed(x, top, bottom))
        with torch.enable_grad():
            out = bands.part(bands.unpack(mixed, read, top, bottom), start - top, stop - top)
        found = grads_of([(out, bands.part(d_out, start, stop))], [mixed, read, *bands.params])
        bands.part(d_mixed, top, bottom).add_(found[0])
        add_grads(d_read, found[1:2])
        add_grads(d_params, found[2:])
    return d_mixed, d_read[0]


def _pack_backward(
    bands: _Bands,
    x: Tensor,
    query: Tensor,
    maximum: Tensor,
    d_mixed: Tensor | None,
    d_total: Tensor | None,
    d_weighted: Tensor | None,
    d_params: list[Tensor | None],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the block's input, which overwrite `d_mixed`, and of the pack's query.

    Args:
        bands, x: The block and its input.
        query: The memory's query.
        maximum: The maximum of the scores of all patches.
        d_mixed, d_total, d_weighted: Gradients of the mixed patches and of the pack's sums.
        d_params: The gradients of the parameters are added here.
    """
    if d_mixed is None and d_total is None:
        return None, None
    d_query: list[Tensor | None] = [None]
    d_x = bands.zeros(x.shape, bands.x_dtype) if d_mixed is None else d_mixed
    below: Tensor | None = None  # the gradient that the band above has for the first row of this band
    for start, stop in bands:
        top, bottom = bands.around(start, stop, bands.block.mix_halo)
        rows = leaf(bands.part(x, top, bottom).to(bands.device, bands.x_dtype))
        with torch.enable_grad():
            mixed = bands.mix(rows, top, bottom, start, stop)
            _, total, weighted = bands.pack(query, mixed, start, stop).rebased(maximum)
        outputs = [(total, d_total), (weighted, d_weighted), (mixed, bands.part(d_mixed, start, stop))]
        found = grads_of(outputs, [rows, query, *bands.params])
        bands.part(d_x, start, stop).copy_(bands.part(found[0], start - top, stop - top))
        if below is not None:
            bands.part(d_x, start, start + 1).add_(below)
        if top < start:
            bands.part(d_x, top, start).add_(bands.part(found[0], 0, start - top))
        below = bands.part(found[0], stop - top, bottom - top) if bottom > stop else None
        add_grads(d_query, found[1:2])
        add_grads(d_params, found[2:])
    if below is not None:
        bands.part(d_x, stop, bottom).add_(below)
    bands.strip.give_back(d_x)
    return d_x, d_query[0]
