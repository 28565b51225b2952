"""Strips of an image, one for each process of a group."""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Group", "process_group", "row_ranges", "split_rows"]

Group = dist.ProcessGroup | DeviceMesh | None


def row_ranges(height: int, patch_size: int, parts: int, dim: str = "processes") -> list[tuple[int, int]]:
    """The pixel rows [start, stop) of each of `parts` strips of an image: whole patches, as even as they can be.

    Args:
        height: Rows of pixels. The last strip ends there, and with it the last patch may be cut.
        patch_size: Rows of a patch.
        parts: How many strips.
        dim: What the strips are for, in the message.

    Raises:
        ValueError: There are fewer rows of patches than strips.
    """
    rows = -(-height // patch_size)
    if rows < parts:
        raise ValueError(
            f"an image of {height} pixel rows has {rows} {'row' if rows == 1 else 'rows'} of patches of {patch_size}: "
            f"too few for {parts} {dim}, each of which takes one at least"
        )
    stops = [rows * (i + 1) // parts * patch_size for i in range(parts)]
    return [(0 if i == 0 else stops[i - 1], min(stop, height)) for i, stop in enumerate(stops)]


def split_rows(image: Tensor, patch_size: int | Sequence[int], group: Group = None) -> Tensor:
    """This process's strip, a view of an image (..., height, width) that all processes of a group have.

    Args:
        image: The image, or a batch of them.
        patch_size: Of the model, `model.patch_embed.patch_size`: side, or (rows, columns).
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
        ValueError: There are no processes, or the mesh has more than one dimension.
    """
    if not dist.is_initialized():
        raise ValueError("sequence parallelism takes processes: call torch.distributed.init_process_group first")
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"the mesh must have one dimension, such as mesh['seq'], got {group.ndim}")
        group = group.get_group()
    return dist.group.WORLD if group is None else group
