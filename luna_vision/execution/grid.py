"""What becomes of the patches after the final norm: a `Sink` takes them row by row.

`Grid` writes them as a file, a .npy or a .zarr array (H', W', C), which is called NAME.partial until it is complete.
"""

import importlib.util
import io
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..utils.files import remove, remove_own
from .layout import Layout
from .store import FileRows, write_all

__all__ = ["GRID_SUFFIXES", "Grid", "Sink"]

GRID_SUFFIXES = (".npy", ".zarr")
ZARR_FILES = ("zarr.json", ".zarray", ".zgroup")


class Sink(ABC):
    """Takes the patches of an image after the final norm, from top to bottom, and makes something of them.

    A run that is stopped calls `open` of a new sink of the same kind with `resume`.

    Attributes:
        passes: How often it takes all rows.
    """

    passes = 1

    @abstractmethod
    def described(self) -> Any:
        """What its result depends on, as plain data: a run with another one does not resume."""

    def planned_bytes(self, grid_size: tuple[int, int], model: torch.nn.Module) -> int:
        """Bytes that it allocates at most."""
        return 0

    @abstractmethod
    def open(self, layout: Layout, embed_dim: int, like: dict[str, Any], band: int, resume: bool) -> None:
        """Begin.

        Args:
            layout: The patches to come, those of the bands.
            embed_dim: C.
            like: Device and dtype of the model.
            band: Rows that are written together.
            resume: Continue what an earlier run has left.

        Raises:
            OSError: It cannot write, or nothing is left.
        """

    def rewind(self, row: int, turn: int) -> int:
        """Take up what an earlier run left that had written all rows above this one, in this pass from 0: the first row
        to write again."""
        return row

    def next_pass(self) -> None:
        """All rows were written, and come once more."""
        raise NotImplementedError

    @abstractmethod
    def write(self, start: int, x: Tensor) -> None:
        """Take rows (n, W', C) from `start` on, zero where a patch is not valid. Rows without valid patches may be
        left out."""

    @abstractmethod
    def sync(self) -> None:
        """Return when what was written survives."""

    @abstractmethod
    def close(self) -> None:
        """Close files, also after an error."""

    @abstractmethod
    def is_finished(self) -> bool:
        """Whether a run that has written all rows has also finished its result."""

    @abstractmethod
    def discard(self) -> None:
        """Leave nothing of a result that nobody resumes."""

    @abstractmethod
    def finish(self) -> None:
        """Complete the result, after the last row."""


class Grid(Sink):
    """A file of patch features that is being written, in float32, or in float64 for a model of that type."""

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: The file.

        Raises:
            ValueError: Another suffix, or zarr is not installed.
        """
        check_grid(path)
        self.path, self.partial = path, partial_path(path)
        self.array, self.rows = None, None

    def described(self) -> str:
        return os.path.abspath(self.path)

    def open(self, layout: Layout, embed_dim: int, like: dict[str, Any], band: int, resume: bool) -> None:
        """
        Raises:
            ValueError: The partial file has another size.
            OSError: The file cannot be written, the disk has no room for it, the partial file does not exist, or the
                path is a folder that is not a zarr array.
        """
        path, shape = self.path, (layout.height, layout.columns, embed_dim)
        self.dtype = torch.float64 if like["dtype"] == torch.float64 else torch.float32
        path.parent.mkdir(parents=True, exist_ok=True)
        check_replaceable(path)
        if not resume and path.suffix == ".zarr":
            remove_own(self.partial, r"zarr\.json|c(/\d+){3}")
        elif resume:
            check_partial(self.partial)
        name = str(self.dtype).removeprefix("torch.")
        if path.suffix == ".zarr":
            import zarr

            chunks = (min(band, shape[0]), min(shape[1], 512), shape[2])
            kind = {"shape": shape, "chunks": chunks, "dtype": name}
            self.array = zarr.open_array(self.partial, mode="r+" if resume else "w", **({} if resume else kind))
            if self.array.shape != shape:
                raise ValueError(
                    f"{self.partial} has shape {self.array.shape} where the run that was stopped had {shape}: "
                    "something else has changed it; remove the store to start again"
                )
            return
        buffer = io.BytesIO()
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(name)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(buffer, header)
        self.rows = FileRows(self.partial, shape[0], shape[1] * shape[2], self.dtype, buffer.tell(), resume)
        self.rows.file.seek(0)
        try:
            write_all(self.rows.file, buffer.getbuffer())
        except OSError as error:
            self.discard()
            raise OSError(f"cannot write {self.partial}: {error.strerror}") from error

    def write(self, start: int, x: Tensor) -> None:
        x = x.to("cpu", self.dtype)
        if self.rows is not None:
            self.rows.write(start, x.flatten(1))
            return
        try:
            self.array[start : start + len(x)] = x.numpy()
        except OSError as error:
            raise OSError(f"cannot write {self.partial}: {error.strerror or error}") from error

    def sync(self) -> None:
        """Return when the rows would survive a loss of power (.npy) or a kill (.zarr)."""
        if self.rows is not None:
            self.rows.sync()

    def close(self) -> None:
        if self.rows is not None:
            self.rows.close()

    def is_finished(self) -> bool:
        return self.path.exists() and not self.partial.exists()

    def discard(self) -> None:
        self.close()
        remove(self.partial)

    def finish(self) -> None:
        """Give the complete file its name."""
        self.close()
        remove(self.path)
        os.replace(self.partial, self.path)


def partial_path(path: Path) -> Path:
    """The name of a file until it is complete."""
    return path.with_name(f"{path.name}.partial")


def check_replaceable(path: Path) -> None:
    """Raise an OSError if the path is a folder that is not of zarr."""
    if path.is_dir() and not (path.suffix == ".zarr" and any((path / name).is_file() for name in ZARR_FILES)):
        raise OSError(f"{path} is a folder, and not one of zarr: it is not replaced")


def check_partial(partial: Path) -> None:
    """Raise a FileNotFoundError if there is nothing to resume at this path."""
    if not partial.exists() or partial.is_symlink():
        raise FileNotFoundError(f"{partial} is gone, with the rows that were done: remove the store, too")


def check_grid(path: Path) -> None:
    """Raise a ValueError unless the suffix is one of `GRID_SUFFIXES`, and zarr is installed if it is needed."""
    if path.suffix not in GRID_SUFFIXES:
        raise ValueError(f"the patch grid must end in {' or '.join(GRID_SUFFIXES)}, got {path}")
    if path.suffix == ".zarr" and importlib.util.find_spec("zarr") is None:
        raise ValueError("a .zarr grid needs zarr (pip install 'luna-vision[streaming]'); .npy does not")


def check_apart(path: Path, what: str, image: Path | None) -> None:
    """Raise a ValueError if writing to `path` would replace the image, a part of it or a folder around it."""
    if image is None:
        return
    path, image = path.resolve(), image.resolve()
    if path == image or path in image.parents or image in path.parents:
        raise ValueError(f"{what} {path} would be written over the image {image}: give another name")
