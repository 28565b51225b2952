"""Where the patches of an image lie between two layers: a ring of rows of the patch grid, in memory or in a file.

The output of a layer goes into the same ring as its input, `margin` rows earlier. With a margin of one row more than a
band has, the rows that a band is computed from are overwritten no sooner than by the next band; so a band can always be
computed again, and a process that was killed in the middle of it has lost nothing but that band.

Shapes: n rows, W' columns of the patch grid, C width.
"""

import math
import os
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..utils.files import open_own

__all__ = ["FileRows", "RamRows", "Ring", "Rows", "write_all"]


class Rows(Protocol):
    """Rows of numbers of one type, by position."""

    def read(self, start: int, count: int) -> Tensor:
        """Rows (count, numbers), which the caller may not change."""

    def write(self, start: int, rows: Tensor) -> None:
        """Put rows (count, numbers) at `start`."""

    def sync(self) -> None:
        """Return when what was written would survive a power cut."""

    def close(self) -> None: ...


class RamRows:
    """Rows in memory."""

    def __init__(self, count: int, numbers: int, dtype: torch.dtype) -> None:
        self.rows = torch.empty(count, numbers, dtype=dtype)

    def read(self, start: int, count: int) -> Tensor:
        return self.rows[start : start + count]

    def write(self, start: int, rows: Tensor) -> None:
        self.rows[start : start + len(rows)].copy_(rows)

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


class FileRows:
    """Rows in a file, which has its full size from the start, so that a disk is full now or never.

    NOTE: read and written by position and not mapped into memory: mapped pages count as the process's own, and a disk
    that is full after all would kill it.
    """

    def __init__(
        self, path: Path, count: int, numbers: int, dtype: torch.dtype, offset: int = 0, resume: bool = False
    ) -> None:
        """
        Args:
            path: The file. Unless it is to go on, a new one takes its place.
            count, numbers, dtype: What it holds.
            offset: Bytes before the first row, which are left alone.
            resume: Go on with what the file holds.

        Raises:
            ValueError: It is to go on with a file of another size.
            OSError: The file cannot be made, or there is no room for it.
        """
        self.path, self.numbers, self.dtype, self.offset = path, numbers, dtype, offset
        self.row_bytes = numbers * dtype.itemsize
        size = offset + count * self.row_bytes
        self.file = open_own(path, resume)
        found = os.fstat(self.file.fileno()).st_size
        if found != size and resume:
            self.file.close()
            raise ValueError(
                f"{path} has {found:,} bytes where the run that was stopped had {size:,}: something else has changed "
                "it; remove the store to begin anew"
            )
        if found != size:
            try:
                reserve(self.file.fileno(), size)
            except OSError as error:
                self.file.close()
                path.unlink()
                raise OSError(f"there is no room for {path}, {size:,} bytes: {error.strerror}") from error

    def read(self, start: int, count: int) -> Tensor:
        rows = torch.empty(count, self.numbers, dtype=self.dtype)
        left = memoryview(rows.view(torch.uint8).numpy()).cast("B")
        self.file.seek(self.offset + start * self.row_bytes)
        while len(left):
            got = self.file.readinto(left)
            if not got:
                raise OSError(f"{self.path} ends too early: something else has changed it")
            left = left[got:]
        return rows

    def write(self, start: int, rows: Tensor) -> None:
        rows = rows.to("cpu", self.dtype).contiguous()
        self.file.seek(self.offset + start * self.row_bytes)
        try:
            write_all(self.file, memoryview(rows.view(torch.uint8).numpy()).cast("B"))
        except OSError as error:
            raise OSError(f"cannot write {self.path}: {error.strerror}") from error

    def sync(self) -> None:
        try:
            os.fsync(self.file.fileno())
        except OSError as error:  # a disk may be full only now
            raise OSError(f"cannot write {self.path}: {error.strerror}") from error

    def close(self) -> None:
        self.file.close()


def write_all(file, data: memoryview) -> None:
    """Write to an unbuffered file, which may take less at a time than it is given."""
    while len(data):
        data = data[file.write(data) :]


def reserve(descriptor: int, size: int) -> None:
    """Give a file its size and, where the system can, the room for it."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    os.truncate(descriptor, size)


class Ring:
    """The patch grid of one layer after the other, in the same rows.

    Attributes:
        sweep: Which layer's output is being written; that of the one before is read.
    """

    def __init__(self, rows: Rows, height: int, columns: int, margin: int) -> None:
        """
        Args:
            rows: `height + margin` rows of `columns` patches.
            height: Rows of the patch grid.
            columns: W'.
            margin: Rows that are free.
        """
        self.rows, self.height, self.columns, self.margin = rows, height, columns, margin
        self.sweep = 0

    def _pieces(self, sweep: int, start: int, count: int) -> list[tuple[int, int]]:
        """Where rows of a layer's output lie: (position, count), two of them where the ring closes."""
        size = self.height + self.margin
        first = (sweep * self.height + start) % size
        head = min(count, size - first)
        return [(first, head), (0, count - head)][: 1 if head == count else 2]

    def read(self, start: int, stop: int) -> Tensor:
        """Patches (1, n W', C) of the rows [start, stop) of the layer before."""
        parts = [self.rows.read(*piece) for piece in self._pieces(self.sweep - 1, start, stop - start)]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        return rows.view(1, (stop - start) * self.columns, -1)

    def write(self, start: int, x: Tensor) -> None:
        """Keep patches (1, n W', C) as the rows from `start` on of this layer."""
        rows = x.reshape(x.shape[1] // self.columns, -1)
        done = 0
        for position, count in self._pieces(self.sweep, start, len(rows)):
            self.rows.write(position, rows[done : done + count])
            done += count


def ring_bytes(height: int, margin: int, columns: int, width: int, dtype: torch.dtype) -> int:
    """What the rows of a `Ring` take."""
    return math.prod((height + margin, columns, width, dtype.itemsize))
