"""The comparison of whole scenes with tiles: its scenes, its scores, and each way on a small scene."""

import numpy as np
import pytest
import torch

import luna_vision
from experiments.benchmarks import seams
from luna_vision.downstream.detection import build_detector
from luna_vision.downstream.pyramid import PyramidBackbone
from luna_vision.downstream.segmentation import FCN

ITEMS = np.full((20, 28, 28), 200, np.uint8), np.arange(20) % 10


@pytest.fixture
def scene(monkeypatch) -> seams.Scene:
    monkeypatch.setitem(seams.ITEM_SOURCES, "fashion_mnist", lambda root: {"test": ITEMS})
    return seams.draw_scene("", "detect", 1100, 1)


def test_a_scene_is_what_its_truth_says(scene):
    assert len(scene.boxes) == 5 * 1100**2 // 512**2 and scene.boxes.max() <= 1100
    for (left, top, right, bottom), label in zip(scene.boxes.astype(int), scene.labels, strict=True):
        assert (scene.mask[top:bottom, left:right] == label + 1).all()
    np.testing.assert_array_equal(scene.mask > 0, scene.image > 0)


def test_objects_are_counted_once(scene):
    count = len(scene.boxes)
    certain = np.ones(count, np.float32)
    cut = seams.matched(scene, scene.boxes, scene.labels, certain)["cut_items"]
    assert 0 < cut < count
    want = {"items": count, "found": count, "cut_items": cut, "cut_found": cut, "wrong": 0}
    assert seams.matched(scene, scene.boxes, scene.labels, certain) == want
    twice = [np.concatenate([x, x]) for x in (scene.boxes, scene.labels, certain)]
    assert seams.matched(scene, *twice) == want | {"wrong": count}
    other = seams.matched(scene, scene.boxes, (scene.labels + 1) % 10, certain)
    assert other["found"] == 0 and other["wrong"] == count
    assert seams.matched(scene, scene.boxes, scene.labels, 0.4 * certain)["found"] == 0
    assert seams.matched(scene, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), certain[:0])["found"] == 0


def test_pixels_near_lines_are_counted_apart():
    truth = np.zeros((1100, 1100), np.uint8)
    found = truth.copy()
    found[500:524], found[:24, :24] = 1, 1  # on a line, and far from all
    everything, near = seams.confusion(truth, found, 48)
    assert everything.sum() == truth.size and everything[0, 1] == (found == 1).sum()
    assert near.sum() == truth.size - (1100 - 96) ** 2 and near[0, 1] == 24 * 1100
    assert seams.mean_iou(everything) == pytest.approx((found == 0).mean())


@pytest.mark.parametrize("way", seams.WAYS)
@pytest.mark.parametrize("task", seams.SHAPES)
def test_each_way_answers(task, way, scene, tmp_path, monkeypatch):
    if way != "whole":
        pytest.importorskip({"segment": "monai", "detect": "sahi"}[task])
    torch.manual_seed(0)
    small = {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 32}
    backbone = PyramidBackbone("test_luna_vit", [32], 8, **small)
    model = FCN(backbone, 11) if task == "segment" else build_detector("faster_rcnn", backbone, 10, min_size=None)
    monkeypatch.setattr(luna_vision, "load", lambda path: (model, None, []))
    job = {"task": task, "way": way, "side": 600, "scenes": 1, "threads": 1}
    row = seams.measure(job, {task: ""}, "", (600, tmp_path))
    if task == "segment":
        assert np.sum(row["pixels"]) == 600**2 and (tmp_path / f"{way}.png").exists()
    else:
        assert row["items"] == 6
    assert f"| 600 | {way} |" in seams.table([job | row])
