"""Samples that cannot be read: an error, or the next readable sample in their place. Faults of label files, counted."""

import logging
from collections import defaultdict
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from luna_vision.images.decode import SampleError
from luna_vision.images.find import listed
from luna_vision.utils.checks import check_option
from luna_vision.utils.text import printable

_logger = logging.getLogger(__name__)
Sample = TypeVar("Sample")


class SkipFaults:
    """Puts the next readable sample in the place of one that cannot be read.

    Sample i is replaced by the first readable one of i + 1, i + 2, ... (the first sample follows the last). This
    depends on i and the data alone, so batches keep their shape, and neither workers nor a resume change them. Each
    fault is logged once: broken samples are marked in memory that all workers of a process share. Other processes learn
    of them by :meth:`known`.

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
        """The index that is read in the place of ``index``, by the faults found so far."""
        while self.broken[index] and not self.broken.all():
            index = (index + 1) % self.length
        return index

    def known(self) -> list[int]:
        """The broken samples that any process has found. All processes call this at once, and then know the same.

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
            so_far = f"the next readable sample takes its place ({count} of {self.length} so far)"
            _logger.warning(f"{printable(str(error))}; {so_far}")
            return
        reasons = []
        for first in self.broken.nonzero()[:3].flatten().tolist():  # other workers may have found them: read them again
            try:
                read(first)
            except SampleError as known:
                reasons.append(str(known).removeprefix(f"{self.name} "))
        raise SampleError(f"{self._too_many(count)}; the first: {'; '.join(reasons)}") from error


class LabelFaults:
    """Faults of the labels of a split: all are collected, then one error or one warning counts and names them.

    A reader leaves out what is faulty, such as a box without area, and says so by :meth:`add`.

    Args:
        name: Names the labels in the error, for instance "train".
        max_error_share: Largest share of the entries that may be left out; None is an error at the first fault.
    """

    def __init__(self, name: str, max_error_share: float | None) -> None:
        self.name, self.max_error_share = name, max_error_share
        self.found: dict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, where: str) -> None:
        """Note a fault.

        Args:
            kind: What is wrong, in words that are the same for all such faults.
            where: The file, and the entry in it.
        """
        self.found[kind].append(where)

    @property
    def count(self) -> int:
        """How many were found."""
        return sum(map(len, self.found.values()))

    def settle(self, sound: int, hint: str = "") -> None:
        """Say what was found beside this number of sound entries, and how to mend it.

        Raises:
            SampleError: There are faults, more than may be left out.
        """
        if not self.found:
            return
        kinds = (f"{len(at)} x {kind} ({listed(at, 3)})" for kind, at in self.found.items())
        text = printable(f"faults in the labels of {self.name}: {'; '.join(kinds)}{hint}")
        entries = sound + self.count
        if self.max_error_share is None:
            raise SampleError(f"{text}. on_error: skip (--data.on_error skip) leaves them out")
        if self.count > self.max_error_share * entries:
            share = f"{self.max_error_share:g} of {entries} entries"
            raise SampleError(f"{text}. They are more than max_error_share (--data.max_error_share), {share}")
        _logger.warning(f"{text}. They are left out")


def check_fault_policy(on_error: str, max_error_share: float) -> None:
    """Raise a ValueError unless the policy is known and the share is in [0, 1)."""
    check_option("on_error", on_error, ("raise", "skip"))
    if not 0 <= max_error_share < 1:
        raise ValueError(f"max_error_share must be in [0, 1), got {max_error_share}")
