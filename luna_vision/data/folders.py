"""Photos in folders, in the layout of ImageNet."""

import os
from pathlib import Path

import timm.data
import torchvision.datasets as tvd

from luna_vision.data.base import ImageDataModule, train_or_val
from luna_vision.data.images import Source, read_image


class ClassFolder(tvd.ImageFolder):
    """torchvision's ImageFolder whose class numbers are those of the training folder.

    By itself ImageFolder numbers the classes that it finds, so that a validation folder in which a class is missing
    would get other labels than the training folder.
    """

    def __init__(self, root: str | os.PathLike, classes: list[str]) -> None:
        self.given = classes
        super().__init__(os.fspath(root), loader=read_image, allow_empty=True)
        if not self.samples:
            raise ValueError(f"no images in {root}: expected {root}/<class>/<images>")

    def find_classes(self, directory: str | os.PathLike) -> tuple[list[str], dict[str, int]]:
        if unknown := sorted(set(class_folders(Path(directory))) - set(self.given)):
            raise ValueError(f"{directory} has classes that the training folder has not: {', '.join(unknown)}")
        return self.given, {name: index for index, name in enumerate(self.given)}


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted: the classes."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())


class PhotoDataModule(ImageDataModule):
    """Base of the data modules of photos on disk: ImageNet's statistics and sizes, and classes that the disk names."""

    MEAN, STD = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD

    def __init__(
        self, img_size: int | list[int] = 224, num_workers: int = 8, crop_pct: float | None = 0.875, **kwargs
    ) -> None:
        super().__init__(img_size=img_size, num_workers=num_workers, crop_pct=crop_pct, **kwargs)
        self._class_names: list[str] | None = None

    def find_class_names(self) -> list[str]:
        """Read the names of the classes off the disk, in the order of their labels."""
        raise NotImplementedError

    @property
    def class_names(self) -> list[str]:
        if self._class_names is None:
            self._class_names = self.find_class_names()
        return self._class_names

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


class ImageFolderDataModule(PhotoDataModule):
    """Photos in the layout of ImageNet: root/train/<class>/<image>, root/val/<class>/<image>, perhaps root/test.

    The classes are the folders of root/train, in alphabetical order. Without root/val, ``val_fraction`` of the training
    images is held out; without root/test, testing and prediction use root/val. Images of any mode are read (palette,
    16-bit, CMYK, ...) and turned upright by their EXIF orientation.

    Arguments not listed here are those of :class:`ImageDataModule`.
    """

    def __init__(self, root: str = "data/imagenet", **kwargs) -> None:
        super().__init__(root=root, **kwargs)

    def find_class_names(self) -> list[str]:
        train = Path(self.root, "train")
        if not train.is_dir():
            raise FileNotFoundError(
                f"no folder {train}: root= must contain train/<class>/<images>, and may contain "
                f"val/<class>/<images> and test/<class>/<images>"
            )
        if not (names := class_folders(train)):
            raise ValueError(f"no class folders in {train}: expected {train}/<class>/<images>")
        return names

    def make_source(self, split: str) -> Source | None:
        classes = self.class_names
        root = Path(self.root)
        if split == "test" and not (root / "test").is_dir():
            split = "val"
            if not (root / "val").is_dir():
                return None  # the held-out images are for validation, testing must not pass for something else
        if (root / "val").is_dir() or split == "test":
            return ClassFolder(root / split, classes)
        train = ClassFolder(root / "train", classes)
        return train_or_val(train, train.targets, split, self.val_fraction)
