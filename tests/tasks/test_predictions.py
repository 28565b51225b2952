"""Predictions of folders without labels: stopped at any time, they continue, and end as if nobody had stopped them."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from PIL import Image, TiffImagePlugin

from luna_vision.data import DetectionDataModule, ImageFolderDataModule, MultiLabelDataModule, SegmentationDataModule
from luna_vision.images.tiff import GEO_TAGS, georeference
from luna_vision.tasks import ClassificationTask, DetectionTask, MultiLabelTask, PredictionWriter, SegmentationTask
from luna_vision.tasks.prediction_files import Journal
from luna_vision.utils.errors import UserError
from tests.labelled import NAMES, save_images, scenes, write_coco, write_labels, write_masks

from .conftest import tiny_trainer
from .ranks import finish, run, start, until

MODEL = {"model_name": "test_luna_vit", "model_kwargs": {"embed_dim": 32, "depth": 2}}
DENSE = MODEL | {"pyramid_channels": 8, "num_classes": 2}
QUIET = {"num_workers": 0, "batch_size": 1}


def detection(root: Path, new: Path):
    detector = {"strides": [8, 16], "min_size": None, "anchor_sizes": [16, 32]}
    return DetectionTask(**DENSE, **detector), DetectionDataModule(write_coco(root), **QUIET, predict_path=str(new))


def segmentation(root: Path, new: Path):
    return SegmentationTask(**DENSE), SegmentationDataModule(write_masks(root), **QUIET, predict_path=str(new))


def several_labels(root: Path, new: Path):
    data = MultiLabelDataModule(root=str(write_labels(root)), **QUIET, img_size=32, predict_path=str(new))
    return MultiLabelTask(**MODEL, num_classes=2, in_chans=3), data


def classification(root: Path, new: Path):
    for name in NAMES:
        (root / "train" / name).mkdir(parents=True)
    data = ImageFolderDataModule(root=str(root), **QUIET, img_size=32, predict_path=str(new))
    return ClassificationTask(**MODEL, num_classes=2, in_chans=3), data


MADE = {detection: "a.json", segmentation: "a", several_labels: "a.csv", classification: "a.csv"}


class Seen(Callback):
    """The images that are predicted; the process ends before the one with number `last`."""

    def __init__(self, last: int | None = None) -> None:
        self.last, self.names = last, []

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        if len(self.names) == self.last:
            os._exit(0)
        self.names += [Path(name).name for name in batch[1]]


@pytest.fixture
def new(tmp_path) -> Path:
    """A folder of images without labels."""
    save_images(tmp_path / "new", scenes("train"))
    return tmp_path / "new"


def predict(task: LightningModule, data, out: Path, *callbacks: Callback, **options) -> None:
    data.finished = set()  # as in a new process
    writer = PredictionWriter(str(out), **options)
    tiny_trainer(out.parent, callbacks=[writer, *callbacks]).predict(task, data, return_predictions=False)


def content(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.parametrize("make", MADE)
def test_a_killed_prediction_continues(make, tmp_path, new):
    seed_everything(0, verbose=False)
    task, data = make(tmp_path / "data", new)
    whole, out = tmp_path / "whole" / MADE[make], tmp_path / "killed" / MADE[make]
    predict(task, data, whole)
    if (child := os.fork()) == 0:
        predict(task, data, out, Seen(last=3))
    os.waitpid(child, 0)
    partial = out.with_name(f"{out.name}.partial")
    assert partial.is_file() and out.exists() == (make is segmentation)
    with partial.open("ab") as file:
        file.write(b'{"image": "half a li')  # as a kill may leave it
    seen = Seen()
    predict(task, data, out, seen)
    assert seen.names == list(scenes("train"))[3:]
    assert content(out) == content(whole) and len(content(out)) > 0
    assert not partial.exists()
    again = Seen()
    with pytest.raises(FileExistsError, match="exists: give --overwrite"):
        predict(task, data, out, again)
    predict(task, data, out, again, overwrite=True)  # a prediction that has ended begins anew
    assert len(again.names) == len(scenes("train")) and content(out) == content(whole)


@pytest.mark.parametrize("make", MADE)
def test_what_others_have_written_is_kept(make, tmp_path, new):
    """Before and in the middle of a prediction."""
    task, data = make(tmp_path / "data", new)
    out = tmp_path / MADE[make]
    names = [Path(name) for name in scenes("train")]
    mine = out / names[4].name if make is segmentation else out
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("by hand")
    with pytest.raises(FileExistsError, match=f"{mine} exists: give --overwrite"):
        predict(task, data, out)
    assert mine.read_text() == "by hand"
    mine.unlink()
    if (child := os.fork()) == 0:
        predict(task, data, out, Seen(last=3))
    os.waitpid(child, 0)
    mine.write_text("by hand")
    with pytest.raises(FileExistsError, match=f"{mine} exists: give --overwrite"):
        predict(task, data, out)
    assert mine.read_text() == "by hand"
    predict(task, data, out, overwrite=True)
    assert mine.read_bytes() != b"by hand"


def test_a_mask_that_a_kill_has_kept_from_the_disk_is_written(tmp_path, new, monkeypatch):
    task, data = segmentation(tmp_path / "data", new)
    out = tmp_path / "out"
    write, files = type(task).predictions.write, []

    def killed(self, prediction):
        if len(files) == 2:
            os._exit(0)
        files.append(write(self, prediction))

    monkeypatch.setattr(type(task).predictions, "write", killed)
    if (child := os.fork()) == 0:
        predict(task, data, out)
    os.waitpid(child, 0)
    monkeypatch.setattr(type(task).predictions, "write", write)
    seen = Seen()
    predict(task, data, out, seen)
    assert seen.names == list(scenes("train"))[2:] and len(content(out)) == len(scenes("train"))


def test_a_picture_by_hand_is_kept(tmp_path, new):
    task, data = segmentation(tmp_path / "data", new)
    mine = tmp_path / "drawn" / f"{Path(list(scenes('train'))[-1]).stem}.jpg"
    mine.parent.mkdir()
    mine.touch()
    with pytest.raises(FileExistsError, match=f"{mine} exists"):
        predict(task, data, tmp_path / "out", overlays=str(mine.parent))


def test_what_is_left_of_other_weights_is_refused(tmp_path, new):
    task, data = segmentation(tmp_path / "data", new)
    out = tmp_path / "found"
    journal = Journal(out, {"weights": "others"})
    journal.add([{"image": "a.png"}])
    journal.close()
    with pytest.raises(UserError, match="other model, overlays, reading, weights"):
        predict(task, data, out)
    journal.path.write_text("no journal\n")
    with pytest.raises(UserError, match="no list of predictions"):
        predict(task, data, out)


@pytest.mark.parametrize("make", MADE)
def test_broken_images_are_left_out_and_listed(make, tmp_path, new, capsys):
    task, data = make(tmp_path / "data", new)
    names, whole, out = list(scenes("train")), tmp_path / "whole" / MADE[make], tmp_path / MADE[make]
    (new / names[1]).write_bytes(b"no image")
    (new / names[5]).write_bytes((new / names[5]).read_bytes()[:200])
    predict(task, data, out)
    lines = capsys.readouterr().err.splitlines()
    at = lines.index(f"2 of {len(names)} images could not be used:")
    assert names[1] in lines[at + 1] and names[5] in lines[at + 2] and len(lines) == at + 3
    for name in (names[1], names[5]):
        (new / name).unlink()
    predict(task, data, whole)
    assert content(out) == content(whole) and content(out)


@pytest.mark.parametrize("make", MADE)
def test_a_full_disk_loses_nothing(make, tmp_path, new, monkeypatch):
    """At any image, and at the end, where all are finished but the file is not written."""
    task, data = make(tmp_path / "data", new)
    out = tmp_path / "out" / MADE[make]
    form, full = type(task).predictions, OSError(28, "No space left on device")
    for name, at in (("records", 3), ("finish", 1)):
        calls, plain = [], getattr(form, name)

        def broken(self, *args, calls=calls, plain=plain, at=at):
            calls.append(1)
            if len(calls) == at:
                raise full
            return plain(self, *args)

        monkeypatch.setattr(form, name, broken)
        with pytest.raises(OSError, match="cannot write .*No space left on device; the same command continues"):
            predict(task, data, out)
        monkeypatch.setattr(form, name, plain)
    seen = Seen()
    predict(task, data, out, seen)
    assert seen.names == list(scenes("train"))[-1:] and len(content(out)) in (1, len(scenes("train")))


@pytest.mark.parametrize("make", [detection, segmentation])
def test_overlays(make, tmp_path, new, monkeypatch):
    task, data = make(tmp_path / "data", new)
    if make is detection:
        found = {"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([2]), "scores": torch.tensor([0.9])}
        monkeypatch.setattr(task, "forward", lambda images: [found for _ in images])
    predict(task, data, tmp_path / MADE[make], overlays=str(tmp_path / "drawn"))
    drawn = sorted((tmp_path / "drawn").iterdir())
    assert [file.stem for file in drawn] == [Path(name).stem for name in scenes("train")]
    for file, one in zip(drawn, scenes("train").values(), strict=True):
        difference = np.abs(np.asarray(Image.open(file), float) - np.asarray(one.image, float))
        assert difference.shape == (*one.mask.shape, 3) and difference.max() > 60


@pytest.mark.parametrize("option", ["output", "overlays"])
def test_no_image_is_replaced(option, tmp_path, new):
    task, data = segmentation(tmp_path / "data", new)
    before, folders = content(new), {"output": tmp_path / "found", "overlays": tmp_path / "drawn", option: tmp_path}
    with pytest.raises(UserError, match="could replace images such as .*: give another folder"):
        predict(task, data, folders["output"], overlays=str(folders["overlays"]))
    assert content(new) == before


def test_predictions_of_other_statistics_do_not_go_on(tmp_path, new):
    _, data = classification(tmp_path / "data", new)
    other = ImageFolderDataModule(root=data.root, **QUIET, img_size=32, mean=[0.1] * 3, predict_path=str(new))
    assert data.reading() != other.reading()


def test_overlays_need_boxes_or_masks(tmp_path, new):
    task, data = classification(tmp_path / "data", new)
    with pytest.raises(ValueError, match="overlays are of boxes and masks"):
        predict(task, data, tmp_path / "a.csv", overlays=str(tmp_path / "drawn"))


def geotiff(path: Path, image: Image.Image, orientation: int = 1, big: bool = False) -> dict[int, tuple]:
    """Write an image in UTM zone 33N, with pixels of 10 m."""
    keys = (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32633)
    given = {33550: (12, (10.0, 10.0, 0.0)), 33922: (12, (0.0, 0.0, 0.0, 6e5, 5e6, 0.0)), 34735: (3, keys)}
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, (kind, value) in given.items():
        tags.tagtype[tag], tags[tag] = kind, value
    tags[274] = orientation
    image.save(path, "TIFF", tiffinfo=tags, big_tiff=big)
    return {tag: value for tag, (_, value) in given.items()}


@pytest.mark.parametrize("big", [False, True])
def test_masks_of_a_geotiff_lie_where_it_lies(big, tmp_path):
    new = tmp_path / "new"
    new.mkdir()
    first, second, third, _ = list(scenes("train").values())[:4]
    tags = geotiff(new / "a.tif", first.image, big=big)
    geotiff(new / "turned.tif", second.image, orientation=3)
    third.image.save(new / "plain.tif")
    task, data = segmentation(tmp_path / "data", new)
    predict(task, data, tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"a.tif", "turned.png", "plain.png"}
    with Image.open(tmp_path / "out/a.tif") as mask:
        assert mask.size == first.image.size and mask.mode == "P"
        assert {tag: tuple(mask.tag_v2[tag]) for tag in GEO_TAGS if tag in mask.tag_v2} == tags
    assert georeference(tmp_path / "out/turned.png") is None
    assert json.dumps(sorted(georeference(new / "a.tif"))) == json.dumps(sorted(tags))


def predict_together(root: str, new: str, out: str, *last: int) -> None:
    """One of two processes; the second one ends before its image with number `last`, if there is one."""
    seed_everything(0, verbose=False)
    task, data = classification(Path(root) / os.environ["RANK"], Path(new))
    stop = [Seen(*last)] if last and os.environ["RANK"] == "1" else []
    trainer = tiny_trainer(Path(out).parent, callbacks=[PredictionWriter(out), *stop], devices=2, strategy="ddp")
    trainer.predict(task, data, return_predictions=False)


@pytest.mark.slow
def test_several_processes_write_one_file_and_any_number_continues(tmp_path, new):
    seed_everything(0, verbose=False)
    task, data = classification(tmp_path / "data", new)
    one, two, killed = (tmp_path / name / "a.csv" for name in ("one", "two", "killed"))
    predict(task, data, one)
    run(tmp_path / "ranks", 2, predict_together, str(tmp_path / "own"), str(new), str(two))
    assert content(two) == content(one) and os.listdir(two.parent) == ["a.csv"]
    processes = start(tmp_path / "stopped", 2, predict_together, str(tmp_path / "other"), str(new), str(killed), 1)
    until(lambda: (killed.parent / "a.csv.1.partial").exists(), processes)
    processes[1].join(60)
    processes[0].kill()
    finish(tmp_path / "stopped", processes)
    assert not killed.exists()
    seen = Seen()
    predict(task, data, killed, seen)  # by one process
    assert len(seen.names) < len(scenes("train"))
    assert content(killed) == content(one) and os.listdir(killed.parent) == ["a.csv"]
