"""The store of an image's patches between two layers: a ring, in memory or in a file.

The output of a layer goes into the same ring as its input, `margin` patches earlier. The margin has as many patches as
a band and the row above it, so only the next band overwrites the patches that a band is computed from. A band can
therefore always be computed again, and a process that is killed loses only the band in work.

Shapes: n patches, C width.
"""

import math
import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..utils.errors import UserError
from ..utils.files import open_own

__all__ = ["FileRows", "RamRows", "Ring", "disk_tensor", "write_all"]


class RamRows:
    """Rows of numbers in memory, on a GPU or for one; methods as in `FileRows`.

    Nobody waits for a copy between a GPU and these rows: its stream has all of them in their order.
    """

    def __init__(
        self, count: int, numbers: int, dtype: torch.dtype, gpu: torch.device | None = None, on_gpu: bool = False
    ) -> None:
        """
        Args:
            count, numbers, dtype: As in `FileRows`.
            gpu: The GPU of the model, if it is on one.
            on_gpu: Keep the rows there; else their pages are locked, as copies that nobody waits for take it.

        Raises:
            UserError: So many bytes cannot be locked.
        """
        self.rows = torch.empty(count, numbers, dtype=dtype, device=gpu if on_gpu else "cpu")
        self.locked_for = None if on_gpu else gpu
        if self.locked_for is not None:  # not by `pin_memory`, which takes up to twice the bytes
            size = self.rows.nbytes
            if int(torch.cuda.cudart().cudaHostRegister(self.rows.data_ptr(), size, 0)):
                raise UserError(f"the system locks no {size:,} bytes of memory for copies to the GPU: give a store")

    def read(self, start: int, count: int) -> Tensor:
        rows = self.rows[start : start + count]
        # only the stream of the GPU knows when copies into locked memory are done: nothing on the CPU reads it
        return rows if self.locked_for is None else rows.to(self.locked_for, non_blocking=True)

    def write(self, start: int, rows: Tensor) -> None:
        self.rows[start : start + len(rows)].copy_(rows, non_blocking=True)

    def sync(self) -> None:
        pass

    def close(self) -> None:
        if self.locked_for is not None:
            torch.cuda.synchronize(self.locked_for)
            torch.cuda.cudart().cudaHostUnregister(self.rows.data_ptr())


class FileRows:
    """Rows of numbers in a file. It has its full size from the start, so that a full disk is noticed at once.

    NOTE: the file is read and written by position and not mapped into memory: mapped pages count as memory of the
    process, and a full disk would kill it.
    """

    def __init__(
        self, path: Path, count: int, numbers: int, dtype: torch.dtype, offset: int = 0, resume: bool = False
    ) -> None:
        """
        Args:
            path: The file. Without `resume`, a new one takes its place.
            count: The number of rows.
            numbers: Numbers in a row.
            dtype: Type of the numbers.
            offset: Bytes before the first row, which stay as they are.
            resume: Continue with the content of the file.

        Raises:
            ValueError: The file to resume has another size.
            OSError: The file cannot be made, or the disk has no room for it.
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
                "it; remove the store to start again"
            )
        if found != size:
            try:
                reserve(self.file.fileno(), size)
            except OSError as error:
                self.file.close()
                path.unlink()
                raise OSError(f"there is no room for {path}, {size:,} bytes: {error.strerror}") from error

    def read(self, start: int, count: int) -> Tensor:
        """Rows (count, numbers), which the caller must not change."""
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
        """Put rows (count, numbers) at `start`."""
        rows = rows.to("cpu", self.dtype).contiguous()
        self.file.seek(self.offset + start * self.row_bytes)
        try:
            write_all(self.file, memoryview(rows.view(torch.uint8).numpy()).cast("B"))
        except OSError as error:
            raise OSError(f"cannot write {self.path}: {error.strerror}") from error

    def sync(self) -> None:
        """Return when the rows would survive a loss of power."""
        try:
            os.fsync(self.file.fileno())
        except OSError as error:  # a disk may be full only now
            raise OSError(f"cannot write {self.path}: {error.strerror}") from error

    def close(self) -> None:
        self.file.close()


def write_all(file, data: memoryview) -> None:
    """Write all of `data` to an unbuffered file, whose `write` may take only a part at a time."""
    while len(data):
        data = data[file.write(data) :]


def reserve(descriptor: int, size: int) -> None:
    """Give a file its size and, if the system can, allocate its blocks on the disk."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    os.truncate(descriptor, size)


def disk_tensor(folder: Path, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros whose memory is a file, which the system reads and writes page by page. It vanishes with the tensor.

    The pages count as memory of the process as long as the system needs it for nothing else.

    Raises:
        OSError: There is no such folder, or the disk has no room.
    """
    size = math.prod(shape) * dtype.itemsize
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            reserve(file.fileno(), size)
            pages = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise OSError(f"there is no room for {size:,} bytes in {folder}: {error.strerror}") from error
    return torch.frombuffer(pages, dtype=dtype).view(*shape)


class Ring:
    """The patches of one layer after the other, in the same rows.

    Attributes:
        sweep: The number of the layer whose output is written; the output of the layer before is read.
    """

    def __init__(self, rows: RamRows | FileRows, count: int, margin: int) -> None:
        """
        Args:
            rows: `count + margin` rows of C numbers.
            count: Patches of a layer.
            margin: Free rows.
        """
        self.rows, self.count, self.margin = rows, count, margin
        self.sweep = 0

    def _pieces(self, sweep: int, start: int, count: int) -> list[tuple[int, int]]:
        """The places (position, count) of patches of a layer's output; two if they lie across the end of the ring."""
        size = self.count + self.margin
        first = (sweep * self.count + start) % size
        head = min(count, size - first)
        return [(first, head), (0, count - head)][: 1 if head == count else 2]

    def read(self, start: int, stop: int) -> Tensor:
        """The patches [start, stop) of the layer before, (1, n, C)."""
        parts = [self.rows.read(*piece) for piece in self._pieces(self.sweep - 1, start, stop - start)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]

    def write(self, start: int, x: Tensor) -> None:
        """Keep patches (1, n, C) as those of this layer that begin at `start`."""
        done = 0
        for position, count in self._pieces(self.sweep, start, x.shape[1]):
            self.rows.write(position, x[0, done : done + count])
            done += count
