"""The patch features of an image as a file: a .npy or a .zarr array (H', W', C), written row by row.

Until it is complete it is called NAME.partial.
"""

import importlib.util
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..utils.files import remove_own
from .store import FileRows, write_all

__all__ = ["GRID_SUFFIXES", "Grid"]

GRID_SUFFIXES = (".npy", ".zarr")
ZARR_FILES = ("zarr.json", ".zarray", ".zgroup")


class Grid:
    """A file of patch features in the making, in float32, or float64 for a model of that type."""

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype, band: int, resume: bool) -> None:
        """
        Args:
            path: The file.
            shape: H', W', C.
            dtype: The model's.
            band: Rows that are written together; those of a zarr array's chunks.
            resume: Go on with the partial file.

        Raises:
            ValueError: Another suffix, zarr is not installed, or the partial file is of another size.
            OSError: It cannot be written, there is no room for it, the partial file is gone, or something else than an
                array would have to be removed.
        """
        check_grid(path)
        self.path, self.partial = path, _partial(path)
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() and not (path.suffix == ".zarr" and any((path / name).is_file() for name in ZARR_FILES)):
            raise OSError(f"{path} is a folder, and not one of zarr: it is not replaced")
        if not resume and path.suffix == ".zarr":
            remove_own(self.partial, r"zarr\.json|c(/\d+){3}")
        elif resume and (not self.partial.exists() or self.partial.is_symlink()):  # a new one would lack those rows
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
                    "something else has changed it; remove the store to begin anew"
                )
            return
        header = npy_header(shape, np.dtype(name))
        self.rows = FileRows(self.partial, shape[0], shape[1] * shape[2], self.dtype, len(header), resume)
        self.rows.file.seek(0)
        try:
            write_all(self.rows.file, memoryview(header))
        except OSError as error:
            self.discard()
            raise OSError(f"cannot write {self.partial}: {error.strerror}") from error

    def write(self, start: int, x: Tensor) -> None:
        """Write rows (n, W', C) from `start` on."""
        x = x.to("cpu", self.dtype)
        if self.rows is not None:
            self.rows.write(start, x.flatten(1))
            return
        try:
            self.array[start : start + len(x)] = x.numpy()
        except OSError as error:
            raise OSError(f"cannot write {self.partial}: {error.strerror or error}") from error

    def sync(self) -> None:
        """Return when what was written would survive a power cut (a .npy file), or a kill (a .zarr folder)."""
        if self.rows is not None:
            self.rows.sync()

    def close(self) -> None:
        if self.rows is not None:
            self.rows.close()

    @staticmethod
    def is_finished(path: Path) -> bool:
        """Whether a run that has written all rows has given the file its name, too."""
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
    """
    Raises:
        ValueError: The suffix is none of `GRID_SUFFIXES`, or the zarr that it takes is not installed.
    """
    if path.suffix not in GRID_SUFFIXES:
        raise ValueError(f"the patch grid must end in {' or '.join(GRID_SUFFIXES)}, got {path}")
    if path.suffix == ".zarr" and importlib.util.find_spec("zarr") is None:
        raise ValueError("a .zarr grid takes zarr (pip install 'luna-vision[streaming]'); .npy does not")


def check_apart(path: Path, what: str, image: Path | None) -> None:
    """
    Raises:
        ValueError: What is written there would replace the file or folder of an image, or a part of it.
    """
    if image is None:
        return
    path, image = path.resolve(), image.resolve()
    if path == image or path in image.parents or image in path.parents:
        raise ValueError(f"{what} {path} would be written over the image {image}: give another name")


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """What a .npy file of that kind begins with."""
    import io

    buffer = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()
