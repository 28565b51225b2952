"""Slides with one label each, in one stage and in two: `python -m experiments.slides --help`.

Each image is an empty field of 4,096 pixels with a dozen photographs of CIFAR-10, enlarged, at places that no tile
knows of, and has a mask of them, as slides have of tissue. They are of animals; the label is whether some of them, each
a 256th of the image, are of vehicles.

One stage: a Luna ViT on the whole image, end to end (configs/slides.yaml). Two stages: the same model with the same
weights, frozen, on the tiles that have a part of a photograph; then attention pooling of the tiles, which is trained
(Ilse et al., "Attention-based Deep Multiple Instance Learning", ICML 2018, arXiv 1802.04712, gated, equation 9). Both
choose their epoch by the accuracy on the images for validation. Each runs in a process of its own, whose peak of
resident memory is measured.
"""

import csv
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from luna_vision.cli.train import build, quiet
from luna_vision.images import find_images, open_image
from luna_vision.images.pixels import Pixels, pixel_statistics
from luna_vision.tasks.checkpoints import best_checkpoint
from luna_vision.utils.files import write_json
from luna_vision.utils.record import read_json

from .benchmarks.jobs import Job, peak_resident
from .command import Parser, at_least, json_file, measured_on

__all__ = ["GatedAttention", "main", "make_slides", "one_stage", "two_stages"]

MODEL = "luna_vit_nano_patch8"
CONFIG = Path(__file__).parents[1] / "configs" / "slides.yaml"
VEHICLES = ("airplane", "automobile", "ship", "truck")
OF_DATA = ("side", "photo", "photos", "rare", "train", "val", "test", "seed")


def make_slides(job: Job) -> Path:
    """Draw the images of all splits, unless they are there; returns their table."""
    folder = Path(job["work"], "-".join(str(job[name]) for name in OF_DATA))
    table = folder / "slides.csv"
    if table.exists():
        return table
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for part, split in enumerate(("train", "val", "test")):
        source = Path(job["root"], "cifar10", "test" if split == "test" else "train")
        files = {one.name: find_images(str(one)) for one in sorted(source.iterdir()) if one.is_dir()}
        for name, some in files.items():  # photographs for validation are others than those for training
            fifth = len(some) // 5 if split != "test" else 0
            files[name] = some[:fifth] if split == "val" else some[fifth:]
        for i in range(job[split]):
            name = f"{split}_{i:04}"
            field, mask = draw(np.random.default_rng((job["seed"], part, i)), files, i % 2, job)
            tifffile.imwrite(folder / f"{name}.tif", field, tile=(256, 256), photometric="rgb", compression="zlib")
            Image.fromarray(mask).save(folder / f"{name}.png")
            rows.append((f"{name}.tif", ("no", "yes")[i % 2], f"{name}.png", split))
    with open(table, "w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "mask", "split"), *rows])
    return table


def draw(rng: np.random.Generator, files: dict[str, list[str]], label: int, job: Job) -> tuple[np.ndarray, np.ndarray]:
    """An image (side, side, 3) uint8 with its photographs, none over another, and where they are (side, side)."""
    side, photo = job["side"], job["photo"]
    animals = [name for name in files if name not in VEHICLES]
    names = rng.choice(animals, job["photos"]).tolist()
    if label:
        names[: job["rare"]] = rng.choice([name for name in files if name in VEHICLES], job["rare"])
    pairs = np.triu_indices(len(names), 1)
    while True:
        places = rng.integers(0, side - photo + 1, (len(names), 2))
        gaps = abs(places[:, None] - places[None]).max(2)
        if gaps[pairs].min() >= photo:
            break
    field, mask = np.full((side, side, 3), 255, np.uint8), np.zeros((side, side), np.uint8)
    for name, (x, y) in zip(names, places, strict=True):
        image = Image.open(files[name][rng.integers(len(files[name]))]).convert("RGB")
        inside = slice(y, y + photo), slice(x, x + photo)
        field[inside] = image.resize((photo, photo), Image.Resampling.BICUBIC)
        mask[inside] = 255
    return field, mask


def accuracy(right: list[bool]) -> dict[str, Any]:
    """Of images of a test."""
    return {"accuracy": float(np.mean(right)), "correct": int(np.sum(right)), "images": len(right)}


def one_stage(job: Job) -> Job:
    """Train the whole model on whole images, and test the best epoch."""
    torch.set_num_threads(job["threads"])
    started = time.perf_counter()
    given = {
        "name": "slides-vehicle",
        "resume": "true",
        "test_after_fit": "false",
        "data.init_args.root": job["table"],
        "data.init_args.vflip": 0,
        "data.init_args.seed": job["seed"],
        "seed_everything": job["seed"],
        "model.init_args.model_kwargs.patch_size": job["patch_size"],
        "model.init_args.lr": job["lr"],
        "model.init_args.store_dtype": job["store_dtype"],
        "model.init_args.store": job["store"] or "null",
        "trainer.default_root_dir": str(Path(job["work"], "runs")),
        "trainer.logger": "lightning.pytorch.loggers.CSVLogger",
        "trainer.logger.init_args.save_dir": str(Path(job["work"], "runs")),
        "trainer.max_epochs": job["epochs"],
        "trainer.accumulate_grad_batches": job["accumulate"],
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
    }
    sys.argv[1:] = []  # which Lightning would warn of
    quiet()
    cli = build(["fit", "--config", str(CONFIG), *(f"--{name}={value}" for name, value in given.items())])
    seconds = time.perf_counter() - started
    trained = torch.load(best_checkpoint(cli.trainer), weights_only=True)["state_dict"]
    cli.model.load_state_dict(trained)
    model = cli.model.eval()
    with torch.no_grad():
        right = [bool(model([slide]).argmax() == label) for slide, label in cli.datamodule.dataset("test")]
    steps = job["epochs"] * job["train"]
    # of a training that was stopped, nobody knows the time before
    spent = {"seconds": seconds} if cli.trainer.ckpt_path is None else {"resumed": True}
    return {"test": accuracy(right), **spent, "steps": steps, "peak_resident_bytes": peak_resident()}


class GatedAttention(nn.Module):
    """Attention pooling of tiles, and a linear classifier."""

    def __init__(self, width: int, hidden: int = 128) -> None:
        super().__init__()
        self.v, self.u = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.w, self.head = nn.Linear(hidden, 1), nn.Linear(width, 2)

    def forward(self, h: Tensor) -> Tensor:
        """Logits (2) of tiles (n, width)."""
        weights = self.w(self.v(h).tanh() * self.u(h).sigmoid()).softmax(0)
        return self.head((weights * h).sum(0))


@torch.no_grad()
def tile_features(model: nn.Module, path: Path, mask: Path, side: int) -> Tensor:
    """The embeddings (n, C) of the tiles of an image in which its mask has a pixel, those at its edges padded with
    zeros."""
    image, there = open_image(path), torch.from_numpy(np.array(Image.open(mask)))
    pixels = Pixels(image, 3, *pixel_statistics(model))
    found = []
    for start in range(0, image.shape[0], side):
        stop = min(start + side, image.shape[0])
        missing = -image.shape[1] % side
        some = F.pad(there[start:stop], (0, missing)).unflatten(1, (-1, side)).amax((0, 2)) > 0
        if some.any():
            x = F.pad(pixels.rows(start, stop), (0, missing, 0, start + side - stop))
            found.append(model(x[0].unflatten(2, (-1, side)).permute(2, 0, 1, 3)[some]))
    return torch.cat(found)


def two_stages(job: Job) -> Job:
    """Embed tiles by the frozen model, train the attention pooling, and test its best epoch."""
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    started = time.perf_counter()
    model = timm.create_model(MODEL, pretrained=True, num_classes=0, patch_size=job["patch_size"]).eval()
    table = Path(job["table"])
    bags: dict[str, list[tuple[Tensor, int]]] = {"train": [], "val": [], "test": []}
    with open(table, newline="") as file:
        for row in csv.DictReader(file):
            features = tile_features(model, *(table.parent / row[name] for name in ("path", "mask")), job["tile"])
            bags[row["split"]].append((features, int(row["label"] == "yes")))
    embedded = time.perf_counter() - started
    every = torch.cat([h for h, _ in bags["train"]])
    mean, std = every.mean(0), every.std(0).clamp(min=1e-6)
    bags = {split: [((h - mean) / std, label) for h, label in some] for split, some in bags.items()}
    head = GatedAttention(model.num_features)
    optimizer = torch.optim.AdamW(head.parameters(), lr=job["head_lr"], weight_decay=1e-2)
    best: tuple[float, float] = (-1.0, 0.0)
    for _ in range(job["head_epochs"]):
        for i in torch.randperm(len(bags["train"])).tolist():
            h, label = bags["train"][i]
            loss = F.cross_entropy(head(h), torch.tensor(label))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            logits = torch.stack([head(h) for h, _ in bags["val"]])
        labels = torch.tensor([label for _, label in bags["val"]])
        score = (float((logits.argmax(1) == labels).float().mean()), -float(F.cross_entropy(logits, labels)))
        if score > best:
            best, state = score, {name: x.clone() for name, x in head.state_dict().items()}
    head.load_state_dict(state)
    with torch.no_grad():
        right = [bool(head(h).argmax() == label) for h, label in bags["test"]]
    seconds = {"seconds": time.perf_counter() - started, "embedding_seconds": embedded}
    return {"test": accuracy(right), **seconds, "val": best[0], "peak_resident_bytes": peak_resident()}


WAYS = {"one-stage": one_stage, "two-stages": two_stages}


def _parser() -> Parser:
    parser = Parser(
        prog="python -m experiments.slides",
        description="Train on large images with one label each, in one stage and in two, and compare them. What --out "
        "has already is not done again, and a training that was stopped goes on.",
    )
    parser.add_argument("--root", default="data", help="folder with cifar10/{train,test}/CLASS/*.png")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--side", type=at_least(1), default=4096, help="of an image, pixels")
    parser.add_argument("--photo", type=at_least(1), default=256, help="side of a photograph in it, pixels")
    parser.add_argument("--photos", type=at_least(2), default=12, help="in an image")
    parser.add_argument(
        "--rare", type=at_least(1), default=3, help="photographs of vehicles in an image with the label"
    )
    parser.add_argument("--tile", type=at_least(1), default=256, help="side of the tiles of two stages, pixels")
    parser.add_argument("--patch-size", type=at_least(1), default=32, help="of the model, pixels; its own is 8")
    for split, count in (("train", 128), ("val", 32), ("test", 64)):
        parser.add_argument(f"--{split}", type=at_least(2), default=count, help="images")
    parser.add_argument("--epochs", type=at_least(1), default=12, help="of one stage")
    parser.add_argument("--accumulate", type=at_least(1), default=4, help="images of an optimizer step")
    parser.add_argument("--lr", type=float, default=5e-4, help="of one stage")
    parser.add_argument("--head-epochs", type=at_least(1), default=100, help="of the attention pooling")
    parser.add_argument("--head-lr", type=float, default=3e-4, help="of the attention pooling")
    parser.add_argument("--store-dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--store", metavar="FOLDER", help="for the activations of one stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=at_least(1), default=1, help="of the CPU")
    parser.add_argument("--work", default="runs/slides", help="folder of the images and the checkpoints")
    parser.add_argument("--out", type=json_file, default="runs/slides/slides.json", metavar="FILE", help=".json")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says."""
    parser = _parser()
    args = parser.parse_args(argv)
    if not Path(args.root, "cifar10", "train").is_dir():
        parser.error(f"there is no folder {Path(args.root, 'cifar10', 'train')}")
    if args.photos * (2 * args.photo) ** 2 > max(args.side - args.photo, 0) ** 2:
        parser.error(f"{args.photos} photographs of {args.photo} pixels are too many for a side of {args.side}")
    if args.rare > args.photos:
        parser.error(f"--rare {args.rare} is more than --photos {args.photos}")
    config = {name: value for name, value in vars(args).items() if name not in ("ways", "out", "root", "work")}
    rows = read_json(args.out).get("rows", [])
    for way in args.ways:
        if any(row["way"] == way and row["config"] == config for row in rows):
            continue
        job = config | {"root": args.root, "work": args.work}
        job["table"] = str(make_slides(job))
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            row = {"way": way, **pool.submit(WAYS[way], job).result(), "config": config}
        rows.append(row)
        write_json(args.out, {**measured_on(), "rows": rows})
        test, peak = row["test"], row["peak_resident_bytes"] / 1e9
        spent = "resumed" if "resumed" in row else f"{row['seconds']:.0f} s"
        print(
            f"{way}: {test['correct']} of {test['images']} right ({100 * test['accuracy']:.1f}%), "
            f"{spent}, peak resident memory {peak:.2f} GB",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
