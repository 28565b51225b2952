"""Slides from a CSV table: read right, by rows, and faults named."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import tifffile
import timm
import torch
from PIL import Image

from luna_vision.data import SlideDataModule
from luna_vision.images.decode import SampleError
from luna_vision.images.find import read_list
from luna_vision.utils.errors import UserError


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six slides of 90 x 70 pixels with a square of tissue, the last one with two levels of known resolution."""
    rng = np.random.default_rng(0)
    for i in range(6):
        array = np.full((70, 90, 3), 240, np.uint8)
        array[20:40, 30 : 50 + i] = rng.integers(0, 255, (20, 20 + i, 3))
        with tifffile.TiffWriter(tmp_path / f"{i}.tif") as tiff:
            how = {"photometric": "rgb", "resolutionunit": "CENTIMETER", "metadata": None}
            tiff.write(array, subifds=1, resolution=(20_000, 20_000), **how)
            tiff.write(array[::2, ::2], subfiletype=1, resolution=(10_000, 10_000), **how)
    Image.fromarray(np.pad(np.full((10, 20), 255, np.uint8), ((0, 60), (0, 70)))).save(tmp_path / "corner.png")
    square = [[[10, 18], [22, 18], [22, 22], [10, 22], [10, 18]]]
    (tmp_path / "drawn.geojson").write_text(json.dumps({"type": "Polygon", "coordinates": square}))
    return tmp_path


def write(folder: Path, text: str, name: str = "slides.csv") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


ROWS = "0.tif,a\n1.tif,b\n2.tif,a\n3.tif,b\n"


def model(**arguments):
    torch.manual_seed(0)
    small = {"embed_dim": 16, "depth": 2, "patch_size": 8, "memory_len": 3, "num_classes": 2}
    return timm.create_model("test_luna_vit", **small | arguments)


def test_splits_masks_and_regions(folder):
    header = "path,label,split,mask,region\n"
    rows = "0.tif,b,train,,\n1.tif,a,train,otsu,\n2.tif,a,val,corner.png,\n3.tif,b,valid,drawn.geojson,8 16 60 40\n"
    data = SlideDataModule(write(folder, header + rows + "4.tif,b,test,,\n"), hflip=0, vflip=0)
    data.setup("fit")
    data.setup("test")
    assert data.class_names == ["a", "b"] and data.num_classes == 2
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [2, 2, 1]
    slides, labels = next(iter(data.train_dataloader()))
    assert isinstance(slides, list) and labels.dtype == torch.int64
    grids = {}
    for split in ("train", "val", "test"):
        for slide, label in (data.dataset(split)[i] for i in range(len(data.dataset(split)))):
            found = slide.patches(model())
            count = None if found.valid is None else int(found.valid.sum())
            grids[Path(slide.row.path).stem] = found.grid_size, label, count
    assert grids["0"] == grids["4"] == ((9, 12), 1, None)
    assert grids["1"][:2] == ((3, 4), 0) and grids["2"] == ((2, 3), 0, 6)
    assert grids["3"] == ((1, 2), 1, 2)


def test_masks_that_are_no_files(folder):
    path = write(folder, "path,label,mask\n0.tif,a,valid\n1.tif,b,otsu\n2.tif,b,corner.png\n")
    masks = ["valid", "otsu", str(folder / "corner.png")]
    assert [row.mask for row in SlideDataModule(path).table()["train"]] == masks
    assert [row.mask for row in read_list(path)] == masks


def test_the_table_is_that_of_encode(folder):
    """Other columns, and any separator in a region."""
    text = 'path,label,patient,region\n0.tif,a,P1,"0, 0, 16,16"\n1.tif,b,P2,0;0;16;16\n2.tif,b,,0 0 16 16\n'
    path = write(folder, text)
    rows = SlideDataModule(path).table()["train"]
    assert [(row.path, row.region) for row in rows] == [(row.path, row.region) for row in read_list(path)]
    assert {row.region for row in rows} == {(0, 0, 16, 16)}


def test_regions_of_a_file_are_held_out_together(folder):
    rows = [f"{i}.tif,{'ab'[i % 2]},{x} 0 16 16" for x in (0, 16, 32) for i in range(6)]
    data = SlideDataModule(write(folder, "\n".join(["path,label,region", *rows])), val_fraction=0.4)
    train, val = ({row.path for row, _ in data.make_source(split)} for split in ("train", "val"))
    assert not train & val and len(train) == 3 and len(val) == 3
    assert len(data.make_source("train")) == len(data.make_source("val")) == 9
    assert {row.path for row, _ in data.make_source("test")} == val  # there are no others
    data.val_fraction = 0
    assert len(data.make_source("train")) == 18 and data.make_source("val") is None


def test_resolution_and_pixels_are_those_of_the_file(folder):
    data = SlideDataModule(write(folder, "path,label\n" + ROWS), mpp=1.0, mask="otsu", val_fraction=0.5)
    data.setup("fit")
    assert len(data.dataset("train")) == len(data.dataset("val")) == 2
    slide, _ = data.dataset("val")[0]
    found = slide.patches(model(in_chans=3))
    assert found.pixels.shape[:2] == (35, 45)
    assert found.grid_size[0] < 5 and found.pixels.mean.flatten().tolist() == pytest.approx(data.mean)


def test_flips_are_drawn_for_each_epoch_and_slide_in_training_alone(folder):
    data = SlideDataModule(write(folder, "path,label\n" + ROWS), val_fraction=0.5)
    drawn = [[data.dataset("train")[epoch, i][0].flip for i in range(2)] for epoch in range(20)]
    assert drawn == [[data.dataset("train")[epoch, i][0].flip for i in range(2)] for epoch in range(20)]
    assert len({flip for flips in drawn for flip in flips}) == 4
    assert {data.dataset("val")[epoch, 0][0].flip for epoch in range(20)} == {(False, False)}


FAULTS = {
    "missing image file": "9.tif,a,,,",
    "image listed twice": "3.tif,a,,,",
    "row without a label": "4.tif,,,,",
    "region that is not X Y WIDTH HEIGHT": "4.tif,a,,,1 2 3",
    "missing mask file": "4.tif,a,,gone.png,",
    "split that is not train, val or test": "4.tif,a,tain,,",
    "row of another number of columns": "4.tif,a",
    "class unknown to training": "4.tif,c,val,,",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_are_counted_and_named_and_left_out(kind, folder, caplog):
    rows = "".join(f"{row},,,\n" for row in ROWS.split())
    table = write(folder, f"path,label,split,mask,region\n{rows}{FAULTS[kind]}\n5.tif,a,val,,\n")
    with pytest.raises(SampleError, match=f"1 x {kind}"):
        SlideDataModule(table).setup("fit")
    data = SlideDataModule(table, on_error="skip", max_error_share=0.5)
    with caplog.at_level(logging.WARNING):
        data.setup("fit")
    assert kind in caplog.text and (len(data.dataset("train")), len(data.dataset("val"))) == (4, 1)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "must have a header"),
        ("path,label\n", "must have a header"),
        ("file,label\n0.tif,a\n", "has no column path"),
        ("path,label\n0.tif,a\n1.tif,a\n", "two or more labels"),
        ("path,label,split\n0.tif,a,val\n1.tif,b,val\n", "two or more labels"),
    ],
)
def test_no_table(text, message, folder):
    with pytest.raises(UserError, match=message):
        SlideDataModule(write(folder, text)).setup("fit")


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"slides\.csv"):
        SlideDataModule(str(tmp_path / "slides.csv")).setup("fit")


@pytest.mark.parametrize("arguments", [{"level": 1, "mpp": 0.5}, {"mean": "data"}, {"value_range": "percentile"}])
def test_arguments_that_do_not_go_together(arguments, folder):
    with pytest.raises(UserError):
        SlideDataModule(write(folder, "path,label\n" + ROWS), **arguments)


def test_prediction_names_slides_and_regions(folder):
    rows = "0.tif,a,train,\n1.tif,b,train,\n2.tif,a,test,\n2.tif,b,test,0 0 16 16\n"
    data = SlideDataModule(write(folder, "path,label,split,region\n" + rows))
    names = data.files_to_predict()
    assert [Path(name).name for name in names] == ["2.tif", "2.tif 0 0 16 16"]
    data.finished = {names[0]}
    ((slides, ids),) = list(data.predict_dataloader())
    assert ids == names[1:] and slides[0].patches(model()).grid_size == (2, 2)
    data = SlideDataModule(str(folder / "slides.csv"), predict_path=str(folder / "1.tif"))
    ((slides, ids),) = list(data.predict_dataloader())
    assert ids == [str(folder / "1.tif")] and slides[0].patches(model()).grid_size == (9, 12)


def test_prediction_without_the_slides_of_the_table(folder):
    """Their classes alone are needed; and it finds what is trained on."""
    table = write(folder, "path,label,mask\ngone.tif,b,gone.png\ngone.svs,a,\n")
    (folder / "new" / "one.zarr").mkdir(parents=True)
    (folder / "new" / "two.mrxs").touch()
    data = SlideDataModule(table, predict_path=str(folder / "new"))
    assert data.class_names == ["a", "b"]
    for _ in range(2):
        assert [Path(name).name for name in data.files_to_predict()] == ["one.zarr", "two.mrxs"]
        data.setup("predict")
