"""`luna-vision preview`: the training images with their labels, as one picture."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from luna_vision.cli.main import main
from tests.labelled import write_labels, write_masks, write_slides, write_yolo

CONFIGS = Path(__file__).parents[2] / "configs"
DATA = {"bccd": write_yolo, "camvid": write_masks, "image_labels": write_labels}
OWN = {"bccd": ["--data.format=yolo", "--data.class_names=[brick, leaf]"], "camvid": ["--data.crop_size=32"]}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["luna-vision", "preview", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0), *capsys.readouterr()

    return call


@pytest.mark.parametrize("name", DATA)
def test_a_sheet_of_training_images(name, run, tmp_path):
    DATA[name](tmp_path / "data")
    (tmp_path / "data/classes.txt").unlink(missing_ok=True)
    short = ["--data.num_workers=0", "--data.batch_size=2", "--trainer.accelerator=cpu", *OWN.get(name, [])]
    config = ["--config", str(CONFIGS / f"{name}.yaml"), "--data.root", "data"]
    code, out, err = run(*config, *short, "--count", "5", "--out", "a.png")
    assert code == 0, err
    assert "5 training images drawn" in out
    sheet = Image.open("a.png")
    side = 36 if name == "camvid" else 0
    assert not side or sheet.size == (4 * side, 2 * side)
    assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 20
    if name == "camvid":
        code, _, err = run(*config, *short, "--out", "a.png")
        assert code == 2 and "error: a.png exists: give --overwrite" in err
        assert run(*config, *short, "--out", "a.png", "--overwrite")[0] == 0


def test_slides_are_no_pictures(run, tmp_path):
    write_slides(tmp_path / "slides.csv")
    code, _, err = run("--config", str(CONFIGS / "slides.yaml"), "--trainer.accelerator=cpu")
    assert code == 2 and "whole" in err and len([line for line in err.splitlines() if "error" in line]) == 1


def test_mistakes(run):
    assert run()[0] == 2 and run("--config", "a.yaml", "--count", "0")[0] == 2
    code, _, err = run("--config", "gone.yaml")
    assert code == 2 and len(err.strip().splitlines()) == 1
