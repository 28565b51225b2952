"""The finished part of a run, in files beside its output, so that the same command continues where it was stopped."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from luna_vision.utils.files import check_own, new_file, new_folder, remove_own, write_json
from luna_vision.utils.text import printable, utf8

from .windows import Window

__all__ = ["WRITERS", "PartFolder"]

ABOUT = "about.json"
KNOWN = r"\.?(about|part-\d{12})(\.[0-9a-f]{8}\.partial)?\.(json|npz)"  # all files of the folder
FINISHED = {"luna_vision": "finished"}  # in ABOUT when the output is complete
BOOKKEEPING = ("stop", "index", "failed", "reason")  # arrays of a part that are not for the output


class PartFolder:
    """The folder `OUTPUT.partial`, with a file for each window of images and a record of model, images and settings.

    A part and the output each get their names in one move, so both are complete when they exist.

    Attributes:
        done: The number of images, from the first on, that are finished.
        failures: Images that could not be used, as (position, reason).
    """

    def __init__(self, out: Path, about: dict[str, Any]) -> None:
        """
        Args:
            out: The output.
            about: Everything that the features depend on, as plain data.

        Raises:
            ValueError: The folder belongs to another run, or to another program.
            OSError: It cannot be read.
        """
        self.out, self.folder = out, out.with_name(f"{out.name}.partial")
        self.about = json.loads(json.dumps(about))
        self.done, self.failures, self.rows = 0, [], 0
        if os.path.lexists(self.folder):
            self._check()
        for part in self._parts():
            self._count(int(part["stop"]), len(part["index"]), part["failed"].tolist(), part["reason"].tolist())

    def add(self, window: Window) -> None:
        """Keep the features of a window that begins where the last one ended."""
        failed, reasons = list(window.failures), [printable(reason) for reason in window.failures.values()]
        if not self.folder.exists():  # not before there is something to keep
            with new_folder(self.folder) as folder:
                write_json(folder / ABOUT, self.about)
        index = np.array(list(window.features), np.int64)
        arrays = {"failed": np.array(failed, np.int64), "reason": np.array(reasons, np.str_), **_columns(window)}
        with new_file(self.folder / f"part-{window.start:012d}.npz") as file:
            np.savez(file, stop=np.array(window.stop), index=index, **arrays)
        self._count(window.stop, len(index), failed, reasons)

    def finish(self, paths: Sequence[str]) -> None:
        """Join the parts to the output and remove them; without a single row there is no output."""
        if self.rows:
            with new_file(self.out) as file:
                WRITERS[self.out.suffix](file, self._rows(paths), self.about)
        write_json(self.folder / ABOUT, FINISHED)  # parts that a kill leaves behind are useless from here on
        remove_own(self.folder, KNOWN)

    def _rows(self, paths: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
        """The columns of the output, part by part."""
        for part in self._parts():
            if len(part["index"]):
                names = np.array([utf8(paths[i]) for i in part["index"]], np.str_)
                yield {"path": names, **{name: part[name] for name in part.files if name not in BOOKKEEPING}}

    def _check(self) -> None:
        """See that the folder is of this run; remove it if it is of a finished one."""
        files = check_own(self.folder, KNOWN)
        try:
            found = dict(json.loads((self.folder / ABOUT).read_text(encoding="utf-8"))) if files else FINISHED
        except (FileNotFoundError, ValueError, TypeError):
            found = {}
        if "luna_vision" not in found:
            raise ValueError(f"{self.folder} was not written by embed: remove it, or give another output")
        if found == FINISHED:
            remove_own(self.folder, KNOWN)
        elif other := [name for name in self.about | found if self.about.get(name) != found.get(name)]:
            raise ValueError(
                f"{self.folder} has parts of a run that was stopped, with other {', '.join(other)}: remove the folder, "
                "or give another output"
            )

    def _parts(self) -> Iterator[np.lib.npyio.NpzFile]:
        for path in sorted(self.folder.glob("part-*.npz")):
            try:
                file = np.load(path, allow_pickle=False)
            except Exception as error:  # a file that was cut short raises nearly anything
                raise ValueError(f"{path} is damaged ({error}): remove {self.folder}") from error
            with file:
                yield file

    def _count(self, stop: int, rows: int, failed: list[int], reasons: list[str]) -> None:
        self.done, self.rows = stop, self.rows + rows
        self.failures += zip(failed, reasons, strict=True)


def _columns(window: Window) -> dict[str, np.ndarray]:
    """The features of a window's n images: "embedding" (n, C) and, where wanted, "memory" (n, L, C), "grid" (patches of
    all images, C) and "grid_shape" (n, 3)."""
    features = list(window.features.values())
    if not features:
        return {}
    arrays = {"embedding": np.stack([one.embedding for one in features])}
    if features[0].memory is not None:
        arrays["memory"] = np.stack([one.memory for one in features])
    if features[0].grid is not None:
        arrays["grid"] = np.concatenate([one.grid.reshape(-1, one.grid.shape[-1]) for one in features])
        arrays["grid_shape"] = np.array([one.grid.shape for one in features], np.int32)
    return arrays


def write_parquet(file: BinaryIO, parts: Iterator[dict[str, np.ndarray]], about: dict[str, Any]) -> None:
    """Write a row for each image, and a row group for each part; the schema's metadata has `about` as JSON."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def fixed(array: np.ndarray) -> pa.Array:
        """(n, ...) to n nested lists of fixed sizes."""
        values = pa.array(array.reshape(-1))
        for size in reversed(array.shape[1:]):
            values = pa.FixedSizeListArray.from_arrays(values, size)
        return values

    writer = None
    try:
        for arrays in parts:
            columns = {"path": pa.array(arrays["path"].tolist(), pa.string())}
            columns |= {name: fixed(arrays[name]) for name in ("embedding", "memory") if name in arrays}
            if "grid" in arrays:
                ends = arrays["grid_shape"].astype(np.int64).prod(axis=1).cumsum()
                offsets = pa.array(np.concatenate([[0], ends]), pa.int64())
                columns["grid"] = pa.LargeListArray.from_arrays(offsets, pa.array(arrays["grid"].reshape(-1)))
                columns["grid_shape"] = fixed(arrays["grid_shape"])
            table = pa.table(columns).replace_schema_metadata({"luna_vision": json.dumps(about)})
            # values do not repeat, so a dictionary would be of no use
            writer = writer or pq.ParquetWriter(file, table.schema, use_dictionary=False)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


def write_npz(file: BinaryIO, parts: Iterator[dict[str, np.ndarray]], about: dict[str, Any]) -> None:
    """Write an array for each column, and `about` as a JSON string. All arrays are in memory at once.

    The grid of image i is `grid[grid_offset[i]:grid_offset[i + 1]].reshape(grid_shape[i])`.
    """
    joined = list(parts)
    arrays = {name: np.concatenate([part[name] for part in joined]) for name in joined[0]}
    if "grid" in arrays:
        patches = arrays["grid_shape"][:, :2].astype(np.int64).prod(axis=1)
        arrays["grid_offset"] = np.concatenate([[0], patches.cumsum()])
    np.savez(file, **arrays, about=np.array(json.dumps(about)))


WRITERS = {".parquet": write_parquet, ".npz": write_npz}
