"""Detection in an image in pieces: the objects of the model as a whole, in files that viewers open."""

import json
import tracemalloc

import numpy as np
import pytest
import rasterio
import rasterio.warp
import torch
from pycocotools.coco import COCO
from torchvision.ops import batched_nms

from luna_vision.downstream.boxes import box_sink, detect
from luna_vision.downstream.detection import build_detector
from luna_vision.downstream.pyramid import PyramidBackbone
from luna_vision.execution import encode
from luna_vision.execution.checkpoint import Checkpoint
from luna_vision.images import open_image
from tests.execution.test_budget import Allocations
from tests.stopping import stopped_anywhere

SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8, "memory_len": 3}


@torch.no_grad()
def make(strides=(4, 8, 16, 32), detector: str = "retinanet", **options):
    """A detector in float64 that is certain of some objects, without the limits of an image."""
    torch.manual_seed(0)
    backbone = PyramidBackbone("test_luna_vit", list(strides), 8, **SMALL | options)
    model = build_detector(detector, backbone, 3, min_size=None).double().eval()
    if detector == "faster_rcnn":
        limits = {"training": 10**9, "testing": 10**9}
        model.rpn.score_thresh, model.rpn._pre_nms_top_n, model.rpn._post_nms_top_n = 0.05, limits, limits
        model.roi_heads.detections_per_img = 10**9
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
        x = torch.from_numpy(picture(200, 200)).permute(2, 0, 1).double() / 255
        features = list(model.backbone(model.transform([x])[0].tensors).values())
        scores = torch.cat([one.flatten() for one in model.rpn.head(features)[0]])
        last = model.rpn.head.cls_logits
        last.weight *= 2 / scores.std()
        scores = torch.cat([one.flatten() for one in model.rpn.head(features)[0]])
        last.bias -= scores.quantile(0.97) + 2.94  # 3 of a hundred anchors propose
        model.rpn.head.bbox_pred.weight *= 20
        model.roi_heads.box_predictor.cls_score.weight *= 20
        model.roi_heads.score_thresh = 0.3
    else:
        model.topk_candidates = model.detections_per_img = 10**9
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        last = model.head.classification_head.cls_logits
        x = torch.from_numpy(picture(200, 200)).permute(2, 0, 1).double() / 255
        features = list(model.backbone(model.transform([x])[0].tensors).values())
        last.weight *= 2 / model.head.classification_head(features)[..., 1:].std()  # without the background
        # of each class, one score of a hundred is above the threshold
        scores = model.head.classification_head(features)[0, :, 1:]
        last.bias.view(-1, 4)[:, 1:] -= scores.quantile(0.99, dim=0) + 2.94
    return model


def picture(height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3): noise and bright squares."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 120, (height, width, 3))
    for _ in range(height * width // 2000):
        y, x, side = rng.integers(0, height), rng.integers(0, width), rng.integers(4, 40)
        image[y : y + side, x : x + side] += rng.integers(0, 130, 3)
    return image.astype(np.uint8)


@torch.no_grad()
def whole(model, image: np.ndarray) -> dict[str, torch.Tensor]:
    return model([torch.from_numpy(image).permute(2, 0, 1).double() / 255])[0]


def record(model, image: np.ndarray, folder, patches: int | None = None, **how) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    sink = box_sink(model, image.shape[:2], folder / "found.partial", found.update)
    sink.patches = patches or sink.patches
    statistics = {"mean": model.transform.image_mean, "std": model.transform.image_std}
    with torch.no_grad():
        encode(sink.backbone.body, image, grid=sink, progress=False, **statistics, **how)
    return found


def same(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert len(want["boxes"]) > 10 and torch.equal(found["labels"], want["labels"])
    torch.testing.assert_close(found["scores"], want["scores"], rtol=0, atol=1e-10)
    torch.testing.assert_close(found["boxes"], want["boxes"], rtol=0, atol=1e-7)  # of hundreds of pixels


@pytest.mark.parametrize("patches", [16, 24, None])
@pytest.mark.parametrize("strides, side", [((8,), 8), ((4, 8, 16, 32), 8), ((8, 16), 16), ((16, 32), 4), ((1, 2), 2)])
def test_the_objects_are_those_of_the_whole_image(strides, side, patches, tmp_path):
    model, image = make(strides, patch_size=side), picture(203, 157) if side > 2 else picture(101, 77)
    same(record(model, image, tmp_path, patches, band_rows=3), whole(model, image))


@pytest.mark.parametrize("patches", [16, 24, None])
@pytest.mark.parametrize("strides, side", [((8,), 8), ((4, 8, 16, 32), 8), ((8, 16), 16), ((8, 16), 4)])
def test_the_objects_of_a_faster_rcnn(strides, side, patches, tmp_path):
    """The proposals have no limits but that of their score."""
    model, image = make(strides, "faster_rcnn", patch_size=side), picture(203, 157)
    want = whole(model, image)
    assert len(want["labels"].unique()) > 1
    same(record(model, image, tmp_path, patches, band_rows=3), want)


def test_proposals_beside_the_mask_are_classified(tmp_path):
    """Of a cell that was looked at, but with its centre elsewhere: as if all squares had something."""
    model, image, valid = make((8, 16), "faster_rcnn"), picture(256, 192), np.zeros((32, 24), bool)
    valid[4:15, 2:9] = True
    want = record(model, image, tmp_path, 32, mask=valid)
    same(record(model, image, tmp_path, 2, mask=valid), want)


@pytest.mark.parametrize("size", [(40, 300), (300, 41), (64, 64), (129, 65), (256, 256)])
def test_every_size(size, tmp_path):
    model, image = make(), picture(*size)
    same(record(model, image, tmp_path, 16, band_rows=2), whole(model, image))


def test_what_a_mask_leaves_out_has_no_objects(tmp_path):
    model, image = make((4, 8, 16)), picture(240, 200)
    valid = np.zeros((30, 25), bool)
    valid[4:10, 5:12] = valid[20:25, 14:22] = True
    body = model.backbone.pyramid_backbone.body
    with torch.no_grad():  # of the model with the same mask, the cells that lie in valid patches
        images = model.transform([torch.from_numpy(image).permute(2, 0, 1).double() / 255])[0].tensors
        seen = torch.from_numpy(np.pad(valid, ((0, 0), (0, 1))))
        images = torch.nn.functional.pad(images[..., :200], (0, 8))
        mask = {"patch_valid": seen.view(1, -1)}
        (y,) = body.forward_intermediates(images, indices=1, norm=True, intermediates_only=True, **mask)
        features = model.backbone.pyramid_backbone.pyramid(y * seen)
        heads, parts = model.head(features), []
        anchors = model.anchor_generator.grid_anchors(
            [f.shape[2:] for f in features], [torch.tensor([s, s]) for s in (4, 8, 16)]
        )
        sizes = [len(one) for one in anchors]
        logits, deltas = (heads[name][0].split(sizes) for name in ("cls_logits", "bbox_regression"))
        for one, scores, delta, f in zip(anchors, logits, deltas, features, strict=True):
            cell = torch.nn.functional.adaptive_max_pool2d(seen[None].double(), f.shape[2:])[0].bool()
            if f.shape[2] > 30:
                cell = seen.repeat_interleave(2, 0).repeat_interleave(2, 1)
            cells = cell.flatten().repeat_interleave(len(one) // cell.numel())
            row, label = ((scores.sigmoid() > model.score_thresh) & cells[:, None]).nonzero().T
            parts.append((model.box_coder.decode_single(delta[row], one[row]), scores.sigmoid()[row, label], label))
        boxes, scores, labels = map(torch.cat, zip(*parts, strict=True))
        boxes[:, 0::2] = boxes[:, 0::2].clamp(0, 200)
        boxes[:, 1::2] = boxes[:, 1::2].clamp(0, 240)
        kept = batched_nms(boxes, scores, labels, model.nms_thresh)
    want = {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}
    same(record(model, image, tmp_path, 16, band_rows=3, mask=valid), want)


@pytest.mark.parametrize("place", ["slide", "map"])
def test_files(place, tmp_path):
    model, image, where = make().float(), picture(300, 400), rasterio.Affine(10.0, 0, 500000.0, 0, -10.0, 5200000.0)
    kind = {"driver": "GTiff", "count": 3, "height": 300, "width": 400, "dtype": "uint8"}
    kind |= {"crs": "EPSG:32633", "transform": where} if place == "map" else {}
    with rasterio.open(tmp_path / "a.tif", "w", tiled=True, **kind) as file:
        file.write(image.transpose(2, 0, 1))
    opened = open_image(tmp_path / "a.tif", region=(30, 20, 300, 250))
    out, coco, names = tmp_path / "a.geojson", tmp_path / "a.json", ["cell", "dog", "car"]
    how = {"class_names": names, "category_ids": [7, 3, 5], "progress": False}
    count, _ = detect(model, opened, out, coco, **how)
    with torch.no_grad():
        want = model([torch.from_numpy(image[20:270, 30:330]).permute(2, 0, 1) / 255])[0]
    objects = want["labels"] > 0
    boxes = want["boxes"][objects].numpy() + [30, 20, 30, 20]
    features = json.loads(out.read_text())["features"]
    assert len(features) == count == len(boxes) > 20
    rings = np.array([feature["geometry"]["coordinates"][0] for feature in features])
    if place == "map":
        x, y = rasterio.warp.transform("OGC:CRS84", "EPSG:32633", rings[..., 0].flatten(), rings[..., 1].flatten())
        x, y = (np.array(x) - where.c) / where.a, (np.array(y) - where.f) / where.e
        rings = np.stack([x, y], axis=1).reshape(rings.shape)
    found = np.concatenate([rings.min(axis=1), rings.max(axis=1)], axis=1)
    np.testing.assert_allclose(np.sort(found, axis=0), np.sort(boxes, axis=0), atol=0.01)
    assert all(f["properties"]["objectType"] == "detection" for f in features)
    scores = [feature["properties"]["measurements"]["score"] for feature in features]
    np.testing.assert_allclose(scores, want["scores"][objects], atol=1e-4)
    read = COCO(coco)
    assert len(read.loadRes(read.dataset["annotations"]).anns) == count
    assert read.dataset["images"] == [{"id": 1, "file_name": str(tmp_path / "a.tif"), "width": 400, "height": 300}]
    first = read.dataset["annotations"][0]
    assert {7: "cell", 3: "dog", 5: "car"}[first["category_id"]] == features[0]["properties"]["classification"]["name"]
    np.testing.assert_allclose(first["bbox"][:2], found[0][:2], atol=0.01)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.geojson", "a.json", "a.tif"]


@pytest.mark.parametrize("detector", ["retinanet", "faster_rcnn"])
def test_a_run_that_is_stopped_anywhere_is_resumed(detector, tmp_path, monkeypatch):
    model, image = make((8, 16), detector, depth=1), picture(260, 157)
    monkeypatch.setattr("luna_vision.downstream.squares.TILE", 32)
    detect(model, image, tmp_path / "want.geojson", progress=False)
    want = (tmp_path / "want.geojson").read_text()
    how = {"store": tmp_path / "store", "band_rows": 4 if detector == "retinanet" else 9, "progress": False}

    def run() -> None:
        detect(model, image, tmp_path / "a.geojson", **how)

    for _ in stopped_anywhere(run, monkeypatch, (Checkpoint, "save"), at_least=10):
        run()
        found = (tmp_path / "a.geojson").read_text()
        assert len(json.loads(found)["features"]) == len(json.loads(want)["features"]) > 10
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.geojson", "want.geojson"]


def test_one_file_of_a_row_is_open_at_a_time(tmp_path, monkeypatch):
    """A system allows a thousand or so, and an image of 524,288 pixels has as many rows of squares."""
    model, ours, opened = make((8, 16), depth=1), np.load, []

    def load(path):
        assert all(file.zip is None for file in opened)
        opened.append(ours(path))
        return opened[-1]

    monkeypatch.setattr("luna_vision.downstream.boxes.np.load", load)
    record(model, picture(300, 60), tmp_path, 16)
    assert len(opened) == 3


def test_nothing_found(tmp_path):
    model = make()
    model.score_thresh = 2.0
    count, _ = detect(model, picture(90, 70), tmp_path / "a.geojson", tmp_path / "a.json", progress=False)
    assert count == 0 and json.loads((tmp_path / "a.geojson").read_text())["features"] == []
    assert json.loads((tmp_path / "a.json").read_text())["annotations"] == []


def test_mistakes(tmp_path):
    with pytest.raises(ValueError, match="FCOS is no detector of an image of any size"):
        detect(type("FCOS", (torch.nn.Module,), {})(), picture(40, 50), tmp_path / "a.geojson")
    with pytest.raises(ValueError, match="polygons must end in .geojson"):
        detect(make(), picture(40, 50), tmp_path / "a.tif")


@pytest.mark.parametrize("detector", ["retinanet", "faster_rcnn"])
def test_what_is_allocated_stays_within_the_plan(detector, tmp_path):
    model, image = make(detector=detector).float(), picture(400, 550)
    tracemalloc.start()
    try:
        with Allocations() as count:
            _, result = detect(model, image, tmp_path / "a.geojson", store=tmp_path / "store", progress=False)
        peak = count.peak + tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 0.05 * result.peak_bytes < peak < result.peak_bytes, (peak, result.peak_bytes)
