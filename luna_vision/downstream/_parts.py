"""What a run has done so far, in files beside its output, so that the same command goes on where it was stopped."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from luna_vision.utils.files import check_own, new_file, new_folder, remove_own, write_json
from luna_vision.utils.fingerprint import describe
from luna_vision.utils.text import printable, utf8

from ._files import write_npz, write_parquet
from ._windows import Window

__all__ = ["WRITERS", "PartFolder", "columns", "describe"]

WRITERS = {".parquet": write_parquet, ".npz": write_npz}
ABOUT = "about.json"
KNOWN = r"\.?(about|part-\d{12})(\.[0-9a-f]{8}\.partial)?\.(json|npz)"  # all that is in the folder
FINISHED = {"luna_vision": "finished"}  # what the parts of are in the output


class PartFolder:
    """The folder `OUTPUT.partial`: a file for each window of images, and what they were made with.

    A part takes its name in one move, and so does the output, so that either is complete when it exists.

    Attributes:
        done: How many images, from the first on, have been dealt with.
        failures: Those that could not be used, as (position, reason).
    """

    def __init__(self, out: Path, about: dict[str, Any]) -> None:
        """
        Args:
            out: The output.
            about: Everything that the features depend on, as JSON can hold it.

        Raises:
            ValueError: The folder has parts that were made with something else, or is not one of parts.
            OSError: It cannot be read.
        """
        self.out, self.folder = out, out.with_name(f"{out.name}.partial")
        self.about = json.loads(json.dumps(about))
        self.done, self.failures, self.rows = 0, [], 0
        if os.path.lexists(self.folder):
            found = self._found()
            if found == FINISHED:
                remove_own(self.folder, KNOWN)
            else:
                self._compare(found)
        for path in self._paths():
            with self._load(path) as part:
                self._count(int(part["stop"]), len(part["index"]), part["failed"].tolist(), part["reason"].tolist())

    def add(self, window: Window) -> None:
        """Keep the features of a window that begins where the last one ended."""
        failed, reasons = list(window.failures), [printable(reason) for reason in window.failures.values()]
        if not self.folder.exists():  # not before there is something to keep
            with new_folder(self.folder) as folder:
                write_json(folder / ABOUT, self.about)
        index = np.array(list(window.features), np.int64)
        with new_file(self.folder / f"part-{window.start:012d}.npz") as file:
            np.savez(
                file,
                stop=np.array(window.stop),
                index=index,
                failed=np.array(failed, np.int64),
                reason=np.array(reasons, np.str_),
                **columns(window),
            )
        self._count(window.stop, len(index), failed, reasons)

    def finish(self, paths: Sequence[str]) -> None:
        """Join the parts to the output, and remove them; without a single row there is no output."""

        def parts() -> Iterator[dict[str, np.ndarray]]:
            for path in self._paths():
                with self._load(path) as part:
                    if len(part["index"]):
                        names = np.array([utf8(paths[i]) for i in part["index"]], np.str_)
                        rest = (name for name in part.files if name not in ("stop", "index", "failed", "reason"))
                        yield {"path": names, **{name: part[name] for name in rest}}

        if self.rows:
            with new_file(self.out) as file:
                WRITERS[self.out.suffix](file, parts, self.about)
        write_json(self.folder / ABOUT, FINISHED)  # whatever is left after a kill is of no use
        remove_own(self.folder, KNOWN)

    def _found(self) -> dict[str, Any]:
        """What the parts in the folder were made with; that they are finished if there are none."""
        check_own(self.folder, KNOWN)
        if not any(self.folder.iterdir()):
            return FINISHED
        try:
            found = dict(json.loads((self.folder / ABOUT).read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            found = {}
        if "luna_vision" not in found:
            raise ValueError(f"{self.folder} is no folder of embed's: remove it, or give another output")
        return found

    def _compare(self, found: dict[str, Any]) -> None:
        other = [name for name in self.about | found if self.about.get(name) != found.get(name)]
        if other:
            raise ValueError(
                f"{self.folder} has parts of a run that was stopped, with other {', '.join(other)}: remove the folder, "
                "or give another output"
            )

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.npz"))

    def _load(self, path: Path) -> np.lib.npyio.NpzFile:
        try:
            return np.load(path, allow_pickle=False)
        except Exception as error:  # a file cut short raises nearly anything
            raise ValueError(f"{path} is damaged ({error}): remove {self.folder}") from error

    def _count(self, stop: int, rows: int, failed: list[int], reasons: list[str]) -> None:
        self.done, self.rows = stop, self.rows + rows
        self.failures += zip(failed, reasons, strict=True)


def columns(window: Window) -> dict[str, np.ndarray]:
    """The features of a window as arrays, n images in all: "embedding" (n, C), "memory" (n, L, C), "grid", those of all
    images one after the other (patches, C), and "grid_shape" (n, 3). What is not there is left out."""
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
