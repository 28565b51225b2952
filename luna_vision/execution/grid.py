"""The patch features of an image as a file: a .npy or a .zarr array (H', W', C), written row by row.

The file is called NAME.partial until it is complete.
"""

import importlib.util
import io
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..utils.files import remove, remove_own
from .store import FileRows, write_all

__all__ = ["GRID_SUFFIXES", "Grid"]

GRID_SUFFIXES = (".npy", ".zarr")
ZARR_FILES = ("zarr.json", ".zarray", ".zgroup")


class Grid:
    """A file of patch features that is being written, in float32, or in float64 for a model of that type."""

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype, band: int, resume: bool) -> None:
        """
        Args:
            path: The file.
            shape: H', W', C.
            dtype: Type of the model.
            band: Rows that are written together, and rows of a zarr array's chunks.
            resume: Continue with the partial file.

        Raises:
            ValueError: Another suffix, zarr is not installed, or the partial file has another size.
            OSError: The file cannot be written, the disk has no room for it, the partial file does not exist, or the
                path is a folder that is not a zarr array.
        """
        check_grid(path)
        self.path, self.partial = path, _partial(path)
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() and not (path.suffix == ".zarr" and any((path / name).is_file() for name in ZARR_FILES)):
            raise OSError(f"{path} is a folder, and not one of zarr: it is not replaced")
        if not resume and path.suffix == ".zarr":
            remove_own(self.partial, r"zarr\.json|c(/\d+){3}")
        elif resume and (not self.partial.exists() or self.partial.is_symlink()):
            raise FileNotFoundError(f"{self.partial} is gone, with the rows that were done: remove the store, too")
        self.array, self.rows = None, None
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
        """Write rows (n, W', C) at `start`."""
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

    @staticmethod
    def is_finished(path: Path) -> bool:
        """Whether a run that has written all rows has also given the file its name."""
        return path.exists() and not _partial(path).exists()

    def discard(self) -> None:
        """Leave nothing of a file that nobody goes on with."""
        self.close()
        remove(self.partial)

    def finish(self) -> None:
        """Give the complete file its name."""
        self.close()
        remove(self.path)
        os.replace(self.partial, self.path)


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


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
