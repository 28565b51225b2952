"""`predict IMAGE --out FILE.tif`: the map of a large image is that of the masks that predict writes of small ones."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from lightning.pytorch import seed_everything
from PIL import Image

import luna_vision
from luna_vision.cli.main import main
from luna_vision.data import DetectionDataModule, SegmentationDataModule
from luna_vision.execution.checkpoint import Checkpoint
from luna_vision.tasks import DetectionTask, PredictionWriter, SegmentationTask, export_weights
from tests.labelled import write_coco, write_masks
from tests.tasks.conftest import tiny_trainer

MODEL = {"model_name": "test_luna_vit", "model_kwargs": {"embed_dim": 32, "depth": 2}, "pyramid_channels": 8}
QUIET = {"num_workers": 0, "batch_size": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a trained segmenter (a checkpoint and exported weights), a detector, and an image."""
    folder = tmp_path_factory.mktemp("trained")
    seed_everything(0, verbose=False)
    data = SegmentationDataModule(write_masks(folder / "data", "colors"), **QUIET)
    task = SegmentationTask(**MODEL, num_classes=data.num_classes, background=data.background, lr=1e-2)
    trainer = tiny_trainer(folder, max_epochs=3)
    trainer.fit(task, data)
    trainer.save_checkpoint(folder / "best.ckpt")
    export_weights(folder / "best.ckpt", folder / "best.safetensors")
    content = torch.load(folder / "best.ckpt", weights_only=True)
    content["hyper_parameters"]["model_kwargs"]["mlp_ratio"] = 1.0
    torch.save(content, folder / "other.ckpt")
    pixels = np.random.default_rng(0).integers(0, 256, (150, 131, 3), dtype=np.uint8)
    pixels[30:90, 40:110] = (200, 30, 30)
    (folder / "new").mkdir()
    Image.fromarray(pixels).save(folder / "new/a.png")
    writer = PredictionWriter(str(folder / "masks"))
    data.predict_path = str(folder / "new")
    how = {"ckpt_path": folder / "best.ckpt", "return_predictions": False, "weights_only": True}
    tiny_trainer(folder, callbacks=[writer]).predict(task, data, **how)
    boxes = DetectionDataModule(write_coco(folder / "boxes"), **QUIET)
    for name in ("retinanet", "faster_rcnn"):
        options = {"detector": name, "strides": [8, 16], "min_size": None, "anchor_sizes": [16, 32]}
        detector = DetectionTask(**MODEL, **options, num_classes=2)
        trainer = tiny_trainer(folder, max_steps=1)
        trainer.fit(detector, boxes)
        if name == "retinanet":  # so that it finds something
            torch.nn.init.constant_(detector.model.head.classification_head.cls_logits.bias, -2.5)
        trainer.save_checkpoint(folder / f"{name}.ckpt")
    return folder


def run(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["luna-vision", "predict", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


@pytest.mark.parametrize("name", ["best.ckpt", "best.safetensors"])
def test_the_map_is_the_mask_that_predict_writes(name, trained, tmp_path, monkeypatch, capsys):
    out, shares = tmp_path / "a.tif", tmp_path / "p.tif"
    words = [trained / "new/a.png", "--checkpoint", trained / name, "--out", out, "--device", "cpu"]
    polygons = tmp_path / "a.geojson"
    assert run(monkeypatch, *words, "--probabilities", shares, "--polygons", polygons) == 0
    assert capsys.readouterr().out == f"{out}: 150 x 131 pixels\n"
    with tifffile.TiffFile(out) as file, Image.open(trained / "masks/a.png") as mask:
        np.testing.assert_array_equal(file.asarray(), np.asarray(mask))
        assert len(np.unique(file.asarray())) > 1
        colors = file.pages.first.colormap[:, :3].T // 257
        assert colors.flatten().tolist() == mask.getpalette()[:9]  # those of the training masks
        assert '"background"' in file.pages.first.description
    features = json.loads(polygons.read_text())["features"]
    assert {f["properties"]["classification"]["name"] for f in features} <= {"leaf", "brick"} and features
    model, transform, names = luna_vision.load(trained / name)
    with torch.no_grad():
        want = model(transform(trained / "new/a.png")[None])[0].softmax(0) * 255
    assert np.abs(tifffile.imread(shares) - want.numpy()).max() < 0.6 and len(names) == 3


def test_the_memory_packs_by_row_where_it_is_asked_to(trained, tmp_path, monkeypatch, capsys):
    words = [trained / "new/a.png", "--checkpoint", trained / "best.ckpt", "--device", "cpu", "--out"]
    model, transform, _ = luna_vision.load(trained / "best.ckpt")
    (backbone,) = (module for module in model.modules() if isinstance(module, luna_vision.LunaVit))
    found = []
    for options in ([], ["--pack-by-row"]):
        shares = tmp_path / f"shares{len(options)}.tif"
        assert run(monkeypatch, *words, tmp_path / f"{len(options)}.tif", "--probabilities", shares, *options) == 0
        backbone.set_pack_by_row(bool(options))
        with torch.no_grad():
            want = model(transform(trained / "new/a.png")[None])[0].softmax(0) * 255
        found.append(tifffile.imread(shares))
        assert np.abs(found[-1] - want.numpy()).max() < 0.6
    assert (found[0] != found[1]).any()


@pytest.mark.parametrize("name", ["retinanet.ckpt", "faster_rcnn.ckpt"])
def test_boxes_are_those_of_the_model(name, trained, tmp_path, monkeypatch, capsys):
    out, coco = tmp_path / "a.geojson", tmp_path / "a.json"
    words = [trained / "new/a.png", "--checkpoint", trained / name, "--device", "cpu"]
    assert run(monkeypatch, *words, "--out", out, "--coco", coco) == 0
    model, transform, names = luna_vision.load(trained / name)
    if name == "retinanet.ckpt":
        model.topk_candidates = model.detections_per_img = 10**9
    else:
        limits = {"training": 10**9, "testing": 10**9}
        model.rpn.score_thresh, model.rpn._pre_nms_top_n, model.rpn._post_nms_top_n = 0.05, limits, limits
        model.roi_heads.detections_per_img = 10**9
    with torch.no_grad():
        want = model([transform(trained / "new/a.png")])[0]
    count = int((want["labels"] > 0).sum())
    assert capsys.readouterr().out == f"{out}: {count} objects in 150 x 131 pixels\n" and count > 0
    content = json.loads(coco.read_text())
    assert len(content["annotations"]) == len(json.loads(out.read_text())["features"]) == count
    assert [category["name"] for category in content["categories"]] == names[1:]


def test_a_stopped_run_goes_on(trained, tmp_path, monkeypatch, capsys):
    save, count = Checkpoint.save, iter(range(100))

    def stop(self, state, band):
        save(self, state, band)
        if next(count) == 20:
            raise KeyboardInterrupt

    words = [trained / "new/a.png", "--checkpoint", trained / "best.ckpt", "--device", "cpu", "--band-rows", 1]
    assert run(monkeypatch, *words, "--out", tmp_path / "want.tif", "--mask", trained / "masks/a.png") == 0
    words += ["--out", tmp_path / "a.tif", "--store", tmp_path / "store", "--mask", trained / "masks/a.png"]
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", stop)
        assert run(monkeypatch, *words) == 130
    assert capsys.readouterr().err.endswith("stopped; the same command continues from here\n")
    assert run(monkeypatch, *words) == 0
    assert (tmp_path / "a.tif").read_bytes() == (tmp_path / "want.tif").read_bytes()
    assert not (tmp_path / "store").exists() and "% looked at" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        (["--out", "{tmp}/old.tif"], "old.tif exists: give --overwrite"),
        (["--probabilities", "{tmp}/p.png"], "a map must end in .tif, .tiff, .zarr, got"),
        (["--polygons", "{tmp}/p.json"], "polygons must end in .geojson, got"),
        (["--probabilities", "{tmp}/a.tif"], "give another name"),
        (["--checkpoint", "{trained}/other.ckpt"], "does not fit test_luna_vit as it is built now: "),
        (["--coco", "{tmp}/a.json"], "--coco goes with boxes"),
        (["--checkpoint", "{trained}/retinanet.ckpt"], "is no segmenter"),
        (["--out", "{tmp}/a.geojson"], "is a segmenter: give --out .tif"),
        (["--out", "{tmp}/a.geojson", "--polygons", "{tmp}/b.geojson"], "--polygons goes with a map"),
        (["--checkpoint", "{trained}/no.ckpt"], "there is no file or folder"),
        (["--region", "0", "0", "1000", "1000"], "is not within"),
        (["--memory-budget", "1KB"], "is too small for this image: it takes "),
    ],
    ids=str,
)
def test_mistakes(change, message, trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "old.tif").write_bytes(b"")
    words = ["--checkpoint", trained / "best.ckpt", "--out", tmp_path / "a.tif", "--device", "cpu"]
    words += [word.format(tmp=tmp_path, trained=trained) for word in change]
    assert run(monkeypatch, trained / "new/a.png", *words) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and message in last, last
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.tif"]


def test_a_folder_is_not_one_image(trained, tmp_path, monkeypatch, capsys):
    words = [trained / "new", "--checkpoint", trained / "best.ckpt", "--out", tmp_path / "a.tif"]
    assert run(monkeypatch, *words) == 2
    assert "new is a folder, and --out .tif is of one image" in capsys.readouterr().err.splitlines()[-1]


def test_help(monkeypatch, capsys):
    assert run(monkeypatch, "--out", "a.tif", "--help") == 0
    text = capsys.readouterr().out
    assert "--probabilities" in text and "--mpp" in text and "--mean" not in text
