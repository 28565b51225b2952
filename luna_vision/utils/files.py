"""How files are written: beside their place, under a name that nobody can guess, and moved there when they are whole.

So a file is complete whenever it exists, what was there before stays until then, and no link that somebody has put in
the way is followed. A process that is killed leaves `.NAME.RANDOM.partial` behind.
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
    """A new name in the folder of `path`, with its suffix."""
    return path.with_name(f".{path.stem[:40]}.{secrets.token_hex(4)}.partial{path.suffix}")


@contextmanager
def new_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write, which becomes `path` at the end of the block, when it is on the disk; an error removes it.

    Its folder is made, and it has the access that the umask gives to new files. What takes a name and no open file may
    write to `file.name`.

    Raises:
        OSError: It cannot be written, or something else than a file is at `path`, which the message names.
    """
    path = Path(path)
    with _moved_in(path, beside(path)) as new:
        if path.exists() and not path.is_file():
            raise OSError("it is a folder or a device")
        with open(new, "xb") as file:  # fails where there is something, a link included
            yield file
            file.flush()
            # of what safetensors has put in its place, which is its owner's alone
            os.chmod(new, stat.S_IMODE(os.fstat(file.fileno()).st_mode))
        to_disk(new)
        os.replace(new, path)


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A folder to fill, which becomes `path` at the end of the block; an error removes it.

    Where there is a folder already, whose parent may be read-only or another disk, it gets the files one by one.

    Raises:
        OSError: It cannot be written; names `path`.
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
    """Leave nothing of `new`. The system's errors about it, or about its folder, are said of `path`; others stay."""
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
        with suppress(OSError):  # which would hide what went wrong
            remove(new)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write text as UTF-8, as `new_file` does."""
    with new_file(path) as file:
        file.write(text.encode())


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write JSON, as `new_file` does."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def save_figure(figure: Any, path: str | os.PathLike, **options: Any) -> None:
    """Write a figure of matplotlib in the format of the suffix, as `new_file` does."""
    with new_file(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:], **options)


def to_disk(path: Path) -> None:
    """Return when what has been written to a file would survive a loss of power."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def open_own(path: Path, keep: bool) -> BinaryIO:
    """A file of a fixed name that several runs write, unbuffered: the one that is there, if it is to be kept, or a new
    one in its place.

    Raises:
        OSError: It cannot be opened, is not there, or is a link.
    """
    if keep:
        nofollow = getattr(os, "O_NOFOLLOW", 0)  # not on Windows
        return open(path, "r+b", buffering=0, opener=lambda name, flags: os.open(name, flags | nofollow))
    path.unlink(missing_ok=True)
    return open(path, "x+b", buffering=0)


def check_own(folder: Path, known: str) -> list[Path]:
    """All that is in a folder of this package, every file before its folder.

    Args:
        folder: The folder.
        known: Paths of the files in it, with slashes, as a regular expression.

    Raises:
        OSError: It is a link or no folder, or has something else in it.
    """
    found = [] if folder.is_symlink() else sorted(folder.rglob("*"), reverse=True)
    for path in [*found, folder]:
        as_named = path.is_file() and re.fullmatch(known, path.relative_to(folder).as_posix())
        if path.is_symlink() or not (path.is_dir() or as_named):
            raise OSError(f"{folder} is in the way, as {path} is not of this package: remove it, or give another name")
    return found


def remove_own(folder: Path, known: str) -> None:
    """Remove a folder, if there is one, in which nothing is unknown: see `check_own`. Otherwise nothing is touched."""
    if os.path.lexists(folder):
        for path in [*check_own(folder, known), folder]:
            path.rmdir() if path.is_dir() else path.unlink()


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed have left in a folder, in which no other process may write."""
    for path in folder.glob(".*.partial*"):
        if re.fullmatch(r"\..*\.[0-9a-f]{8}\.partial(\..*)?", path.name):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder with all that it has, if it exists; of a link, only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_output(path: Path, suffixes: Sequence[str], overwrite: bool) -> None:
    """Make the folder of an output file and see that files can be written there.

    Raises:
        ValueError: The suffix is none of `suffixes`.
        OSError: The file cannot be written, or exists and is not to be overwritten.
    """
    if path.suffix not in suffixes:
        raise ValueError(f"the output must end in {' or '.join(suffixes)}, got {path}")
    if path.is_dir():
        raise IsADirectoryError(f"the output {path} is a folder")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: give --overwrite (overwrite=True) to replace it")
    check_folder(path.parent)


def check_folder(folder: Path) -> None:
    """Make a folder, and see that files can be written there.

    Raises:
        OSError: They cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"cannot write into {folder}: {error.strerror or error}") from error
