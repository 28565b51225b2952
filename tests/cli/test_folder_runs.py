"""train.py on image folders as they are: what it says at the start, and what it refuses."""

import csv
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import luna_vision
from luna_vision.cli import predict_words
from luna_vision.cli.train import main

DEBUG = str(Path(__file__).parents[2] / "configs" / "debug.yaml")
DATA = ["--data=ImageFolderDataModule", "--data.root=photos", "--data.img_size=16", "--data.in_chans=1"]
DATA += ["--data.num_workers=0", "--data.batch_size=4", "--model.num_classes=2", "--trainer.max_epochs=1"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch, capsys):
    """Runs train.py beside photos/{train,test}/{cat,dog}; returns its exit code, what it prints, and its messages."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 3)):
        for name in ("cat", "dog"):
            Path("photos", split, name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8))
                image.save(f"photos/{split}/{name}/{i}.png")

    def call(
        subcommand: str, *words: str, data: list[str] = DATA, config: bool = True
    ) -> tuple[int, list[str], list[str]]:
        own = ["--config", DEBUG, *data] if config else []
        monkeypatch.setattr(sys, "argv", ["train.py", subcommand, *own, *words])
        code = 0
        try:
            main()
        except SystemExit as error:
            code = int(error.code or 0)
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return call


def rename(old: str, new: str) -> None:
    for split in ("train", "test"):
        Path("photos", split, old).rename(f"photos/{split}/{new}")


def test_a_run_on_training_and_test_folders(run, caplog):
    Path("photos/masks").mkdir()
    Path("photos/train/.Trash-0").mkdir()
    caplog.set_level("INFO")
    code, out, _ = run("fit", "--data.val_fraction=0.2")
    assert code == 0
    said = [record.getMessage() for record in caplog.records]
    lines = [line for line in said if line.startswith(("train: ", "val: ", "test: ", "not used"))]
    assert lines == [
        "train: 16 images of 20 in photos/train, 2 classes; skipped 1 hidden and 0 other names",
        "val: 4 images held out of 20 in photos/train, 2 classes; skipped 1 hidden and 0 other names",
        "not used of photos: masks",
        "test: 6 images in photos/test, 2 classes",
    ]
    assert any(line.startswith("test accuracy: ") for line in out)


def test_training_images_alone(run):
    shutil.rmtree("photos/test")
    code, out, _ = run("fit", "--data.val_fraction=0.2")
    assert code == 0 and any(line.startswith("test accuracy") for line in out)  # of those held out
    assert out[-1].startswith("load it with:")


@pytest.mark.parametrize(
    "path, message",
    [
        (
            "photos/test/eel",
            "photos/test has classes that the training folder lacks: eel",
        ),  # not after days of training
        ("photos/train/empty", "no images in class folders of photos/train: empty"),
        ("photos/val", "no class folders in photos/val"),
        ("bare/train", "error: no class folders in bare/train"),
    ],
)
def test_mistakes_are_found_before_a_run_begins(path: str, message: str, run):
    Path(path).mkdir(parents=True)
    code, _, err = run("fit", *["--data.root=bare"] * path.startswith("bare"))
    assert code == 2 and message in err[-1]
    assert not Path("runs").exists()


def test_a_checkpoint_of_other_classes(run):
    assert run("fit")[0] == 0
    best = "runs/debug/version_0/checkpoints/best.ckpt"
    rename("dog", "eel")
    shutil.move("runs", "old")
    weights = best.replace("runs", "old")
    for words in (
        ("test", f"--ckpt_path={weights}"),
        ("validate", f"--ckpt_path={weights}"),
        ("predict", f"--ckpt_path={weights}"),
        ("fit", f"--ckpt_path={weights}"),
        ("test", f"--model.checkpoint={weights}"),
        ("test", f"--model.checkpoint={weights.replace('best.ckpt', 'best.safetensors')}"),
    ):
        code, _, err = run(*words)
        assert code == 2, words
        assert "the data lacks dog; the data alone has eel" in err[-1] and err[-1].startswith("error: ")
        assert not Path("runs").exists(), words
    # as the message says
    assert run("fit", f"--model.checkpoint={weights}")[0] == 0


def test_images_of_any_name_are_predicted(run):
    assert run("fit", "--test_after_fit=false")[0] == 0
    name = os.fsdecode(b"caf\xe9.png")
    shutil.copytree("photos/test/cat", "new")
    Path("new/0.png").rename(f"new/{name}")
    os.mkfifo("new/pipe.png")  # which would be read for ever
    Path("new/._1.png").touch()
    words = ["--ckpt_path=runs/debug/version_0/checkpoints/best.ckpt", "--data.predict_path=new"]
    assert run("predict", *words, "--trainer.limit_predict_batches=null")[0] == 0
    rows = list(csv.reader(next(Path("runs").rglob("predictions.csv")).open()))
    assert [row[0] for row in rows[1:]] == ["new/1.png", "new/2.png", "new/caf\\xe9.png"]


def test_paths_and_a_checkpoint_are_enough_to_predict(run, monkeypatch):
    assert run("fit", "--test_after_fit=false")[0] == 0
    folder = Path("runs/debug/version_0/checkpoints")
    shutil.copy(folder / "best.safetensors", "mine.safetensors")
    wants = run("predict", f"--ckpt_path={folder / 'best.ckpt'}", "--data.predict_path=photos/test", "--out=want.csv")
    assert wants[0] == 0
    want = Path("want.csv").read_text()
    weights = [folder / "best.ckpt", folder / "best.safetensors", "mine.safetensors"]
    for words in (["--checkpoint", str(weights[0])], *([f"--checkpoint={file}"] for file in weights[1:])):
        code, _, err = run("predict", "photos/test", *words, "--out=found.csv", config=False)
        assert code == 0, err
        assert Path("found.csv").read_text() == want
        assert run("predict", "photos/test", *words, "--out=found.csv", config=False)[0] == 2  # it exists
        Path("found.csv").unlink()
    shutil.rmtree("photos/train")  # which names the classes
    monkeypatch.setattr(predict_words, "SHIPPED", ["mine"])
    monkeypatch.setattr(predict_words, "weights_file", lambda name: Path(f"{name}.safetensors").resolve())
    assert run("predict", "photos/test/cat/1.png", "photos/test/dog", "--out=found.csv", config=False)[0] == 0
    assert Path("found.csv").read_text().splitlines() == [want.splitlines()[i] for i in (0, 2, 4, 5, 6)]


@pytest.mark.parametrize(
    "words, message",
    [
        (["photos"], "predict needs weights: give --checkpoint"),
        (["photos", "--checkpoint", "nothing.ckpt"], "there is no file nothing.ckpt"),
        (["photos", "--checkpoint", "w.safetensors"], "does not say how to prepare images"),
        (["photos", "--ckpt_path=x.ckpt"], "predict takes either paths and --checkpoint, or"),
    ],
)
def test_mistakes_of_the_short_form(run, words, message, monkeypatch):
    monkeypatch.setattr(predict_words, "SHIPPED", ())
    Path("w.safetensors").write_bytes(b"no weights")
    code, _, err = run("predict", *words, config=False)
    assert code == 2 and len(err) == 1 and message in err[0] and not Path("runs").exists()


def test_predictions_have_the_names_of_the_checkpoint_where_the_training_folder_is_gone(run):
    assert run("fit", "--test_after_fit=false")[0] == 0
    Path("photos").rename("new")
    best = "runs/debug/version_0/checkpoints/best"
    for words in (f"--ckpt_path={best}.ckpt", f"--model.checkpoint={best}.safetensors"):
        assert run("predict", words, "--data.predict_path=new/test", "--trainer.limit_predict_batches=null")[0] == 0
        path = max(Path("runs").rglob("predictions.csv"))
        rows = list(csv.DictReader(path.open()))
        assert len(rows) == 6 and {row["label1"] for row in rows} <= {"cat", "dog"}
        path.unlink()


def test_classes_are_counted(run):
    """Where a config says null."""
    Path("count.yaml").write_text("model: {num_classes: null}")
    words = [word for word in DATA if not word.startswith("--model.num_classes")]
    assert run("fit", "--config=count.yaml", data=words)[0] == 0
    assert luna_vision.load("runs/debug/version_0/checkpoints/best.safetensors").class_names == ["cat", "dog"]
    shutil.rmtree("photos/train")
    code, _, err = run("fit", "--config=count.yaml", data=words)
    assert code == 2 and "no folder photos/train" in err[-1]


def test_a_run_does_not_go_on_with_other_classes(run):
    assert run("fit")[0] == 0
    record = Path("runs/debug/version_0/run.json")
    record.write_text(json.dumps({**json.loads(record.read_text()), "finished": False}))
    (record.parent / ".run.lock").unlink()  # which this process holds
    rename("dog", "eel")
    code, _, err = run("fit", "--resume")
    assert code == 2 and "the data lacks dog; the data alone has eel" in err[-1]
    assert run("fit")[0] == 0


def test_a_value_range_goes_from_training_to_prediction(run, caplog):
    """By the checkpoint: another folder is predicted, whose percentiles are others."""
    caplog.set_level("INFO")
    rng = np.random.default_rng(0)
    for path in sorted(Path("photos").rglob("*.png")):
        Image.fromarray(rng.integers(1000, 4000, (16, 16), dtype=np.uint16)).save(path)
    assert run("fit", "--data.value_range=percentile", "--data.augmentation=none", "--data.fill=error")[0] == 0
    (found,) = sorted(Path("runs").rglob("best.ckpt"))
    values = luna_vision.load(found).transform.values
    assert values.fill == "error" and values.value_range == pytest.approx((1000, 4000), abs=100)
    Path("new").mkdir()
    dark = Image.fromarray(rng.integers(1000, 1300, (16, 16), dtype=np.uint16))
    dark.save("new/a.png")
    words = [f"--ckpt_path={found}", "--data.predict_path=new", "--out=out.csv"]
    before = sorted(Path("runs").rglob("*"))
    assert run("predict", *words)[0] == 0
    assert sorted(Path("runs").rglob("*")) == before  # no folder of a run beside the file
    with open("out.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    model, transform, names = luna_vision.load(found)
    probabilities = model(transform("new/a.png")[None]).softmax(1)[0]
    assert row["label1"] == names[int(probabilities.argmax())]
    assert float(row["probability1"]) == pytest.approx(float(probabilities.max()), abs=1e-4)
