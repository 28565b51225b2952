"""`predict PHOTOS --checkpoint FILE` from the file alone, wherever it lies, for all that a training can write."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from luna_vision.cli.train import main
from luna_vision.data import DetectionDataModule, ImageFolderDataModule, MultiLabelDataModule, SegmentationDataModule
from luna_vision.tasks import (
    ClassificationTask,
    DetectionTask,
    MultiLabelTask,
    PredictionWriter,
    SegmentationTask,
    export_weights,
)
from tests.labelled import NAMES, save_images, scenes, write_coco, write_labels, write_masks
from tests.tasks.conftest import tiny_trainer

MODEL = {"model_name": "test_luna_vit", "model_kwargs": {"embed_dim": 32, "depth": 2}, "num_classes": 2, "in_chans": 3}
QUIET = {"num_workers": 0, "batch_size": 2}


class OwnTask(MultiLabelTask):
    """A task of a user."""


class OwnData(MultiLabelDataModule):
    """Data of a user."""


def several_labels(root: Path, kind=MultiLabelTask, data=MultiLabelDataModule):
    return kind(**MODEL), data(root=str(write_labels(root)), **QUIET, img_size=32)


def one_label(root: Path, **options):
    for split in ("train", "val"):
        for i, name in enumerate(NAMES):
            found = dict(list(scenes("train").items())[i::2])
            save_images(root / split / name, found)
    return ClassificationTask(**MODEL, **options), ImageFolderDataModule(root=str(root), **QUIET, img_size=32)


def independent(root: Path):
    return one_label(root, loss="bce")


def boxes(root: Path):
    options = {"detector": "retinanet", "strides": [8, 16], "anchor_sizes": [16, 32], "min_size": None}
    options |= {"detector_kwargs": {"score_thresh": 0.001}, "pyramid_channels": 8}
    return DetectionTask(**MODEL, **options), DetectionDataModule(write_coco(root), **QUIET)


def masks(root: Path):
    data = SegmentationDataModule(write_masks(root, "colors"), **QUIET)
    return SegmentationTask(**MODEL, pyramid_channels=8, stride=8), data


def train(task, data, folder: Path) -> None:
    """Train a step and write best.ckpt and best.safetensors into a folder."""
    trainer = tiny_trainer(folder, max_steps=1)
    trainer.fit(task, data)
    trainer.save_checkpoint(folder / "best.ckpt")
    export_weights(folder / "best.ckpt", folder / "best.safetensors")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs predict on new/ in an empty folder; returns its exit code and its messages."""
    monkeypatch.chdir(tmp_path)
    save_images(Path("new"), scenes("test"))
    seed_everything(0, verbose=False)

    def call(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["luna-vision", "predict", *map(str, words), "--trainer.accelerator=cpu"])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0), capsys.readouterr().err

    return call


def content(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return {file.name: file.read_bytes() for file in files}


MADE = {several_labels: "csv", one_label: "csv", independent: "csv", boxes: "json", masks: ""}


@pytest.mark.parametrize("make", MADE)
def test_a_file_alone_predicts_what_its_task_does(make, run, tmp_path):
    task, data = make(tmp_path / "data")
    train(task, data, tmp_path)
    data.predict_path = "new"
    want, found = (tmp_path / name / f"out.{MADE[make]}".rstrip(".") for name in ("want", "found"))
    how = {"ckpt_path": "best.ckpt", "return_predictions": False, "weights_only": True}
    tiny_trainer(tmp_path, callbacks=[PredictionWriter(str(want))]).predict(task, data, **how)
    shutil.rmtree("data")
    Path("moved/train/other").mkdir(parents=True)  # which is no folder of the training
    for name in ("best.safetensors", "best.ckpt"):
        shutil.move(name, f"moved/{name}")
        code, err = run("new", "--checkpoint", f"moved/{name}", "--out", found)
        assert code == 0, err
        assert content(found) == content(want) and content(want)
        shutil.rmtree(found.parent)


def test_the_yaml_of_the_run_is_not_read(run, tmp_path):
    """It could run any code."""
    train(*one_label(tmp_path / "data"), tmp_path)
    Path("run/checkpoints").mkdir(parents=True)
    for name in ("best.ckpt", "best.safetensors"):
        shutil.move(name, f"run/checkpoints/{name}")
    Path("run/config.yaml").write_text("data: {class_path: strange.Code}\n")
    code, err = run("new", "--checkpoint=run/checkpoints/best.ckpt", "--out=found.csv")
    assert code == 0 and Path("found.csv").exists(), err
    code, err = run("--checkpoint=run/checkpoints/best.ckpt")  # the test images, which the YAML alone knows
    assert code == 2 and "needs images" in err


def test_the_name_of_a_model_is_no_task(run, tmp_path):
    train(*one_label(tmp_path / "data"), tmp_path)
    code, err = run("new", "--checkpoint=best.ckpt", "--model", "luna_vit_nano_patch8", "--out=found.csv")
    assert code == 2 and "there is no class luna_vit_nano_patch8; the name of a model is --model.model_name" in err


def test_boxes_name_files_below_the_folder_that_is_predicted(run, tmp_path):
    train(*boxes(tmp_path / "data"), tmp_path)
    save_images(Path("all/photos"), scenes("test"))
    words = ["--checkpoint=best.ckpt", "--out"]
    for folder, first in (("all", "photos/test_0.png"), ("all/photos", "test_0.png")):
        out = Path(f"{len(folder)}.json")
        assert run(folder, *words, out)[0] == 0
        assert json.loads(out.read_text())["images"][0]["file_name"] == first


def old(path: str) -> None:
    """Make weights as they were before they said their task."""
    with safe_open(path, "pt") as file:
        training = json.loads(file.metadata()["training"])
    assert training.pop("task")
    save_file(load_file(path), path, {"training": json.dumps(training)})


def test_older_files_of_several_labels(run, tmp_path):
    train(*several_labels(tmp_path / "data"), tmp_path)
    assert run("new", "--checkpoint=best.safetensors", "--out=new.csv")[0] == 0
    old("best.safetensors")
    assert run("new", "--checkpoint=best.safetensors", "--out=old.csv")[0] == 0
    assert Path("new.csv").read_text() == Path("old.csv").read_text()


@pytest.mark.parametrize("kinds", [(OwnTask, MultiLabelDataModule), (MultiLabelTask, OwnData)])
def test_what_cannot_be_known_is_not_guessed(kinds, run, tmp_path):
    train(*several_labels(tmp_path / "data", *kinds), tmp_path)
    if kinds[1] is OwnData:
        old("best.safetensors")
    code, err = run("new", "--checkpoint=best.safetensors", "--out=found.csv")
    assert code == 2 and "does not say how to prepare images and what its outputs mean" in err
    assert len(err.splitlines()) == 1 and not Path("found.csv").exists()


def test_a_backbone_has_no_classes(run, tmp_path):
    train(*one_label(tmp_path / "data"), tmp_path)
    content = torch.load("best.ckpt", weights_only=True)
    content["hyper_parameters"]["num_classes"], content["task"] = 0, "LeJEPATask"
    torch.save(content, "best.ckpt")
    code, err = run("new", "--checkpoint=best.ckpt", "--out=found.csv")
    assert code == 2 and "trained without labels" in err
