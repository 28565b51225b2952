"""Broken label files of every format: a run starts, or ends in one line of ours, and never in another error."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from luna_vision.cli.common import is_mistake
from luna_vision.data import DetectionDataModule, MultiLabelDataModule, SegmentationDataModule
from luna_vision.data.dense import DenseDataModule
from tests.labelled import WRITERS, coco_of, scenes, write_coco, write_labels, write_masks, write_voc, write_yolo

QUIET = {"num_workers": 0, "batch_size": 2}
ROUNDS = 40
ODD = [None, True, -1, 0, 3, 7, 50, 1e30, -0.5, 2**70, float("nan"), "", "7", "x" * 300, [], [1, 2], [[1, 2]], {}]
ODD += [{"size": [48, 64], "counts": "\ud800"}, {"size": [48, 64], "counts": [3072]}, [[0, 0, 9, 0, 9, 9]]]
ODD += [{"size": [48, 64], "counts": "o" * 40}, {"size": [48, 64], "counts": "P^1Z0"}, [[1e30] * 6], [[-1e9, 5] * 9]]
WORDS = [
    b"",
    b"\0",
    b"\xff\xfe",
    b"nan",
    b"inf",
    b"-1",
    b"1e999",
    b"99999999999999999999",
    b",",
    b"\n",
    b'"',
    b"<",
    b"&#0;",
]
WORDS += [b"{", b"[" * 2000, b"<a>" * 2000, b"../../x", b"\xc3\xa9", b": *a", b"&a [*a]", b"!!python/name:os.system"]


def check(data: DenseDataModule | MultiLabelDataModule) -> bool:
    """Whether the run would start and read all samples; any error but the user's is raised."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data.setup("fit")
            for split in ("train", "val"):
                dataset = data.dataset(split)
                for index in range(0 if dataset is None else len(dataset)):
                    dataset[1, index]
    except (ValueError, OSError) as error:
        if not is_mistake(error):
            raise
        return False
    return True


def both(make: Callable[..., Any], root: Path) -> int:
    return sum(
        check(make(str(root), **QUIET, **policy)) for policy in ({}, {"on_error": "skip", "max_error_share": 0.9})
    )


def corrupted(content: bytes, rng: np.random.Generator) -> bytes:
    """Bytes in which a few stretches are cut out, doubled, or replaced by something odd."""
    for _ in range(rng.integers(1, 4)):
        start, stop = sorted(rng.integers(0, len(content) + 1, 2))
        stop = start + min(stop - start, int(rng.integers(1, 30)))
        part = [b"", content[start:stop] * 2, WORDS[rng.integers(len(WORDS))]][rng.integers(3)]
        content = content[:start] + part + content[stop:]
    return content


def replaced(value: Any, rng: np.random.Generator, depth: int = 0) -> Any:
    """JSON in which one value, somewhere, is another."""
    if not isinstance(value, dict | list) or not value or (depth > 1 and rng.random() < 0.3):
        return copy.deepcopy(ODD[rng.integers(len(ODD))])
    value = copy.copy(value)
    key = list(value)[rng.integers(len(value))] if isinstance(value, dict) else int(rng.integers(len(value)))
    if rng.random() < 0.1:
        del value[key]
    else:
        value[key] = replaced(value[key], rng, depth + 1)
    return value


FILES = {
    "coco": (DetectionDataModule, write_coco, "train.json"),
    "voc": (DetectionDataModule, write_voc, "Annotations/train_1.xml"),
    "voc list": (DetectionDataModule, write_voc, "ImageSets/Main/train.txt"),
    "yolo": (DetectionDataModule, write_yolo, "labels/train/train_1.txt"),
    "yolo yaml": (DetectionDataModule, write_yolo, "data.yaml"),
    "outlines": (SegmentationDataModule, write_coco, "train.json"),
    "yolo outlines": (SegmentationDataModule, lambda root: write_yolo(root, True), "labels/train/train_1.txt"),
    "masks": (SegmentationDataModule, write_masks, "train/masks/train_1.png"),
    "names": (SegmentationDataModule, write_masks, "classes.txt"),
    "colors": (SegmentationDataModule, lambda root: write_masks(root, "colors"), "class_dict.csv"),
    "lists": (MultiLabelDataModule, write_labels, "train.csv"),
    "columns": (MultiLabelDataModule, lambda root: write_labels(root, "columns"), "train.csv"),
}


@pytest.mark.parametrize("form", FILES)
def test_corrupted_bytes(form, tmp_path):
    make, write, name = FILES[form]
    make = (lambda root, **o: MultiLabelDataModule(root, img_size=16, **o)) if make is MultiLabelDataModule else make
    file, rng = write(tmp_path) / name, np.random.default_rng(0)
    content, started = file.read_bytes(), 0
    assert both(make, tmp_path) == 2
    for _ in range(ROUNDS // 2):
        file.write_bytes(corrupted(content, rng))
        started += both(make, tmp_path)
    assert started < ROUNDS


@pytest.mark.slow
@pytest.mark.parametrize("make", [DetectionDataModule, SegmentationDataModule])
def test_odd_values_in_coco(make, tmp_path):
    write_coco(tmp_path)
    content, rng, started = coco_of(scenes("train")), np.random.default_rng(0), 0
    for _ in range(2 * ROUNDS):
        (tmp_path / "train.json").write_text(json.dumps(replaced(content, rng)))
        started += both(make, tmp_path)
    assert 0 < started < 4 * ROUNDS


@pytest.mark.parametrize("form", WRITERS)
def test_no_labels_at_all(form, tmp_path):
    WRITERS[form](tmp_path)
    for file in [*tmp_path.glob("*.json"), *tmp_path.glob("Annotations/*"), *tmp_path.glob("labels/*/*")]:
        file.write_bytes(b"")
    both(DetectionDataModule, tmp_path)


def test_masks_of_odd_kinds(tmp_path):
    write_masks(tmp_path)
    file, rng = tmp_path / "train/masks/train_0.png", np.random.default_rng(0)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I"):
        size = (64, 48) if rng.random() < 0.7 else (1, 1)
        Image.new(mode, size).save(file, "TIFF")
        both(SegmentationDataModule, tmp_path)
