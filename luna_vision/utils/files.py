"""Safe writing of files: a file is written beside its place, under a random name, and moved there when it is complete.

So a file is complete whenever it exists, an old file stays until then, and links are not followed. A process that is
killed leaves `.NAME.RANDOM.partial` behind.
"""

import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

__all__ = [
    "beside",
    "check_folder",
    "check_new",
    "check_output",
    "check_own",
    "new_file",
    "new_folder",
    "open_own",
    "remove",
    "remove_leftovers",
    "remove_own",
    "save_figure",
    "to_disk",
    "write_json",
    "write_text",
]


def beside(path: Path) -> Path:
    """A new random name in the folder of `path`, with its suffix."""
    return path.with_name(f".{path.stem[:40]}.{secrets.token_hex(4)}.partial{path.suffix}")


@contextmanager
def new_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a file to write, which becomes `path` at the end of the block, once it is on the disk; an error removes it.

    Its folder is made if necessary. Its permissions are those of any new file. A library that needs a name and no open
    file may write to `file.name`.

    Raises:
        OSError: It cannot be written, or `path` is a folder or a device. The message names `path`.
    """
    path = Path(path)
    with _moved_in(path, beside(path)) as new:
        if path.exists() and not path.is_file():
            raise OSError("it is a folder or a device")
        with open(new, "xb") as file:  # fails where there is something, a link included
            yield file
            file.flush()
            # safetensors replaces the file by one that only its owner can read
            os.chmod(new, stat.S_IMODE(os.fstat(file.fileno()).st_mode))
        to_disk(new)
        os.replace(new, path)


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Make a folder to fill, which becomes `path` at the end of the block; an error removes it.

    If `path` is a folder already, the files are moved into it one by one: its parent may be read-only or another disk.

    Raises:
        OSError: It cannot be written. The message names `path`.
    """
    path = Path(path)
    there = path.is_dir()
    with _moved_in(path, beside(path / path.name if there else path)) as new:
        new.mkdir()
        yield new
        for file in new.iterdir() if there else ():
            os.replace(file, path / file.name)
        if not there:
            os.replace(new, path)


@contextmanager
def _moved_in(path: Path, new: Path) -> Iterator[Path]:
    """Remove `new` at the end of the block. Errors of the system that name it, or its folder, name `path` instead."""
    try:
        new.parent.mkdir(parents=True, exist_ok=True)
        yield new
    except OSError as error:
        name = str(error.filename)
        if error.filename is not None and not name.startswith(str(new)) and not str(path).startswith(name):
            raise
        kept = "; what was there before is whole" if path.is_file() else ""
        raise OSError(f"cannot write {path}: {error.strerror or error}{kept}") from error
    finally:
        with suppress(OSError):  # it would hide the first error
            remove(new)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write text as UTF-8, as `new_file` does."""
    with new_file(path) as file:
        file.write(text.encode())


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write JSON, as `new_file` does."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def save_figure(figure: Any, path: str | os.PathLike, **options: Any) -> None:
    """Write a matplotlib figure in the format of the suffix, as `new_file` does."""
    with new_file(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:], **options)


def to_disk(path: Path) -> None:
    """Return when the content of a file would survive a loss of power."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def open_own(path: Path, keep: bool) -> BinaryIO:
    """Open a file of a fixed name to read and write, unbuffered: the existing one if `keep`, else a new one.

    Raises:
        OSError: It cannot be opened, does not exist, or is a link.
    """
    if keep:
        nofollow = getattr(os, "O_NOFOLLOW", 0)  # not on Windows
        return open(path, "r+b", buffering=0, opener=lambda name, flags: os.open(name, flags | nofollow))
    path.unlink(missing_ok=True)
    return open(path, "x+b", buffering=0)


def check_own(folder: Path, known: str) -> list[Path]:
    """List all files and folders in a folder of this package, each file before its folder.

    Args:
        folder: The folder.
        known: A regular expression that matches the relative path of every file of this package in it.

    Raises:
        OSError: It is a link or no folder, or has another file in it.
    """
    found = [] if folder.is_symlink() else sorted(folder.rglob("*"), reverse=True)
    for path in [*found, folder]:
        as_named = path.is_file() and re.fullmatch(known, path.relative_to(folder).as_posix())
        if path.is_symlink() or not (path.is_dir() or as_named):
            raise OSError(f"{folder} is in the way, as {path} is not of this package: remove it, or give another name")
    return found


def remove_own(folder: Path, known: str) -> None:
    """Remove a folder if it exists; if `check_own` finds an unknown file in it, raise its error and remove nothing."""
    if os.path.lexists(folder):
        for path in [*check_own(folder, known), folder]:
            path.rmdir() if path.is_dir() else path.unlink()


def remove_leftovers(folder: Path) -> None:
    """Remove the leftovers of killed processes in a folder, into which no other process may be writing."""
    for path in folder.glob(".*.partial*"):
        if re.fullmatch(r"\..*\.[0-9a-f]{8}\.partial(\..*)?", path.name):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_output(path: Path, suffixes: Sequence[str], overwrite: bool) -> None:
    """Make the folder of an output file and check that files can be written there.

    Raises:
        ValueError: The suffix is not one of `suffixes`.
        OSError: The file cannot be written, or exists and `overwrite` is False.
    """
    if path.suffix not in suffixes:
        raise ValueError(f"the output must end in {' or '.join(suffixes)}, got {path}")
    if path.is_dir():
        raise IsADirectoryError(f"the output {path} is a folder")
    check_new(path, overwrite)
    check_folder(path.parent)


def check_new(path: Path, overwrite: bool) -> None:
    """Raise a FileExistsError if a file that is to be written exists and `overwrite` is False."""
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(f"{path} exists: give --overwrite (overwrite=True) to replace it")


def check_folder(folder: Path) -> None:
    """Make a folder, and raise an OSError if no file can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"cannot write into {folder}: {error.strerror or error}") from error
