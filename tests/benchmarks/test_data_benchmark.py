"""The benchmark of data sources: every cell is measured, and what it was measured on is kept."""

import json
from pathlib import Path

import pytest
from PIL import Image

from luna_vision.benchmarks.data import main, make_photographs
from luna_vision.cli.common import run_command


def test_every_source_and_augmentation(tmp_path: Path, capsys: pytest.CaptureFixture):
    main(["--images", "4", "--img-size", "32", "--repeats", "1", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "data.json").read_text())
    cells = {(row["source"], row["augmentation"]) for row in result["rows"]}
    assert cells == {
        (s, a) for s in ("folder", "webdataset", "litdata") for a in ("albumentations", "torchvision", "timm", "none")
    }
    assert all(row["range"][0] <= row["images_per_second"] <= row["range"][1] for row in result["rows"])
    assert result["machine"]["cpu"] and {"webdataset", "litdata", "albumentations"} <= set(result["versions"])
    text = (tmp_path / "data.md").read_text()
    assert text == capsys.readouterr().out and "| source | albumentations | torchvision | timm | none |" in text


def test_photographs_are_the_same_every_time(tmp_path: Path):
    for name in "ab":
        make_photographs(tmp_path / name, 3)
    first, again = (sorted((tmp_path / name).rglob("*.jpg")) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert len(first) == 3 and Image.open(first[0]).size == (500, 375) and first[0].stat().st_size > 20_000


def test_mistakes(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda: main(["--sources", "tape"]))
    assert exit_.value.code == 2 and "invalid choice: 'tape'" in capsys.readouterr().err
