"""One image over many processes, exactly: each holds a strip of it, and they exchange what a block needs of the others.

That is, for each block, the state of the pack, L (C + 2 H) numbers whatever the image's size, and where the block
mixes locally, a row of patches to each neighbour. See docs/sequence_parallel.md.

Shapes: B batch, H', W' patch grid, N = H' * W' patches, n of them in a strip, L memory slots, C width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from timm.layers import DropPath
from timm.models import checkpoint
from torch import Tensor, nn

from ..functional import PackState
from ..layers import LunaBlock
from ..layers.patches import pad_to_patches
from ..models.luna_vit import initial_memory, join_tokens
from ..models.pooling import Pool
from .check import check_model
from .collectives import from_all, largest, mean_gradient, own_gradient, shared_max, shared_sum, with_neighbours
from .strips import Group, process_group, row_ranges, split_rows

__all__ = ["SequenceParallel", "StripFeatures", "merge_over", "row_ranges", "split_rows"]


def merge_over(state: PackState, group: dist.ProcessGroup) -> PackState:
    """The state that has read what all processes' states have read, all of them for the same queries.

    Two reductions: of the maximum, L H numbers an image, and of the sums that are scaled to it, L (C + H). Gradients
    pass through the second.
    """
    maximum, total, weighted = state.rebased(largest(state.maximum, group))
    sums = shared_sum(torch.cat([total[..., None], weighted], dim=-1), group)
    return PackState(maximum, sums[..., 0], sums[..., 1:])


def share_pool(pool: Pool, x: Tensor, group: dist.ProcessGroup) -> None:
    """Have a pool that has read this process's patches x (B, n, C) know those of the others."""
    if "sum" in pool.parts:
        pool.parts["sum"] = shared_sum(pool.parts["sum"], group)
    if "max" in pool.parts:
        pool.parts["max"] = shared_max(x, group)
    if "maximum" in pool.parts:
        pool.parts |= merge_over(PackState(**pool.parts), group)._asdict()


@dataclass
class StripFeatures:
    """What `SequenceParallel.encode` returns; all but the patches is the same on every process.

    Attributes:
        patches: (B, n, C), this process's, after the final norm.
        memory: (B, L, C), after the final norm.
        raw_memory: (B, L, C), before it: what to hand in as `memory` for a next image.
        embedding: (B, C), what the model's head reads; None for `global_pool=""`.
        logits: (B, num_classes); None without classes or embedding.
        rows: [start, stop), of the image's rows of patches, that are this process's.
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
    """The shape of a tensor of so many dimensions; -1 in the place of each for any other."""
    return list(x.shape) if x.dim() == dims else [-1] * dims


class SequenceParallel(nn.Module):
    """A Luna ViT on images of which each process of a group holds a strip: exactly, up to rounding, what the model
    computes of the whole images, forward and backward.

    The processes go forward and backward together. The loss that counts is the mean of theirs (they are all the same
    where it is made of the logits), and the gradients of the weights are to be averaged over the processes:
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
            ValueError: The model has `global_pool=""`, and with it no output that all processes could have.
        """
        if self.model.global_pool == "":
            raise ValueError(
                "global_pool='' pools nothing: call encode, which gives the memory and the strip's patches"
            )
        out = self.encode(strip, memory)
        return out.embedding if out.logits is None else out.logits

    def encode(self, strip: Tensor, memory: Tensor | None = None) -> StripFeatures:
        """
        Args:
            strip: (B, in_chans, rows, width), the process's part of the images, from top to bottom in the order of the
                group. `split_rows` makes even ones; of any other height they have to be whole patches, but for the
                last.
            memory: (B, L, C), the same on all processes, takes the place of the learned initial memory.

        Raises:
            ValueError: Strips that do not belong together, a model that runs in bands, or random parts of it that the
                processes cannot draw alike; on all processes.
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
        with self._same_random(strip.device):
            x = self._embed(strip, start, height)
            columns = x.shape[2]
            memory = initial_memory(model.learned_memory(), memory, x.flatten(1, 2))
            for block in model.blocks:
                if model.grad_checkpointing and torch.is_grad_enabled():
                    x, memory = checkpoint(self._block, block, x, memory)
                else:
                    x, memory = self._block(block, x, memory)
            raw, tokens = memory, model.norm(join_tokens(memory, x.flatten(1, 2)))
            memory, x = tokens[:, : model.memory_len], tokens[:, model.memory_len :]
            pool = model.new_pool()
            if pool.reads_patches:
                pool.add(x)
                share_pool(pool, x, self.group)
            embedding = pool.finish(memory, height * columns)
            embedding = None if embedding is None else model.head_drop(embedding)
            logits = model.head(embedding) if embedding is not None and model.num_classes else None
        return StripFeatures(x, memory, raw, embedding, logits, (start, stop), (height, columns))

    def _place(self, strip: Tensor, memory: Tensor | None) -> tuple[int, int, int]:
        """Where the strip's rows of patches begin and end, and how many the image has. All processes find the same
        mistakes: one that raised alone would leave the others waiting."""
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
        """See that all random parts of the model can be drawn alike by all processes.

        Raises:
            ValueError: What is drawn for every patch cannot: all strips would be given the same, or the processes'
                copies of the memory different ones.
        """
        allowed = [self.model.head_drop]
        drops = [m for m in self.model.modules() if isinstance(m, nn.Dropout) and m.p > 0 and m not in allowed]
        if drops or self.model.patch_drop is not None or any(block.drops_values for block in self.model.blocks):
            raise ValueError(
                "sequence parallelism trains with drop_path_rate and drop_rate only: pos_drop_rate, patch_drop_rate, "
                "proj_drop_rate and attn_drop_rate must be 0"
            )

    @contextmanager
    def _same_random(self, device: torch.device) -> Iterator[None]:
        """Have all processes draw the same, whatever they have drawn before: the first one's generator decides."""
        model = self.model
        draws = model.head_drop.p > 0 or any(isinstance(m, DropPath) and m.drop_prob > 0 for m in model.modules())
        if not (model.training and draws):
            yield
            return
        seed = torch.randint(2**62, (1,)).to(device)
        dist.broadcast(seed, dist.get_global_rank(self.group, 0), group=self.group)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(int(seed))
            yield

    def _embed(self, strip: Tensor, start: int, height: int) -> Tensor:
        """Patches (B, rows, W', C) of a strip whose first row of patches is `start`."""
        model, above = self.model, 0
        side, columns = model.patch_embed.patch_size
        if model.embed_halo:
            strip, pixels = with_neighbours(
                pad_to_patches(strip, (side, columns)), 2, model.embed_halo * side, 0, self.group
            )
            above = pixels // side
        return model.embed_tile(strip, start, (height, -(-strip.shape[3] // columns)), above)

    def _block(self, block: LunaBlock, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """`LunaBlock.forward` on patches (B, rows, W', C) and the memory (B, L, C)."""
        rows = x.shape[1]
        x, above = with_neighbours(x, 1, block.mix_halo, block.mix_halo, self.group)
        x = block.mix_tile(x.flatten(1, 2), x.shape[1:3]).unflatten(1, x.shape[1:3])[:, above : above + rows]
        x, above = with_neighbours(x, 1, block.unpack_halo, block.unpack_halo, self.group)
        grid, own = x.shape[1:3], slice(above, above + rows)
        x = x.flatten(1, 2)
        h = block.norm_tile(x)
        tile = block.pack_tile(h.unflatten(1, grid)[:, own].flatten(1, 2), block.pack_query(memory))
        memory, read = block.close_pack(memory, merge_over(tile, self.group))
        return block.unpack_tile(x, h, read, grid).unflatten(1, grid)[:, own], memory
