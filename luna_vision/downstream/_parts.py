"""What a run has done so far, in files beside its output, so that the same command goes on where it was stopped."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from luna_vision._checksums import describe
from luna_vision.data.images import printable

from ._files import write_npz, write_parquet
from ._windows import Window

__all__ = ["WRITERS", "PartFolder", "columns", "describe", "printable"]

WRITERS = {".parquet": write_parquet, ".npz": write_npz}
ABOUT = "about.json"


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
            ValueError: The folder has parts that were made with something else.
            OSError: It cannot be read.
        """
        self.out, self.folder = out, out.with_name(f"{out.name}.partial")
        self.about = json.loads(json.dumps(about))
        self.done, self.failures, self.rows = 0, [], 0
        if (self.folder / ABOUT).exists():
            self._compare(json.loads((self.folder / ABOUT).read_text(encoding="utf-8")))
        elif self.folder.is_dir():  # the remains of a run that was finished
            shutil.rmtree(self.folder)
        for path in self._paths():
            with self._load(path) as part:
                self._count(int(part["stop"]), len(part["index"]), part["failed"].tolist(), part["reason"].tolist())

    def add(self, window: Window) -> None:
        """Keep the features of a window that begins where the last one ended."""
        failed, reasons = list(window.failures), [printable(reason) for reason in window.failures.values()]
        if not self.folder.exists():  # not before there is something to keep
            self.folder.mkdir()
            text = json.dumps(self.about)
            self._move_in(ABOUT, lambda path: path.write_text(text, encoding="utf-8"))
        index = np.array(list(window.features), np.int64)
        self._move_in(
            f"part-{window.start:012d}.npz",
            lambda path: np.savez(
                path,
                stop=np.array(window.stop),
                index=index,
                failed=np.array(failed, np.int64),
                reason=np.array(reasons, np.str_),
                **columns(window),
            ),
        )
        self._count(window.stop, len(index), failed, reasons)

    def finish(self, paths: Sequence[str]) -> None:
        """Join the parts to the output, and remove them; without a single row there is no output."""

        def parts() -> Iterator[dict[str, np.ndarray]]:
            for path in self._paths():
                with self._load(path) as part:
                    if len(part["index"]):
                        names = np.array([printable(paths[i]) for i in part["index"]], np.str_)
                        rest = (name for name in part.files if name not in ("stop", "index", "failed", "reason"))
                        yield {"path": names, **{name: part[name] for name in rest}}

        if self.rows:
            joined = self.folder / f"joined{self.out.suffix}"
            WRITERS[self.out.suffix](joined, parts, self.about)
            os.replace(joined, self.out)
        (self.folder / ABOUT).unlink()  # first: it says that the parts are still of use
        shutil.rmtree(self.folder)

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

    def _move_in(self, name: str, write: Callable[[Path], object]) -> None:
        """Write a file under another name first."""
        new = self.folder / f"new-{name}"
        write(new)
        os.replace(new, self.folder / name)


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
