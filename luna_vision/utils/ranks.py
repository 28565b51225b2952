"""The processes that torchrun starts for a command: each does a share of the files, and the first joins the results."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

__all__ = ["ALONE", "Ranks", "is_first", "joined_ranks", "world_size"]

FOREVER = timedelta(days=365)  # torchrun ends those who wait for a process that failed


class Ranks(NamedTuple):
    """All processes of a command, and the number of this one among them."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes and says what there is to say once."""
        return self.rank == 0

    def share(self, total: int) -> range:
        """The positions of this process, one after the other, of a list of so many."""
        return range(total * self.rank // self.count, total * (self.rank + 1) // self.count)

    def gather(self, value: Any = None) -> list[Any]:
        """What all processes give, in their order. Each waits here for all others."""
        if self.count == 1:
            return [value]
        values = [None] * self.count
        dist.all_gather_object(values, value)
        return values


ALONE = Ranks()


def world_size() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def is_first() -> bool:
    """Whether this is the first process of torchrun, or the only one."""
    return world_size() == 1 or os.environ["RANK"] == "0"


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The processes of torchrun, joined for the block; `ALONE` without torchrun."""
    if world_size() == 1:
        yield ALONE
        return
    dist.init_process_group("gloo", timeout=FOREVER)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
