"""The common parts of the data modules of shards."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import ModuleType

from luna_vision.data.folders import PhotoDataModule

CLASSES = "classes.txt"
MAX_BYTES = 2**29  # of an image file: three bytes for each of the 179 megapixels that are decoded at most
CONVERT = "luna-vision convert FOLDER OUT makes them from an image folder"


def need(library: str) -> ModuleType:
    """Import an optional library; a ValueError says how to get it."""
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ValueError(f"{library} is not installed: pip install 'luna-vision[shards]'") from error


@contextmanager
def listing(path: Path) -> Iterator[None]:
    """While a JSON file is read: a ValueError about the file where something is missing in it or of a wrong type."""
    try:
        yield
    except Exception as error:  # JSON of strangers may hold anything in any place
        raise ValueError(f"{path} is not as docs/data.md describes it: {type(error).__name__}: {error}") from error


class ShardDataModule(PhotoDataModule):
    """Base of the data modules of shards: root/classes.txt has the name of a class in each line, in order of labels."""

    @cached_property
    def class_names(self) -> list[str]:
        path = Path(self.root, CLASSES)
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}, the names of the classes: {CONVERT}")
        names = path.read_text(encoding="utf-8").splitlines()
        if not names:
            raise ValueError(f"{path} is empty: it must have the name of a class in each line, in order of labels")
        return names
