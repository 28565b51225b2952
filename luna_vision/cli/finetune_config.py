"""The configuration of a fine-tuning: what a folder of labelled files is, and the YAML that suits it."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule

from ..data import DetectionDataModule, ImageFolderDataModule, MultiLabelDataModule, SegmentationDataModule
from ..data.base import ImageDataModule
from ..data.dense import IGNORE, DenseDataModule
from ..data.label_files import image_size
from ..data.segmentation import BINARY
from ..images.find import listed
from ..models.factory import training_checkpoint
from ..models.weights import SHIPPED
from ..utils.checks import check_option
from ..utils.errors import UserError
from .recipe import loggers

SAMPLED = 200  # images whose size is looked at
LARGE = 1024  # longer side of images, pixels, beyond which training is on crops
CROP = 512
IMAGES_SEEN = 20_000  # in a whole run, roughly


def configuration(
    task: str,
    data: Path,
    out: Path,
    model: str | None = None,
    checkpoint: Path | None = None,
    options: Sequence[str] = (),
) -> tuple[dict[str, Any], list[str]]:
    """The complete configuration of a run, and what was recognised, in words.

    Args:
        task: A key of `TASKS`.
        data: Folder of the images and their labels.
        out: Folder of the run.
        model: A name of timm; by default that of the checkpoint, else ``luna_vit_tiny``.
        checkpoint: Weights to start from; by default those of the package, if it has some of the model.
        options: Those of the data, as words of a command line. They win, also where the data is recognised.

    Raises:
        ValueError: The data is faulty.
        ArgumentError: An option is none of the data.
        FileNotFoundError: It is not there.
    """
    check_option("task", task, TASKS)
    if not data.exists():
        raise FileNotFoundError(f"--data: there is no {data}")
    task_class, data_class, make = TASKS[task]
    given = _parsed(data_class, options)
    module = data_class(**{"root": str(data)} | given)
    data_args, model_args, said = make(module)
    trained = training_checkpoint(checkpoint).get("hyper_parameters", {}) if checkpoint else {}
    name = model or trained.get("model_name", "luna_vit_tiny")
    recorded = (trained.get("model_kwargs") or {}) if name == trained.get("model_name") else {}
    ours = checkpoint is None and name in [shipped.partition(".")[0] for shipped in SHIPPED]
    start = str(checkpoint) if checkpoint else "the weights of the package" if ours else None
    arguments = {
        "model_name": name,
        "model_kwargs": {"pretrained": True} if ours else {k: v for k, v in recorded.items() if k != "img_size"},
        "checkpoint": str(checkpoint) if checkpoint else None,
        **model_args,
        "optimizer": "adamw",
        "lr": 3e-4 if checkpoint or ours else 1e-3,
        "weight_decay": 0.05,
        "scheduler": "cosine",
        "warmup_epochs": 1,
        "warmup_lr": 1e-6,
        "min_lr": 1e-5,
    }
    images = len(module.make_source("train"))
    epochs = int(np.clip(round(IMAGES_SEEN / images), 5, 200))
    config = {
        "name": out.name,
        "seed_everything": 0,
        "test_after_fit": True,
        "model": {"class_path": f"luna_vision.tasks.{task_class}", "init_args": arguments},
        "data": {
            "class_path": f"luna_vision.data.{type(module).__name__}",
            "init_args": {"root": str(data), **data_args, "num_workers": min(4, (os.cpu_count() or 2) - 1), "seed": 0}
            | given,
        },
        "trainer": {
            "accelerator": "auto",
            "devices": 1,
            "precision": "32-true",
            "max_epochs": epochs,
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 10,
            "num_sanity_val_steps": 0,
            "default_root_dir": str(out),
            "logger": loggers(out),
            "callbacks+": [
                {"class_path": "luna_vision.tasks.EMA", "init_args": {"decay": 0.99, "warmup": True}},
                {"class_path": "luna_vision.tasks.LogPictures"},
                {"class_path": "luna_vision.tasks.Report"},
            ],
        },
    }
    counts = f"{images} training images, classes: {listed(list(module.class_names), 20)}"
    begins = [f"{name} starts from {start}"] if start else []  # else an option of `fit` may say from what
    return config, [f"recognised: {said}", counts, *begins]


def data_options(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of a command line that are options of the data, and the others."""
    of_data, others, left = [], [], list(words)
    while left:
        word = left.pop(0)
        kind = of_data if word.startswith("--data.") else others
        kind.append(word)
        if kind is of_data and "=" not in word and left:
            kind.append(left.pop(0))
    return of_data, others


def _parsed(data_class: type[ImageDataModule], options: Sequence[str]) -> dict[str, Any]:
    """The arguments of a data module that these words give."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    words = [f"--data=luna_vision.data.{data_class.__name__}", *options]
    return parser.parse_args(words, defaults=False).as_dict()["data"].get("init_args", {})


Made = tuple[dict[str, Any], dict[str, Any], str]  # arguments of the data, those of the task, and words


def _classify(module: ImageFolderDataModule) -> Made:
    if len(names := module.class_names) < 2:
        raise UserError(f"{module.folder('train')} has one class folder alone, {names[0]}: there must be two or more")
    side = _side(module.make_source("train"))
    data = {"img_size": side, "crop_pct": 1.0, "batch_size": 32, "val_fraction": 0.1, "crop_scale": [0.3, 1.0]}
    said = f"folders of images, a class each, in {module.root}"
    return data, {"label_smoothing": 0.1, "compile": "auto"}, said


def _multilabel(module: MultiLabelDataModule) -> Made:
    side = _side(module.make_source("train"))
    data = {"img_size": side, "crop_pct": 1.0, "batch_size": 32, "val_fraction": 0.1, "crop_scale": [0.3, 1.0]}
    said = f"a table of labels, {module.table('train').where}"
    return data, {"class_weights": "balanced", "compile": "auto"}, said


def _detect(module: DetectionDataModule) -> Made:
    source = module.source("train")
    labels = source.labels
    data = {"format": module.format, "class_names": module.class_names, "val_fraction": 0.1}
    boxes = np.concatenate([image.boxes for image in labels.images])
    sides = np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    anchors = [max(8, int(side)) for side in np.quantile(sides, (0.15, 0.5, 0.85)).round()]
    model = {
        "detector": "faster_rcnn",
        "strides": [8, 16, 32],
        "pyramid_channels": 128,
        "anchor_sizes": anchors,
        "min_size": None,
    }
    said = f"boxes in the format {module.format}, {labels.where}; anchors of {anchors} pixels, as the boxes are"
    return data | _size_options(module, [image.size for image in labels.images]), model, said


def _segment(module: SegmentationDataModule) -> Made:
    source = module.source("train")
    data = {"format": module.format, "background": module.background, "val_fraction": 0.1}
    unnamed = ""
    if module.format == "masks":
        coding = module.coding
        data |= {"classes": coding.names, "values": [v if isinstance(v, int) else list(v) for v in coding.values]}
        if coding.values == BINARY:
            unnamed = f"; they hold 0 and 255 alone, which are {' and '.join(coding.names)}"
        elif coding.names == list(map(str, coding.values)) and module.ignored == IGNORE:
            last = coding.names[-1]
            unnamed = (
                f"; no file names the classes: each number is one, also {last}, which has {int(source.pixels[-1]):,} "
                f"pixels, unless --data.ignore_index {last} leaves it out"
            )
    else:
        data |= {"classes": module.class_names}
    background = "the first class is the background" if module.background else "no background"
    kind = "masks" if module.format == "masks" else f"outlines in the format {module.format}"
    said = f"{kind}, {source.where}; {background}{unnamed}"
    options = _size_options(module, _sizes(source))
    return data | options, {"stride": 4, "pyramid_channels": 128}, said


TASKS = {
    "classify": ("ClassificationTask", ImageFolderDataModule, _classify),
    "multilabel": ("MultiLabelTask", MultiLabelDataModule, _multilabel),
    "detect": ("DetectionTask", DetectionDataModule, _detect),
    "segment": ("SegmentationTask", SegmentationDataModule, _segment),
}


def _sizes(source: Any) -> list[tuple[int, int]]:
    """Height and width of some of the images."""
    whole = getattr(source, "dataset", source)
    count = min(len(whole), SAMPLED)
    at = np.linspace(0, len(whole) - 1, count).round().astype(int)
    name = whole.sample_file if hasattr(whole, "sample_file") else lambda index: whole.samples[index][0]
    return [image_size(name(int(index))) for index in at]


def _side(source: Any) -> int:
    """The side to train at: that of most images, as whole patches of 16 pixels, and at most 224."""
    side = int(np.median([min(size) for size in _sizes(source)]))
    return int(np.clip(side // 16 * 16, 32, 224))


def _size_options(module: DenseDataModule, sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Whether to train on whole images or on crops."""
    longer = int(np.median([max(size) for size in sizes]))
    crops = longer > LARGE or module.masks and longer > CROP
    options = {"train_on": "crops", "crop_size": CROP} if crops else {"train_on": "whole"}
    print(f"images of about {longer} pixels: train_on {options['train_on']} suits them", file=sys.stderr)
    return options | {"scale": [0.75, 1.33], "hflip": 0.5, "batch_size": 4}
