"""A training step on an image that is read row by row: its pixels are never in memory as a whole.

The patch embedding takes a few rows of patches at a time. Its backward pass reads their pixels again. Blocks run in
bands (`luna_vision.execution.bands`), and so do the final norm and the pooling. What has the size of the image are the
inputs of the blocks, in the type in which they are stored, and two tensors of patches, one on the way through a block
and one that leaves it. With a folder as `store`, all of them lie on the disk.

Shapes: H', W' patch grid, N = H' * W' patches, n patches of a band, L memory slots, C width, K classes.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..functional import PackState
from ..images.pixels import Pixels
from ..layers.patches import pad_to_patches
from ..layers.pos_embed import grid_coords
from ..models import LunaVit
from ..models.luna_vit import initial_memory
from .bands import Strip, add_grads, block_by_bands, check_bands, grads_of, kept_autocast, leaf, zeros
from .plan import BAND_PATCHES
from .sequence_parallel import row_ranges, same_random, share_pool

__all__ = ["PatchRows", "check_streamed", "streamed_logits"]


def check_streamed(model: nn.Module) -> None:
    """Raise a ValueError unless a model can be trained by `streamed_logits`."""
    check_bands(model, "a streamed step")
    if model.pos_drop.p > 0 or model.patch_drop is not None:
        raise ValueError("a streamed step needs pos_drop_rate=0 and patch_drop_rate=0")
    if model.global_pool == "" or not model.num_classes:
        raise ValueError("a streamed step needs a model with classes and a global_pool")


class PatchRows:
    """The patches of an image, embedded a few rows at a time from its pixels: those that a mask leaves, and around them
    what is needed for a rectangle. Processes that share an image have a strip of it each, and a row of each neighbour.

    Attributes:
        grid_size: H', W' of the rectangle, or of this process's part of it.
        valid: (1, N) bool, the patches to look at; None if all are.
        count: How many of them the whole image has.
        strip: The rows that this process computes.
    """

    def __init__(
        self,
        model: LunaVit,
        pixels: Pixels,
        valid: np.ndarray | None = None,
        flip: tuple[bool, bool] = (False, False),
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """
        Args:
            model: Embeds the patches.
            pixels: The image, of whose patches outside `valid` no pixel is read.
            valid: (h, w) bool, the patches of the whole image to look at; None for all.
            flip: Upside down, and from left to right. The image is padded to whole patches before.
            group: The processes that share the image.

        Raises:
            ValueError: There are fewer rows of patches than processes.
        """
        self.model, self.pixels, self.flip = model, pixels, flip
        self.side = model.patch_embed.patch_size
        sizes = [-(-length // side) for length, side in zip(pixels.shape, self.side, strict=False)]
        self.box = [(0, size) for size in sizes]
        self.valid = None
        if valid is not None:
            pixels.restrict(valid, self.side)
            lines = [np.flatnonzero(valid.any(axis=1 - axis)) for axis in (0, 1)]
            self.box = [(int(line[0]), int(line[-1]) + 1) for line in lines]
            grid = valid[tuple(slice(*ends) for ends in self.box)]
            grid = np.flip(grid, [axis for axis in (0, 1) if flip[axis]])
            self.valid = torch.from_numpy(grid.copy()).view(1, -1).to(pixels.mean.device)
        self.grid_size = tuple(stop - start for start, stop in self.box)
        self.coords = grid_coords(self.grid_size, pixels.mean, self.valid)
        self.count = math.prod(self.grid_size) if self.valid is None else int(self.valid.sum())
        self.strip = Strip(0, *self.grid_size)
        if group is not None:
            self._keep_strip(group)

    def _keep_strip(self, group: dist.ProcessGroup) -> None:
        """Leave the other processes' rows to them."""
        (height, columns), p = self.grid_size, self.side[0]
        start, stop = (end // p for end in row_ranges(height * p, p, dist.get_world_size(group))[dist.get_rank(group)])
        top, bottom = max(start - 1, 0), min(stop + 1, height)
        first, last = self.box[0]
        self.box[0] = (last - bottom, last - top) if self.flip[0] else (first + top, first + bottom)
        self.valid = self.part(self.valid, top, bottom)
        self.coords = self.coords[0][..., top:bottom], self.coords[1]
        self.grid_size = bottom - top, columns
        self.strip = Strip(start - top, stop - top, columns, group)

    def part(self, x: Tensor | None, start: int, stop: int) -> Tensor | None:
        """Rows [start, stop) of the patches (1, N, C), or of the mask (1, N)."""
        return None if x is None else x[:, start * self.grid_size[1] : stop * self.grid_size[1]]

    def embed(self, start: int, stop: int) -> Tensor:
        """The patches (1, n, C) of the rows [start, stop)."""
        above = min(self.model.embed_halo, start)
        x, mask = self._read(start - above, stop), self.part(self.valid, start - above, stop)
        if mask is not None:
            x = x.masked_fill(x.isnan(), 0.0)  # the mean
        rows, columns = self.coords
        return self.model.embed_tile(x, rows[..., start:stop], columns, above, mask).flatten(1, 2)

    def _read(self, start: int, stop: int) -> Tensor:
        """Normalised pixels (1, channels, height, width) of whole patches, of rows of the rectangle."""
        (top, bottom), (left, right) = self.box
        (p, q), (upside_down, mirrored) = self.side, self.flip
        first, last = (bottom - stop, bottom - start) if upside_down else (top + start, top + stop)
        raw = self.pixels.raw(first * p, min(last * p, self.pixels.shape[0]))
        x = self.pixels.normalised(raw[:, left * q : right * q], first * p, left * q)
        x = pad_to_patches(x, self.side)
        return x.flip([2] * upside_down + [3] * mirrored) if any(self.flip) else x


def streamed_logits(
    model: LunaVit,
    image: PatchRows,
    rows: int | None = None,
    store_dtype: torch.dtype | None = None,
    store: Path | None = None,
) -> Tensor:
    """Logits (1, K) of an image, those of the ordinary forward pass, with gradients for the parameters.

    Args:
        model: For which `check_streamed` holds.
        image: Its patches. If processes share them, all must call this together, and gradients, averaged over the
            processes, are those of the mean of their losses (`SequenceParallel`).
        rows: Rows of patches in a band; those of about 4,096 patches if None.
        store_dtype: Type in which the inputs of blocks are kept for the backward pass, by default that of the patches.
            With `torch.bfloat16`, gradients are computed at inputs that are rounded to 8 bits.
        store: A folder for what has the size of the image (on a GPU, for the inputs of blocks alone). None keeps it in
            memory.

    Raises:
        OSError: The image cannot be read, or the disk is full.
    """
    bands = _Rows(model, image, rows or max(1, BAND_PATCHES // image.grid_size[1]), store)
    x = _Embed.apply(bands, *bands.parameters("patch_embed", "pos_embed"))
    memory = initial_memory(model.learned_memory(), None, x)
    how = {"rows": bands.rows, "store_dtype": store_dtype, "store": store, "strip": image.strip}
    group = image.strip.group
    with same_random(model, group, x.device):
        for block in model.stages():
            x, memory = block_by_bands(block, x, memory, image.grid_size, image.valid, **how)
        pool = model.new_pool()
        if pool.reads_patches:
            bands.pooled = []
            parts = _Pool.apply(bands, x, *bands.parameters("norm", "attn_pool"))
            pool = model.new_pool(dict(zip(bands.pooled, parts, strict=True)))
            if group is not None:
                share_pool(pool, group)
        return model.head(model.head_drop(pool.finish(model.norm(memory), image.count)))


class _Rows:
    """An image, the model, and the division of its patches into bands."""

    def __init__(self, model: LunaVit, image: PatchRows, rows: int, store: Path | None) -> None:
        self.model, self.image, self.rows, self.store = model, image, rows, store
        self.context: Callable[[], torch.autocast] = kept_autocast(image.pixels.mean)
        self.pooled: list[str] = []

    def __iter__(self) -> Iterator[tuple[int, int]]:
        yield from self.image.strip.bands(self.rows)

    def parameters(self, *names: str) -> list[Tensor]:
        """The parameters of parts of the model that are trained."""
        parts = [part for name in names if (part := getattr(self.model, name)) is not None]
        return [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]

    def zeros(self, dtype: torch.dtype) -> Tensor:
        """(1, N, C)."""
        height, columns = self.image.grid_size
        shape = torch.Size((1, height * columns, self.model.embed_dim))
        return zeros(shape, dtype, self.image.pixels.mean.device, self.store)

    def pool(self, x: Tensor, start: int, stop: int, parts: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What the pooling has read, after the rows [start, stop) of the patches."""
        pool = self.model.new_pool(parts)
        pool.add(self.model.norm(x), self.image.part(self.image.valid, start, stop))
        return pool.parts


class _Embed(torch.autograd.Function):
    """The patch embedding. Autograd keeps nothing of it: the backward pass reads the pixels again."""

    @staticmethod
    def forward(ctx: Any, bands: _Rows, *params: Tensor) -> Tensor:
        ctx.bands, ctx.params, out = bands, params, None
        for start, stop in bands:
            x = bands.image.embed(start, stop)
            out = bands.zeros(x.dtype) if out is None else out
            bands.image.part(out, start, stop).copy_(x)
        bands.image.strip.fetch(out)
        bands.image.pixels.check_broken()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor | None, ...]:
        bands, grads = ctx.bands, [None] * len(ctx.params)
        for start, stop in bands:
            with torch.enable_grad(), bands.context():
                x = bands.image.embed(start, stop)
            add_grads(grads, grads_of([(x, bands.image.part(d_x, start, stop))], list(ctx.params)))
        return None, *grads


class _Pool(torch.autograd.Function):
    """The final norm and what the pooling reads of the patches: the parts of a `Pool`, in the order of their names."""

    @staticmethod
    def forward(ctx: Any, bands: _Rows, x: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
        parts: dict[str, Tensor] = {}
        for start, stop in bands:
            parts = bands.pool(bands.image.part(x, start, stop), start, stop, parts)
        ctx.bands, ctx.params = bands, params
        ctx.save_for_backward(x, *parts.values())
        ctx.set_materialize_grads(False)
        bands.pooled += parts
        if "maximum" in parts:
            ctx.mark_non_differentiable(parts["maximum"])
        return tuple(parts.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_parts: Tensor | None) -> tuple[Tensor | None, ...]:
        bands, params = ctx.bands, list(ctx.params)
        x, *parts = (tensor.detach() for tensor in ctx.saved_tensors)  # outputs would lead back to here
        whole, given = (dict(zip(bands.pooled, some, strict=True)) for some in (parts, d_parts))
        d_x, grads = bands.zeros(x.dtype), [None] * len(params)
        for start, stop in bands:
            with torch.enable_grad(), bands.context():
                rows = leaf(bands.image.part(x, start, stop))
                found = bands.pool(rows, start, stop)
                if "maximum" in found:
                    found = PackState(**found).rebased(whole["maximum"])._asdict()
                if "max" in found:  # the rows that have it get the gradient
                    found["max"] = torch.where(found["max"] == whole["max"], found["max"], whole["max"])
            d_rows, *more = grads_of([(found[name], given[name]) for name in given], [rows, *params])
            bands.image.part(d_x, start, stop).copy_(d_rows)
            add_grads(grads, tuple(more))
        return None, d_x, *grads
