"""Canvases: the label is what it claims to be, boxes and masks are exact, splits share no item."""

import numpy as np
import pytest
import torch

from luna_vision.data import CanvasDataModule, CanvasDataset, CanvasSpec, make_canvas
from luna_vision.data.canvas import FRAME_COLORS
from luna_vision.data.datasets import digits_splits

IMAGES, LABELS = digits_splits()["train"]


def canvases(count: int, **spec):
    dataset = CanvasDataset(IMAGES, LABELS, CanvasSpec(**spec), count)
    return [dataset.canvas(i) for i in range(count)]


PLAIN = {"side": 160, "num_items": 5, "item_size": 20}
CUED = {"side": 200, "num_items": 5, "item_size": 17, "cued": True}
GRID = {"side": 130, "num_items": 2, "item_size": 16, "cued": True, "frame": 4, "cue_size": 16, "grid": 16}


@pytest.mark.parametrize(
    "spec", [PLAIN, CUED, GRID, {"side": 512, "cued": True, "noise": 0.0}], ids=["plain", "cued", "grid", "512"]
)
def test_boxes_and_masks_are_exact(spec: dict):
    for canvas in canvases(20, **spec):
        n, side = len(canvas.classes), spec["side"]
        assert canvas.masks.shape == (n, side, side) and canvas.boxes.shape == (n, 4)
        grey = canvas.image if canvas.image.ndim == 2 else canvas.image.min(2)  # frames and cue are colours: minimum 0
        assert np.array_equal(grey > 0, canvas.masks.any(0))
        assert canvas.masks.sum(0).max() == 1  # items do not overlap
        for mask, (left, top, right, bottom) in zip(canvas.masks, canvas.boxes, strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert (top, bottom, left, right) == (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1)


def test_items_are_of_the_classes_that_are_stated():
    """Found again, pixel by pixel, among the digits of the stated class."""
    spec = CanvasSpec(side=100, num_items=3, item_size=8)  # at their own size, items are copied
    for i in range(10):
        canvas = make_canvas(np.random.default_rng(i), IMAGES, LABELS, spec)
        for mask, number, (left, top, _, _) in zip(canvas.masks, canvas.classes, canvas.boxes, strict=True):
            known = IMAGES[LABELS == number]
            rows, columns = np.nonzero(mask)
            found = False
            for item in known:
                r, c = np.nonzero(item)
                if len(r) == len(rows) and np.array_equal(r - r.min(), rows - top):
                    if np.array_equal(c - c.min(), columns - left):
                        found |= np.array_equal(item[r, c], canvas.image[rows, columns])
            assert found


def test_plain_label_is_the_class_of_more_than_half():
    for num_items in (1, 2, 5, 8):
        for canvas in canvases(30, side=256, num_items=num_items, item_size=16):
            assert 2 * (canvas.classes == canvas.label).sum() > num_items
            assert canvas.cued_item is None and canvas.cue_box is None


@pytest.mark.parametrize("spec", [CUED, GRID], ids=["cued", "grid"])
def test_cued_canvas_is_solved_by_its_pixels_alone(spec: dict):
    """Find the lone square, take its colour, find the frame of that colour, read the item inside: that is the label."""
    colors = [tuple(color) for color in FRAME_COLORS.tolist()]
    for canvas in canvases(40, **spec):
        left, top, right, bottom = canvas.cue_box
        cue = canvas.image[top:bottom, left:right].reshape(-1, 3)
        color = tuple(cue[0].tolist())
        assert color in colors and (cue == cue[0]).all()
        outside = (canvas.image == cue[0]).all(2)
        outside[top:bottom, left:right] = False
        rows, columns = np.flatnonzero(outside.any(1)), np.flatnonzero(outside.any(0))
        framed = [
            number
            for number, (x0, y0, x1, y1) in zip(canvas.classes, canvas.boxes, strict=True)
            if rows[0] < y0 and y1 <= rows[-1] and columns[0] < x0 and x1 <= columns[-1]
        ]
        assert framed == [canvas.label]
        assert canvas.classes[canvas.cued_item] == canvas.label
        assert len(set(canvas.classes)) == len(canvas.classes)  # no majority gives the label away
        centre = np.array([columns[0] + columns[-1] + 1, rows[0] + rows[-1] + 1]) / 2
        assert np.abs(centre - [(left + right) / 2, (top + bottom) / 2]).max() >= spec["side"] / 3


def test_labels_and_cued_positions_are_balanced():
    for spec in (PLAIN, CUED):
        counts = np.bincount([canvas.label for canvas in canvases(600, **spec)], minlength=10)
        assert counts.min() > 30  # 60 each on average, standard deviation 7
    targets = np.bincount([canvas.cued_item for canvas in canvases(600, **CUED)], minlength=5)
    assert targets.min() > 80


def test_frames_and_cue_have_the_stated_size_and_stand_on_the_grid():
    for canvas in canvases(40, **GRID):
        left, top, right, bottom = canvas.cue_box
        assert right - left == bottom - top == 16 and left % 16 == top % 16 == 0
        rows, columns = np.nonzero((canvas.image > 0).any(2))  # with the cue and all frames
        assert rows.min() % 16 == columns.min() % 16 == 0 and rows.max() % 16 == columns.max() % 16 == 15
        colored = (canvas.image.max(2) > 0) & (canvas.image.min(2) == 0)
        frames = 2 * (32**2 - 24**2)  # each is 4 px thick, and so far from its item
        assert colored.sum() == frames + 16**2


def test_noise_changes_the_image_and_not_the_truth():
    quiet, noisy = canvases(5, **CUED), canvases(5, **CUED, noise=20.0)
    for one, two in zip(quiet, noisy, strict=True):
        assert one.label == two.label and np.array_equal(one.boxes, two.boxes)
        assert np.array_equal(one.instances, two.instances)
        difference = two.image.astype(int) - one.image
        inside = (one.image > 80) & (one.image < 175)  # where nothing is clipped
        assert 15 < difference[inside].std() < 25


def test_canvases_are_a_function_of_seed_split_and_index():
    spec = CanvasSpec(**CUED)
    reference = CanvasDataset(IMAGES, LABELS, spec, 8, seed=1, split="val")
    again = CanvasDataset(IMAGES, LABELS, spec, 8, seed=1, split="val")
    seen = {reference[i][0].tobytes() for i in range(8)}
    assert len(seen) == 8
    assert all(np.array_equal(reference[i][0], again[i][0]) for i in (7, 0, 3))
    for seed, split in ((2, "val"), (1, "train"), (1, "test")):
        other = CanvasDataset(IMAGES, LABELS, spec, 8, seed=seed, split=split)
        assert not seen & {other[i][0].tobytes() for i in range(8)}
    with pytest.raises(IndexError, match="canvas 8 of 8"):
        reference[8]


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"num_items": 0}, "num_items must be 1 to 254, got 0"),
        ({"num_items": 9, "cued": True}, "num_items must be 1 to 8 on a cued canvas, got 9"),
        ({"item_size": 3}, "item_size must be at least 4, got 3"),
        ({"noise": -1.0}, "noise must be at least 0, got -1.0"),
        ({"side": 64}, "5 items of 28 pixels do not fit loosely on a canvas of side 64"),
        ({"grid": 0}, "grid must be at least 1, got 0"),
        ({"frame": 2}, "frame is for cued canvases alone, got 2"),
        ({"frame": 0, "cued": True}, "frame must be at least 1, got 0"),
        ({"cue_size": -1, "cued": True}, "cue_size must be at least 1, got -1"),
        ({"cue_size": 37, "cued": True}, "cue_size must be at most 36, an item with its frame, got 37"),
        ({"side": 200, "grid": 128}, "5 items of 28 pixels, on a grid of 128, do not fit loosely on a canvas"),
        ({"side": 10}, "do not fit loosely on a canvas of side 10"),
    ],
)
def test_bad_specs(spec: dict, message: str):
    with pytest.raises(ValueError, match=message):
        CanvasSpec(**spec)


@pytest.mark.parametrize(
    "spec",
    [
        {"num_items": 8},
        {"num_items": 1, "frame": 1, "cue_size": 12},
        {"num_items": 1, "frame": 6, "grid": 16, "cue_size": 30},
        {"num_items": 3, "frame": 2, "grid": 7, "cue_size": 16},
    ],
)
def test_the_fullest_canvas_that_is_allowed_can_be_drawn(spec: dict):
    accepted = 0
    for side in range(20, 250):
        try:
            full = CanvasSpec(side=side, item_size=8, cued=True, **spec)
        except ValueError:
            continue
        for i in range(20):
            make_canvas(np.random.default_rng(i), IMAGES, LABELS, full)
        accepted += 1
        if accepted == 20:  # on a grid, not only the smallest one is tight
            return
    pytest.fail("no side was accepted")


def module(**kwargs) -> CanvasDataModule:
    arguments = {"side": 96, "num_items": 3, "item_size": 12, "num_train": 10, "num_val": 6, "num_test": 4}
    return CanvasDataModule(**arguments | {"num_workers": 0, "batch_size": 4} | kwargs)


@pytest.mark.parametrize("cued, in_chans", [(False, 1), (False, 3), (True, 3)])
@pytest.mark.parametrize("source", ["digits", "fashion_mnist"])
def test_data_module(source: str, cued: bool, in_chans: int, fashion_root: str):
    data = module(source=source, root=fashion_root, cued=cued, in_chans=in_chans, drop_last=False)
    data.setup("fit"), data.setup("test")
    assert data.num_classes == len(data.class_names) == 10 and data.img_size == (96, 96)
    for split, length in (("train", 10), ("val", 6), ("test", 4)):
        images = torch.cat([images for images, _ in getattr(data, f"{split}_dataloader")()])
        assert images.shape == (length, in_chans, 96, 96) and images.min() == 0 and images.max() <= 2
    image, label = data.dataset("val")[2]
    canvas = data.dataset("val").source.canvas(2)
    assert label == canvas.label and torch.equal(
        image[0] * 127.5, torch.from_numpy(canvas.image.reshape(96, 96, -1)[..., 0]).float()
    )
    assert [name for _, names in data.predict_dataloader() for name in names] == list("0123")


@pytest.mark.parametrize("source", ["digits", "fashion_mnist"])
def test_splits_share_no_item(source: str, fashion_root: str):
    data = module(source=source, root=fashion_root)
    items = [{item.tobytes() for item in data.dataset(split).source.images} for split in ("train", "val", "test")]
    assert all(items) and sum(map(len, items)) == len(set.union(*items))


def test_the_run_seed_leaves_the_canvases_alone():
    images = [module(seed=seed).dataset("train")[0][0] for seed in (0, 1)]
    assert torch.equal(*images)
    assert not torch.equal(images[0], module(canvas_seed=1).dataset("train")[0][0])


def test_data_module_errors(tmp_path):
    with pytest.raises(ValueError, match="source must be one of 'digits', 'fashion_mnist', got 'letters'"):
        module(source="letters")
    with pytest.raises(ValueError, match="cued canvases are told apart by colour: in_chans must be 3"):
        module(cued=True, in_chans=1)
    with pytest.raises(ValueError, match="num_val must be at least 1, got 0"):
        module(num_val=0)
    with pytest.raises(FileNotFoundError, match="no complete FashionMNIST in .*download=True"):
        module(source="fashion_mnist", root=str(tmp_path)).setup("fit")
