"""Memory of training on a large photograph, by `train_on`: `python -m experiments.benchmarks.train_on --help`.

A training is that of `luna-vision finetune` with another `train_on`, on one photograph of noise with boxes, or with a
mask, for a single optimizer step. Each is measured in a process of its own, whose peak of resident memory is then that
of the training: reading, augmentation, forward, backward, optimizer and its state, but neither validation nor workers.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Trainer
from PIL import Image

from experiments.command import Parser, at_least, json_file, quiet_lightning
from luna_vision.data import DetectionDataModule, SegmentationDataModule
from luna_vision.data.dense import TRAIN_ON
from luna_vision.tasks import DetectionTask, SegmentationTask

from .jobs import Job, measure_all, peak_resident

__all__ = ["main", "measure"]

TASKS = ("detect", "segment")
CLASSES = 11  # as CamVid has, without a background


def write_data(task: str, root: Path, side: int) -> None:
    """A photograph for training: noise with squares of a hundredth of its side up to a fifth."""
    rng = np.random.default_rng(0)
    pixels = np.repeat(np.repeat(rng.integers(0, 256, (side // 8 + 1, side // 8 + 1, 3), np.uint8), 8, 0), 8, 1)
    mask, boxes = np.zeros((side, side), np.uint8), []
    for number in range(40):
        width = int(rng.integers(max(8, side // 100), max(9, side // 5)))
        left, top = rng.integers(0, side - width, 2).tolist()
        mask[top : top + width, left : left + width] = number % CLASSES
        boxes.append([left, top, width, width])
    name = "photo.jpg"
    images = root / "train" / "images" if task == "segment" else root / "train"
    images.mkdir(parents=True)
    Image.fromarray(pixels[:side, :side]).save(images / name)
    if task == "segment":
        (root / "train" / "masks").mkdir()
        Image.fromarray(mask).save(root / "train" / "masks" / "photo.png")
        (root / "classes.txt").write_text("\n".join(f"class{i}" for i in range(CLASSES)))
        return
    annotations = [
        {"id": i + 1, "image_id": 1, "category_id": i % CLASSES, "bbox": box, "area": box[2] ** 2, "iscrowd": 0}
        for i, box in enumerate(boxes)
    ]
    content = {
        "images": [{"id": 1, "file_name": name, "width": side, "height": side}],
        "annotations": annotations,
        "categories": [{"id": i, "name": f"class{i}"} for i in range(CLASSES)],
    }
    (root / "train.json").write_text(json.dumps(content))


def measure(job: Job) -> Job:
    """Train for a step: what it took."""
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, quiet_lightning():
        write_data(job["task"], Path(folder), job["side"])
        options = {"batch_size": 1, "num_workers": 0, "val_fraction": 0.0, "train_on": job["train_on"]}
        shared = {"model_name": job["model"], "num_classes": CLASSES, "in_chans": 3, "pyramid_channels": 128}
        if job["task"] == "segment":
            data = SegmentationDataModule(folder, **options)
            task = SegmentationTask(**shared, stride=4, background=False)
        else:
            data = DetectionDataModule(folder, **options)
            task = DetectionTask(**shared, strides=[8, 16, 32], anchor_sizes=[40, 120, 400], min_size=None)
        silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(accelerator="cpu", max_steps=1, enable_checkpointing=False, limit_val_batches=0, **silent)
        before, started = peak_resident(), time.perf_counter()
        trainer.fit(task, data)
        seconds = time.perf_counter() - started
        loss = float(trainer.callback_metrics["train_loss"])
    return {"peak_resident_bytes": peak_resident(), "resident_bytes_before": before, "seconds": seconds, "loss": loss}


def _parser() -> Parser:
    parser = Parser(
        prog="python -m experiments.benchmarks.train_on",
        description="Peak resident memory of training on one large photograph, by train_on. What --out has already is "
        "not measured again.",
    )
    parser.add_argument("--model", default="luna_vit_tiny", metavar="NAME", help="a Luna ViT")
    parser.add_argument("--side", type=at_least(64), default=4000, metavar="PIXELS", help="of the photograph")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--ways", nargs="+", choices=TRAIN_ON, default=list(TRAIN_ON), help="of train_on")
    parser.add_argument("--threads", type=at_least(1), default=1, help="of the CPU")
    parser.add_argument("--out", type=json_file, metavar="FILE", help=".json")
    return parser


def jobs(args: argparse.Namespace) -> list[Job]:
    """What is to be measured."""
    common = {"model": args.model, "side": args.side, "threads": args.threads}
    return [{**common, "task": task, "train_on": way} for task in args.tasks for way in args.ways]


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write; returns the exit code: 1 if something could not be measured."""
    args = _parser().parse_args(argv)
    rows = measure_all(measure, jobs(args), args.out, "{0[task]}, {0[side]} px, {0[train_on]}".format)
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
