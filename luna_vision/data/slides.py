"""Whole slides, and other images of any size, with one label each: a CSV table. Their pixels are read by rows.

Shapes: H', W' patch grid.
"""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.data import DataLoader

from luna_vision.data.base import hold_out
from luna_vision.data.faults import LabelFaults
from luna_vision.data.folders import PhotoDataModule
from luna_vision.data.images import Source, TransformedDataset
from luna_vision.data.label_files import COLUMNS, MISSING, TWICE, UNKNOWN, read_csv, split_names
from luna_vision.data.sampling import sample_seed
from luna_vision.execution.streamed import PatchRows
from luna_vision.images import open_image
from luna_vision.images.find import MASK_WORDS, listed, region_of, region_text
from luna_vision.images.foreground import patch_mask
from luna_vision.images.pixels import Pixels
from luna_vision.images.regions import Choice
from luna_vision.images.values import DATA, PERCENTILE
from luna_vision.models import LunaVit
from luna_vision.utils.checks import check_share
from luna_vision.utils.errors import UserError

NEEDED = ("path", "label")
RECORDED = ("level", "mpp", "magnification", "bands", "channel")  # what a checkpoint says of the part of a file
SPLITS = {name: split for split in ("train", "val", "test") for name in split_names(split)}


class Row(NamedTuple):
    """What a table says of a slide."""

    path: str
    label: str = ""  # name of its class
    mask: str | None = None  # "otsu", "valid" or a file, see `luna_vision.images.foreground.patch_mask`
    region: tuple[float, ...] | None = None  # (x, y, width, height) in pixels of level 0; None for the whole image

    @property
    def name(self) -> str:
        """What predictions call it."""
        return self.path if self.region is None else f"{self.path} {region_text(self.region)}"


class Slide:
    """A sample: a slide that is opened when a model asks for its patches."""

    def __init__(self, row: Row, data: "SlideDataModule", flip: tuple[bool, bool] = (False, False)) -> None:
        """
        Args:
            row: What to read.
            data: Says how.
            flip: Upside down, and from left to right.
        """
        self.row, self.data, self.flip = row, data, flip

    def patches(self, model: LunaVit, group: ProcessGroup | None = None) -> PatchRows:
        """Open the slide for a model, and for the processes that share it, if there is a group.

        Raises:
            ValueError: It has fewer rows of patches than there are processes.
            UserError: There is no such part of it, or the mask leaves nothing of it.
            OSError: It cannot be read.
        """
        row, data, side = self.row, self.data, model.patch_embed.patch_size
        image = open_image(row.path, **vars(replace(data.choice, region=row.region)))
        like = next(model.parameters())
        pixels = Pixels(image, model.in_chans, data.mean, data.std, like.dtype, like.device, data.values)
        if (known := (row.name, side)) not in data.known_masks:
            mask = row.mask or data.mask
            if mask is not None:
                grid_size = tuple(-(-length // s) for length, s in zip(image.shape, side, strict=False))
                pixels.restrict(patch_mask(mask, image, grid_size, side, data.values.nodata), side)
            data.known_masks[known] = pixels.valid(side, 1)
        return PatchRows(model, pixels, data.known_masks[known], self.flip, group)


class SlideRows:
    """(row, label) by index.

    Attributes:
        rows: What the table says of each slide.
        targets: The labels.
        where: The table.
    """

    def __init__(self, rows: list[Row], class_names: list[str], where: str) -> None:
        self.rows, self.where = rows, where
        self.targets = [class_names.index(row.label) for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def sample_file(self, index: int) -> str:
        return self.rows[index].name

    def __getitem__(self, index: int) -> tuple[Row, int]:
        return self.rows[index], self.targets[index]


def read_slides(path: Path, faults: LabelFaults, files: bool = True) -> dict[str, list[Row]]:
    """The rows of a table by split, all "train" without a column of that name.

    Args:
        path: A CSV file with a header; relative paths in it begin at its folder, and other columns are for others.
        faults: Is told what is left out.
        files: A file that does not exist is a fault.

    Raises:
        UserError: It is no such table, or lacks a column.
    """
    header, rows = read_csv(path)
    if lacking := [name for name in NEEDED if name not in header]:
        raise UserError(f"{path} has no column {' and no column '.join(lacking)}, but {', '.join(header)}")
    found: dict[str, list[Row]] = {}
    seen: set[str] = set()
    for number, cells in rows:
        where = f"{path.name} row {number}"
        if len(cells) != len(header):
            faults.add(COLUMNS, where)
            continue
        given = dict(zip(header, cells, strict=True))
        region = _region(given["region"], where) if given.get("region") else ()
        mask = given.get("mask") or None
        if mask is not None and mask not in MASK_WORDS:
            mask = str(path.parent / mask)
        row = Row(str(path.parent / given["path"]), given["label"], mask, region or None)
        if not given["path"] or (files and not Path(row.path).exists()):
            faults.add(MISSING, f"{where}: {given['path']}")
        elif row.name in seen:
            faults.add(TWICE, f"{where}: {given['path']}")
        elif not row.label:
            faults.add("row without a label", where)
        elif region is None:
            faults.add("region that is not X Y WIDTH HEIGHT in pixels", f"{where}: {given['region']}")
        elif files and mask is not None and mask not in MASK_WORDS and not Path(mask).is_file():
            faults.add("missing mask file", f"{where}: {given['mask']}")
        elif (split := given.get("split") or "train") not in SPLITS:
            faults.add("split that is not train, val or test", f"{where}: {split}")
        else:
            seen.add(row.name)
            found.setdefault(SPLITS[split], []).append(row)
    return found


def _region(cell: str, where: str) -> tuple[float, ...] | None:
    """The numbers of a region; None if it is no region."""
    try:
        region = region_of(cell, where)
        Choice(region=region)  # whose sides must be above 0
    except UserError:
        return None
    return region


class SlideDataset(TransformedDataset):
    """(`Slide`, label) of `SlideRows`."""

    def __init__(self, *args: Any, data: "SlideDataModule", flips: tuple[float, float]) -> None:
        super().__init__(*args)
        self.data, self.flips = data, flips

    def _read(self, source: Source, transform: Any, index: int) -> tuple[Row, int]:
        return source[index]

    def prepare(self, image: Row, label: int, epoch: int, index: int, *args: Any) -> tuple[Slide, int]:
        draws = np.random.default_rng(sample_seed(self.seed, epoch, index)).random(2)
        return Slide(image, self.data, tuple((draws < self.flips).tolist())), label


class SlideDataModule(PhotoDataModule):
    """Whole slides, or other images of any size, with one label each, for :class:`~luna_vision.tasks.SlideTask`.

    ``root`` is a CSV table with a header. Its columns are ``path`` and ``label``, and perhaps ``mask`` ("otsu",
    "valid", an image or GeoJSON, as of ``luna-vision encode``), ``region`` (X Y WIDTH HEIGHT in pixels of level 0) and
    ``split`` (train, val or test); it may have others. Relative paths begin at its folder. Without rows for val,
    ``val_fraction`` of the files for training is held out, each with all of its regions; without rows for test, those
    for val are tested.

    Batches are ``(slides, labels)``: a list of :class:`Slide`, whose pixels the task reads by rows, and int64 (B,).
    Files are those of :func:`luna_vision.images.open_image`; PNG and JPEG are decoded as a whole.

    Args:
        root: The table.
        img_size: Side in pixels that checkpoints note; any size is read, and none is resized.
        in_chans: 1 (grey) or 3 (RGB), to which images are converted; or any other number of bands.
        batch_size: Slides in a batch on each device, all of whose activations are kept; ``accumulate_grad_batches``
            of the trainer takes one after the other.
        seed: Seed of the shuffle and of flips.
        val_fraction: Share of the training files to hold out for validation, see above.
        level, mpp, magnification: Which level of a pyramid, or how large a pixel, see
            :class:`luna_vision.images.regions.Choice`; likewise down to channel.
        bands: Numbers of bands, from 1.
        channel: Names or numbers of channels.
        mask: For rows without one of their own.
        hflip, vflip: Probability of a flip from left to right, and upside down.
        mean, std, value_range, nodata, fill: As in :class:`ImageDataModule`, but in numbers: nothing is measured.
        on_error: "skip" leaves out faulty rows; an image that cannot be read is an error.
        max_error_share: Largest share of the rows that "skip" leaves out.
        predict_path: Files to predict; the slides for test if None. With it, the files of the table may be missing.

    Raises:
        ValueError: On setup: faulty rows; an argument out of range.
        FileNotFoundError: On setup: there is no table.
    """

    large = predicts_files = True

    def __init__(
        self,
        root: str = "slides.csv",
        img_size: int | list[int] = 4096,
        in_chans: int = 3,
        batch_size: int = 1,
        seed: int = 0,
        val_fraction: float = 0.2,
        level: int | None = None,
        mpp: float | None = None,
        magnification: float | None = None,
        bands: list[int] | None = None,
        channel: list[str] | None = None,
        mask: str | None = None,
        hflip: float = 0.5,
        vflip: float = 0.5,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        value_range: str | list[float] | None = None,
        nodata: float | None = None,
        fill: float | str | None = None,
        on_error: str = "raise",
        max_error_share: float = 0.01,
        predict_path: str | list[str] | None = None,
    ) -> None:
        if DATA in (mean, value_range) or value_range == PERCENTILE:
            raise UserError(f"mean {DATA!r} and value_range {PERCENTILE!r} hold whole images: give numbers for slides")
        super().__init__(
            root=root,
            img_size=img_size,
            in_chans=in_chans,
            batch_size=batch_size,
            num_workers=0,  # a slide is read while the model takes it
            seed=seed,
            val_fraction=val_fraction,
            mean=mean,
            std=std,
            value_range=value_range,
            nodata=nodata,
            fill=fill,
            crop_pct=None,
            augmentation="none",
            crop="none",
            on_error=on_error,
            max_error_share=max_error_share,
            predict_path=predict_path,
        )
        check_share(hflip=hflip, vflip=vflip)
        self.choice = Choice(level, mpp, magnification, bands=bands, channel=channel)
        self.mask, self.flips = mask, (vflip, hflip)
        # the patches (H', W') to look at, as far as they are known, by slide and size of patches
        self.known_masks: dict[tuple[str, tuple[int, int]], np.ndarray | None] = {}
        self._table: dict[str, list[Row]] | None = None

    def table(self) -> dict[str, list[Row]]:
        """The rows of each split, read once."""
        if self._table is None:
            path = Path(self.root)
            if not path.is_file():
                raise FileNotFoundError(f"no table {path}: root= must be a CSV file with the columns path and label")
            faults = LabelFaults(type(self).__name__, self.max_error_share)
            found = read_slides(path, faults, files=self.predict_path is None)
            names = {row.label for row in found.get("train", [])}
            if len(names) > 1:
                for split, rows in found.items():
                    for row in rows:
                        if row.label not in names:
                            faults.add(UNKNOWN, f"{split} {row.name}: {row.label}")
                    found[split] = [row for row in rows if row.label in names]
            faults.settle(sum(map(len, found.values())))
            if len(names) < 2:
                given = listed(sorted(names)) if names else "none"
                raise UserError(f"{path} must have two or more labels to train on, got {given}")
            self._table = found
        return self._table

    @cached_property
    def class_names(self) -> list[str]:
        return sorted({row.label for row in self.table()["train"]})

    def make_source(self, split: str) -> Source | None:
        rows = self.table()
        if split == "test" and "test" not in rows:
            split = "val"
        if split in rows and (split != "train" or "val" in rows):
            return SlideRows(rows[split], self.class_names, self.root)
        labels = {row.path: row.label for row in rows["train"]}  # of a file with several, the last
        files = np.array(list(labels))[hold_out(list(labels.values()), self.val_fraction)[split != "train"]].tolist()
        part = [row for row in rows["train"] if row.path in set(files)]
        return SlideRows(part, self.class_names, self.root) if part else None

    def _tensors(self, source: Source, split: str) -> SlideDataset:
        flips = self.flips if split == "train" else (0.0, 0.0)
        return SlideDataset(source, *self._arguments(split), data=self, flips=flips)

    def timm_cfg(self) -> dict[str, Any]:
        reads = {name: value for name in RECORDED if (value := getattr(self.choice, name)) is not None}
        mask = {"mask": self.mask} if self.mask in MASK_WORDS else {}  # a file would stay behind
        return super().timm_cfg() | {"slides": reads | mask}

    def reading(self) -> dict[str, Any]:
        return super().reading() | {"choice": self.choice.described(), "mask": self.mask}

    def predict_dataloader(self) -> DataLoader:
        files = self.files_to_predict()
        rows = self.make_source("test").rows if self.predict_path is None else [Row(file) for file in files]
        return self._loader([(Slide(row, self), row.name) for row in rows if row.name not in self.finished], 1)

    @staticmethod
    def collate_fn(samples: list[tuple[Slide, int | str]]) -> tuple[list[Slide], Tensor | list[str]]:
        slides, labels = zip(*samples, strict=True)
        return list(slides), list(labels) if isinstance(labels[0], str) else torch.tensor(labels)
