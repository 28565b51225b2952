"""Randomness of the input pipeline as a pure function of (seed, epoch, sample index).

Random generators in the loader's worker processes make a run depend on the number of workers, repeat themselves
between workers or epochs, and cannot be restored on resume. Here no worker has a random state: :class:`EpochSampler`
sends the epoch along with every index, and :func:`sample_seed` turns the two into the seed of that sample. So a sample
is the same in any worker, rank or machine, and new in every epoch.
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
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset


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


def repeat_rare(matrix: np.ndarray, threshold: float) -> np.ndarray:
    """How often each image comes in an epoch, so that images of rare classes come more often.

    An image of a class that a share f of all images has comes max(1, sqrt(threshold / f)) times; that of the rarest of
    its classes counts, rounded up or down at random, always alike.

    Source: Gupta et al., "LVIS: A Dataset for Large Vocabulary Instance Segmentation", CVPR 2019, appendix B.2.

    Args:
        matrix: (n, K), 1 for the classes that an image has.
        threshold: A share of the images.

    Returns:
        int64 (n,)
    """
    share = (matrix > 0).mean(0)
    factor = np.sqrt(threshold / np.maximum(share, 1 / len(matrix))).clip(min=1)
    repeats = np.where(matrix > 0, factor, 1).max(1, initial=1)
    return np.floor(repeats + np.random.default_rng(0).random(len(repeats))).astype(np.int64)


def repeated(source: Dataset, matrix: np.ndarray, threshold: float) -> Subset:
    """A source in which images of rare classes come more often, see `repeat_rare`.

    Args:
        source: All images, or a part of them.
        matrix: (n, K) of all images, 1 for the classes that an image has.
        threshold: A share of the images.
    """
    whole, kept = (source.dataset, source.indices) if isinstance(source, Subset) else (source, range(len(source)))
    kept = np.asarray(kept)
    return Subset(whole, np.repeat(kept, repeat_rare(matrix[kept], threshold)).tolist())


class EpochSampler(DistributedSampler):
    """Shuffles like ``DistributedSampler`` and yields ``(epoch, index)`` pairs instead of indices.

    Lightning leaves a ``DistributedSampler`` in place; under DDP it replaces any other training sampler.

    Args:
        dataset: The dataset to draw from; only its length is used.
        seed: Seed of the shuffle, the same on all ranks.
        num_replicas: Number of processes that share the epoch.
        rank: The rank of this process among them.
        drop_last: Where the samples cannot be shared out evenly, leave out the last few; else the first few come twice.
    """

    def __init__(
        self,
        dataset: Dataset,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, seed=seed, drop_last=drop_last)
        self.start = 0

    def begin(self, epoch: int, start: int = 0) -> None:
        """Set the next iteration, and only that, to ``epoch`` without its first ``start`` samples.

        A sampler of whole batches counts batches.
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
    order = copy.copy(sampler)  # the state of the sampler itself stays as it is
    if loader.batch_size is None:  # it yields whole batches
        order.begin(epoch, batch)
        return [index for _, index, _ in next(iter(order), [])]
    order.begin(epoch, batch * loader.batch_size)
    return [index for _, index in islice(order, loader.batch_size)]


class EvalSampler(DistributedSampler):
    """Every sample once, on one of the processes; with ``DistributedSampler`` some would count twice in a score.

    Lightning leaves a ``DistributedSampler`` in place. All processes must have equally many batches, since a process
    that communicates within the model would wait for ever for one without a batch. So take :attr:`batch_size`.

    Args:
        dataset: The dataset; only its length is used.
        batch_size: The largest batch.
        num_replicas: Number of processes that share the samples.
        rank: The rank of this process among them.

    Attributes:
        batch_size: The largest size, up to the given one, with which all processes have equally many batches. Where
            there is none (it is 1, or there are fewer samples than processes), the given one; then the first few
            samples come twice.
    """

    def __init__(self, dataset: Dataset, batch_size: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)
        least, rest = divmod(len(dataset), num_replicas)
        self.repeats, self.batch_size = False, batch_size
        if rest:  # some processes have one sample more than others: it must not begin a batch
            fitting = (size for size in range(batch_size, 1, -1) if least % size)
            self.batch_size = next(fitting, batch_size)
            self.repeats = least % self.batch_size == 0

    def __iter__(self) -> Iterator[int]:
        return super().__iter__() if self.repeats else iter(range(self.rank, len(self.dataset), self.num_replicas))

    def __len__(self) -> int:
        return super().__len__() if self.repeats else len(range(self.rank, len(self.dataset), self.num_replicas))


class EpochLoader(DataLoader):
    """A training loader that continues in the middle of an epoch, with exactly the batches that are left.

    Lightning's own ``set_epoch`` is too late: a loader with workers asks for its first indices when its iterator is
    created, and after a resume that is before ``set_epoch``. A sampler skips the batches that are done without loading
    them. A stream knows no indices, so it is read up to there once more.

    Args:
        next_batch: Is called when an iteration begins, and returns the epoch and the number of its batches that are
            done, as :func:`next_batch` does. With None, ``set_epoch`` of the sampler or the dataset decides.
        **kwargs: The arguments of ``DataLoader``. Either the sampler is an :class:`EpochSampler`, or the dataset is a
            stream with ``set_epoch``.
    """

    def __init__(self, *, next_batch: Callable[[], tuple[int, int] | None], **kwargs) -> None:
        # Without its own generator, a loader draws the seeds of its workers from the global one at every epoch, and
        # the random numbers of the model would depend on that.
        kwargs.setdefault("generator", torch.Generator())
        super().__init__(**kwargs)
        self.next_batch = next_batch

    def __iter__(self) -> Iterator:
        # A generator asks at the first batch. Lightning makes its iterator earlier, sometimes before it reads a
        # checkpoint, to learn the length of a schedule.
        at, done = self.next_batch(), 0
        if at is not None:
            epoch, done = at
            if isinstance(self.sampler, EpochSampler):
                self.sampler.begin(epoch, done * (self.batch_size or 1))  # without a batch size, it yields batches
                done = 0
            elif hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(epoch)
        yield from islice(super().__iter__(), done, None)

    # These tell Lightning that the loader can continue within an epoch. The trainer itself knows where.

    def state_dict(self) -> dict[str, int]:
        epoch, done = self.next_batch() or (0, 0)
        return {"epoch": epoch, "batches": done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


def next_batch(trainer: Trainer | None) -> tuple[int, int] | None:
    """The epoch of the next training batch, and the number of batches before it in that epoch. None without a trainer.

    It is right in training, when a checkpoint is written, and after one was loaded.
    """
    if trainer is None:
        return None
    epochs, batches = trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_loop.batch_progress
    # after the last batch it is the next epoch, even if this one does not count as processed yet; and likewise after an
    # epoch that max_steps has cut short
    ended = batches.is_last_batch or epochs.processed == epochs.ready
    return (epochs.ready, 0) if ended else (epochs.processed, batches.current.ready)
