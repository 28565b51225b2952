"""Training at several sizes: each batch has one of them, and about as many patches as any other batch.

The size of a batch is a function of (seed, epoch, position), see :mod:`luna_vision.data.sampling`. All ranks have the
same size at the same step, so none waits for another.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, default_collate

from luna_vision.data.sampling import EpochSampler
from luna_vision.utils.checks import check_at_least

Size = tuple[int, int]
Key = tuple[int, int, Size]


def height_width(name: str, size: int | Sequence[int]) -> Size:
    """A side, or [height, width], in pixels to (height, width).

    Raises:
        ValueError: It is neither.
    """
    out = (size, size) if isinstance(size, int) else tuple(size)
    if len(out) != 2 or min(out) < 1:
        raise ValueError(f"{name} must be a positive side or [height, width] in pixels, got {size}")
    return out


def parse_sizes(sizes: Sequence[int | Sequence[int]], patch_size: int) -> list[Size]:
    """Sides, or [height, width], in pixels to (height, width).

    Raises:
        ValueError: There is no size, one is given twice, or one does not consist of whole patches.
    """
    out = [height_width("train_sizes", size) for size in sizes]
    check_at_least(1, patch_size=patch_size)
    if not out:
        raise ValueError("train_sizes must have at least one size; leave it out to train at img_size")
    for given, size in zip(sizes, out, strict=True):
        if any(side % patch_size for side in size):
            raise ValueError(f"train_sizes must be multiples of patch_size={patch_size}, got {given}")
        if out.count(size) > 1:
            raise ValueError(f"train_sizes has {given} more than once")
    return out


class SizeSampler(EpochSampler):
    """Yields whole batches, lists of ``(epoch, index, size)`` with one size each, for a loader without batch size.

    In an epoch all sizes have the same number of batches (up to one), in an order that is drawn anew for each epoch. A
    batch has as many images as make ``patches`` patches, rounded, and at least one. Only the last batch may have fewer.
    Every epoch has the same number of batches.

    Args:
        dataset: The dataset to draw from; only its length is used.
        sizes: (height, width) of images, in pixels.
        patch_size: Side of a patch in pixels.
        patches: Patches in a batch, on each device.
        drop_last: Leave out samples that cannot be shared out evenly, and an incomplete last batch unless it is the
            only one.
        seed: Seed of the shuffle and of the sizes, the same on all ranks.
        num_replicas: Number of processes that share the epoch.
        rank: The rank of this process among them.
    """

    def __init__(
        self,
        dataset: Dataset,
        sizes: Sequence[Size],
        patch_size: int,
        patches: int,
        drop_last: bool = False,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        # samples that cannot be shared out evenly are left out, unless a process would then have none
        uneven = drop_last and len(dataset) >= num_replicas
        super().__init__(dataset, seed=seed, num_replicas=num_replicas, rank=rank, drop_last=uneven)
        self.batches: list[tuple[Size, int]] = []
        left = self.num_samples  # the same on every rank
        while left:
            size = sizes[len(self.batches) % len(sizes)]
            count = min(left, images_in_batch(size, patch_size, patches))
            self.batches.append((size, count))
            left -= count
        size, count = self.batches[-1]
        self.complete = len(self.batches) - (count < images_in_batch(size, patch_size, patches))
        if drop_last and self.complete:
            del self.batches[self.complete :]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, start, self.start = self.epoch, self.start, 0
        indices = list(DistributedSampler.__iter__(self))
        # three numbers, which no other seed for an epoch has
        order = np.random.default_rng((self.seed, epoch, 1)).permutation(self.complete).tolist()
        position = 0
        for step, batch in enumerate([*order, *range(self.complete, len(self.batches))]):
            size, count = self.batches[batch]
            if step >= start:
                yield [(epoch, index, size) for index in indices[position : position + count]]
            position += count


def images_in_batch(size: Size, patch_size: int, patches: int) -> int:
    """Images of a size that have `patches` patches together, rounded, and at least one."""
    return max(1, round(patches / patches_of(size, patch_size)))


def patches_of(size: Size, patch_size: int) -> int:
    """Patches of an image, with the ones that it fills in part."""
    return -(-size[0] // patch_size) * -(-size[1] // patch_size)


class BatchDataset(Dataset):
    """A dataset by batches, for a :class:`SizeSampler`: a key is a list of keys, an item the batch of their samples."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, keys: list[Key]) -> list[Tensor]:
        return default_collate([self.dataset[key] for key in keys])
