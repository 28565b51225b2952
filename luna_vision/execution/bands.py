"""A Luna block in bands of rows, forward and backward: of a layer, autograd keeps its input, and that is all.

Checkpointing a whole block still makes all of it at once when it is computed again: the hidden layer of the MLP alone
is four times the patches. Here both passes take a few rows of the patch grid at a time. A patch learns of others only
through the pack, whose softmax merges exactly (`PackState`), and from its neighbours by local mixing, which a band gets
from a row more on each side. So gradients are those of the ordinary step, up to rounding.

The backward pass of one block, in the order of the chain rule:

    unpack  band by band: unpack and MLP again; gives the gradients of the mixed patches and of what they read
    close   once: the memory's part; gives the gradients of the pack's sums
    pack    band by band: local mixing and the band's part of the pack again, measured against the final maximum; gives
            the gradients of the input and of the memory's query

Shapes: B batch, H', W' patch grid, N = H' * W' patches, n patches of a band, L memory slots, C width.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..functional import PackState, autocasts
from ..layers import LunaBlock
from ..models import LunaVit
from .check import check_model

__all__ = ["block_by_bands", "set_band_checkpointing"]


def set_band_checkpointing(model: LunaVit, rows: int, store_dtype: torch.dtype | None = None) -> None:
    """Run every block of a model a few rows of patches at a time, forward and backward.

    Of a block its input is kept, as by `set_grad_checkpointing`, and what else it makes exists for one band only.
    Results and gradients are the same up to rounding. Compiled, traced and exported models run without bands.

    Args:
        model: A Luna ViT.
        rows: Rows of the patch grid in a band; 0 for none. A band of about 4,096 patches is large enough.
        store_dtype: Type in which inputs are kept. `torch.bfloat16` halves what they take, and gradients are then
            those at inputs that are rounded to 8 bits.

    Raises:
        ValueError: Fewer than 0 rows, a type that is not floating-point, a mixer without memory, or dropout of
            activations or attention weights, of which bands would have to remember what was dropped.
    """
    if rows < 0:
        raise ValueError(f"rows must be at least 0, got {rows}")
    if store_dtype is not None and not store_dtype.is_floating_point:
        raise ValueError(f"store_dtype must be a floating-point type, got {store_dtype}")
    if rows:
        check_model(model, "band checkpointing")
    if rows and any(block.drops_values for block in model.blocks):
        raise ValueError("bands need attn_drop_rate=0 and proj_drop_rate=0 (drop_path_rate may be above)")
    model.block_runner = partial(block_by_bands, rows=rows, store_dtype=store_dtype) if rows else None


def block_by_bands(
    block: LunaBlock,
    x: Tensor,
    memory: Tensor,
    grid_size: tuple[int, int],
    patch_valid: Tensor | None,
    rows: int,
    store_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`block(x, memory, grid_size, patch_valid)`, a few rows of patches at a time, in both passes.

    Args:
        block, x, memory, grid_size, patch_valid: As in `LunaBlock.forward`.
        rows: Rows of the patch grid in a band.
        store_dtype: Type in which x is kept for the backward pass; None keeps it as it is.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return block(x, memory, grid_size, patch_valid)
    params = [p for p in block.parameters() if p.requires_grad]
    bands = _Bands(block, grid_size, rows, patch_valid, store_dtype if torch.is_grad_enabled() else None, x, params)
    return _ByBands.apply(bands, x, memory, *params)


class _Bands:
    """How a block runs on bands of its patches."""

    def __init__(
        self,
        block: LunaBlock,
        grid_size: tuple[int, int],
        rows: int,
        patch_valid: Tensor | None,
        store_dtype: torch.dtype | None,
        x: Tensor,
        params: list[Tensor],
    ) -> None:
        self.block, self.rows, self.valid, self.store_dtype, self.params = block, rows, patch_valid, store_dtype, params
        self.height, self.columns = grid_size
        self.x_dtype, self.device = x.dtype, x.device
        self.autocast = autocasts(x)
        self.autocast_dtype = torch.get_autocast_dtype(x.device.type) if self.autocast else None
        # all bands of an image drop their path, or none does
        self.draws = block.training and not isinstance(block.drop_path1, torch.nn.Identity)
        self.rng: list[Tensor] = []

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.height, self.rows):
            yield start, min(start + self.rows, self.height)

    def context(self) -> torch.autocast:
        """Autocast as it was in the forward pass; without its cache, in which weights that were cast without gradients
        would be found when there should be some."""
        return torch.autocast(self.device.type, self.autocast_dtype, self.autocast, cache_enabled=False)

    def part(self, x: Tensor | None, start: int, stop: int) -> Tensor | None:
        """Rows [start, stop) of the patches (B, N, C), or of a mask (B, N)."""
        return None if x is None else x[:, start * self.columns : stop * self.columns]

    def around(self, start: int, stop: int, halo: int) -> tuple[int, int]:
        return max(start - halo, 0), min(stop + halo, self.height)

    def mix(self, x: Tensor, top: int, bottom: int, start: int, stop: int) -> Tensor:
        """Rows [start, stop) after `mix_tile`, from rows [top, bottom) of the block's input."""
        mixed = self.block.mix_tile(x, (bottom - top, self.columns), self.part(self.valid, top, bottom))
        return self.part(mixed, start - top, stop - top)

    def mixed(self, x: Tensor, start: int, stop: int) -> Tensor:
        """The same from all of the input, which may be stored in another type."""
        top, bottom = self.around(start, stop, self.block.mix_halo)
        return self.mix(self.part(x, top, bottom).to(self.x_dtype), top, bottom, start, stop)

    def pack(self, query: Tensor, mixed: Tensor, start: int, stop: int) -> PackState:
        """Pack rows [start, stop)."""
        return self.block.pack_tile(self.block.norm_tile(mixed), query, self.part(self.valid, start, stop))

    def unpack(self, mixed: Tensor, read: Tensor, top: int, bottom: int) -> Tensor:
        """Rows [top, bottom) after the block; the outer ones lack their neighbours."""
        grid_size, valid = (bottom - top, self.columns), self.part(self.valid, top, bottom)
        return self.block.unpack_tile(mixed, self.block.norm_tile(mixed), read, grid_size, valid)

    # ---- random numbers: the memory draws first, as in the ordinary step, then all bands the same

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
    """The parameters are arguments so that their gradients go the ordinary way, once each, as DDP demands."""

    @staticmethod
    def forward(ctx: Any, bands: _Bands, x: Tensor, memory: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
        block = bands.block
        with bands.context():
            query, state = block.pack_query(memory), None
            for start, stop in bands:
                tile = bands.pack(query, bands.mixed(x, start, stop), start, stop)
                state = tile if state is None else state.merge(tile)
            bands.mark()
            new_memory, read = block.close_pack(memory, state)
            bands.mark()
            out: Tensor | None = None
            for start, stop in bands:
                bands.rewind(1)
                top, bottom = bands.around(start, stop, block.unpack_halo)
                rows = bands.unpack(bands.mixed(x, top, bottom), read, top, bottom)
                if out is None:  # only now is its type known
                    out = rows.new_empty(x.shape)
                bands.part(out, start, stop).copy_(bands.part(rows, start - top, stop - top))
        stored = x if bands.store_dtype is None else x.to(bands.store_dtype)
        ctx.bands = bands
        ctx.save_for_backward(stored, memory, *state)
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


class _Sum:
    """Gradients of some tensors, summed over bands."""

    def __init__(self, count: int) -> None:
        self.grads: list[Tensor | None] = [None] * count
        self.own = [False] * count

    def add(self, grads: tuple[Tensor | None, ...]) -> None:
        for i, grad in enumerate(grads):
            if grad is None:
                continue
            if self.grads[i] is None:  # may be what autograd was handed, which others read
                self.grads[i] = grad
            elif self.own[i]:
                self.grads[i].add_(grad)
            else:
                self.grads[i], self.own[i] = self.grads[i] + grad, True


def _grad(outputs: list[Tensor], inputs: list[Tensor], d_outputs: list[Tensor]) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(outputs, inputs, d_outputs, allow_unused=True)


def _leaf(x: Tensor) -> Tensor:
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
    d_params, d_memory = _Sum(len(params)), _Sum(1)
    memory, total, weighted = _leaf(memory), _leaf(total), _leaf(weighted)
    bands.rewind(0)
    with torch.enable_grad():
        first = block.pack_query(memory)
        query = _leaf(first)
        new_memory, read = block.close_pack(memory, PackState(maximum, total, weighted))

    d_mixed, d_read = _unpack_backward(bands, x, read, d_out, d_params)

    ends = [(read, d_read), (new_memory, d_new_memory)]
    ends = [(y, d_y) for y, d_y in ends if d_y is not None]
    d_total = d_weighted = None
    if ends:
        found = _grad([y for y, _ in ends], [memory, total, weighted, *params], [d_y for _, d_y in ends])
        d_memory.add(found[:1])
        d_total, d_weighted = found[1:3]
        d_params.add(found[3:])

    d_x, d_query = _pack_backward(bands, x, query, maximum, d_mixed, d_total, d_weighted, d_params)
    if d_query is not None:
        found = _grad([first], [memory, *params], [d_query])
        d_memory.add(found[:1])
        d_params.add(found[1:])
    return d_x, *d_memory.grads, *d_params.grads


def _unpack_backward(
    bands: _Bands, x: Tensor, read: Tensor, d_out: Tensor | None, d_params: _Sum
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the mixed patches (B, N, C), in a tensor of its own, and of what the patches read."""
    if d_out is None:
        return None, None
    read, d_read = _leaf(read), _Sum(1)
    d_mixed = torch.zeros(x.shape, dtype=bands.x_dtype, device=x.device)
    for start, stop in bands:
        bands.rewind(1)
        top, bottom = bands.around(start, stop, bands.block.unpack_halo)
        mixed = _leaf(bands.mixed(x, top, bottom))
        with torch.enable_grad():
            out = bands.part(bands.unpack(mixed, read, top, bottom), start - top, stop - top)
        found = _grad([out], [mixed, read, *bands.params], [bands.part(d_out, start, stop)])
        bands.part(d_mixed, top, bottom).add_(found[0])
        d_read.add(found[1:2])
        d_params.add(found[2:])
    return d_mixed, d_read.grads[0]


def _pack_backward(
    bands: _Bands,
    x: Tensor,
    query: Tensor,
    maximum: Tensor,
    d_mixed: Tensor | None,
    d_total: Tensor | None,
    d_weighted: Tensor | None,
    d_params: _Sum,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the block's input, which take the place of `d_mixed`, and of the pack's query.

    Args:
        bands, x: The block and its input.
        query: What the memory asks.
        maximum: Of the scores of all patches.
        d_mixed, d_total, d_weighted: Gradients of the mixed patches and of the pack's sums.
        d_params: Where those of the parameters are added.
    """
    if d_mixed is None and d_total is None:
        return None, None
    d_query = _Sum(1)
    d_x = torch.zeros(x.shape, dtype=bands.x_dtype, device=x.device) if d_mixed is None else d_mixed
    below: Tensor | None = None  # what the band above has found for the first row of this one
    for start, stop in bands:
        top, bottom = bands.around(start, stop, bands.block.mix_halo)
        rows = _leaf(bands.part(x, top, bottom).to(bands.x_dtype))
        with torch.enable_grad():
            mixed = bands.mix(rows, top, bottom, start, stop)
            _, total, weighted = bands.pack(query, mixed, start, stop).rebased(maximum)
        ends = [(total, d_total), (weighted, d_weighted)]
        ends.append((mixed, None if d_mixed is None else bands.part(d_mixed, start, stop)))
        ends = [(y, d_y) for y, d_y in ends if d_y is not None]
        found = _grad([y for y, _ in ends], [rows, query, *bands.params], [d_y for _, d_y in ends])
        bands.part(d_x, start, stop).copy_(bands.part(found[0], start - top, stop - top))
        if below is not None:
            bands.part(d_x, start, start + 1).add_(below)
        if top < start:
            bands.part(d_x, top, start).add_(bands.part(found[0], 0, start - top))
        below = bands.part(found[0], stop - top, bottom - top) if bottom > stop else None
        d_query.add(found[1:2])
        d_params.add(found[2:])
    return d_x, d_query.grads[0]
