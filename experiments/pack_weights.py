"""Make weights for the package from a finished training: `python -m experiments.pack_weights --help`.

The weights become float16. The header of the file keeps what the training recorded, with readable names of WordNet's
classes, and gets the accuracy that the run's own test has measured.
"""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import ImageNetInfo

from luna_vision.models.checkpoints import training_checkpoint
from luna_vision.models.weights import FOLDER
from luna_vision.utils.files import new_file

from .command import Parser

__all__ = ["main", "pack"]


def pack(weights: Path, metrics: Path, name: str, about: str, out: Path) -> dict[str, Any]:
    """Write `NAME.safetensors` into a folder.

    Args:
        weights: `best.safetensors` of a classification.
        metrics: `metrics.csv` of its run, which has the accuracy on its test images.
        name: Of the model, with a tag that tells the data.
        about: A sentence about the data.
        out: The folder.

    Returns:
        What the header records of images and classes.

    Raises:
        ValueError: The file does not record its training, or the run has not been tested.
        RuntimeError: The model was trained with other arguments than its own.
    """
    training = training_checkpoint(weights)
    if not training:
        raise ValueError(f"{weights} does not record its training")
    with metrics.open(encoding="utf-8", newline="") as file:
        tested = [row["test_acc1"] for row in csv.DictReader(file) if row.get("test_acc1")]
    if not tested:
        raise ValueError(f"{metrics} has no test_acc1: the run has not been tested")
    cfg = training["data"]["cfg"]
    cfg["label_names"] = [readable(label) for label in cfg["label_names"]]
    cfg["notes"] = [about, f"top-1 {float(tested[-1]):.4f} on its test images"]
    half = {key: value.to(torch.float16).contiguous() for key, value in load_file(weights).items()}
    model = timm.create_model(name.partition(".")[0], num_classes=cfg["num_classes"], in_chans=cfg["input_size"][0])
    model.load_state_dict(half)  # fails where the training had other arguments than the model has by default
    with new_file(out / f"{name}.safetensors") as file:
        save_file(half, file.name, {"training": json.dumps(training, default=str)})
    return cfg


def readable(label: str) -> str:
    """The first word for a WordNet id, such as "goldfish" for n01443537; other labels as they are."""
    for subset in ("imagenet-1k", "imagenet-22k"):  # neither has all that the other has
        info = ImageNetInfo(subset)
        if label in info.label_names():
            return info.label_name_to_description(label).split(",")[0]
    return label


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; returns the exit code."""
    parser = Parser(prog="python -m experiments.pack_weights", description=__doc__.split("\n\n")[1])
    parser.add_argument("run", type=Path, help="folder of a finished run, such as runs/tiny_imagenet/version_0")
    parser.add_argument("--name", default="luna_vit_nano_patch8.tiny_imagenet_64", help="of the model, with a tag")
    parser.add_argument(
        "--about", default="Tiny-ImageNet-200, recompressed (AVIF, quality 50)", help="the data of the training"
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the weights")
    args = parser.parse_args(argv)
    weights = args.run / "checkpoints" / "best.safetensors"
    try:
        cfg = pack(weights, args.run / "metrics.csv", args.name, args.about, args.out)
    except (OSError, RuntimeError, ValueError) as error:
        parser.error(error)
    size = (args.out / f"{args.name}.safetensors").stat().st_size
    print(f"{args.name}: {size / 1e6:.2f} MB, {len(cfg['label_names'])} classes, {cfg['notes'][1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
