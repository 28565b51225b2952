"""One image over many processes, exactly: each process has a strip of it.

For each block the processes exchange the state of the pack, L (C + 2 H) numbers for an image of any size, and for local
mixing a row of patches with each neighbour. See docs/sequence_parallel.md.

Shapes: B batch, H', W' patch grid, N = H' * W' patches, n patches of a strip, L memory slots, C width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from timm.layers import DropPath
from timm.models import checkpoint
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..functional import PackState
from ..layers import LunaBlock
from ..layers.patches import pad_to_patches
from ..layers.pos_embed import grid_coords
from ..models import LunaVit
from ..models.luna_vit import initial_memory, join_tokens
from ..models.pooling import Pool
from .check import check_model
from .collectives import from_all, largest, mean_gradient, own_gradient, shared_max, shared_sum, with_neighbours

__all__ = [
    "SequenceParallel",
    "StripFeatures",
    "merge_over",
    "row_ranges",
    "same_random",
    "share_pool",
    "split_rows",
]

Group = dist.ProcessGroup | DeviceMesh | None


def row_ranges(height: int, patch_size: int, parts: int) -> list[tuple[int, int]]:
    """Divide an image into strips of whole patches, as even as possible: the pixel rows [start, stop) of each.

    Args:
        height: Rows of pixels. The last strip ends there, perhaps within a patch.
        patch_size: Rows of a patch.
        parts: The number of strips.

    Raises:
        ValueError: There are fewer rows of patches than strips.
    """
    rows = -(-height // patch_size)
    if rows < parts:
        raise ValueError(
            f"an image of {height} pixel rows has {rows} row{'s' * (rows != 1)} of patches of {patch_size}: "
            f"too few for {parts} processes: each needs at least one"
        )
    stops = [rows * i // parts * patch_size for i in range(parts + 1)]
    return [(start, min(stop, height)) for start, stop in zip(stops, stops[1:], strict=False)]


def split_rows(image: Tensor, patch_size: int | Sequence[int], group: Group = None) -> Tensor:
    """This process's strip, a view of an image (..., height, width) that all processes of a group have.

    Args:
        image: The image, or a batch.
        patch_size: `model.patch_embed.patch_size`: side, or (rows, columns).
        group: As in `SequenceParallel`.

    Raises:
        ValueError: There are fewer rows of patches than processes.
    """
    group = process_group(group)
    side = patch_size if isinstance(patch_size, int) else patch_size[0]
    start, stop = row_ranges(image.shape[-2], side, dist.get_world_size(group))[dist.get_rank(group)]
    return image[..., start:stop, :]


def process_group(group: Group) -> dist.ProcessGroup:
    """The process group of a one-dimensional mesh; all processes for None.

    Raises:
        ValueError: torch.distributed is not initialised, or the mesh has more than one dimension.
    """
    if not dist.is_initialized():
        raise ValueError("sequence parallelism needs processes: call torch.distributed.init_process_group first")
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"the mesh must have one dimension, such as mesh['seq'], got {group.ndim}")
        group = group.get_group()
    return dist.group.WORLD if group is None else group


def merge_over(state: PackState, group: dist.ProcessGroup) -> PackState:
    """Merge the states of all processes, which belong to the same queries.

    It takes two reductions: of the maximum, L H numbers an image, and of the sums scaled to it, L (C + H) numbers.
    Gradients pass through the second.
    """
    maximum, total, weighted = state.rebased(largest(state.maximum, group))
    sums = shared_sum(torch.cat([total[..., None], weighted], dim=-1), group)
    return PackState(maximum, sums[..., 0], sums[..., 1:])


def share_pool(pool: Pool, group: dist.ProcessGroup, x: Tensor | None = None) -> None:
    """Add the other processes' patches to a pool that has read this process's.

    Args:
        pool: The pool.
        group: The processes.
        x: The patches (B, n, C), among which equal maxima share the gradient; None for equal shares of the processes.
    """
    if "sum" in pool.parts:
        pool.parts["sum"] = shared_sum(pool.parts["sum"], group)
    if "max" in pool.parts:
        pool.parts["max"] = shared_max(pool.parts["max"][:, None] if x is None else x, group)
    if "maximum" in pool.parts:
        pool.parts |= merge_over(PackState(**pool.parts), group)._asdict()


@contextmanager
def same_random(model: LunaVit, group: dist.ProcessGroup | None, device: torch.device) -> Iterator[None]:
    """Let all processes of a group draw the same random numbers, seeded by the first one; without a group, nothing."""
    draws = model.head_drop.p > 0 or any(isinstance(m, DropPath) and m.drop_prob > 0 for m in model.modules())
    if group is None or not (model.training and draws):
        yield
        return
    seed = torch.randint(2**62, (1,)).to(device)
    dist.broadcast(seed, dist.get_global_rank(group, 0), group=group)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(seed))
        yield


@dataclass
class StripFeatures:
    """The result of `SequenceParallel.encode`; every process has the same, except for `patches` and `rows`.

    Attributes:
        patches: (B, n, C), this process's, after the final norm.
        memory: (B, L, C), after the final norm.
        raw_memory: (B, L, C), before the final norm: the `memory` for a next image.
        embedding: (B, C), the input of the model's classifier; None for `global_pool=""`.
        logits: (B, num_classes); None without classes or embedding.
        rows: This process's rows [start, stop) of the image's patch grid.
        grid_size: (H', W') of the image.
    """

    patches: Tensor
    memory: Tensor
    raw_memory: Tensor
    embedding: Tensor | None
    logits: Tensor | None
    rows: tuple[int, int]
    grid_size: tuple[int, int]


def _shape(x: Tensor, dims: int) -> list[int]:
    """The shape of a tensor with `dims` dimensions; for another number of dimensions, -1 for each."""
    return list(x.shape) if x.dim() == dims else [-1] * dims


class SequenceParallel(nn.Module):
    """A Luna ViT on images that are split into strips, one for each process of a group.

    Forward and backward it computes the same as the model on the whole images, up to rounding. All processes must run
    both passes together. The loss is the mean of the processes' losses (which are equal if they depend on the logits
    alone), and the gradients of the weights must be averaged over the processes:
    `DistributedDataParallel(SequenceParallel(model, mesh["seq"]))` does it, over all dimensions of the mesh.
    """

    def __init__(self, model: nn.Module, group: Group = None) -> None:
        """
        Args:
            model: A Luna ViT with the `luna` mixer, the same on all processes.
            group: The processes that share an image, in the order of their strips: a process group, a mesh of one
                dimension, or None for all processes.

        Raises:
            ValueError: A model that cannot be split, or no processes.
        """
        super().__init__()
        check_model(model, "sequence parallelism")
        self.model, self.group = model, process_group(group)

    def forward(self, strip: Tensor, memory: Tensor | None = None) -> Tensor:
        """Logits (B, num_classes), or the embedding (B, C) of a model without classes. Arguments and errors as in
        `encode`.

        Raises:
            ValueError: The model has `global_pool=""`, and so no output that all processes share.
        """
        if self.model.global_pool == "":
            raise ValueError(
                "global_pool='' pools nothing: call encode, which returns the memory and the strip's patches"
            )
        out = self.encode(strip, memory)
        return out.embedding if out.logits is None else out.logits

    def encode(self, strip: Tensor, memory: Tensor | None = None) -> StripFeatures:
        """Encode the images.

        Args:
            strip: (B, in_chans, rows, width), this process's part of the images, from top to bottom in the order of the
                group. `split_rows` makes even strips; all but the last must be whole patches.
            memory: (B, L, C), the same on all processes, replaces the learned initial memory.

        Raises:
            ValueError: Strips that do not belong together, a model that runs in bands, or random parts of it that the
                processes cannot draw alike. All processes raise it.
        """
        model = self.model
        if model.block_runner is not None:
            raise ValueError("strips are not computed in bands: set band_rows to 0 (grad_checkpointing goes with them)")
        if model.training:
            self.check_training()
        start, stop, height = self._place(strip, memory)
        strip = own_gradient(strip, self.group)
        if memory is not None:
            memory = mean_gradient(memory, self.group)
        with same_random(model, self.group, strip.device):
            x = self._embed(strip, start, height)
            columns = x.shape[2]
            memory = initial_memory(model.learned_memory(), memory, x.flatten(1, 2))
            for block in model.stages():
                if model.grad_checkpointing and torch.is_grad_enabled():
                    x, memory = checkpoint(self._block, block, x, memory)
                else:
                    x, memory = self._block(block, x, memory)
            raw, tokens = memory, model.norm(join_tokens(memory, x.flatten(1, 2)))
            memory, x = tokens[:, : model.memory_len], tokens[:, model.memory_len :]
            pool = model.new_pool()
            if pool.reads_patches:
                pool.add(x)
                share_pool(pool, self.group, x)
            embedding = pool.finish(memory, height * columns)
            embedding = None if embedding is None else model.head_drop(embedding)
            logits = model.head(embedding) if embedding is not None and model.num_classes else None
        return StripFeatures(x, memory, raw, embedding, logits, (start, stop), (height, columns))

    def _place(self, strip: Tensor, memory: Tensor | None) -> tuple[int, int, int]:
        """The first row of patches of the strip, the row after its last, and the rows of the image.

        All processes check all shapes: if one of them raised alone, the others would wait for it forever.
        """
        given = [0] * 3 if memory is None else _shape(memory, 3)
        found = from_all([*_shape(strip, 4), *given], self.group, strip.device)
        shapes, memories = [f[:4] for f in found], [f[4:] for f in found]
        chans, side = self.model.in_chans, self.model.patch_embed.patch_size[0]
        for i, (batch, channels, height, width) in enumerate(shapes):
            if batch < 0 or channels != chans or height < 1 or width < 1:
                raise ValueError(
                    f"process {i}: a strip must have shape (batch, {chans}, rows, width), 1 pixel at least"
                )
            if (batch, width) != (shapes[0][0], shapes[0][3]):
                raise ValueError(
                    f"strips must have the same batch and width, got {batch} of {width} on process {i} and "
                    f"{shapes[0][0]} of {shapes[0][3]} on process 0"
                )
            if height % side and i < len(shapes) - 1:
                raise ValueError(
                    f"strips but the last must be whole patches of {side} rows, got {height} rows on process {i}"
                )
        want = [shapes[0][0], self.model.memory_len, self.model.embed_dim] if any(map(any, memories)) else [0] * 3
        for i, shape in enumerate(memories):
            if shape != want:
                got = "none" if not any(shape) else "another number of dimensions" if min(shape) < 0 else shape
                raise ValueError(f"process {i}: memory must have shape {want}, as on all processes, got {got}")
        stops = torch.tensor([-(-shape[2] // side) for shape in shapes]).cumsum(0).tolist()
        rank = dist.get_rank(self.group)
        return stops[rank - 1] if rank else 0, stops[rank], stops[-1]

    def check_training(self) -> None:
        """Check that all processes can draw the random parts of the model alike.

        Raises:
            ValueError: The model draws random numbers for every patch: the strips would get the same numbers, or the
                processes' copies of the memory different ones.
        """
        allowed = [self.model.head_drop]
        drops = [m for m in self.model.modules() if isinstance(m, nn.Dropout) and m.p > 0 and m not in allowed]
        if drops or self.model.patch_drop is not None or any(block.drops_values for block in self.model.stages()):
            raise ValueError(
                "sequence parallelism trains with drop_path_rate and drop_rate only: pos_drop_rate, patch_drop_rate, "
                "proj_drop_rate and attn_drop_rate must be 0"
            )

    def _embed(self, strip: Tensor, start: int, height: int) -> Tensor:
        """The patches (B, rows, W', C) of a strip that begins at row `start` of the patch grid."""
        model, above = self.model, 0
        side, columns = model.patch_embed.patch_size
        if model.embed_halo:
            strip, pixels = with_neighbours(
                pad_to_patches(strip, (side, columns)), 2, model.embed_halo * side, 0, self.group
            )
            above = pixels // side
        rows, columns = grid_coords((height, -(-strip.shape[3] // columns)), strip, None)
        return model.embed_tile(strip, rows[start : start + -(-strip.shape[2] // side) - above], columns, above)

    def _block(self, block: LunaBlock, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """`LunaBlock.forward` on patches (B, rows, W', C) and the memory (B, L, C)."""
        rows = x.shape[1]
        x, above = with_neighbours(x, 1, block.mix_halo, block.mix_halo, self.group)
        x = block.mix_tile(x.flatten(1, 2), x.shape[1:3]).unflatten(1, x.shape[1:3])[:, above : above + rows]
        x, above = with_neighbours(x, 1, block.unpack_halo, block.unpack_halo, self.group)
        grid, own = x.shape[1:3], slice(above, above + rows)
        x = x.flatten(1, 2)
        h = block.norm_tile(x)
        tile = block.pack_tile(h.unflatten(1, grid)[:, own].flatten(1, 2), block.pack_query(memory), rows=rows)
        memory, read = block.close_pack(memory, merge_over(tile, self.group))
        return block.unpack_tile(x, h, read, grid).unflatten(1, grid)[:, own], memory
