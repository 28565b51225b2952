"""The finished part of a run, in files beside its output, so that the same command continues where it was stopped.

Several processes of a run keep their parts in one folder, and the first joins them to the output.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from torch import nn

import luna_vision
from luna_vision.utils.device import product_dtype
from luna_vision.utils.files import check_own, new_file, new_folder, remove_own, write_json
from luna_vision.utils.fingerprint import describe
from luna_vision.utils.ranks import ALONE, Ranks
from luna_vision.utils.text import printable, utf8

from .windows import Window

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["WRITERS", "PartFolder", "as_table", "describe_model", "window_columns"]

ABOUT = "about.json"
KNOWN = r"\.?(about|part-\d{12})(\.[0-9a-f]{8}\.partial)?\.(json|npz)"  # all files of the folder
FINISHED = {"luna_vision": "finished"}  # in ABOUT when the output is complete
BOOKKEEPING = ("index", "failed", "reason")  # arrays of a part that are not for the output


class PartFolder:
    """The folder `OUTPUT.partial`, with files of one or more images and a record of model, images and settings.

    A part and the output each get their names in one move, so both are complete when they exist.

    Attributes:
        done: The positions of the images that are finished.
        failures: Images that could not be used, as (position, reason).
        rows: The number of images that could be used.
    """

    def __init__(self, out: Path, about: dict[str, Any], ranks: Ranks = ALONE) -> None:
        """
        Args:
            out: The output.
            about: Everything that the features depend on, as plain data.
            ranks: The processes of the run, all of which call this.

        Raises:
            ValueError: The folder belongs to another run, or to another program.
            OSError: It cannot be read.
        """
        self.out, self.folder = out, out.with_name(f"{out.name}.partial")
        self.about = json.loads(json.dumps(about))
        self.ranks = ranks
        finished = os.path.lexists(self.folder) and self._is_finished()
        ranks.gather()
        if ranks.first and finished:
            remove_own(self.folder, KNOWN)
        if ranks.first and ranks.count > 1:
            self._begin()
        ranks.gather()
        self._read()

    def gaps(self, positions: range) -> Iterator[tuple[int, int]]:
        """The runs [start, stop) of these positions that are not finished."""
        start = positions.start
        for stop in sorted({*(i for i in self.done if i in positions), positions.stop}):
            if start < stop:
                yield start, stop
            start = stop + 1

    def add(self, index: Sequence[int], columns: dict[str, np.ndarray], failures: Mapping[int, str]) -> None:
        """Keep what was found of some images, in place of an earlier part that begins with the same image.

        Args:
            index: Positions of the images that could be used.
            columns: An array for each column of the output, with a row for each of these.
            failures: By position, why an image could not be used.
        """
        reasons = np.array([printable(reason) for reason in failures.values()], np.str_)
        own = {"index": np.array(index, np.int64), "failed": np.array(list(failures), np.int64), "reason": reasons}
        self._begin()
        with new_file(self.folder / f"part-{min([*index, *failures]):012d}.npz") as file:
            np.savez(file, **own, **columns)
        self._count(own)

    def finish(self, paths: Sequence[str], keep: bool = False) -> None:
        """Join the parts to the output and remove them; without a single row there is no output.

        Args:
            paths: Of all images.
            keep: Do not remove them, as some images are left for another run.
        """
        self._read()
        if self.rows:
            with new_file(self.out) as file:
                WRITERS[self.out.suffix](file, self._rows(paths), self.about)
        if keep:
            return
        write_json(self.folder / ABOUT, FINISHED)  # parts that a kill leaves behind are useless from here on
        remove_own(self.folder, KNOWN)

    def _rows(self, paths: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
        """The columns of the output, part by part."""
        for part in self._parts():
            if len(part["index"]):
                names = np.array([utf8(paths[i]) for i in part["index"]], np.str_)
                yield {"path": names, **{name: part[name] for name in part.files if name not in BOOKKEEPING}}

    def _begin(self) -> None:
        """Make the folder; not before there is something to keep, or another process may make it."""
        if not self.folder.exists():
            with new_folder(self.folder) as folder:
                write_json(folder / ABOUT, self.about)

    def _is_finished(self) -> bool:
        """Whether the folder is of a finished run; a ValueError if it is of another one than this."""
        files = check_own(self.folder, KNOWN)
        try:
            found = dict(json.loads((self.folder / ABOUT).read_text(encoding="utf-8"))) if files else FINISHED
        except (FileNotFoundError, ValueError, TypeError):
            found = {}
        if "luna_vision" not in found:
            raise ValueError(f"{self.folder} has no parts of a run: remove it, or give another output")
        if found == FINISHED:
            return True
        if other := [name for name in self.about | found if self.about.get(name) != found.get(name)]:
            raise ValueError(
                f"{self.folder} has parts of a run that was stopped or left images out, with other "
                f"{', '.join(other)}: remove the folder, or give another output"
            )
        return False

    def _read(self) -> None:
        """Count what all processes have finished."""
        self.done, self.failures, self.rows = set(), [], 0
        for part in self._parts():
            self._count(part)

    def _parts(self) -> Iterator[np.lib.npyio.NpzFile]:
        for path in sorted(self.folder.glob("part-*.npz")):
            try:
                file = np.load(path, allow_pickle=False)
            except Exception as error:  # a file that was cut short raises nearly anything
                raise ValueError(f"{path} is damaged ({error}): remove {self.folder}") from error
            with file:
                yield file

    def _count(self, part: Mapping[str, np.ndarray]) -> None:
        index, failed = part["index"].tolist(), part["failed"].tolist()
        self.done |= {*index, *failed}
        self.rows += len(index)
        self.failures += zip(failed, part["reason"].tolist(), strict=True)


def describe_model(model: nn.Module) -> dict[str, Any]:
    """What a run records of its model, and of the package."""
    parameter = next(model.parameters())
    return {
        "luna_vision": luna_vision.__version__,
        "model": getattr(model, "pretrained_cfg", {}).get("architecture", type(model).__name__),
        **describe(model),
        "dtype": str(product_dtype(parameter.device, parameter.dtype)).removeprefix("torch."),
    }


def window_columns(window: Window) -> dict[str, np.ndarray]:
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


def as_table(arrays: Mapping[str, np.ndarray]) -> "pa.Table":
    """Columns, (n, ...) each, as a table: numbers as nested lists of fixed sizes, but a "grid" as flat lists."""
    import pyarrow as pa

    def column(array: np.ndarray) -> pa.Array:
        if array.dtype.kind == "U":
            return pa.array(array.tolist(), pa.string())
        values = pa.array(array.reshape(-1))
        for size in reversed(array.shape[1:]):
            values = pa.FixedSizeListArray.from_arrays(values, size)
        return values

    columns = {}
    for name, array in arrays.items():
        if name == "grid":
            ends = arrays["grid_shape"].astype(np.int64).prod(axis=1).cumsum()
            offsets = pa.array(np.concatenate([[0], ends]), pa.int64())
            columns[name] = pa.LargeListArray.from_arrays(offsets, pa.array(array.reshape(-1)))
        else:
            columns[name] = column(array)
    return pa.table(columns)


def write_parquet(file: BinaryIO, parts: Iterator[dict[str, np.ndarray]], about: dict[str, Any]) -> None:
    """Write a row for each image, and a row group for each part; the schema's metadata has `about` as JSON."""
    import pyarrow.parquet as pq

    writer = None
    try:
        for arrays in parts:
            table = as_table(arrays).replace_schema_metadata({"luna_vision": json.dumps(about)})
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
