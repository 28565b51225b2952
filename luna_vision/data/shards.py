"""What data modules of shards share: the layout of a folder of shards, and what is said where it is not one."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from luna_vision.data.folders import PhotoDataModule

CLASSES = "classes.txt"
CONVERT = "luna-vision convert FOLDER OUT makes them from an image folder"


def need(library: str) -> ModuleType:
    """Import an optional library; a ValueError says how to get it."""
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ValueError(f"{library} is not installed: pip install 'luna-vision[shards]'") from error


@contextmanager
def listing(path: Path) -> Iterator[None]:
    """For the reading of a file of JSON: whatever is missing in it, or of another kind, is a ValueError about it."""
    try:
        yield
    except Exception as error:  # JSON of strangers may hold anything in any place
        raise ValueError(f"{path} is not as docs/data.md describes it: {type(error).__name__}: {error}") from error


class ShardDataModule(PhotoDataModule):
    """Base of the data modules of shards: root/classes.txt has the name of a class in each line, in order of labels.

    Arguments not listed here are those of :class:`ImageDataModule`.
    """

    def __init__(self, root: str = "data/imagenet_shards", **kwargs) -> None:
        super().__init__(root=root, **kwargs)

    def find_class_names(self) -> list[str]:
        path = Path(self.root, CLASSES)
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}, the names of the classes: {CONVERT}")
        names = path.read_text(encoding="utf-8").splitlines()
        if not names:
            raise ValueError(f"{path} is empty: it must have the name of a class in each line, in order of labels")
        return names
