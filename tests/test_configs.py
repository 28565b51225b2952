"""Every config builds its task, data and trainer with no data present, and trains on small data in its format."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_sample_images

import luna_vision
from luna_vision.cli.train import build
from luna_vision.data.convert import convert
from luna_vision.data.dense import DenseDataModule
from luna_vision.tasks import NonFiniteGuard
from tests.labelled import write_labels, write_masks, write_slides, write_voc

DIGITS = Path(luna_vision.__file__).parent / "cli" / "digits.yaml"
CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
NARROW = {"embed_dim": 16, "depth": 2, "num_heads": 2}
SMALL_CANVASES = {"source": "digits", "num_train": 48, "num_val": 2, "num_test": 2}
LABELLED = {
    "DetectionDataModule": write_voc,
    "SegmentationDataModule": write_masks,
    "MultiLabelDataModule": write_labels,
    "SlideDataModule": write_slides,
}
SIDE = 256  # of canvases that are larger
# of each kind of task, and with each kind of compilation and precision
ANOMALIES = ("canvas_carry", "canvas_detection", "digits", "fashion_mnist_distill", "imagenet_small_224", "slides")
# these differ from another one in sizes, rates and classes alone
ALIKE = """
cifar10 cifar100 cifar100_224 digits fashion_mnist fashion_mnist_teacher imagenet_base_224 imagenet_tiny_224
imagenet_small_384_finetune imagenet_small_512_finetune
""".split()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_builds(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])  # pytest's own arguments make LightningCLI warn
    machine = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.precision=32-true"]
    cli = build(["--config", str(path), *machine], run=False)
    hparams, data = cli.model.hparams, cli.datamodule
    assert hparams.in_chans == data.in_chans
    assert hparams.get("compile", False) in (False, "auto")  # by device: a CPU takes minutes
    if not path.stem.startswith(("image", "slides", "tiny_imagenet")):  # whose classes are the user's
        assert hparams.num_classes == data.num_classes == len(data.class_names)
    if not isinstance(data, DenseDataModule):  # of any size
        assert data.img_size == (hparams.model_kwargs.get("img_size", hparams.get("min_size")),) * 2
    best = cli.trainer.checkpoint_callback
    best.setup(cli.trainer, cli.model, "validate")
    assert best.monitor == cli.model.headline[0].replace("test_", "val_")
    assert [logger.root_dir for logger in cli.trainer.loggers][0] == f"runs/{path.stem}"
    assert not list(tmp_path.iterdir()), "building a run must not write anything"


def test_the_documented_places_of_cifar_build(tmp_path, monkeypatch):
    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text().replace("\\\n", " ")
    lines = [
        line.partition("#")[0].split()
        for line in text.splitlines()
        if line.startswith("luna-vision fit --config configs/cifar10")
    ]
    found = []
    monkeypatch.setattr("sys.argv", ["train.py"])  # pytest's own arguments make LightningCLI warn
    for words in lines:
        words[words.index("--config") + 1] = str(Path(__file__).parents[1] / words[words.index("--config") + 1])
        machine = ["--trainer.accelerator=cpu", "--trainer.precision=32-true", "--model.num_classes=10"]
        cli = build([*words[2:], *machine], run=False)
        found.append(type(cli.datamodule).__name__)
        assert cli.datamodule.img_size == (32, 32) and cli.datamodule.crop_pct is None
    assert found == ["CIFAR10DataModule", "ImageFolderDataModule", "TimmDataModule"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_header_says_how_to_run_it_and_what_comes_out(path):
    header = [line[2:] for line in path.read_text().splitlines() if line.startswith("# ")]
    found = dict(line.split(":", 1) for line in header if line.startswith(("Command:", "Hardware:", "Time:", "Score:")))
    fields = {name: value.strip() for name, value in found.items()}
    assert set(fields) == {"Command", "Hardware", "Time", "Score"}
    assert all(value and "not measured" not in value for value in fields.values())
    named = "" if path.stem == "digits" else f" --config configs/{path.name}"
    named += " --data.root photos" if path.stem in ("image_folder", "image_labels") else ""
    assert fields["Command"].removesuffix(" --model.compile true") == f"python train.py fit{named}"


def test_the_default_of_an_installed_package_is_the_digits():
    assert DIGITS.read_bytes() == (CONFIGS[0].parent / "digits.yaml").read_bytes()


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem in ANOMALIES], ids=lambda path: path.stem)
def test_anomalies_can_be_looked_for_in_any_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    overlay = str(path.parent / "overlays" / "detect_anomaly.yaml")
    machine = ["--trainer.accelerator=cpu", "--trainer.devices=1"]
    cli = build(["--config", str(path), "--config", overlay, *machine], run=False)
    assert cli.trainer._detect_anomaly and cli.trainer.precision == "32-true"
    cli.model.trainer = cli.trainer
    cli.model.setup("fit")
    assert cli.model.model._compiled_call_impl is None
    assert any(isinstance(callback, NonFiniteGuard) for callback in cli.trainer.callbacks)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """photos/{folder,webdataset,litdata}: parts of scikit-learn's photographs, ten classes of four and one."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    images = [Image.fromarray(image) for image in load_sample_images().images]
    for split, count in (("train", 4), ("val", 1)):
        for label in range(10):
            (root / "folder" / split / str(label)).mkdir(parents=True)
            for i in range(count):
                x, y = rng.integers(0, 400), rng.integers(0, 300)
                part = images[i % 2].crop((x, y, x + 90 + 10 * i, y + 120))
                part.save(root / "folder" / split / str(label) / f"{i}.jpg")
    for form in ("webdataset", "litdata"):
        convert(root / "folder", root / form, form)
    for form, write in LABELLED.items():
        write(root / form)
    (root / "SegmentationDataModule" / "classes.txt").unlink()
    return root


def small(config: dict, photos: Path, weights: Path) -> dict:
    """What makes a config small, by dotted name: model, data and number of batches, but neither method nor size."""
    model, data = config["model"].get("init_args", config["model"]), config["data"]["init_args"]
    prefix = "model.init_args" if "class_path" in config["model"] else "model"
    changed = {f"{prefix}.model_kwargs.{name}": value for name, value in NARROW.items()}
    source = config["data"]["class_path"].rpartition(".")[2]
    if source.startswith("Canvas"):
        changed |= {f"data.init_args.{name}": value for name, value in SMALL_CANVASES.items()}
        if data["side"] > SIDE:
            changed |= {"data.init_args.side": SIDE, "data.init_args.item_size": 20}
    elif source in LABELLED:
        changed["data.init_args.root"] = photos / source
        changed |= {"data.init_args.class_names": "[brick, leaf]"} if "class_names" in data else {}
    elif source != "DigitsDataModule":
        form = {"WebDatasetDataModule": "webdataset", "LitDataDataModule": "litdata"}.get(source, "folder")
        # torchvision's files as an image folder, as a user would who has them so
        changed |= {} if form != "folder" else {"data": "ImageFolderDataModule"}
        changed["data.init_args.root"] = photos / form
    if "pretrained" in model.get("model_kwargs", {}):
        changed[f"{prefix}.model_kwargs.pretrained"] = False
    if "teacher_kwargs" in model:
        changed |= {f"{prefix}.teacher_kwargs.{name}": value for name, value in NARROW.items()}
        changed |= {f"{prefix}.teacher_checkpoint": weights, f"{prefix}.feature_layers": [[0, 0], [1, 1]]}
        changed |= {f"{prefix}.teacher_mean": [0.3], f"{prefix}.teacher_std": [0.4]}  # which plain weights do not say
    elif "checkpoint" in model:
        changed[f"{prefix}.checkpoint"] = weights
    if "checkpoint" in model or "teacher_kwargs" in model:
        arguments = model.get("teacher_kwargs", model["model_kwargs"]) | NARROW
        start = timm.create_model(model["model_name"], num_classes=10, in_chans=data["in_chans"], **arguments)
        torch.save(start.state_dict(), weights)
    changed["trainer.check_val_every_n_epoch"] = 1
    batches = {f"limit_{stage}_batches": 2 for stage in ("train", "val", "test")}
    machine = {"accelerator": "cpu", "devices": 1, "strategy": "auto"}
    changed |= {f"trainer.{name}": value for name, value in (batches | machine).items()}
    changed |= {} if source == "SlideDataModule" else {"data.init_args.num_workers": 0}
    return changed | {"trainer.max_epochs": 1, "data.init_args.batch_size": 4}


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem not in ALIKE], ids=lambda path: path.stem)
def test_config_trains(path, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    changed = small(yaml.safe_load(path.read_text()), photos, tmp_path / "start.pth")
    cli = build(["fit", "--config", str(path), *(f"--{name}={value}" for name, value in changed.items())])
    assert cli.trainer.global_step == max(1, 2 // cli.trainer.accumulate_grad_batches)
    checkpoints = tmp_path / "runs" / path.stem / "version_0" / "checkpoints"
    assert {"best.ckpt", "last.ckpt", "best.safetensors"} <= {file.name for file in checkpoints.iterdir()}
    metrics = cli.trainer.callback_metrics
    assert metrics and all(value.isfinite() for value in metrics.values())
