"""A Luna block in bands of rows, forward and backward: of a layer, autograd keeps its input, and that is all.

Checkpointing a whole block still makes all of it at once when it is computed again: the hidden layer of the MLP alone
is four times the patches. Here both passes take a few rows of the patch grid at a time. A patch learns of others only
through the pack, whose softmax merges exactly (`PackState`), and from its neighbours by local mixing, which a band gets
from a row more on each side. So gradients are those of the ordinary step, up to rounding.

The backward pass of one block, in the order of the chain rule:

    leave   band by band: unpack and MLP again, from the packed memory; gives the gradients of the mixed patches and of
            what was packed
    memory  once: its residual, norm and MLP; gives the gradients of the pack's sums
    enter   band by band: local mixing and the band's part of the pack again, measured against the final maximum; gives
            the gradients of the input and of the memory's queries

Shapes: B batch, H', W' patch grid, N = H' * W' patches, n patches of a band, L memory slots, C width.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._tensors import autocasts, saturate
from ..functional import PackState
from .block import LunaBlock

__all__ = ["block_by_bands", "check_bands"]


def check_bands(block: LunaBlock) -> None:
    """
    Raises:
        ValueError: The block drops attention weights or activations: bands would have to remember what.
    """
    if block.attn.attn_drop > 0.0 or block.proj_drop > 0.0:
        raise ValueError(
            "bands need attn_drop_rate=0 and proj_drop_rate=0 (drop_path_rate may be above), got "
            f"{block.attn.attn_drop} and {block.proj_drop}"
        )


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
        self.mixes_before = block.local is not None and not block.local_after
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

    def before(self, x: Tensor, top: int, bottom: int, start: int, stop: int) -> Tensor:
        """Rows [start, stop) after the block's first local mixing, from rows [top, bottom) of its input."""
        mixed = self.block.before(x, (bottom - top, self.columns), self.part(self.valid, top, bottom))
        return self.part(mixed, start - top, stop - top)

    def mixed(self, x: Tensor, start: int, stop: int) -> Tensor:
        """The same from all of the input, which may be stored in another type."""
        top, bottom = self.around(start, stop, int(self.mixes_before))
        return self.before(self.part(x, top, bottom).to(self.x_dtype), top, bottom, start, stop)

    def enter(self, state: PackState, mixed: Tensor, start: int, stop: int) -> PackState:
        """Pack rows [start, stop)."""
        return state.update(self.block.norm_patches(mixed), self.part(self.valid, start, stop))

    def sums(self, nothing: PackState, mixed: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The same from a state that has read nothing, as sums that are measured against its maximum: of patches that
        were rounded, some may score above it."""
        state = self.enter(nothing, mixed, start, stop)
        rise = (state.maximum - nothing.maximum).exp().nan_to_num(nan=1.0)  # -inf twice where nothing is valid
        return state.total * rise, state.weighted * rise[..., None]

    def pack(self, state: PackState, memory: Tensor) -> tuple[Tensor, Tensor]:
        """What was packed, and the memory after the block."""
        packed = saturate(state.finish().to(memory.dtype))
        return packed, self.block.mix_memory(self.block.add_packed(memory, packed))

    def leave(self, mixed: Tensor, packed: Tensor, top: int, bottom: int) -> Tensor:
        """Rows [top, bottom) after the block; the outer ones lack their neighbours."""
        if self.block.mlp is None:
            return mixed
        h = self.block.norm_patches(mixed)
        y = self.block.attn.unpack(h, packed)
        valid = self.part(self.valid, top, bottom)
        return self.block.update_patches(mixed, h, y, (bottom - top, self.columns), valid)

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
            state = block.attn.pack_state(block.norm_memory(memory))
            for start, stop in bands:
                state = bands.enter(state, bands.mixed(x, start, stop), start, stop)
            bands.mark()
            packed, new_memory = bands.pack(state, memory)
            bands.mark()
            out: Tensor | None = None
            for start, stop in bands:
                bands.rewind(1)
                top, bottom = bands.around(start, stop, block.halo())
                rows = bands.leave(bands.mixed(x, top, bottom), packed, top, bottom)
                if out is None:  # only now is its type known
                    out = rows.new_empty(x.shape)
                bands.part(out, start, stop).copy_(bands.part(rows, start - top, stop - top))
        stored = x if bands.store_dtype is None else x.to(bands.store_dtype)
        ctx.bands = bands
        ctx.save_for_backward(stored, memory, state.maximum, state.total, state.weighted)
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
        first = block.attn.pack_state(block.norm_memory(memory))
        queries = _leaf(first.queries)
        state = dataclasses.replace(first, queries=queries, maximum=maximum, total=total, weighted=weighted)
        packed, new_memory = bands.pack(state, memory)

    d_mixed, d_packed = _leave(bands, x, packed, d_out, d_params)

    ends = [(packed, d_packed), (new_memory, d_new_memory)]
    ends = [(y, d_y) for y, d_y in ends if d_y is not None]
    d_total = d_weighted = None
    if ends:
        found = _grad([y for y, _ in ends], [memory, total, weighted, *params], [d_y for _, d_y in ends])
        d_memory.add(found[:1])
        d_total, d_weighted = found[1:3]
        d_params.add(found[3:])

    with torch.no_grad():
        nothing = dataclasses.replace(state, total=torch.zeros_like(total), weighted=torch.zeros_like(weighted))
    d_x, d_queries = _enter(bands, x, nothing, d_mixed, d_total, d_weighted, d_params)
    if d_queries is not None:
        found = _grad([first.queries], [memory, *params], [d_queries])
        d_memory.add(found[:1])
        d_params.add(found[1:])
    return d_x, *d_memory.grads, *d_params.grads


def _leave(
    bands: _Bands, x: Tensor, packed: Tensor, d_out: Tensor | None, d_params: _Sum
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the mixed patches (B, N, C), in a tensor of its own, and of what was packed."""
    if d_out is None:
        return None, None
    if bands.block.mlp is None:
        return d_out.to(bands.x_dtype, copy=True), None
    packed, d_packed = _leaf(packed), _Sum(1)
    d_mixed = torch.zeros(x.shape, dtype=bands.x_dtype, device=x.device)
    for start, stop in bands:
        bands.rewind(1)
        top, bottom = bands.around(start, stop, bands.block.halo())
        mixed = _leaf(bands.mixed(x, top, bottom))
        with torch.enable_grad():
            out = bands.part(bands.leave(mixed, packed, top, bottom), start - top, stop - top)
        found = _grad([out], [mixed, packed, *bands.params], [bands.part(d_out, start, stop)])
        bands.part(d_mixed, top, bottom).add_(found[0])
        d_packed.add(found[1:2])
        d_params.add(found[2:])
    return d_mixed, d_packed.grads[0]


def _enter(
    bands: _Bands,
    x: Tensor,
    nothing: PackState,
    d_mixed: Tensor | None,
    d_total: Tensor | None,
    d_weighted: Tensor | None,
    d_params: _Sum,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the block's input, which take the place of `d_mixed`, and of the pack's queries.

    Args:
        bands, x: The block and its input.
        nothing: A state that has read nothing, with the maximum over all patches.
        d_mixed, d_total, d_weighted: Gradients of the mixed patches and of the pack's sums.
        d_params: Where those of the parameters are added.
    """
    if d_mixed is None and d_total is None:
        return None, None
    d_queries = _Sum(1)
    d_x = torch.zeros(x.shape, dtype=bands.x_dtype, device=x.device) if d_mixed is None else d_mixed
    below: Tensor | None = None  # what the band above has found for the first row of this one
    for start, stop in bands:
        top, bottom = bands.around(start, stop, int(bands.mixes_before))
        rows = _leaf(bands.part(x, top, bottom).to(bands.x_dtype))
        with torch.enable_grad():
            mixed = bands.before(rows, top, bottom, start, stop)
            total, weighted = bands.sums(nothing, mixed, start, stop)
        ends = [(total, d_total), (weighted, d_weighted)]
        ends.append((mixed, None if d_mixed is None else bands.part(d_mixed, start, stop)))
        ends = [(y, d_y) for y, d_y in ends if d_y is not None]
        found = _grad([y for y, _ in ends], [rows, nothing.queries, *bands.params], [d_y for _, d_y in ends])
        bands.part(d_x, start, stop).copy_(bands.part(found[0], start - top, stop - top))
        if below is not None:
            bands.part(d_x, start, start + 1).add_(below)
        if top < start:
            bands.part(d_x, top, start).add_(bands.part(found[0], 0, start - top))
        below = bands.part(found[0], stop - top, bottom - top) if bottom > stop else None
        d_queries.add(found[1:2])
        d_params.add(found[2:])
    return d_x, d_queries.grads[0]
