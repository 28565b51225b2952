"""A class for each pixel, from folders of masks or from the outlines of a COCO file."""

import csv
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from luna_vision.data.dense import IGNORE, DenseDataModule, Truth, check_image_size, size_of
from luna_vision.data.label_files import (
    COCO,
    YOLO,
    Format,
    LabelSet,
    LabelSource,
    Place,
    Size,
    draw_outline,
    find_coco,
    find_yolo,
    image_size,
    read_coco,
    read_yolo,
    split_names,
    whole_coco,
    whole_yolo,
)
from luna_vision.images.decode import SampleError, read_image
from luna_vision.images.find import find_images, listed, walk
from luna_vision.images.pillow import open_image_file
from luna_vision.utils.errors import UserError, one_line
from luna_vision.utils.text import csv_separator, printable

# folders of images and of their masks
LAYOUTS = (
    ("{}/images", "{}/masks"),
    ("images/{}", "masks/{}"),
    ("images/{}", "annotations/{}"),
    ("images/{}", "labels/{}"),
    ("{}", "{}annot"),
    ("{}", "{}_labels"),
    ("{}", "{}_masks"),
)
WHOLE = (("images", "masks"), ("images", "annotations"), ("images", "labels"))  # without splits
MASK_ENDS = ("", "_mask", "_masks", "_label", "_L")  # of a mask's name, after the name of its image
BACKGROUNDS = ("background", "_background_", "bg")  # names of a first class that is no object
BINARY = [0, 255]  # the numbers of masks of one kind of object, as most programs write them
SCANNED = 2000  # masks that are read at the start, evenly spread, to count the pixels of each class


class Coding(NamedTuple):
    """What the pixels of mask files mean."""

    names: list[str]  # the classes, with the background where there is one
    values: list[int] | list[tuple[int, int, int]]  # the number of each class in the files, or its colour
    ignored: Any = IGNORE  # the number, or the colour, of pixels that do not count; None where there is none

    @property
    def colors(self) -> bool:
        return bool(self.values) and not isinstance(self.values[0], int)

    def decode(self, numbers: np.ndarray) -> tuple[np.ndarray, Counter[Any]]:
        """The class of each pixel as uint8, `IGNORE` where it has none, and how many have each value without a class.

        Args:
            numbers: (H, W) integers, or (H, W, 3) uint8 where values are colours.
        """
        known = list(self.values)
        classes = list(range(len(known)))
        if self.ignored is not None and self.ignored not in known:
            known, classes = [*known, self.ignored], [*classes, IGNORE]
        flat = _packed(numbers) if self.colors else numbers.astype(np.int64)
        keys = _packed(np.array(known, np.uint8)) if self.colors else np.array(known, np.int64)
        order = np.argsort(keys)
        keys, classes = keys[order], np.array(classes)[order]
        at = np.searchsorted(keys, flat).clip(max=len(keys) - 1)
        found = keys[at] == flat
        values, counts = (part.tolist() for part in np.unique(flat[~found], return_counts=True))
        if self.colors:
            values = [(value >> 16, value >> 8 & 255, value & 255) for value in values]
        unknown = Counter(dict(zip(values, counts, strict=True)))
        return np.where(found, classes[at], IGNORE).astype(np.uint8), unknown


def _packed(colors: np.ndarray) -> np.ndarray:
    """Colours (..., 3) as one number each."""
    red, green, blue = np.moveaxis(colors.astype(np.int64), -1, 0)
    return red << 16 | green << 8 | blue


def read_mask(path: str | os.PathLike, colors: bool) -> np.ndarray:
    """The numbers of a mask file (H, W), those of a palette image its indices; or its colours (H, W, 3).

    A grey mask may be saved as RGB, and may have an opacity, which is not read.

    Raises:
        SampleError: It is no mask.
        OSError: It cannot be read.
    """
    try:
        with open_image_file(path) as image:
            if colors:
                return np.asarray(image.convert("RGB"))
            array = np.asarray(image)
            if len(bands := image.getbands()) > 1:
                grey = array[..., : len(bands) - (bands[-1] == "A")]
                array = grey[..., 0] if (grey == grey[..., :1]).all() else array
    except FileNotFoundError:
        raise
    except Exception as error:  # decoders raise nearly anything for a broken file
        raise SampleError(f"cannot decode mask {path}: {one_line(error)}") from error
    if array.ndim != 2 or not (np.issubdtype(array.dtype, np.integer) or array.dtype == bool):
        raise SampleError(
            f"mask {path} has colours or fractions: give the colour of each class as values (--data.values)"
        )
    return array


class MaskSource:
    """(image, `Truth`) of image files and mask files.

    Args:
        pairs: Files of an image and of its mask.
        coding: What the pixels of masks mean.
        where: In words, where they are.

    Attributes:
        unknown: Pixels of each value that is no class, of all masks that `mask` has read.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]], coding: Coding, where: str) -> None:
        self.pairs, self.coding, self.where = pairs, coding, where
        self.unknown: Counter[Any] = Counter()

    def __len__(self) -> int:
        return len(self.pairs)

    def sample_file(self, index: int) -> str:
        return self.pairs[index][0]

    def mask(self, index: int, size: Size) -> np.ndarray:
        """uint8 (H, W), the class of each pixel or `IGNORE`, of an image that has this size."""
        path = self.pairs[index][1]
        mask, unknown = self.coding.decode(read_mask(path, self.coding.colors))
        if unknown:
            self.unknown += unknown
            raise SampleError(f"mask {path} has values that are no class: {listed(list(map(str, unknown)), 5)}")
        check_image_size(size, mask.shape, f"its mask {path}")
        return mask

    def presence(self) -> np.ndarray:
        """bool (n, K), whether an image has a class; of masks that cannot be read, none. Reads all of them."""
        found = np.zeros((len(self.pairs), IGNORE + 1), bool)
        for row, (_, path) in zip(found, self.pairs, strict=True):
            with suppress(SampleError):
                row[np.unique(self.coding.decode(read_mask(path, self.coding.colors))[0])] = True
        return found[:, : len(self.coding.names)]

    def __getitem__(self, index: int) -> tuple[Any, Truth]:
        image = read_image(self.pairs[index][0])
        return image, Truth(mask=self.mask(index, size_of(image)))


class OutlineSource(LabelSource):
    """(image, `Truth`) of the outlines of objects in label files: smaller ones over larger ones, crowds ignored."""

    def __init__(self, labels: LabelSet, background: bool) -> None:
        super().__init__(labels)
        self.background = background

    def mask(self, index: int, size: Size) -> np.ndarray:
        """uint8 (H, W), the class of each pixel or `IGNORE`, of an image that has this size."""
        image = self.labels.images[index]
        check_image_size(size, image.size, f"the label of {image.file}")
        mask = np.full(image.size, 0 if self.background else IGNORE, np.uint8)
        objects = [draw_outline(outline, image.size) for outline in image.outlines]
        for at in sorted(range(len(objects)), key=lambda at: -int(objects[at].sum())):
            mask[objects[at]] = IGNORE if image.crowd[at] else image.labels[at] + self.background
        return mask

    def __getitem__(self, index: int) -> tuple[Any, Truth]:
        image = read_image(self.sample_file(index))
        return image, Truth(mask=self.mask(index, size_of(image)))


def find_masks(root: Path, split: str) -> Place | None:
    """The folders of the masks and of the images of a split."""
    return _folders(root, *([part.format(name) for part in at] for name in split_names(split) for at in LAYOUTS))


def whole_masks(root: Path) -> Place | None:
    """The folders of the masks and of the images without splits."""
    return _folders(root, *WHOLE)


def _folders(root: Path, *pairs: Sequence[str]) -> Place | None:
    """The first pair of folders of images and masks."""
    for images, masks in ((root / images, root / masks) for images, masks in pairs):
        # YOLO has texts in such a folder
        if images.is_dir() and masks.is_dir() and any(folder.images for folder in walk(masks)):
            return Place(masks, images)
    return None


MASKS = listed([" and ".join(at).format("train", "train") for at in (*LAYOUTS, WHOLE[0])])


class SegmentationDataModule(DenseDataModule):
    """Photos with a class for each pixel, for :class:`~luna_vision.tasks.SegmentationTask`.

    Targets are masks, uint8 (H, W): 0 to the number of classes - 1 in the order of ``class_names``, with a background
    0 is the background and classes count from 1; 255 is ignored.

    The folders are ``root/SPLIT/images`` and ``root/SPLIT/masks``, or another of docs/dense.md; or ``root`` has a COCO
    file. A mask is a grey image with numbers, a palette image (its indices count), or of colours. By default the
    classes are those of ``root/classes.txt``, a name in each line; or of ``root/class_dict.csv``, with the columns
    name, r, g, b; else the numbers in the training masks. A run begins with the share of pixels of each class.

    Args:
        *args: ``root``, and ``format``: "masks", "coco" or "yolo".
        classes: Names of the classes, the background among them where the masks have one.
        values: The number of each class in masks, or its colour [red, green, blue]; by default 0, 1, ..., or 0 and 255
            where training masks hold these alone.
        ignore_index: The number, or the colour, of pixels that are neither trained on nor scored, and no class; -1 for
            none. Where ``values`` has 255, it is a class all the same.
        background: Whether the first class is the background, which is trained on, and scored as one more class;
            by default where it is called so. With COCO and YOLO, whether pixels outside of all outlines are background
            or ignored.
        **kwargs: The other arguments of :class:`~luna_vision.data.dense.DenseDataModule`.

    Raises:
        ValueError: On setup: faulty masks, or an argument out of range.
        FileNotFoundError: On setup: ``root`` has no masks.
    """

    formats = {
        "masks": Format(find_masks, None, MASKS, whole_masks),
        "coco": Format(find_coco, partial(read_coco, masks=True), COCO, whole_coco),
        "yolo": Format(find_yolo, partial(read_yolo, masks=True), YOLO, whole_yolo),
    }
    masks = True

    def __init__(
        self,
        *args: Any,
        classes: list[str] | None = None,
        values: list[int] | list[list[int]] | None = None,
        ignore_index: int | list[int] = IGNORE,
        background: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._names, self._background = classes, background
        self._values = None if values is None else [v if isinstance(v, int) else tuple(v) for v in values]
        ignored = ignore_index if isinstance(ignore_index, int) else tuple(ignore_index)
        self.ignored = None if ignored == -1 else ignored
        if classes is not None and len(set(classes)) < len(classes):
            raise ValueError(f"classes must have different names, got {classes}")

    # ---- classes

    @cached_property
    def coding(self) -> Coding:
        """The classes of mask files."""
        names, values = self._names, self._values
        if names is None:
            names, table = class_table(Path(self.root))
            values = table if values is None else values
        if values is None and self._binary(names):
            names, values = names or [BACKGROUNDS[0], "foreground"], BINARY
        if values is None:
            values = list(range(len(names))) if names is not None else self._numbers()
        names = list(map(str, values)) if names is None else names
        if len(names) != len(values):
            raise ValueError(f"values must be one for each of the {len(names)} classes, got {len(values)}")
        if self.ignored != IGNORE:  # which is a class where `values` has it
            kept = [i for i, value in enumerate(values) if value != self.ignored]
            names, values = [names[i] for i in kept], [values[i] for i in kept]
        if not 2 <= len(names) <= IGNORE:
            raise UserError(f"masks must have 2 to {IGNORE} classes, got {len(names)} in {self.root}")
        no_color = not isinstance(values[0], int) and isinstance(self.ignored, int)
        return Coding(list(names), list(values), None if no_color else self.ignored)

    def _binary(self, names: list[str] | None) -> bool:
        """Whether the training masks of classes with these names hold 0 and 255 alone, and both are classes."""
        if self.ignored not in (None, IGNORE) or (names is not None and len(names) != 2):
            return False
        with suppress(*[FileNotFoundError] * (names is not None)):  # a prediction with names does without training data
            return self._found == set(BINARY)
        return False

    @cached_property
    def _found(self) -> set[int]:
        """The numbers in the training masks. Those that cannot be read are counted later."""
        found: set[int] = set()
        faults: list[SampleError] = []
        pairs = self._pairs(self.place("train"), "train")
        for at in _spread(len(pairs), SCANNED):
            try:
                found |= set(np.unique(read_mask(pairs[at][1], colors=False)).tolist())
            except SampleError as error:
                faults.append(error)
        if faults and not found:
            raise faults[0]
        return found

    def _numbers(self) -> list[int]:
        """The classes of masks, where nothing names them."""
        top = max((number for number in self._found if number != self.ignored), default=0)
        if top >= IGNORE:
            asked = "give classes and values (--data.classes, --data.values)"
            raise UserError(f"the masks of {self.root} hold numbers up to {top}: {asked}")
        return list(range(top + 1))

    @property
    def background(self) -> bool:
        """Whether class 0 of the masks in a batch is the background, which ``class_names`` leaves out."""
        if self._background is not None:
            return self._background
        return self.format != "masks" or self.coding.names[0].lower() in BACKGROUNDS

    @property
    def class_names(self) -> list[str]:
        """The classes without the background."""
        if self.format != "masks":
            return self._names or self.source("train").labels.names
        return self.coding.names[int(self.background) :]

    # ---- files

    def _pairs(self, place: Place, split: str) -> list[tuple[str, str]]:
        """The files of images and their masks."""
        faults = self.label_faults(split)
        by_stem: dict[str, str] = {}
        for path in find_images(str(place.labels)):
            stem = _stem(path, place.labels)
            if stem in by_stem:
                faults.add("second mask of an image", path)
            by_stem.setdefault(stem, path)
        pairs = []
        for path in find_images(str(place.images)):
            stem = _stem(path, place.images)
            mask = next((by_stem.pop(stem + end) for end in MASK_ENDS if stem + end in by_stem), None)
            if mask is None:
                faults.add("image without a mask", path)
            else:
                pairs.append((path, mask))
        for path in by_stem.values():
            faults.add("mask without an image", path)
        faults.settle(len(pairs))
        if not pairs:
            raise UserError(f"no image in {place.images} has a mask of the same name in {place.labels}")
        return pairs

    def open_labels(self, place: Place, split: str) -> MaskSource | OutlineSource:
        if self.format == "masks":
            source = MaskSource(self._pairs(place, split), self.coding, f"{place.images} and {place.labels}")
            names = self.coding.names
        else:
            source = OutlineSource(self.read_labels(place, split), self.background)
            names = ["background"] * self.background + source.labels.names
            if len(names) > IGNORE:
                among = " with the background" * self.background
                raise UserError(f"masks hold at most {IGNORE} classes{among}, got {len(names)} in {source.where}")
        self._scan(source, names, split)
        return source

    def _scan(self, source: MaskSource | OutlineSource, names: list[str], split: str) -> None:
        """Count the pixels of each class in some masks; those that cannot be read are faults."""
        faults = self.label_faults(split)
        scanned = _spread(len(source), SCANNED)
        counted = np.zeros((len(scanned), IGNORE + 1), np.int64)
        for row, index in zip(counted, scanned, strict=True):
            try:
                mask = source.mask(index, image_size(source.sample_file(index)))
            except SampleError as error:
                faults.add("faulty mask", str(error))
                continue
            row += np.bincount(mask.ravel(), minlength=IGNORE + 1)
        hint = ""
        if isinstance(source, MaskSource) and source.unknown:
            (value, pixels), *_ = source.unknown.most_common(1)
            shown = str(value) if isinstance(value, int) else f"'{list(value)}'"
            hint = f". {shown} has {pixels:,} pixels and no name: --data.ignore_index {shown} leaves them out"
        faults.settle(len(scanned) - faults.count, hint)
        counts = counted.sum(0)
        source.pixels, source.holds = counts[: len(names)], partial(_shares, names, scanned, counted)
        never = [label for i, label in enumerate(names) if not counts[i]]
        if never:
            seen = f"{len(scanned)} masks" if len(scanned) < len(source) else "the masks"
            rank_zero_warn(printable(f"{faults.name}: classes that never occur in {seen}: {listed(never)}"))

    def pixel_share(self) -> Tensor:
        """float32 (K,), the share of the labelled training pixels that each class has, with the background."""
        pixels = torch.from_numpy(self.source("train").pixels).double()
        return (pixels / pixels.sum()).float()

    def timm_cfg(self) -> dict[str, Any]:
        values = None if self.format != "masks" else [v if isinstance(v, int) else list(v) for v in self.coding.values]
        return super().timm_cfg() | {"mask_values": values}

    def target(self, truth: Truth) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(truth.mask))


def _shares(names: list[str], scanned: list[int], counted: np.ndarray, indices: np.ndarray) -> str:
    """The shares of pixels of each class in those of some images whose masks were counted, in words."""
    counts = counted[np.isin(scanned, indices)].sum(0)
    total = max(int(counts.sum()), 1)
    shares = [f"{label} {counts[i] / total:.1%}" for i, label in enumerate(names) if counts[i]]
    return f"; pixels: {listed(shares, 20)}; ignored {counts[IGNORE] / total:.1%}"


def class_table(root: Path) -> tuple[list[str] | None, list[tuple[int, int, int]] | None]:
    """Names and colours of the classes from ``classes.txt`` or ``class_dict.csv``; None for what is not there.

    Raises:
        UserError: The file is broken.
    """
    lines, table = root / "classes.txt", root / "class_dict.csv"
    try:
        if lines.is_file():
            names = [line.strip() for line in lines.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
            colors = None
        elif table.is_file():
            with table.open(encoding="utf-8-sig", newline="") as file:
                text = file.readlines()
            reader = csv.DictReader(text, delimiter=csv_separator(text))
            rows = [{str(k).strip().lower(): v for k, v in row.items()} for row in reader]
            names = [row["name"].strip() for row in rows]
            colors = [(int(row["r"]), int(row["g"]), int(row["b"])) for row in rows]
            if any(not 0 <= part <= 255 for color in colors for part in color) or len(set(colors)) < len(colors):
                raise ValueError("colours must be different, and of 0 to 255")
        else:
            return None, None
        if len(set(names)) < len(names):
            raise ValueError("a name is there twice")
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(f"{lines if lines.is_file() else table} is no table of classes: {one_line(error)}") from error
    return names, colors


def _stem(path: str, folder: Path) -> str:
    return os.path.splitext(os.path.relpath(path, folder))[0]


def _spread(length: int, most: int) -> list[int]:
    """Up to `most` positions, evenly spread."""
    return np.linspace(0, length - 1, min(length, most)).round().astype(int).tolist()
