"""Randomness of the input pipeline as a pure function of (seed, epoch, sample index).

Random generators that live in the loader's worker processes make a run depend on how many workers there are, repeat
themselves between workers or epochs, and cannot be restored on resume. Here nothing random lives in a worker:
:class:`EpochSampler` sends the epoch along with every index, and :func:`sample_seed` turns the two into the seed of
that sample. Whatever worker, rank or machine draws it, it comes out the same, and it comes out new in every epoch.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, Dataset, DistributedSampler


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """Seed in [0, 2^32) for one sample in one epoch; all three arguments must be non-negative."""
    # SeedSequence mixes: neighbouring indices or epochs get unrelated seeds, which seed + index would not give.
    return int(np.random.SeedSequence((seed, epoch, index)).generate_state(1)[0])


@contextmanager
def seeded_rng(seed: int) -> Iterator[None]:
    """Seed the global CPU generators of ``random``, numpy and torch inside the block; restore them afterwards."""
    with isolate_rng(include_cuda=False):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the transforms of timm and torchvision draw from the global generators
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed CUDA as well, unrestored
        yield


class EpochSampler(DistributedSampler):
    """Shuffles like ``DistributedSampler`` and yields ``(epoch, index)`` pairs instead of indices.

    As a ``DistributedSampler`` it is left in place by Lightning, which replaces any other training sampler under DDP.

    Args:
        dataset: The dataset to draw from; only its length is used.
        seed: Seed of the shuffle, the same on all ranks.
        num_replicas: Number of processes that share the epoch.
        rank: The rank of this process among them.
        shuffle: Draw a new order each epoch.
        current_epoch: Called whenever an epoch begins, returns its number, or None where none is known; then the value
            last given to :meth:`set_epoch` counts (0 at first).
    """

    def __init__(
        self,
        dataset: Dataset,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        current_epoch: Callable[[], int | None] | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)
        self.current_epoch = current_epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        # set_epoch alone does not do: a loader with workers asks for its first indices when Lightning creates its
        # iterator, and after a resume that is before set_epoch (Lightning issue 21938).
        epoch = self.current_epoch() if self.current_epoch is not None else None
        if epoch is not None:
            self.set_epoch(epoch)
        epoch = self.epoch
        return ((epoch, index) for index in super().__iter__())


class StreamLoader(DataLoader):
    """Loads a dataset that is a stream, for which there are no samplers, and tells it the epoch when one begins.

    Args:
        current_epoch: As in :class:`EpochSampler`.
        **kwargs: The arguments of ``DataLoader``; the dataset must have ``set_epoch``.
    """

    def __init__(self, *, current_epoch: Callable[[], int | None], **kwargs) -> None:
        super().__init__(**kwargs)
        self.current_epoch = current_epoch

    def __iter__(self) -> Iterator:
        self.dataset.set_epoch(self.current_epoch() or 0)
        return super().__iter__()
