"""Images a second that one core reads, decodes and augments: ``python -m experiments.benchmarks.data --help``.

The images are random parts of scikit-learn's two sample photographs, written as JPEG files of 500 x 375 pixels, the
usual size in ImageNet. They stay in the page cache: it is reading and decoding that is measured, not the disk.
"""

import importlib.metadata
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from tqdm import tqdm

from experiments.command import Parser, at_least, markdown_table, measured_on
from luna_vision.data import (
    AUGMENTATIONS,
    ImageDataModule,
    ImageFolderDataModule,
    LitDataDataModule,
    WebDatasetDataModule,
)
from luna_vision.data.convert import convert
from luna_vision.utils.files import write_json, write_text

__all__ = ["main", "make_photographs", "measure", "table"]

SOURCES = {"folder": ImageFolderDataModule, "webdataset": WebDatasetDataModule, "litdata": LitDataDataModule}
LIBRARIES = ("albumentations", "torchvision", "pillow", "opencv-python-headless", "webdataset", "litdata", "lightning")
SIZE, QUALITY = (500, 375), 90


def make_photographs(root: Path, count: int) -> int:
    """Write JPEG files to root/train/{china,flower}/; returns their mean size in bytes. The same ones every time."""
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    sizes = []
    for index in range(count):
        photo, name = photos[index % 2], ("china", "flower")[index % 2]
        width = int(rng.integers(photo.width // 2, photo.height * 4 // 3))
        height = width * 3 // 4
        left, top = int(rng.integers(photo.width - width + 1)), int(rng.integers(photo.height - height + 1))
        part = photo.resize(SIZE, Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        path = root / "train" / name / f"{index:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        part.save(path, quality=QUALITY)
        sizes.append(path.stat().st_size)
    return round(statistics.mean(sizes))


def measure(
    cells: dict[tuple[str, str], ImageDataModule], images: int, repeats: int, tick: Callable[[], Any]
) -> list[dict[str, Any]]:
    """Read the training set of each data module several times, in turn; a first time is for the caches.

    Returns:
        For each source and augmentation, images a second: the median of the repeats and their range.
    """
    rates: dict[tuple[str, str], list[float]] = {key: [] for key in cells}
    for repeat, (key, module) in itertools.product(range(repeats + 1), cells.items()):
        started = time.perf_counter()
        seen = sum(len(targets) for _, targets in module.train_dataloader())
        assert seen == images
        if repeat:
            rates[key].append(images / (time.perf_counter() - started))
        tick()
    return [
        {
            "source": source,
            "augmentation": augmentation,
            "images_per_second": statistics.median(r),
            "range": [min(r), max(r)],
        }
        for (source, augmentation), r in rates.items()
    ]


def table(result: dict[str, Any]) -> str:
    """Markdown: a row for each source, a column for each augmentation."""
    rates = {(row["source"], row["augmentation"]): row["images_per_second"] for row in result["rows"]}
    sources, augmentations = (list(dict.fromkeys(key[i] for key in rates)) for i in (0, 1))
    about, side = result["machine"], result["img_size"]
    said = (
        f"Images a second on one core of {about['cpu']}: {result['images']} JPEG files of {SIZE[0]} x {SIZE[1]} pixels "
        f"({result['mean_bytes'] / 1000:.0f} kB) to {side} x {side}, in one process; median "
        f"of {result['repeats']}."
    )
    rows = [[source, *(f"{rates[source, a]:.0f}" for a in augmentations)] for source in sources]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    made_with = f"torch {about['torch']}, timm {about['timm']}, {versions}; {result['date']}."
    return "\n\n".join([said, markdown_table(["source", *augmentations], rows), made_with])


def main(argv: list[str] | None = None) -> None:
    """Make the images, measure, print the table, and write JSON and table if asked."""
    parser = Parser(
        prog="python -m experiments.benchmarks.data",
        description="Images a second that one core reads, decodes and augments, from a folder, WebDataset and LitData, "
        "with each of the augmentation libraries: a random resized crop, flip and colour jitter. About two minutes.",
    )
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--augmentations", nargs="+", choices=AUGMENTATIONS, default=list(AUGMENTATIONS))
    parser.add_argument("--images", type=at_least(2), default=256, help="files")
    parser.add_argument("--img-size", type=at_least(1), default=224, metavar="PIXELS", help="side")
    parser.add_argument("--repeats", type=at_least(1), default=3, help="times that all are read")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder for data.json and data.md")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    words = " ".join(sys.argv[1:] if argv is None else argv)
    result: dict[str, Any] = {
        "command": f"python -m experiments.benchmarks.data {words}".strip(),
        **measured_on(),
        "versions": {name: version for name in LIBRARIES if (version := _version(name))},
        **{name: getattr(args, name) for name in ("images", "img_size", "repeats")},
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "folder")
        result["mean_bytes"] = make_photographs(root, args.images)
        for source in set(args.sources) - {"folder"}:
            convert(root, Path(folder, source), source, shard_megabytes=4)
        settings = {"img_size": args.img_size, "batch_size": 32, "num_workers": 0, "drop_last": False}
        cells = {
            (source, augmentation): SOURCES[source](
                str(Path(folder, source)), augmentation=augmentation, val_fraction=0, **settings
            )
            for source, augmentation in itertools.product(args.sources, args.augmentations)
        }
        with tqdm(total=len(cells) * (args.repeats + 1), unit="epoch", disable=None) as bar:
            result["rows"] = measure(cells, args.images, args.repeats, bar.update)
    print(text := table(result))
    if args.out:
        write_json(args.out / "data.json", result)
        write_text(args.out / "data.md", text + "\n")


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
