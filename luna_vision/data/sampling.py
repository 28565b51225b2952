"""Randomness of the input pipeline as a pure function of (seed, epoch, sample index).

Random generators that live in the loader's worker processes make a run depend on how many workers there are, repeat
themselves between workers or epochs, and cannot be restored on resume. Here nothing random lives in a worker:
:class:`EpochSampler` sends the epoch along with every index, and :func:`sample_seed` turns the two into the seed of
that sample. Whatever worker, rank or machine draws it, it comes out the same, and it comes out new in every epoch.
"""

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch
from lightning.pytorch import Trainer
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
        drop_last: Where the samples cannot be shared out evenly, leave the last few of the epoch's order out; else the
            first few come twice.
    """

    def __init__(
        self,
        dataset: Dataset,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed, drop_last=drop_last)
        self.start = 0

    def begin(self, epoch: int, start: int = 0) -> None:
        """Say what the next iteration, and only that, covers: ``epoch`` without its first ``start`` samples.

        A sampler of whole batches counts those.
        """
        self.set_epoch(epoch)
        self.start = start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, start, self.start = self.epoch, self.start, 0
        return ((epoch, index) for index in islice(super().__iter__(), start, None))


def batch_indices(loader: DataLoader, epoch: int, batch: int) -> list[int] | None:
    """Dataset indices of a batch of this process in an epoch; None where no :class:`EpochSampler` draws them."""
    if not isinstance(sampler := getattr(loader, "sampler", None), EpochSampler):
        return None
    order = copy.copy(sampler)  # what the sampler itself is about to do stays as it is
    if loader.batch_size is None:  # it yields whole batches
        order.begin(epoch, batch)
        return [index for _, index, _ in next(iter(order), [])]
    order.begin(epoch, batch * loader.batch_size)
    return [index for _, index in islice(order, loader.batch_size)]


class EvalSampler(DistributedSampler):
    """Every sample once, on one of the processes; ``DistributedSampler`` would have some count twice in a score.

    As a ``DistributedSampler`` it is left in place by Lightning. Processes of which some have a batch more than others
    would wait for each other for ever where the model itself communicates, so batches are to be made of
    :attr:`batch_size`.

    Args:
        dataset: The dataset; only its length is used.
        batch_size: The largest batch.
        num_replicas: Number of processes that share the samples.
        rank: The rank of this process among them.

    Attributes:
        batch_size: The largest up to the given one with which all processes have equally many batches. Where there is
            none (it is 1, or there are fewer samples than processes) it is the given one, and the first few samples
            come twice after all.
    """

    def __init__(self, dataset: Dataset, batch_size: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)
        least, rest = divmod(len(dataset), num_replicas)
        self.repeats, self.batch_size = False, batch_size
        if rest:  # some have one more than the others: it must not begin a batch
            fitting = (size for size in range(batch_size, 1, -1) if least % size)
            self.batch_size = next(fitting, batch_size)
            self.repeats = least % self.batch_size == 0

    def __iter__(self) -> Iterator[int]:
        return super().__iter__() if self.repeats else iter(range(self.rank, len(self.dataset), self.num_replicas))

    def __len__(self) -> int:
        return super().__len__() if self.repeats else len(range(self.rank, len(self.dataset), self.num_replicas))


class EpochLoader(DataLoader):
    """A training loader that goes on in the middle of an epoch, with the very batches that were still to come.

    Lightning's own ``set_epoch`` does not do: a loader with workers asks for its first indices when its iterator is
    created, and after a resume that is before ``set_epoch`` (Lightning issue 21938).

    A sampler skips what is done without loading it; a dataset that is a stream, which knows no indices, is read up to
    there once more.

    Args:
        next_batch: Called whenever an iteration begins, returns the epoch and how many of its batches are done, as
            :func:`next_batch` does; None leaves it to ``set_epoch`` of the sampler or the dataset.
        **kwargs: The arguments of ``DataLoader``. The sampler is an :class:`EpochSampler`, or the dataset a stream with
            ``set_epoch``.
    """

    def __init__(self, *, next_batch: Callable[[], tuple[int, int] | None], **kwargs) -> None:
        # a generator of its own, as the seeds of the workers would be drawn from the global one at every epoch, and
        # what the model draws would depend on how often that was
        kwargs.setdefault("generator", torch.Generator())
        super().__init__(**kwargs)
        self.next_batch = next_batch

    def __iter__(self) -> Iterator:
        # A generator, so that it asks at the first batch: Lightning makes its iterator before it reads a checkpoint
        # where the length of a schedule is asked for.
        at, done = self.next_batch(), 0
        if at is not None:
            epoch, done = at
            if isinstance(self.sampler, EpochSampler):
                self.sampler.begin(epoch, done * (self.batch_size or 1))  # without a batch size, it yields batches
                done = 0
            elif hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(epoch)
        yield from islice(super().__iter__(), done, None)

    # By having these a loader tells Lightning that it can go on within an epoch. Where, the trainer knows itself.

    def state_dict(self) -> dict[str, int]:
        epoch, done = self.next_batch() or (0, 0)
        return {"epoch": epoch, "batches": done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


def next_batch(trainer: Trainer | None) -> tuple[int, int] | None:
    """The epoch that the next training batch belongs to, and how many of its batches come before that one.

    Right at any time: in training, when a checkpoint is written, and when one has been loaded. None without a trainer.
    """
    if trainer is None:
        return None
    epochs, batches = trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_loop.batch_progress
    # after the last batch it is the next epoch, whether or not this one has been counted as processed yet; and so it is
    # once one has been counted that max_steps has cut short
    ended = batches.is_last_batch or epochs.processed == epochs.ready
    return (epochs.ready, 0) if ended else (epochs.processed, batches.current.ready)
