"""The files that predictions are written to: CSV, COCO JSON, and masks; and the list of what is finished so far."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

import numpy as np
from PIL import Image

from luna_vision.downstream.detection import coco_content
from luna_vision.downstream.segmentation import mask_numbers
from luna_vision.images.tiff import georeference
from luna_vision.utils.errors import UserError
from luna_vision.utils.files import check_folder, check_output, new_file, open_own, write_text
from luna_vision.utils.text import csv_cell, utf8

from .outcomes import BoxOutcome

if TYPE_CHECKING:
    from .base import TimmTask


class Journal:
    """What is predicted so far, a line of JSON for each image, in ``OUT.partial`` beside the output.

    A line is on its way to the disk before the next image is predicted, so a killed run loses no image that is
    finished. The first line says what the predictions depend on. Of several processes each writes its own list, from
    the second on ``OUT.1.partial`` and so on, and reads those of all.

    Args:
        output: The file or folder of predictions.
        about: Plain data that the predictions depend on.
        keep: Whether to take what an earlier run has left; else it is replaced.
        rank: The number of this process.

    Attributes:
        records: By image, what was written of it.

    Raises:
        UserError: The file was left by a run that depended on something else, or by another program.
        OSError: It cannot be read or written.
    """

    def __init__(self, output: Path, about: dict[str, Any], keep: bool = True, rank: int = 0) -> None:
        self.output = output
        self.path = output.with_name(f"{output.name}.{rank}.partial" if rank else f"{output.name}.partial")
        self.about: dict[str, Any] = json.loads(json.dumps(about))
        self.records: dict[str, dict[str, Any]] = {}
        self._file: BinaryIO | None = None
        self._length = 0  # of what an earlier run has left, bytes
        if keep:
            self.read()
        elif not rank:
            self.remove()

    def _paths(self) -> list[Path]:
        """The lists of all processes."""
        name = re.escape(self.output.name)
        found = self.output.parent.glob("*.partial")
        return sorted(path for path in found if re.fullmatch(rf"{name}(\.\d+)?\.partial", path.name))

    def read(self) -> None:
        """Read the lists of all processes."""
        for path in self._paths():
            self._read(path)

    def _read(self, path: Path) -> None:
        with open_own(path, keep=True) as file:
            content = file.read()
        length = content.rfind(b"\n") + 1  # a line that a kill cut off was not finished
        if path == self.path and self._file is None:
            self._length = length
        try:
            about, *records = [json.loads(line) for line in content[:length].split(b"\n")[:-1]]
            self.records |= {record["image"]: record for record in records}
            known = set(about)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no list of predictions: remove it, or give another output") from error
        if other := sorted(name for name in known | set(self.about) if about.get(name) != self.about.get(name)):
            raise UserError(
                f"{path} was left by a run with other {', '.join(other)}: remove it, or give another output"
            )

    def add(self, records: list[dict[str, Any]]) -> None:
        """Write what is predicted of some images."""
        lines = records
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open_own(self.path, keep=self._length > 0)
            self._file.truncate(self._length)
            self._file.seek(self._length)
            lines = records if self._length else [self.about, *records]
        left = memoryview(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        while left:  # of a nearly full disk, a part may be written
            left = left[self._file.write(left) :]
        self.records |= {record["image"]: record for record in records}

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def remove(self) -> None:
        """Remove the lists of all processes, once the output is complete."""
        self.close()
        for path in self._paths():
            path.unlink(missing_ok=True)


class FileNames:
    """Names for files that belong to images, below the folder that all images have in common.

    Where two images differ by their suffix alone, the name keeps it.

    Args:
        files: All images.
    """

    def __init__(self, files: list[str]) -> None:
        stems = Counter(os.path.splitext(os.path.abspath(file))[0] for file in files)
        self._twice = {stem for stem, count in stems.items() if count > 1}
        self._common = os.path.commonpath([os.path.dirname(stem) for stem in stems]) if stems else os.getcwd()

    def below(self, file: str, folder: str | None) -> str:
        """The path of an image, below this folder or, without one, below that of all images; else as it is."""
        name = os.path.relpath(os.path.abspath(file), os.path.abspath(folder or self._common))
        return file if name.startswith(os.pardir) else name

    def __call__(self, file: str, suffix: str) -> str:
        """The relative path of the file with this suffix that belongs to an image."""
        stem, own = os.path.splitext(os.path.abspath(file))
        name = os.path.relpath(stem, self._common)
        name = os.path.basename(stem) if name.startswith(os.pardir) else name  # an image that is none of `files`
        return f"{name}{own if stem in self._twice else ''}{suffix}"


class PredictionFile:
    """A file, or a folder, of predictions. A subclass says how an image is recorded, and what the records become.

    Args:
        path: The file or folder.
        names: Names of the classes, if they are known.
        task: The task that predicts.
        files: All images, also those that an earlier run has predicted; empty where images are no files.
    """

    default: ClassVar[str]  # its name in a run's folder
    suffix: ClassVar[str]  # of the file; empty for a folder
    drawn: ClassVar[bool] = False  # whether predictions can be drawn over their images

    def __init__(self, path: Path, names: list[str] | None, task: TimmTask, files: list[str]) -> None:
        self.path, self.names, self.task = path, names, task
        self.file_names = FileNames(files)

    @classmethod
    def check(cls, path: Path, overwrite: bool) -> None:
        """Raise a ValueError or an OSError if nothing can be written to this path, or there is a file already."""
        if cls.suffix:
            check_output(path, [cls.suffix], overwrite)
        else:
            check_folder(path)

    def own_file(self, image: str) -> Path | None:
        """The file that the prediction of an image alone is written to, where images have such files."""
        return None

    def records(self, prediction: dict[str, Any]) -> list[dict[str, Any]]:
        """What ``predict_step`` of the task returns, as plain data: a dict for each image, with its name as "image"."""
        raise NotImplementedError

    def write(self, prediction: dict[str, Any]) -> None:
        """Write what belongs into files of their own, see `own_file`."""

    def targets(self, prediction: dict[str, Any]) -> list[Any]:
        """What ``predict_step`` returns, as `luna_vision.tasks.pictures.draw` takes it, where `drawn`."""
        raise NotImplementedError

    def finish(self, records: list[dict[str, Any]]) -> None:
        """Write what is to be written of all images at once."""


class CsvPredictions(PredictionFile):
    """``image`` (path or index), ``label1`` to ``label5``, ``probability1`` to 5.

    Labels are class names where they are known, else indices. An apostrophe marks text that a spreadsheet would take
    for a formula, see `luna_vision.utils.text.csv_cell`.
    """

    default, suffix = "predictions.csv", ".csv"

    def records(self, prediction: dict[str, Any]) -> list[dict[str, Any]]:
        columns = (prediction["ids"], prediction["labels"].tolist(), prediction["probabilities"].tolist())
        return [{"image": i, "labels": own, "probabilities": p} for i, own, p in zip(*columns, strict=True)]

    def finish(self, records: list[dict[str, Any]]) -> None:
        text = io.StringIO(newline="")
        rows = csv.writer(text)
        for cells in (self.header(records), *map(self.row, records)):
            rows.writerow([csv_cell(cell) if isinstance(cell, str) else cell for cell in cells])
        write_text(self.path, text.getvalue())

    def header(self, records: list[dict[str, Any]]) -> list[str]:
        """Names of the columns."""
        count = len(records[0]["labels"])
        return ["image", *(f"{column}{i + 1}" for column in ("label", "probability") for i in range(count))]

    def row(self, record: dict[str, Any]) -> list[Any]:
        """The cells of an image."""
        labels = [self.names[label] for label in record["labels"]] if self.names else record["labels"]
        return [record["image"], *labels, *(f"{p:.6f}" for p in record["probabilities"])]


class LabelsCsv(CsvPredictions):
    """``image``, ``labels`` (those of probability 0.5 and more, separated by |), and a column of probabilities a class.

    Text is marked as in `CsvPredictions`.
    """

    def records(self, prediction: dict[str, Any]) -> list[dict[str, Any]]:
        columns = (prediction["ids"], prediction["probabilities"].tolist())
        return [{"image": image, "probabilities": own} for image, own in zip(*columns, strict=True)]

    def header(self, records: list[dict[str, Any]]) -> list[str]:
        return ["image", "labels", *(self.names or map(str, range(len(records[0]["probabilities"]))))]

    def row(self, record: dict[str, Any]) -> list[Any]:
        probabilities = record["probabilities"]
        names = self.names or list(map(str, range(len(probabilities))))
        found = [name for name, p in zip(names, probabilities, strict=True) if p >= 0.5]
        return [record["image"], "|".join(found), *(f"{p:.6f}" for p in probabilities)]


class CocoPredictions(PredictionFile):
    """One JSON with ``images``, ``categories`` and ``annotations``, which have a ``score``.

    ``file_name`` is relative to the folder that is predicted or, of several ones and of files, to that of all images.

    Images are numbered from 1 in the order of prediction, but those of a COCO file keep the numbers that they have
    there, and so do its categories. So ``COCO.loadRes`` takes the list of annotations as it is.
    """

    default, suffix, drawn = "predictions.json", ".json", True

    def records(self, prediction: dict[str, Any]) -> list[dict[str, Any]]:
        found = zip(*(prediction[name] for name in ("ids", "sizes", "objects")), strict=True)
        return [
            {"image": image, "size": list(size), **{name: value.tolist() for name, value in objects.items()}}
            for image, size, objects in found
        ]

    def targets(self, prediction: dict[str, Any]) -> list[Any]:
        return list(map(BoxOutcome.predicted, prediction["objects"]))

    def finish(self, records: list[dict[str, Any]]) -> None:
        data = self.task.trainer.datamodule
        known, given = getattr(data, "image_ids", {}), getattr(data, "predict_path", None)
        (folder,) = [given] if isinstance(given, str) else given if given is not None and len(given) == 1 else [None]
        folder = folder if folder is not None and os.path.isdir(folder) else None
        count = len(self.names or []) or self.task.hparams.num_classes
        names = self.names or list(map(str, range(1, count + 1)))
        ids = self.task.data_cfg.get("category_ids") or range(1, count + 1)
        files = [
            record
            | {"file_name": utf8(self.file_names.below(record["image"], folder)), "id": known.get(record["image"], i)}
            for i, record in enumerate(records, 1)
        ]
        with new_file(self.path) as file:
            file.write(json.dumps(coco_content(files, names, ids)).encode())


class MaskPredictions(PredictionFile):
    """A folder of masks, in the numbers or colours of the training masks, with a palette that shows them.

    A mask has the name of its image, see `FileNames`. It is a PNG, or a TIFF with the georeference of its image where
    that is a GeoTIFF.
    """

    default, suffix, drawn = "predictions", "", True

    def __init__(self, path: Path, names: list[str] | None, task: TimmTask, files: list[str]) -> None:
        super().__init__(path, names, task, files)
        hp = task.hparams
        self._values, palette = mask_numbers(hp.num_classes + hp.background, task.data_cfg.get("mask_values"))
        self._palette = palette.tobytes()

    def own_file(self, image: str) -> Path:
        return self.path / self.file_names(image, ".tif" if _georeference(image) else ".png")

    def records(self, prediction: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"image": file} for file in prediction["ids"]]

    def write(self, prediction: dict[str, Any]) -> None:
        for file, mask in zip(prediction["ids"], prediction["masks"], strict=True):
            numbers = self._values[mask.cpu().numpy()]
            deep = numbers.max(initial=0) > 255
            picture = Image.fromarray(numbers.astype(np.uint16 if deep else np.uint8))
            if not deep:
                picture.putpalette(self._palette)
            tags = _georeference(file)
            options = {"format": "TIFF", "tiffinfo": tags, "compression": "tiff_deflate"} if tags else {"format": "PNG"}
            with new_file(self.own_file(file)) as new:
                picture.save(new, **options)

    def targets(self, prediction: dict[str, Any]) -> list[Any]:
        return prediction["masks"]


def _georeference(image: str) -> Any:
    """The georeference of an image, None also of a broken one: who reads its pixels says what is wrong."""
    try:
        return georeference(image)
    except Exception:  # Pillow raises nearly anything for a broken file
        return None
