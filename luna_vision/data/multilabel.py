"""Photos with any number of labels each, from a table."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from luna_vision.data.faults import LabelFaults
from luna_vision.data.folders import PhotoDataModule
from luna_vision.data.images import Source, TransformedDataset
from luna_vision.data.label_files import COLUMNS, MISSING, TWICE, UNKNOWN, in_words, read_csv, split_names
from luna_vision.data.sampling import repeated, sample_seed
from luna_vision.images.decode import read_image
from luna_vision.images.find import contents
from luna_vision.utils.checks import check_share
from luna_vision.utils.errors import UserError

SEPARATORS = ("|", ";", ",")
YES, NO = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no", "")


class LabelTable:
    """(image, labels) of a table: labels are float32 (K,), 1 for the classes that an image has, else 0.

    Attributes:
        class_names: Names of the K classes.
        matrix: float32 (n, K), all labels.
        where: In words, where they are.
    """

    def __init__(self, files: list[str], matrix: np.ndarray, class_names: list[str], where: str) -> None:
        self.files, self.matrix, self.class_names, self.where = files, matrix, class_names, where

    def __len__(self) -> int:
        return len(self.files)

    def holds(self, indices: np.ndarray) -> str:
        """How many labels of each class these images have, in words."""
        return in_words(self.class_names, self.matrix[indices], "labels")

    def sample_file(self, index: int) -> str:
        return self.files[index]

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        return read_image(self.files[index]), self.matrix[index]


def read_table(
    path: Path, class_names: list[str] | None, faults: LabelFaults, separator: str | None = None
) -> LabelTable:
    """Read a CSV file with a header. The first column names the images, relative to the file or to a folder beside it.

    With two columns, the second one lists the labels of an image; with more, each other column is a class, and has 0 or
    1.

    Args:
        path: The file.
        class_names: The classes of training; None takes those of the file.
        faults: Is told what is left out.
        separator: Between labels in a list; by default the first of | ; , that occurs.

    Raises:
        UserError: It is no such table, or lacks the column of a class.
    """
    header, rows = read_csv(path)
    folders = [path.parent, path.parent / path.stem, path.parent / "images", path.parent / path.stem / "images"]
    names = [row[0] for _, row in rows if row[0]]  # the first of which may be missing
    folder = next((folder for folder in folders if any((folder / name).is_file() for name in names)), path.parent)
    kept: list[tuple[str, list[str]]] = []
    seen: set[str] = set()
    for number, row in rows:
        where, name = f"{path.name} row {number}", row[0]
        if len(row) != len(header):
            faults.add(COLUMNS, where)
        elif name in seen:
            faults.add(TWICE, f"{where}: {name}")
        elif not name or not (folder / name).is_file():
            faults.add(MISSING, f"{where}: {name}")
        else:
            seen.add(name)
            kept.append((where, [str(folder / name), *row[1:]]))
    other = class_names is not None and header[-1] not in class_names
    lists = len(header) == 2 and (other or any(cells[1].lower() not in YES + NO for _, cells in kept))
    if lists:
        separator = separator or next((s for s in SEPARATORS if any(s in cells[1] for _, cells in kept)), SEPARATORS[0])
        found = [[label for part in cells[1].split(separator) if (label := part.strip())] for _, cells in kept]
        class_names = sorted({label for labels in found for label in labels}) if class_names is None else class_names
    else:
        if lacking := [name for name in class_names or () if name not in header[1:]]:
            raise UserError(f"{path} has no column {' and no column '.join(lacking)}, but {', '.join(header[1:])}")
        found = [_columns(cells[1:], header[1:], where, faults) for where, cells in kept]
        class_names = header[1:] if class_names is None else class_names
    matrix = np.zeros((len(kept), len(class_names)), np.float32)
    at = {name: i for i, name in enumerate(class_names)}
    for row, ((where, _), labels) in enumerate(zip(kept, found, strict=True)):
        for label in labels:
            if label in at:
                matrix[row, at[label]] = 1
            else:
                faults.add(UNKNOWN, f"{where}: {label}")
    return LabelTable([cells[0] for _, cells in kept], matrix, class_names, str(path))


def _columns(cells: list[str], names: list[str], where: str, faults: LabelFaults) -> list[str]:
    """The names of the columns with a 1; a cell that is neither 0 nor 1 is a fault."""
    for name, cell in zip(names, cells, strict=True):
        if cell.lower() not in YES + NO:
            faults.add("cell that is neither 0 nor 1", f"{where} {name}: {cell[:20]}")
    return [name for name, cell in zip(names, cells, strict=True) if cell.lower() in YES]


class MultiLabelDataset(TransformedDataset):
    """(image tensor, labels (K,)) of a `LabelTable`."""

    def prepare(self, image: Any, label: np.ndarray, epoch: int, index: int, what: str, transform: Any = None) -> tuple:
        tensor = (transform or self.transform)(image, sample_seed(self.seed, epoch, index))
        return tensor, torch.from_numpy(label)


class MultiLabelDataModule(PhotoDataModule):
    """Photos with any number of labels each, for :class:`~luna_vision.tasks.MultiLabelTask`.

    ``root/train.csv``, and ``root/val.csv`` and ``root/test.csv`` if there are any, name the images in the first
    column; without splits, ``root`` has one CSV file, or is it. Two layouts are read: a second column with the labels
    of an image, "cat|dog", or a column for each class with 0 or 1. Files are found beside the table, in a folder of its
    name or in ``images``. Targets are float32 (B, K).

    Args:
        root: Folder of the tables, or a table for training.
        separator: Between labels in a list; by default the first of | ; , that occurs.
        repeat_rare: Images of classes that fewer than this share of the images have come more often, see
            :func:`luna_vision.data.sampling.repeat_rare`; 0 is off.
        **kwargs: The other arguments of :class:`ImageDataModule`. ``on_error`` also counts faulty rows.

    Raises:
        ValueError: On setup: faulty labels; an argument out of range.
        FileNotFoundError: On setup: there is no table for training.
    """

    dataset_type = MultiLabelDataset
    predicts_files = True

    def __init__(self, root: str = "data", separator: str | None = None, repeat_rare: float = 0.0, **kwargs) -> None:
        super().__init__(root=root, **kwargs)
        check_share(repeat_rare=repeat_rare)
        self.separator, self.repeat_rare = separator, repeat_rare
        self._tables: dict[str, LabelTable | None] = {}

    @property
    def class_names(self) -> list[str]:
        return self.table("train").class_names

    def table(self, split: str) -> LabelTable | None:
        """The table of a split, read once; None if there is none."""
        if split not in self._tables:
            path = self._path(split)
            if path is None and split == "train":
                raise FileNotFoundError(
                    f"no table of labels in {self.root}, which {contents(self.root)}: it must have train.csv, or "
                    "one other CSV file, which names images and labels"
                )
            self._tables[split] = None if path is None else self._read(path, split)
        return self._tables[split]

    def _path(self, split: str) -> Path | None:
        """The file of a split. Without such files, the one there is, or ``root`` itself, is for training."""
        root = Path(self.root)
        tables = {path.stem: path for path in ([root] if root.is_file() else sorted(root.glob("[!.]*.csv")))}
        splits = {name for split in ("train", "val", "test") for name in split_names(split)}
        if split == "train" and len(tables) == 1 and not splits & set(tables):
            return next(iter(tables.values()))
        return next((tables[name] for name in split_names(split) if name in tables), None)

    def _read(self, path: Path, split: str) -> LabelTable:
        faults = LabelFaults(f"{type(self).__name__} {split}", self.max_error_share)
        names = None if split == "train" else self.class_names
        table = read_table(path, names, faults, self.separator)
        faults.settle(len(table))
        if not len(table) or not table.class_names:
            raise UserError(f"{path} has no {'images' if table.class_names else 'labels'}")
        return table

    def make_source(self, split: str) -> Source | None:
        source = self.split_source(split, self.table)
        if split == "train" and self.repeat_rare:
            return repeated(source, self.table("train").matrix, self.repeat_rare)
        return source

    def positive_share(self) -> Tensor:
        """float32 (K,), the share of the training images that have each class."""
        return torch.from_numpy(self.table("train").matrix.mean(0))
