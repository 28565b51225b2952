"""Photos in folders, in the layout of ImageNet."""

import os
from functools import cached_property
from pathlib import Path

import timm.data
from PIL import Image

from luna_vision.data.base import ImageDataModule
from luna_vision.data.images import Source
from luna_vision.images.decode import read_image
from luna_vision.images.find import Folder, class_folders, contents, listed, skipped, split_folder, unused_folders, walk


class ClassFolder:
    """(image, label) of folder/<class>/<images>.

    Args:
        folder: The folder.
        labels: The label of each class of the training folder; a validation folder may lack some classes.
        found: The folders of each class; by default those below the folder of its name.

    Attributes:
        samples: File and label of each image, class by class, sorted.
        targets: The labels.
        where, skipped: In words, where the images are, and what was left out.

    Raises:
        ValueError: A class has no images, or no label.
        OSError: A folder cannot be read.
    """

    def __init__(self, folder: Path, labels: dict[str, int], found: dict[str, list[Folder]] | None = None) -> None:
        if found is None:
            found = {name: sorted(walk(folder / name)) for name in class_folders(folder)}
        if unknown := [name for name in found if name not in labels]:
            raise ValueError(f"{folder} has classes that the training folder lacks: {listed(unknown)}")
        if empty := [name for name, at in found.items() if not any(one.images for one in at)]:
            raise ValueError(f"no images in class folders of {folder}: {listed(empty)}")
        self.samples = [(path, labels[name]) for name, at in found.items() for one in at for path in one.images]
        self.targets = [label for _, label in self.samples]
        every = [next(walk(folder)), *(one for at in found.values() for one in at)]
        dangling = [path for one in every for path in one.dangling]
        self.where = str(folder)
        self.skipped = skipped(every) + (f"; links to nothing: {listed(dangling)}" if dangling else "")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return read_image(path), label


def numbered(names: list[str]) -> dict[str, int]:
    """The label of each class: its place in the list."""
    return {name: label for label, name in enumerate(names)}


class SplitFolders:
    """Mixin of the data modules whose splits are folders in ``root``."""

    root: str

    def folder(self, split: str) -> Path | None:
        """The folder of "train", which must be there, "val" or "test", None if there is none."""
        return split_folder(self.root, split) or (Path(self.root, "train") if split == "train" else None)

    def unused(self) -> list[str]:
        if self.folder("train") == Path(self.root):
            return []
        return unused_folders(self.root, map(self.folder, ("train", "val", "test")))


class PhotoDataModule(ImageDataModule):
    """Base of the data modules of photos: ImageNet's statistics and sizes.

    A subclass reads ``class_names`` off the disk. ``num_workers`` is by default the number of CPUs, at most 8.
    """

    MEAN, STD = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD

    def __init__(
        self,
        root: str = "data/imagenet",
        img_size: int | list[int] = 224,
        num_workers: int = min(8, os.cpu_count() or 1),
        crop_pct: float | None = 0.875,
        **kwargs,
    ) -> None:
        super().__init__(root=root, img_size=img_size, num_workers=num_workers, crop_pct=crop_pct, **kwargs)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


class ImageFolderDataModule(SplitFolders, PhotoDataModule):
    """Photos in the layout of ImageNet: root/train/<class>/<image>, root/val/<class>/<image>, perhaps root/test.

    Without any of these, root/<class>/<image> are all for training. The classes are in alphabetical order. The
    validation folder may also be called ``validation`` or ``valid``. Without it, ``val_fraction`` of the training
    images is held out. Without root/test, testing and prediction use the validation images. Hidden names, such as
    ``.ipynb_checkpoints``, and files that are no images are skipped. A run starts with a list of what was found and
    what is not used. Images of any mode are read (palette, 16-bit, CMYK, ...) and turned upright by their EXIF
    orientation.

    Arguments not listed here are those of :class:`ImageDataModule`.

    Raises:
        FileNotFoundError: On setup: there is neither root/train nor a class.
        ValueError: On setup: a class has no images, validation has a class that training lacks, or two folders are for
            validation.
    """

    def folder(self, split: str) -> Path | None:
        found = super().folder(split)
        if split != "train" or os.path.lexists(found) or not os.path.isdir(self.root):
            return found
        if any(super(ImageFolderDataModule, self).folder(other) for other in ("val", "test")):
            return found
        classes = (Path(self.root, name) for name in next(walk(self.root)).folders)
        return Path(self.root) if any(at.images for name in classes for at in walk(name)) else found

    @cached_property
    def class_names(self) -> list[str]:
        train = self.folder("train")
        if not train.is_dir():
            raise FileNotFoundError(
                f"no folder {Path(self.root, 'train')}: root= must contain train/<class>/<images>, and may contain "
                "val/<class>/<images> and test/<class>/<images>; or it must contain <class>/<images>. "
                f"{self.root} {contents(self.root)}"
            )
        return class_folders(train)

    def make_source(self, split: str) -> Source | None:
        labels = numbered(self.class_names)
        return self.split_source(split, self.folder, lambda folder: ClassFolder(folder, labels))
