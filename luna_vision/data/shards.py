"""What data modules of shards share: the layout of a folder of shards, and what is said where it is not one."""

import importlib
from pathlib import Path
from types import ModuleType

import timm.data

from luna_vision.data.base import ImageDataModule

CLASSES = "classes.txt"
CONVERT = "python -m luna_vision.data.convert FOLDER OUT makes them from an image folder"


def need(library: str) -> ModuleType:
    """Import an optional library; a ValueError says how to get it."""
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ValueError(f"{library} is not installed: pip install 'luna-vision[shards]'") from error


class ShardDataModule(ImageDataModule):
    """Base of the data modules of shards: root/classes.txt has the name of a class in each line, in order of labels.

    Arguments not listed here are those of :class:`ImageDataModule`.
    """

    MEAN, STD = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD

    def __init__(
        self,
        root: str = "data/imagenet_shards",
        img_size: int | list[int] = 224,
        num_workers: int = 8,
        crop_pct: float | None = 0.875,
        **kwargs,
    ) -> None:
        super().__init__(root=root, img_size=img_size, num_workers=num_workers, crop_pct=crop_pct, **kwargs)
        self._class_names: list[str] | None = None

    @property
    def class_names(self) -> list[str]:
        if self._class_names is None:
            path = Path(self.root, CLASSES)
            if not path.is_file():
                raise FileNotFoundError(f"no file {path}, the names of the classes: {CONVERT}")
            self._class_names = path.read_text(encoding="utf-8").splitlines()
            if not self._class_names:
                raise ValueError(f"{path} is empty: it must have the name of a class in each line, in order of labels")
        return self._class_names

    @property
    def num_classes(self) -> int:
        return len(self.class_names)
