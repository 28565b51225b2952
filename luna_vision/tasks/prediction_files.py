"""The files that predictions are written to: CSV, COCO JSON, and masks."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image

from luna_vision.utils.files import check_folder, check_output, new_file, new_folder
from luna_vision.utils.text import csv_cell, utf8

if TYPE_CHECKING:
    from .base import TimmTask


class PredictionFile:
    """A file, or a folder, of predictions: a context that takes what ``predict_step`` of a task returns.

    The file appears at the end of the block, and not at all after an error.

    Args:
        path: the file or folder.
        names: names of the classes, if they are known.
        task: the task that predicts.
    """

    default: ClassVar[str]  # its name in a run's folder
    suffix: ClassVar[str]  # of the file; empty for a folder

    def __init__(self, path: Path, names: list[str] | None, task: TimmTask) -> None:
        self.path, self.names, self.task = path, names, task
        self.closing = ExitStack()

    @classmethod
    def check(cls, path: Path) -> None:
        """Raise a ValueError or an OSError if nothing can be written to this path."""
        if cls.suffix:
            check_output(path, [cls.suffix], overwrite=True)
        else:
            check_folder(path)

    def __enter__(self) -> PredictionFile:
        self.open()
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self.finish()
        self.closing.__exit__(*error)

    def open(self) -> None:
        """Prepare for the first prediction."""

    def write(self, prediction: dict[str, Any]) -> None:
        """Take the prediction of a batch."""
        raise NotImplementedError

    def finish(self) -> None:
        """Write what is left, after the last prediction."""


class CsvPredictions(PredictionFile):
    """``image`` (path or index), ``label1`` to ``label5``, ``probability1`` to 5.

    Labels are class names where they are known, else indices. An apostrophe marks text that a spreadsheet would take
    for a formula, see `luna_vision.utils.text.csv_cell`.
    """

    default, suffix = "predictions.csv", ".csv"

    def open(self) -> None:
        file = io.TextIOWrapper(self.closing.enter_context(new_file(self.path)), encoding="utf-8", newline="")
        self.closing.callback(file.detach)  # flushes
        self.rows = csv.writer(file)
        self._has_header = False

    def row(self, *cells: Any) -> None:
        """Write a row."""
        self.rows.writerow([csv_cell(cell) if isinstance(cell, str) else cell for cell in cells])

    def header(self, prediction: dict[str, Any]) -> list[str]:
        """Names of the columns after the first."""
        count = prediction["labels"].shape[1]
        return [f"{column}{i + 1}" for column in ("label", "probability") for i in range(count)]

    def write(self, prediction: dict[str, Any]) -> None:
        if not self._has_header:
            self.row("image", *self.header(prediction))
            self._has_header = True
        self.write_rows(prediction)

    def write_rows(self, prediction: dict[str, Any]) -> None:
        columns = (prediction["ids"], prediction["labels"].tolist(), prediction["probabilities"].tolist())
        for image, labels, probabilities in zip(*columns, strict=True):
            shown = [self.names[label] for label in labels] if self.names else labels
            self.row(image, *shown, *(f"{p:.6f}" for p in probabilities))


class LabelsCsv(CsvPredictions):
    """``image``, ``labels`` (those of probability 0.5 and more, separated by |), and a column of probabilities a class.

    Text is marked as in `CsvPredictions`.
    """

    def header(self, prediction: dict[str, Any]) -> list[str]:
        count = prediction["probabilities"].shape[1]
        return ["labels", *(self.names or map(str, range(count)))]

    def write_rows(self, prediction: dict[str, Any]) -> None:
        for image, probabilities in zip(prediction["ids"], prediction["probabilities"].tolist(), strict=True):
            names = self.names or list(map(str, range(len(probabilities))))
            found = [name for name, p in zip(names, probabilities, strict=True) if p >= 0.5]
            self.row(image, "|".join(found), *(f"{p:.6f}" for p in probabilities))


class CocoPredictions(PredictionFile):
    """One JSON with ``images``, ``categories`` and ``annotations``, which have a ``score``.

    Images are numbered from 1 in the order of prediction, but those of a COCO file keep the numbers that they have
    there, and so do its categories. So ``COCO.loadRes`` takes the list of annotations as it is.
    """

    default, suffix = "predictions.json", ".json"

    def open(self) -> None:
        self._content: dict[str, list] = {"images": [], "categories": [], "annotations": []}
        self._ids = getattr(self.task.trainer.datamodule, "image_ids", {})
        self._categories = self.task.data_cfg.get("category_ids")

    def write(self, prediction: dict[str, Any]) -> None:
        images, annotations = self._content["images"], self._content["annotations"]
        for image, (height, width), objects in zip(*(prediction[k] for k in ("ids", "sizes", "objects")), strict=True):
            id_ = self._ids.get(image, len(images) + 1)
            images.append({"id": id_, "file_name": utf8(image), "width": width, "height": height})
            columns = (objects["boxes"].tolist(), objects["labels"].tolist(), objects["scores"].tolist())
            for (left, top, right, bottom), label, score in zip(*columns, strict=True):
                category = self._categories[label - 1] if self._categories else label
                box = [round(x, 3) for x in (left, top, right - left, bottom - top)]
                found = {"id": len(annotations) + 1, "image_id": id_, "category_id": category, "bbox": box}
                annotations.append(found | {"area": round(box[2] * box[3], 3), "iscrowd": 0, "score": round(score, 6)})

    def finish(self) -> None:
        count = len(self.names or []) or self.task.hparams.num_classes
        names = self.names or list(map(str, range(1, count + 1)))
        ids = self._categories or range(1, count + 1)
        self._content["categories"] = [{"id": id_, "name": name} for id_, name in zip(ids, names, strict=True)]
        with new_file(self.path) as file:
            file.write(json.dumps(self._content).encode())


class MaskPredictions(PredictionFile):
    """A folder of PNG masks, in the numbers or colours of the training masks, with a palette that shows them.

    A mask has the name of its image, below the folder that all images have in common. Where two images differ by their
    suffix alone, the mask keeps it.
    """

    default, suffix = "predictions", ""

    def open(self) -> None:
        self._folder = self.closing.enter_context(new_folder(self.path))
        hp, values = self.task.hparams, self.task.data_cfg.get("mask_values")
        count = hp.num_classes + hp.background
        values = list(range(count)) if values is None else values
        self._colors = not isinstance(values[0], int)
        palette = np.array(values, np.uint8) if self._colors else voc_palette()
        self._values = np.arange(count) if self._colors else np.array(values)
        self._palette = palette.tobytes()
        files = self.task.trainer.predict_dataloaders.dataset.source
        self._common = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
        stems = Counter(os.path.splitext(os.path.abspath(file))[0] for file in files)
        self._twice = {stem for stem, count in stems.items() if count > 1}

    def write(self, prediction: dict[str, Any]) -> None:
        for file, mask in zip(prediction["ids"], prediction["masks"], strict=True):
            numbers = self._values[mask.cpu().numpy()]
            deep = numbers.max(initial=0) > 255
            picture = Image.fromarray(numbers.astype(np.uint16 if deep else np.uint8))
            if not deep:
                picture.putpalette(self._palette)
            path = self._folder / self.name(file)
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)

    def name(self, file: str) -> str:
        """The path of an image's mask in the folder."""
        stem, suffix = os.path.splitext(os.path.abspath(file))
        relative = os.path.relpath(stem, self._common)
        return f"{relative}{suffix if stem in self._twice else ''}.png"


def voc_palette() -> np.ndarray:
    """uint8 (256, 3), the colours of Pascal VOC's masks: the bits of a number, spread over the three channels."""
    numbers = np.arange(256)
    palette = np.zeros((256, 3), np.int64)
    for bit in range(8):
        palette |= (numbers[:, None] >> np.arange(3) & 1) << (7 - bit)
        numbers = numbers >> 3
    return palette.astype(np.uint8)
