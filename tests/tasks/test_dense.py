"""Detection and segmentation through Lightning: metrics are right, and weights start where they should."""

from pathlib import Path

import pytest
import timm
import torch
from lightning.pytorch import Trainer, seed_everything

import luna_vision
from luna_vision.data import CanvasDetectionDataModule, CanvasSegmentationDataModule
from luna_vision.tasks import DetectionTask, SegmentationTask, export_weights
from luna_vision.tasks.optimization import build_optimizer

DATA = {"side": 64, "num_items": 2, "item_size": 12, "num_train": 4, "num_val": 2, "num_test": 4, "num_workers": 0}
DATA["batch_size"] = 2
MODEL = {"model_name": "test_luna_vit", "pyramid_channels": 8, "model_kwargs": {"embed_dim": 32, "depth": 2}}
TASKS = {
    "detection": (DetectionTask, MODEL | {"strides": [8, 16], "min_size": 64}, CanvasDetectionDataModule),
    "segmentation": (SegmentationTask, MODEL, CanvasSegmentationDataModule),
}


def make(name: str, **kwargs):
    seed_everything(0, verbose=False)
    task, arguments, data = TASKS[name]
    return task(**arguments | kwargs), data(**DATA)


def trainer(folder: Path, **kwargs) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(max_epochs=1, accelerator="cpu", default_root_dir=folder, **quiet, **kwargs)


@pytest.mark.parametrize("name", TASKS)
def test_a_run_trains_everything_and_measures(name: str, tmp_path):
    task, data = make(name)
    before = {n: p.detach().clone() for n, p in task.named_parameters()}
    run = trainer(tmp_path)
    run.validate(task, data, verbose=False)  # whose state training takes over
    run.fit(task, data)
    assert not [n for n, p in task.named_parameters() if p.requires_grad and torch.equal(p, before[n])]
    metric = task.headline[0].removeprefix("test_")
    assert {"train_loss", "lr", f"val_{metric}"} <= set(run.callback_metrics)
    assert 0 <= run.test(task, data, verbose=False)[0][f"test_{metric}"] <= 1
    checkpoint = tmp_path / "a.ckpt"
    run.save_checkpoint(checkpoint)
    export_weights(checkpoint, tmp_path / "best.safetensors")
    canvas = data.dataset("test").source.canvas(0).image
    image, _ = data.dataset("test")[0]
    for path in (checkpoint, tmp_path / "best.safetensors"):
        model, transform, class_names = luna_vision.load(path)
        torch.testing.assert_close(model.state_dict(), task.model.state_dict(), rtol=0, atol=0)
        assert torch.equal(transform(canvas), image)
        with torch.inference_mode():  # a detector takes a list of images
            batch = [image] if name == "detection" else image[None]
            torch.testing.assert_close(model(batch), task.model.eval()(batch), rtol=0, atol=0)
        assert class_names == ["background", *map(str, range(10))]  # the items of canvases are digits


def test_perfect_boxes_have_an_average_precision_of_one(tmp_path, monkeypatch):
    task, data = make("detection")
    data.setup("test")
    truth = {image.numpy().tobytes(): target for image, target in data.dataset("test")}

    def perfect(images):
        found = [truth[image.numpy().tobytes()] for image in images]
        return [{**target, "scores": torch.ones(len(target["labels"]))} for target in found]

    monkeypatch.setattr(task, "forward", perfect)
    assert trainer(tmp_path).test(task, data, verbose=False)[0]["test_map"] == 1.0


def test_a_class_that_is_not_there_has_no_average_precision(tmp_path, monkeypatch):
    task, data = make("detection")
    data.setup("test")
    there = {int(label) - 1 for _, target in data.dataset("test") for label in target["labels"]}
    found = {"boxes": torch.tensor([[1.0, 1, 9, 9]] * 10), "labels": torch.arange(1, 11), "scores": torch.ones(10)}
    monkeypatch.setattr(task, "forward", lambda images: [found] * len(images))
    (scores,) = trainer(tmp_path).test(task, data, verbose=False)
    assert {name for name in scores if "/" in name} == {f"test_ap/{label}" for label in there} and len(there) < 10


def test_perfect_masks_have_an_iou_of_one_and_an_empty_prediction_has_not(tmp_path, monkeypatch):
    task, data = make("segmentation")
    data.setup("test")
    truth = {image.numpy().tobytes(): mask for image, mask in data.dataset("test")}

    def perfect(images):
        masks = torch.stack([truth[image.numpy().tobytes()] for image in images])
        return torch.nn.functional.one_hot(masks, 11).permute(0, 3, 1, 2).float()

    monkeypatch.setattr(task, "forward", perfect)
    assert trainer(tmp_path).test(task, data, verbose=False)[0]["test_miou"] == 1.0
    monkeypatch.setattr(task, "forward", lambda images: perfect(images).index_fill(1, torch.arange(1, 11), 0.0))
    assert trainer(tmp_path).test(task, data, verbose=False)[0]["test_miou"] < 0.3


@pytest.mark.parametrize("name", TASKS)
def test_weights_of_a_whole_model_start_the_backbone(name: str, tmp_path):
    whole = timm.create_model("test_luna_vit", num_classes=7, embed_dim=32, depth=2)
    torch.save(whole.state_dict(), tmp_path / "whole.pt")
    task, data = make(name, checkpoint=str(tmp_path / "whole.pt"))
    task.on_validation_start()
    body = task.model.get_submodule(task.pyramid).body
    assert torch.equal(body.blocks[0].attn.pack_q.weight, whole.blocks[0].attn.pack_q.weight)
    assert torch.equal(body.norm.weight, whole.norm.weight)


@pytest.mark.parametrize("name", TASKS)
def test_weight_decay_leaves_the_memory_alone(name: str):
    task, _ = make(name)
    memory = task.model.get_submodule(task.pyramid).body.memory
    (group,) = [g for g in task._build_optimizer().param_groups if any(p is memory for p in g["params"])]
    assert group["weight_decay"] == 0.0


def test_layer_decay_reaches_a_model_that_spares_nothing():
    model = timm.create_model("test_resnet", num_classes=3)
    assert not hasattr(model, "no_weight_decay")
    scales = {g["lr_scale"] for g in build_optimizer(model, "adamw", 1e-3, 0.05, 0.5, {}).param_groups}
    assert len(scales) > 1


def test_targets_out_of_range():
    task, _ = make("detection")
    target = {"boxes": torch.tensor([[1.0, 1.0, 9.0, 9.0]]), "labels": torch.tensor([11])}
    with pytest.raises(ValueError, match=r"labels must be in \[1, 10\], got 11 to 11"):
        task.check_batch([torch.rand(3, 64, 64)], [target])
    task, _ = make("segmentation")
    with pytest.raises(ValueError, match="masks must be 0 to 10, or 255, got 0 to 12"):
        task.check_batch(torch.rand(1, 3, 8, 8), torch.tensor([[[0, 12, 255, 255]] * 8]))


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("detection", {"model_name": "luna"}, "unknown model name 'luna'"),
        (
            "detection",
            {"detector_kwargs": {"boxes": 3}},
            "faster_rcnn has no argument .boxes.; it takes rpn_",
        ),
        ("detection", {"strides": [5]}, "strides must be 16 times a power of two"),
        ("segmentation", {"background_weight": 0.0}, "background_weight must be above 0, got 0.0"),
        ("segmentation", {"model_kwargs": {"memory_length": 3}}, "did you mean memory_len?"),
    ],
)
def test_mistakes(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(name, **arguments)
