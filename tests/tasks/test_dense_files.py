"""From files to files: a run on labelled files trains, and scores of what it predicts into files are those it logs."""

import contextlib
import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sklearn.metrics import average_precision_score, f1_score, jaccard_score

import luna_vision
from luna_vision.cli.train import run_words
from luna_vision.data import DetectionDataModule, MultiLabelDataModule, SegmentationDataModule
from luna_vision.tasks import DetectionTask, MultiLabelTask, PredictionWriter, SegmentationTask, export_weights
from tests.labelled import COLORS, NAMES, WRITERS, coco_of, scenes, write_coco, write_labels, write_masks, write_yolo

QUIET = {"num_workers": 0, "batch_size": 2}
MODEL = {"model_name": "test_luna_vit", "model_kwargs": {"embed_dim": 32, "depth": 2}}
DENSE = MODEL | {"pyramid_channels": 8}
DETECTOR = DENSE | {"strides": [8, 16], "min_size": None, "anchor_sizes": [16, 32], "num_classes": 2}


def trainer(folder: Path, **kwargs) -> Trainer:
    seed_everything(0, verbose=False)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(max_epochs=1, accelerator="cpu", default_root_dir=folder, **quiet, **kwargs)


def run(task, data, folder: Path, out: str) -> tuple[dict[str, float], Path]:
    """Train an epoch, test, and predict the test images from the checkpoint. Returns scores and the written path."""
    writer = PredictionWriter(str(folder / out))
    one = trainer(folder, callbacks=[writer])
    one.fit(task, data)
    (scores,) = one.test(task, data, verbose=False)
    one.save_checkpoint(folder / "a.ckpt")
    one.predict(task, data, ckpt_path=folder / "a.ckpt", return_predictions=False)
    return scores, folder / out


def coco_score(truth: dict, found: list[dict]) -> float:
    """pycocotools' mean average precision."""
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = truth
        known.createIndex()
        evaluation = COCOeval(known, known.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[0]


@pytest.mark.parametrize("form", WRITERS)
def test_detection(form, tmp_path, monkeypatch):
    data = DetectionDataModule(WRITERS[form](tmp_path / "data"), **QUIET)
    task = DetectionTask(**DETECTOR)
    data.setup("test")
    dataset, rng = data.dataset("test"), np.random.default_rng(0)
    guesses = {}
    for index in range(len(dataset)):  # near the truth, and one that is wrong
        image, target = dataset[index]
        boxes = target["boxes"] + torch.from_numpy(rng.normal(0, 1.5, (2, 4))).float()
        boxes = torch.cat([boxes, torch.tensor([[1.0, 1.0, 20.0, 20.0]])]).clamp(0, 48)
        labels = torch.cat([target["labels"], torch.tensor([1])])
        found = {"boxes": boxes, "labels": labels, "scores": torch.rand(3)}
        guesses[image.numpy().tobytes()] = found
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)}

    def forward(images):
        return [guesses.get(image.numpy().tobytes(), empty) for image in images]

    monkeypatch.setattr(task, "forward", forward)
    scores, path = run(task, data, tmp_path, "found.json")
    assert 0 < scores["test_map"] < 1
    assert scores["test_map"] == pytest.approx((scores["test_ap/brick"] + scores["test_ap/leaf"]) / 2)
    content = json.loads(path.read_text())
    assert {image["file_name"] for image in content["images"]} == set(scenes("test"))
    truth = coco_of(scenes("test"))
    if form == "coco":  # which keeps its own numbers
        assert content["categories"] == sorted(truth["categories"], key=lambda category: category["id"])
    else:
        ids = {Path(image["file_name"]).name: image["id"] for image in content["images"]}
        classes = {category["name"]: category["id"] for category in content["categories"]}
        moved = {image["id"]: ids[image["file_name"]] for image in truth["images"]}
        names = {category["id"]: category["name"] for category in truth["categories"]}
        for annotation in truth["annotations"]:
            annotation["image_id"] = moved[annotation["image_id"]]
            annotation["category_id"] = classes[names[annotation["category_id"]]]
        truth |= {"images": content["images"], "categories": content["categories"]}
    assert coco_score(truth, content["annotations"]) == pytest.approx(scores["test_map"], abs=1e-4)


@pytest.mark.slow
def test_a_detector_learns_at_native_size(tmp_path):
    """The real model: its loss falls, and it loads again with its classes."""
    data = DetectionDataModule(write_coco(tmp_path / "data"), **QUIET, train_on="crops", crop_size=48)
    task, losses = DetectionTask(**DETECTOR, lr=2e-3), []
    one = trainer(tmp_path)
    one.fit_loop.max_epochs = 6
    task.on_train_batch_end = lambda outputs, batch, batch_idx: losses.append(float(outputs["loss"]))
    one.fit(task, data)
    assert np.mean(losses[-6:]) < 0.8 * np.mean(losses[:3])
    one.save_checkpoint(tmp_path / "a.ckpt")
    export_weights(tmp_path / "a.ckpt", tmp_path / "best.safetensors")
    model, transform, names = luna_vision.load(tmp_path / "best.safetensors")
    assert names == ["background", *NAMES[::-1]]
    (found,) = model([transform(tmp_path / "data/test/test_0.png")])
    assert set(found) == {"boxes", "labels", "scores"}


@pytest.mark.parametrize("form", ["index", "palette", "colors", "coco", "yolo", "no background", "0 and 255"])
def test_segmentation(form, tmp_path):
    root, options = tmp_path / "data", {"train_on": "crops", "crop_size": 32}
    if form == "coco":
        write_coco(root)
    elif form == "yolo":
        write_yolo(root, outlines=True)
    else:
        write_masks(root, form if form in ("palette", "colors") else "index")
    if form == "no background":
        options |= {"background": False}
    elif form == "0 and 255":
        for file in root.glob("*/masks/*"):
            Image.fromarray((np.asarray(Image.open(file)) > 0).astype(np.uint8) * 255).save(file)
        options |= {"classes": ["background", "thing"], "values": [0, 255], "ignore_index": -1}
    data = SegmentationDataModule(root, **QUIET, **options)
    assert data.background == (form != "no background")
    names = {"no background": ["background", *NAMES], "0 and 255": ["thing"], "coco": NAMES[::-1]}
    assert data.class_names == names.get(form, NAMES)
    task = SegmentationTask(**DENSE, num_classes=data.num_classes, background=data.background, lr=1e-2)
    scores, path = run(task, data, tmp_path, "found")
    written = {file.stem: file for file in path.iterdir()}
    assert set(written) == {Path(name).stem for name in scenes("test")}
    truth, found = [], []
    for name, one in scenes("test").items():
        mask = Image.open(written[Path(name).stem])
        values = np.asarray(mask)
        if form == "colors":
            colors = np.asarray(mask.convert("RGB"))
            values = sum((colors == color).all(2) * (i + 1) for i, color in enumerate(COLORS))
        elif form == "0 and 255":
            assert set(np.unique(values)) <= {0, 255}
        expected = one.mask
        expected = np.array([0, 2, 1])[expected] if form == "coco" else expected
        expected = (expected > 0) * 255 if form == "0 and 255" else expected
        truth.append(expected.ravel())
        found.append(values.ravel())
    score = jaccard_score(np.concatenate(truth), np.concatenate(found), average="macro")
    assert score == pytest.approx(scores["test_miou"], abs=1e-5)
    each = [value for name, value in scores.items() if name.startswith("test_iou/")]
    assert np.mean(each) == pytest.approx(scores["test_miou"], abs=1e-5)


def test_images_of_several_sizes_are_padded_without_a_trace():
    task = SegmentationTask(**DENSE, num_classes=2).eval()
    small, large = torch.rand(3, 40, 24), torch.rand(3, 48, 64)
    with torch.inference_mode():
        both, alone = task([small, large]), task([small])
        torch.testing.assert_close(both[1:], task(large[None]), rtol=1e-4, atol=1e-4)
        # the last row and column of patches sees the padding through the convolutions of the head
        torch.testing.assert_close(both[0, :, :16, :12], alone[0, :, :16, :12], rtol=1e-3, atol=1e-3)
    masks = [torch.zeros(40, 24, dtype=torch.uint8), torch.ones(48, 64, dtype=torch.uint8)]
    task.check_batch([small, large], masks)


def test_a_crop_in_which_all_is_ignored_gives_no_nan():
    task = SegmentationTask(**DENSE, num_classes=2)
    logits = torch.zeros(1, 3, 8, 8, requires_grad=True)
    loss = task._loss(logits, torch.full((1, 8, 8), 255), task.class_weight)
    loss.backward()
    assert loss == 0 and logits.grad.isfinite().all()


class Gradients(Callback):
    """Keeps the gradients of the backbone."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.found = [parameter.grad.clone() for parameter in pl_module.timm_model.parameters()]


@pytest.mark.parametrize("name", ["detection", "segmentation"])
def test_bands_change_no_gradient(name, tmp_path):
    """`train_on: bands` runs the backbone in bands, and only then, with the gradients of whole images."""
    root, gradients, ran = write_coco(tmp_path), [], []
    for train_on in ("whole", "bands"):
        seed_everything(0, verbose=False)
        if name == "detection":
            task, data = DetectionTask(**DETECTOR), DetectionDataModule(root, **QUIET, train_on=train_on)
        else:
            data = SegmentationDataModule(root, **QUIET, train_on=train_on)
            task = SegmentationTask(**DENSE, num_classes=2)
        kept = Gradients()
        trainer(tmp_path, limit_train_batches=1, limit_val_batches=0, callbacks=[kept]).fit(task, data)
        gradients.append(kept.found)
        ran.append(task.timm_model.block_runner is not None)
    assert ran == [False, True]
    for whole, bands in zip(*gradients, strict=True):
        torch.testing.assert_close(bands, whole, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("given", ["balanced", [1.0, 0.0, 4.0]])
def test_class_weights_of_pixels(given, tmp_path):
    """Training pixels count by their class, those of validation alike; balanced, by its share among all pixels."""
    data = SegmentationDataModule(write_masks(tmp_path), **QUIET)
    task = SegmentationTask(**DENSE, num_classes=2, class_weights=given, background_weight=0.5)
    trainer(tmp_path, limit_train_batches=1, limit_val_batches=1).fit(task, data)
    pixels = np.bincount(np.concatenate([one.mask.ravel() for one in scenes("train").values()]), minlength=3)
    expected = np.array(given if isinstance(given, list) else np.median(pixels) / pixels) * [0.5, 1, 1]
    logits, mask = torch.randn(1, 3, 4, 6), torch.randint(3, (1, 4, 6))
    seen = {}
    task.forward = lambda images: logits
    task.log_evaluation_mean = lambda name, value, count: seen.setdefault(name, value)
    task.log = task.log_training = lambda *args, **kwargs: None
    for loss, weights in (
        (task.training_step((torch.zeros(1, 3, 4, 6), mask), 0), expected),
        (task.evaluate("val", torch.zeros(1, 3, 4, 6), mask) and seen["val_loss"], [0.5, 1, 1]),
    ):
        weights = torch.tensor(weights, dtype=torch.float32)
        torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, mask, weights), rtol=1e-4, atol=1e-5)


def test_weights_of_the_wrong_number_of_classes():
    with pytest.raises(ValueError, match="3 finite numbers"):
        SegmentationTask(**DENSE, num_classes=2, class_weights=[1.0, 2.0])


@pytest.mark.parametrize("form", ["boxes", "masks", "outlines"])
def test_images_of_rare_classes_come_more_often(form, tmp_path):
    root = write_masks(tmp_path) if form == "masks" else write_coco(tmp_path)
    make = DetectionDataModule if form == "boxes" else SegmentationDataModule
    plain, more = make(root, **QUIET), make(root, **QUIET, repeat_rare=1.0)
    assert len(plain.dataset("train")) < len(more.dataset("train")) and len(more.dataset("val")) == 2
    has = {name: set(one.labels) for name, one in scenes("train").items()}
    rare = min((0, 1), key=lambda label: sum(label in labels for labels in has.values()))
    source = more.make_source("train")
    files = [Path(source.dataset.sample_file(index)).name for index in source.indices]
    share = sum(rare in has[file] for file in files) / len(files)
    assert share > sum(rare in labels for labels in has.values()) / len(has)
    with pytest.raises(ValueError, match="repeat_rare"):
        make(root, **QUIET, repeat_rare=2)


def test_bands_need_a_luna_vit(tmp_path):
    data = SegmentationDataModule(write_masks(tmp_path), **QUIET, train_on="bands")
    for model in ({"model_name": "vit_tiny_patch16_224"}, MODEL | {"model_kwargs": {"mixer": "softmax"}}):
        task = SegmentationTask(**model, pyramid_channels=8, num_classes=2)
        with pytest.raises(ValueError, match="band"):
            task.check_data(data, "fit")


@pytest.mark.parametrize("form", ["lists", "columns"])
def test_several_labels(form, tmp_path):
    data = MultiLabelDataModule(root=str(write_labels(tmp_path / "data", form)), **QUIET, img_size=32, repeat_rare=0.5)
    task = MultiLabelTask(**MODEL, num_classes=2, in_chans=3, class_weights="balanced")
    scores, path = run(task, data, tmp_path, "found.csv")
    rows = list(csv.DictReader(path.open()))
    assert [Path(row["image"]).name for row in rows] == list(scenes("test"))
    probabilities = np.array([[float(row[name]) for name in NAMES] for row in rows])
    truth = np.array([[label in one.labels for label in range(2)] for one in scenes("test").values()])
    for row, found in zip(rows, probabilities >= 0.5, strict=True):
        assert row["labels"] == "|".join(name for name, there in zip(NAMES, found, strict=True) if there)
    each = [average_precision_score(truth[:, i], probabilities[:, i]) for i in range(2) if truth[:, i].any()]
    assert np.mean(each) == pytest.approx(scores["test_map"], abs=1e-4)
    expected = f1_score(truth, probabilities >= 0.5, average="macro", zero_division=0)
    assert expected == pytest.approx(scores["test_f1"], abs=1e-4)


def test_the_template_of_the_documentation_trains(tmp_path, monkeypatch, capsys):
    """By the command line, as its user would; it has no test images."""
    text = (Path(__file__).parents[2] / "docs" / "dense.md").read_text()
    (code,) = [part for part in text.split("```python\n")[1:] if "LightningDataModule" in part]
    code = code.partition("```")[0]
    assert len(code.splitlines()) <= 46
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["luna-vision"])
    monkeypatch.syspath_prepend(tmp_path)
    Path("dots.py").write_text(code)
    task = {"class_path": "luna_vision.tasks.SegmentationTask", "init_args": DENSE}
    trainer = {"max_epochs": 1, "limit_train_batches": 2, "accelerator": "cpu", "enable_progress_bar": False}
    config = {"model": task, "data": {"class_path": "dots.DotsDataModule"}, "trainer": trainer}
    Path("dots.yaml").write_text(json.dumps(config))
    run_words(["fit", "--config", "dots.yaml"])
    out = capsys.readouterr().out
    assert "load it with:" in out and "test mIoU" not in out
    assert json.loads(Path("runs/run/version_0/run.json").read_text())["finished"] is True
