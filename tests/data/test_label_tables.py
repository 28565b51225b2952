"""Several labels an image, from CSV tables: read right, rare classes repeated, and faults named."""

import logging
from pathlib import Path

import numpy as np
import pytest

from luna_vision.data import MultiLabelDataModule
from luna_vision.data.sampling import repeat_rare
from luna_vision.images.decode import SampleError
from luna_vision.utils.errors import UserError
from tests.labelled import NAMES, scenes, write_labels

QUIET = {"num_workers": 0, "batch_size": 2, "img_size": 16}


@pytest.mark.parametrize("form", ["lists", "columns"])
def test_labels_of_a_table(form, tmp_path):
    data = MultiLabelDataModule(str(write_labels(tmp_path, form)), **QUIET)
    data.setup("fit")
    assert data.class_names == NAMES and data.num_classes == 2
    for split in ("train", "val"):
        dataset = data.dataset(split)
        for index, (name, one) in enumerate(scenes(split).items()):
            image, labels = dataset[index]
            assert Path(dataset.source.sample_file(index)).name == name
            assert labels.tolist() == [float(label in one.labels) for label in range(2)] and image.shape == (3, 16, 16)
    images, targets = next(iter(data.val_dataloader()))
    assert targets.shape == (2, 2) and targets.dtype.is_floating_point


@pytest.mark.parametrize("separator", [";", "\t"])
@pytest.mark.parametrize("form", ["lists", "columns"])
def test_columns_apart_by_other_characters(form, separator, tmp_path):
    """Where a comma is in the numbers of a country, its Excel takes semicolons."""
    file = write_labels(tmp_path, form) / "train.csv"
    truth = MultiLabelDataModule(str(tmp_path), **QUIET).table("train").matrix
    text = file.read_text().replace(",", separator)
    file.write_text(f"{separator}\n{text}", "utf-8-sig")
    data = MultiLabelDataModule(str(tmp_path), **QUIET)
    assert data.class_names == NAMES and np.array_equal(data.table("train").matrix, truth)


def test_images_of_rare_classes_come_more_often():
    matrix = np.zeros((100, 3), np.float32)
    matrix[:, 0], matrix[:4, 1], matrix[4, 2] = 1, 1, 1
    repeats = repeat_rare(matrix, 0.16)
    assert (repeats[5:] == 1).all() and (repeats[:4] == 2).all() and repeats[4] == 4
    assert np.array_equal(repeats, repeat_rare(matrix, 0.16))


def test_an_image_without_a_label_stays(tmp_path):
    write_labels(tmp_path, "lists")
    (tmp_path / "train.csv").write_text("file,labels\ntrain/train_0.png,\ntrain/train_1.png,a;b\n")
    data = MultiLabelDataModule(str(tmp_path), **QUIET, val_fraction=0)
    assert data.class_names == ["a", "b"] and data.table("train").matrix.tolist() == [[0, 0], [1, 1]]


FAULTS = {
    "missing image file": "file,labels\ntrain_0.png,a\ntrain_1.png,b\ngone.png,a\n",
    "image listed twice": "file,labels\ntrain_0.png,a\ntrain_1.png,b\ntrain_1.png,b\n",
    "row of another number of columns": "file,labels\ntrain_0.png,a\ntrain_1.png,b\ntrain_2.png\n",
    "cell that is neither 0 nor 1": "file,a,b\ntrain_0.png,1,0\ntrain_1.png,0,1\ntrain_2.png,1,7\n",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_are_counted_and_named_and_left_out(kind, tmp_path, caplog):
    write_labels(tmp_path)
    for split in ("val", "test"):
        (tmp_path / f"{split}.csv").unlink()
    (tmp_path / "train.csv").write_text(FAULTS[kind])
    with pytest.raises(SampleError, match=f"1 x {kind}"):
        MultiLabelDataModule(str(tmp_path), **QUIET, val_fraction=0).setup("fit")
    data = MultiLabelDataModule(str(tmp_path), **QUIET, val_fraction=0, on_error="skip", max_error_share=0.5)
    with caplog.at_level(logging.WARNING):
        data.setup("fit")
    assert kind in caplog.text and len(data.dataset("train")) == (3 if "cell" in kind else 2)


@pytest.mark.parametrize(
    "layout, table, text, error, said",
    [
        ("lists", "train", "\nfile,labels\n\ntrain_0.png,a\n,\ngone.png,b\n", SampleError, "train.csv row 6: gone.png"),
        ("lists", "val", "file,labels\nval_0.png,brick|moss\n", SampleError, "1 x class unknown to training .*moss"),
        ("columns", "val", "file,leaf\nval_0.png,1\n", UserError, "val.csv has no column brick, but leaf"),
    ],
    ids=["row of a missing file", "label that training lacks", "class without a column"],
)
def test_what_is_wrong_in_a_table_is_named(layout, table, text, error, said, tmp_path):
    write_labels(tmp_path, layout)
    (tmp_path / f"{table}.csv").write_text(text)
    with pytest.raises(error, match=said):
        MultiLabelDataModule(str(tmp_path), **QUIET).setup("fit")


def test_a_list_without_any_label_is_no_column(tmp_path):
    write_labels(tmp_path)
    (tmp_path / "val.csv").write_text("file,labels\nval_0.png,\n")
    assert MultiLabelDataModule(str(tmp_path), **QUIET).table("val").matrix.tolist() == [[0, 0]]


@pytest.mark.parametrize("text", ["", "file\na.png\n", "file,labels\n", "file,a,a\nx.png,1,0\n", "\0"])
def test_no_table(text, tmp_path):
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(UserError, match="must have a header|is no CSV"):
        MultiLabelDataModule(str(tmp_path), **QUIET).setup("fit")


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="train.csv"):
        MultiLabelDataModule(str(tmp_path), **QUIET).setup("fit")
