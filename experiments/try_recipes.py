"""Try every config on real photographs: `python -m experiments.try_recipes DATA`.

DATA is a folder with the images of CIFAR-10 (cifar10/{train,test}/<class>/*.png) and of Tiny-ImageNet
(tiny_imagenet/{train,val}/<class>/*.png) as image folders, and Fashion-MNIST as torchvision lays it out
(FashionMNIST/raw). They are brought into the format that each config names, under --work, in the places where the
configs look for them. ImageNet's stands in Tiny-ImageNet, upsampled to JPEGs of 500 x 375, each class cut into five so
that there are a thousand; CIFAR-100's stands in CIFAR-10, each class cut into ten. torchvision checks the MD5 sums of
CIFAR's files, which files made here cannot have: it is told theirs instead.

For each config: the first 5,000 training samples in the order of its loader, decoded and augmented; training steps with
a checkpoint; a resume from that; validation; the line that `fit` prints to load the weights; and the export to ONNX,
where the task is one of classification. The model is the config's, narrow and shallow (NARROW), on the CPU, with small
batches; what else is changed stands in the result. What is done is not done again: a second call goes on.
"""

import hashlib
import json
import multiprocessing
import os
import pickle
import re
import shutil
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.datasets as tvd
import yaml
from PIL import Image

from luna_vision.cli import export
from luna_vision.cli import train as cli
from luna_vision.data import convert
from luna_vision.utils.files import write_json
from luna_vision.utils.record import read_json

from .command import Parser, markdown_table, measured_on

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
LIBRARIES = ("torchvision", "lightning", "pillow", "albumentations", "webdataset", "litdata", "onnx", "onnxruntime")
SAMPLES = 5000
NARROW = {"embed_dim": 32, "depth": 2, "num_heads": 2}
TRAINER = {"accelerator": "cpu", "devices": 1, "limit_train_batches": 8, "limit_val_batches": 2, "log_every_n_steps": 1}
DATA = {"num_workers": 1, "batch_size": 8}
# arguments of a config that have to follow from NARROW, or from two cores
ALSO = {
    "fashion_mnist_distill": {
        **{f"model.init_args.teacher_kwargs.{name}": value for name, value in NARROW.items()},
        "model.init_args.feature_layers": [[0, 0], [1, 1]],
    },
    "canvas_sequence_parallel": {
        "trainer.devices": 2,
        "data.init_args.side": 1024,
        "data.init_args.item_size": 56,
        "data.init_args.batch_size": 2,
    },
}
FORK = multiprocessing.get_context("fork")  # each stage in a process of its own, without the time that imports take


# ---- data


def prepare(source: Path, work: Path) -> None:
    """Bring the data into the formats that the configs name, each folder in one move."""
    for name, make in {
        "imagenet": make_imagenet,
        "imagenet_webdataset": lambda source, out: shards(work, out, "webdataset"),
        "imagenet_litdata": lambda source, out: shards(work, out, "litdata"),
        tvd.CIFAR10.base_folder: lambda source, out: make_cifar(tvd.CIFAR10, source, out),
        tvd.CIFAR100.base_folder: lambda source, out: make_cifar(tvd.CIFAR100, source, out),
    }.items():
        out = work / "data" / name
        if out.exists():
            continue
        print(f"making {out}", flush=True)
        partial = out.with_name(f"{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        make(source, partial)
        os.replace(partial, out)
    link = work / "data" / "FashionMNIST"
    if not link.exists():
        link.symlink_to((source / "FashionMNIST").resolve())


def shards(work: Path, out: Path, form: str) -> None:
    convert.convert(work / "data" / "imagenet", out, form, shard_megabytes=32)


def make_imagenet(source: Path, out: Path) -> None:
    for split, count in (("train", 5), ("val", 1)):
        for folder in sorted((source / "tiny_imagenet" / split).iterdir()):
            for i, path in enumerate(sorted(folder.iterdir())[: 5 * count]):
                target = out / split / f"{folder.name}_{i // count}" / f"{path.stem}.jpg"
                target.parent.mkdir(parents=True, exist_ok=True)
                size = (500, 375) if i % 2 else (375, 500)
                Image.open(path).convert("RGB").resize(size, Image.Resampling.BICUBIC).save(target, quality=90)


def make_cifar(dataset: type[tvd.CIFAR10], source: Path, out: Path) -> None:
    out.mkdir()
    fine = dataset is tvd.CIFAR100
    for split, files in (("train", dataset.train_list), ("test", dataset.test_list)):
        folders = sorted((source / "cifar10" / split).iterdir())
        photos = [
            (path, 10 * c + i % 10 if fine else c)
            for c, f in enumerate(folders)
            for i, path in enumerate(sorted(f.iterdir()))
        ]
        order = np.random.default_rng(0).permutation(len(photos))
        for (name, _), part in zip(files, np.array_split(order, len(files)), strict=True):
            images = np.stack([np.asarray(Image.open(photos[i][0])).transpose(2, 0, 1).ravel() for i in part])
            labels = [photos[i][1] for i in part]
            (out / name).write_bytes(pickle.dumps({"data": images, "fine_labels" if fine else "labels": labels}))
    names = [f"{folder.name} {i}" if fine else folder.name for folder in folders for i in range(10 if fine else 1)]
    (out / dataset.meta["filename"]).write_bytes(pickle.dumps({dataset.meta["key"]: names}))


def accept_sums(data: Path) -> None:
    """Have torchvision expect the sums of the files that there are."""
    for dataset in (tvd.CIFAR10, tvd.CIFAR100):
        folder = data / dataset.base_folder

        def md5(name: str, folder: Path = folder) -> str:
            return hashlib.md5((folder / name).read_bytes()).hexdigest()

        dataset.train_list = [[name, md5(name)] for name, _ in dataset.train_list]
        dataset.test_list = [[name, md5(name)] for name, _ in dataset.test_list]
        dataset.meta = {**dataset.meta, "md5": md5(dataset.meta["filename"])}


# ---- one config


class StageError(Exception):
    """A stage failed, or did something else than it should."""


def attempt(name: str, files: list[Path], work: Path, samples: int) -> dict[str, Any]:
    """What came of a config: seconds of each stage, and the error of the one that failed."""
    config = yaml.safe_load(files[0].read_text(encoding="utf-8"))
    changed = options_of(config, name)
    run = Path("runs", config["name"])
    shutil.rmtree(work / run, ignore_errors=True)
    words = [word for file in files for word in ("--config", str(file))]
    words += [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in changed.items()]
    row: dict[str, Any] = {
        "configs": [str(file.relative_to(ROOT)) for file in files],
        "changed": changed,
        "seconds": {},
    }
    fitted, resumed = run / "version_0/checkpoints", run / "version_1/checkpoints"

    def stage(stage: str, function: Callable, *arguments: Any) -> str:
        begun, log = time.perf_counter(), work / "logs" / f"{name.replace('/', '-')}.{stage}.log"
        process = FORK.Process(target=in_child, args=(work, log, function, *arguments))
        process.start()
        process.join()
        row["seconds"][stage] = round(time.perf_counter() - begun, 1)
        output = log.read_text(encoding="utf-8")
        if process.exitcode != 0:
            last = next(iter(output.strip().splitlines()[::-1]), "")
            raise StageError(f"{stage} ended with {process.exitcode}: {last}")
        return output

    try:
        of_config = [*words, f"--data.init_args.batch_size={config['data']['init_args']['batch_size']}"]
        row["samples"] = json.loads(stage("samples", read_samples, samples, of_config).splitlines()[-1])
        output = stage("fit", train, "fit", *words, "--trainer.max_epochs=1")
        row["steps"] = steps(work / fitted / "last.ckpt")
        row["parameters"] = int(re.search(r"([\d,]+) parameters", output)[1].replace(",", ""))
        (line,) = re.findall(r"^load it with: +(.*)", output, re.M)
        stage("load", exec, line, {})
        stage("resume", train, "fit", *words, "--trainer.max_epochs=2", f"--ckpt_path={fitted / 'last.ckpt'}")
        row["steps_after_resume"] = steps(work / resumed / "last.ckpt")
        if row["steps_after_resume"] != 2 * row["steps"]:
            raise StageError(f"resume ended at step {row['steps_after_resume']}, not at {2 * row['steps']}")
        output = stage("validate", train, "validate", *words, f"--ckpt_path={resumed / 'best.ckpt'}")
        row["validated"] = {key: float(value) for key, value in re.findall(r"(val_\w+) +│ +([\d.e-]+)", output)}
        if not row["validated"]:
            raise StageError("validate printed no score")
        if not config["model"].get("class_path", "").endswith(("DetectionTask", "SegmentationTask")):
            weights = ["--checkpoint", str(resumed / "best.ckpt"), "--out", str(run / "model.onnx")]
            stage("export", export.main, ["--format", "onnx", *weights])
    except StageError as error:
        row["error"] = str(error)
    return row


def options_of(config: dict[str, Any], name: str) -> dict[str, Any]:
    """What is changed of a config, by dotted name."""
    model = "model.init_args" if "class_path" in config["model"] else "model"
    changed = {f"{model}.model_kwargs.{key}": value for key, value in NARROW.items()}
    if config["model"].get("init_args", config["model"]).get("model_kwargs", {}).get("pretrained"):
        changed[f"{model}.model_kwargs.pretrained"] = False
    changed |= {f"data.init_args.{key}": value for key, value in DATA.items()}
    changed |= {f"trainer.{key}": value for key, value in TRAINER.items()}
    if config["test_after_fit"]:
        changed["trainer.limit_test_batches"] = 2
    return changed | ALSO.get(name, {})


def steps(checkpoint: Path) -> int:
    return torch.load(checkpoint, weights_only=True)["global_step"]


# ---- what a child does


def in_child(work: Path, log: Path, function: Callable, *arguments: Any) -> None:
    log.parent.mkdir(exist_ok=True)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(work)
    function(*arguments)


def train(*words: str) -> None:
    sys.argv = [str(ROOT / "train.py"), *words]  # with which Lightning starts further processes
    cli.main()


def read_samples(count: int, words: list[str]) -> None:
    """Load so many training samples, epoch by epoch, and print how it went."""
    sys.argv = [str(ROOT / "train.py")]
    data = cli.build(words, run=False).datamodule
    data.prepare_data()
    data.setup("fit")
    read, epoch = 0, 0
    while read < count:
        loader = data.train_dataloader()
        loader.next_batch = lambda epoch=epoch: (epoch, 0)  # where a trainer would be
        for images, *_ in loader:
            parts = images if isinstance(images, list) else [images]
            if not all(part.isfinite().all() and part.dtype == torch.float32 for part in parts):
                raise RuntimeError(f"after {read} samples of epoch {epoch}: not finite, or of another type")
            read += len(images)
            if read >= count:
                break
        epoch += 1
    print(json.dumps({"read": read, "epochs": epoch, "last_shape": list(parts[-1].shape)}))


# ---- all of them


def all_recipes() -> dict[str, list[Path]]:
    """Names and files; those that begin from what others have trained come last."""
    found = {path.stem: [path] for path in sorted(CONFIGS.glob("*.yaml"))}
    found = dict(sorted(found.items(), key=lambda item: "checkpoint: runs/" in item[1][0].read_text(encoding="utf-8")))
    overlays = sorted((CONFIGS / "overlays").glob("*.yaml"))
    under = {path: "slides" if path.stem == "sequence_parallel" else "cifar10" for path in overlays}
    return found | {f"overlays/{path.stem}": [CONFIGS / f"{name}.yaml", path] for path, name in under.items()}


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = []
    for name, row in rows.items():
        samples = row.get("samples", {"read": "", "last_shape": []})
        shape = " x ".join(map(str, samples["last_shape"][-3:]))
        reached = f"{row.get('steps', '')}, {row.get('steps_after_resume', '')}"
        seconds = f"{sum(row['seconds'].values()):.0f}"
        lines.append([name, str(samples["read"]), shape, reached, seconds, row.get("error", "ok")])
    return markdown_table(["config", "samples", "at", "steps, after a resume", "seconds", "outcome"], lines)


def main() -> None:
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, metavar="DATA", help="with cifar10, tiny_imagenet and FashionMNIST")
    parser.add_argument("--work", type=Path, help="folder for converted data and runs; DATA/try_recipes if left out")
    parser.add_argument("--out", type=Path, default=Path("docs/results/recipes.json"), help="results")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of each config")
    parser.add_argument("--only", nargs="+", choices=all_recipes(), metavar="NAME", help="these alone, done or not")
    args = parser.parse_args()
    work = (args.work or args.data / "try_recipes").absolute()
    prepare(args.data.absolute(), work)
    accept_sums(work / "data")
    result = read_json(args.out) or {"recipes": {}}
    result |= measured_on()
    result["versions"] = {name: version(name) for name in LIBRARIES}
    for name, files in all_recipes().items():
        known = result["recipes"].get(name)
        if name not in args.only if args.only else known and "error" not in known:
            continue
        row = result["recipes"][name] = attempt(name, files, work, args.samples)
        write_json(args.out, result)
        print(f"{name:<28} {row.get('error') or 'ok'}  {row['seconds']}", flush=True)
    print(table(result["recipes"]))


if __name__ == "__main__":
    main()
