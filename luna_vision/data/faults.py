"""What becomes of samples that cannot be read: an error, or the next readable sample in their place."""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from luna_vision.utils.errors import UserError

ON_ERROR = ("raise", "skip")

_logger = logging.getLogger(__name__)
Sample = TypeVar("Sample")


class SampleError(UserError):
    """A sample cannot be used: its image does not decode, or its label is not one of the declared classes."""

    def __init__(self, message: str) -> None:
        # DataLoader re-raises a worker's exception with the worker's whole traceback as the message, whose last line
        # is "module.SampleError: what happened": keep what happened.
        super().__init__(message.rstrip().rsplit("\n", 1)[-1].rpartition(f"{__name__}.SampleError: ")[2])


class SkipFaults:
    """Puts the next readable sample in the place of one that cannot be read.

    Sample i is replaced by the first readable one of i + 1, i + 2, ... (the first sample follows the last). That is a
    function of i and the data alone, so batches keep their shape, and neither workers nor a resume change them. Each
    fault is logged once: what is broken is marked in shared memory, for all workers and epochs of a process. Others
    learn of it by :meth:`known`.

    Args:
        length: Number of samples.
        max_error_share: Share of the samples that may be broken.
        name: Names the data in the log and in errors, for instance "train".

    Raises:
        SampleError: On :meth:`read` and :meth:`known`: more than that share is broken.
    """

    def __init__(self, length: int, max_error_share: float, name: str) -> None:
        self.length, self.max_error_share, self.name = length, max_error_share, name
        self.broken = torch.zeros(length, dtype=torch.bool).share_memory_()

    def read(self, read: Callable[[int], Sample], index: int) -> Sample:
        """``read(index)``, or that of the next index for which ``read`` does not raise a SampleError."""
        for _ in range(self.length):
            if not self.broken[index]:
                try:
                    return read(index)
                except SampleError as error:
                    self._report(read, index, error)
            index = (index + 1) % self.length
        raise SampleError(f"{self.name}: not one of {self.length} samples can be read")

    def replacement(self, index: int) -> int:
        """The index that is read in the place of ``index``, as far as faults have been found."""
        while self.broken[index] and not self.broken.all():
            index = (index + 1) % self.length
        return index

    def known(self) -> list[int]:
        """The broken samples that any process has found. To be called by all of them at once, which then all know.

        Raises:
            SampleError: Together they have found too many.
        """
        known = self.broken.nonzero().flatten().tolist()
        if dist.is_initialized():
            found = [None] * dist.get_world_size()
            dist.all_gather_object(found, known)
            known = sorted(set().union(*found))
            self.broken[known] = True
        if len(known) > self.max_error_share * self.length:
            raise SampleError(f"{self._too_many(len(known))}, of all processes together")
        return known

    def _too_many(self, count: int) -> str:
        share = f"more than max_error_share={self.max_error_share:g} allows"
        return f"{self.name}: {count} of {self.length} samples cannot be read, {share}"

    def _report(self, read: Callable[[int], Sample], index: int, error: SampleError) -> None:
        self.broken[index] = True
        count = int(self.broken.sum())
        if count <= self.max_error_share * self.length:
            _logger.warning(f"{error}; the next readable sample takes its place ({count} of {self.length} so far)")
            return
        reasons = []
        for first in self.broken.nonzero()[:3].flatten().tolist():  # of all workers, so they are read once more
            try:
                read(first)
            except SampleError as known:
                reasons.append(str(known).removeprefix(f"{self.name} "))
        raise SampleError(f"{self._too_many(count)}; the first: {'; '.join(reasons)}") from error


def check_fault_policy(on_error: str, max_error_share: float) -> None:
    """Raise a ValueError unless both make sense."""
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error must be one of {', '.join(ON_ERROR)}, got {on_error!r}")
    if not 0 <= max_error_share < 1:
        raise ValueError(f"max_error_share must be in [0, 1), got {max_error_share}")
