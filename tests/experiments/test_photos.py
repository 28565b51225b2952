"""Photographs in the comparison: what is held out, mosaics, and why larger images are harder."""

import argparse

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import compare, dense_probe
from experiments.compare import SUITES, plan
from experiments.larger_sides import CHANGES
from experiments.measure import fresh_model
from experiments.mosaics import Mosaics
from experiments.runs import evaluate, make_data
from luna_vision.data.datasets import ArraySource


def arguments(*words: str) -> argparse.Namespace:
    return compare._parser().parse_args(["--suite", "photos", "--width", "32", "--depth", "1", *words])


@pytest.fixture
def photos(tmp_path):
    """The layout of CIFAR-10: 20 images of each class, whose grey is ten times the label and the split's."""
    for split, offset in (("train", 0), ("test", 100)):
        for label in range(10):
            folder = tmp_path / "cifar10" / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(20):
                Image.new("RGB", (32, 32), (10 * label + offset, i, 0)).save(folder / f"{i}.png")
    return tmp_path


def test_choices_are_made_on_images_held_out_of_training_and_the_test_set_is_asked_for(photos):
    chosen, final = (
        plan(arguments("--tasks", "cifar10", "--only", "luna", "--split", split))[0] for split in ("val", "test")
    )
    assert chosen.work_name == final.work_name  # one training serves both
    assert chosen.config["split"] == "val" and "split" not in final.config
    data = make_data(chosen.config, str(photos), 2)
    train, val, test = (data.dataset(split).source for split in ("train", "val", "test"))
    assert len(train) == 180 and len(val) == 20 and len(test) == 200
    assert not set(train.indices) & set(val.indices)

    tested = []

    class Model:
        class trainer:
            @staticmethod
            def test(model, loader, verbose):
                tested.append(torch.cat([y for _, y in loader]))
                return [{"test_acc1": 0.5}]

        model = None

    found = evaluate(Model, data, 10, 2, "val")
    assert found == {"side": 64, "images": 10, "correct": 5, "accuracy": 0.5}
    assert tested[0].tolist() == list(range(10))  # spread over all classes, in whose order the images are


def test_a_task_that_holds_nothing_out_is_no_place_for_choices():
    with pytest.raises(ValueError, match="fashion32 holds no images out"):
        plan(arguments("--tasks", "fashion32"))


def test_a_mosaic_has_its_class_twice_and_two_others_once():
    labels = np.repeat(np.arange(5), 4)
    images = np.zeros((20, 6, 6, 3), np.uint8)
    images[..., 0], images[..., 1] = labels[:, None, None], np.arange(20)[:, None, None]
    mosaics = Mosaics(ArraySource(images, labels))
    places = set()
    for index in range(20):
        mosaic, label = mosaics[index]
        assert mosaic.shape == (12, 12, 3) and label == labels[index]
        corners = mosaic[::6, ::6].reshape(4, 3)
        seen, counts = np.unique(corners[:, 0], return_counts=True)
        assert len(seen) == 3 and counts[seen == label] == 2
        assert index in corners[:, 1] and len(set(corners[:, 1])) == 4
        np.testing.assert_array_equal(mosaics[index][0], mosaic)
        places.add(corners[:, 1].tolist().index(index))
    assert places == {0, 1, 2, 3}


@pytest.mark.parametrize("variant", ["luna", "softmax"])
def test_every_change_acts_on_the_model(variant):
    config = plan(arguments("--tasks", "cifar10", "--only", variant))[0].config
    image, outputs = torch.randn(2, 3, 64, 64), {}
    for name, change in CHANGES.items():
        model = fresh_model(config).eval().requires_grad_(False)
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.normal_(module.weight, std=0.2)
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        change(model, 2)
        outputs[name] = model(image)
    idle = {"none"} if variant == "luna" else {"none", "packed by row"}
    for name, output in outputs.items():
        assert (name in idle) == torch.allclose(output, outputs["none"]), name


def test_variants_of_the_suite_are_models_and_data():
    for run in plan(arguments("--tasks", "cifar10", "tiny_imagenet")):
        fresh_model(run.config, device="meta")
        make_data(run.config, "nowhere")
    assert set(SUITES["photos"]) >= {"luna", "softmax"}


def test_a_linear_probe_reads_the_class_that_most_pixels_of_a_patch_have():
    mask = np.full((8, 12), 11, np.uint8)  # 11 is unlabelled
    mask[0, :3], mask[3, 0], mask[4:, 4:8] = 5, 7, 2
    assert dense_probe.patch_labels(mask, 4).tolist() == [5, -1, -1, -1, 2, -1]
    x = torch.randn(600, 4, generator=torch.Generator().manual_seed(0))
    y = (x @ torch.eye(4)[:, :3]).argmax(-1)
    weight, bias = dense_probe.fit(x, y)
    scores = dense_probe.score((x @ weight.T + bias).argmax(-1), y)
    assert scores["accuracy"] > 0.97 and scores["mean_iou"] > 0.94
    wrong = dense_probe.score(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1]))
    assert wrong == pytest.approx({"accuracy": 0.75, "mean_iou": (1 / 2 + 2 / 3) / 2})
