"""Where an export goes: checked before the work, written under another name, and moved into place when it is right."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["SUFFIXES", "check_target", "staged"]

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "hf": ""}  # by format; a folder has none


def check_target(path: Path, format: str, overwrite: bool) -> None:
    """Find out whether an export may and can be written, and make the folder that it goes into.

    Raises:
        ValueError: Another suffix than the format's, something that is there and not to be replaced, or a place where
            nothing can be written.
    """
    suffix = SUFFIXES[format]
    if suffix and path.suffix != suffix:
        raise ValueError(f"a file of format {format} must end in {suffix}, got {path}")
    if suffix and path.is_dir():
        raise ValueError(f"{path} is a folder; format {format} writes a file")
    if not suffix and path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; format {format} writes a folder")
    taken = path.is_file() or (path.is_dir() and any(path.iterdir()))
    if taken and not overwrite:
        raise ValueError(f"{path} {'exists' if suffix else 'is not empty'}: --overwrite replaces what is there")
    folder = path if path.is_dir() else path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"cannot write to {path}: {error.strerror or error}") from error


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A path to write to, beside `path`, or in it if it is a folder: its parent may be read-only or another disk.

    What is there at the end is moved to `path`, in one step but for a folder that gets files; after an error nothing is
    left of it."""
    place = path if path.is_dir() else path.absolute().parent
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=place) as folder:
        temporary = Path(folder, f"new{path.suffix}")
        yield temporary
        if path.is_dir():
            for file in temporary.iterdir():
                os.replace(file, path / file.name)
        else:
            os.replace(temporary, path)
