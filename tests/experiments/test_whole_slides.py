"""The images of the comparison of one stage with two have the labels that they are said to have."""

import csv

import numpy as np
import pytest
from PIL import Image

from experiments.slides import VEHICLES, _parser, main, make_slides
from luna_vision.images import open_image

CLASSES = {"airplane": (255, 0, 0), "bird": (0, 60, 0), "cat": (0, 90, 0), "horse": (0, 0, 255)}


@pytest.fixture
def photos(tmp_path):
    """CIFAR-10's folders, a colour for each class."""
    for split in ("train", "test"):
        for name, color in CLASSES.items():
            folder = tmp_path / "cifar10" / split / name
            folder.mkdir(parents=True)
            for i in range(10):
                Image.new("RGB", (4, 4), color).save(folder / f"{i}.png")
    return tmp_path


def test_labels(photos):
    words = ["--root", str(photos), "--work", str(photos / "work"), "--side", "256", "--photo", "24"]
    args = _parser().parse_args([*words, "--photos", "5", "--rare", "2", "--train", "4", "--val", "2", "--test", "2"])
    table = make_slides(vars(args))
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["split"] for row in rows] == ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    for row in rows:
        image = open_image(table.parent / row["path"])
        pixels = np.asarray(image[0 : image.shape[0]])
        sizes = {name: int((pixels == color).all(axis=2).sum()) for name, color in CLASSES.items()}
        vehicles = sum(size for name, size in sizes.items() if name in VEHICLES)
        assert image.shape == (256, 256, 3) and vehicles == 2 * 24**2 * (row["label"] == "yes")
        mask = np.asarray(Image.open(table.parent / row["mask"]))
        assert sum(sizes.values()) == 5 * 24**2 and ((pixels != 255).any(axis=2) == (mask == 255)).all()


@pytest.mark.parametrize(
    "words", [["--out", "a.txt"], ["--root", "gone"], ["--photo", "2000"], ["--rare", "13"], ["--ways", "none"]]
)
def test_mistakes(words, photos, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--root", str(photos), *words])
    assert caught.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
