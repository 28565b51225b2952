"""Crops that move over a canvas."""

import numpy as np
import pytest
import torch

from luna_vision.data import CanvasSequenceDataModule, CanvasSpec, crop_sequence


def data(**arguments) -> CanvasSequenceDataModule:
    return CanvasSequenceDataModule(**{"num_workers": 0, "num_train": 64, "num_val": 8, "num_test": 8, **arguments})


def seen(sequence, box) -> list[tuple[bool, bool]]:
    """Of a box in each crop: whether any pixel, and whether all of it is in view; by looking at a mask."""
    mask = np.zeros(sequence.canvas.image.shape[:2], bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    views = [mask[t : t + sequence.side, c : c + sequence.side] for t, c in sequence.corners]
    return [(bool(v.any()), v.sum() == mask.sum()) for v in views]


@pytest.mark.parametrize(
    "arguments",
    [{}, {"num_items": 3, "steps": 7, "side": 320, "grid": 1}, {"cue_first": True}],
    ids=["2", "3", "cue first"],
)
def test_cue_and_items_are_never_in_view_at_once_and_all_are_seen(arguments):
    dataset = data(**arguments).dataset("train")
    orders, cue_first = set(), arguments.get("cue_first", False)
    for index in range(40):
        sequence = dataset.sequence(index)
        canvas = sequence.canvas
        cue, *items = (seen(sequence, box) for box in [canvas.cue_box, *canvas.frames])
        for views in zip(cue, *items, strict=True):
            assert not (views[0][0] and any(part for part, _ in views[1:]))
        first = [[whole for _, whole in views].index(True) for views in [cue, *items]]  # or a ValueError
        assert sequence.known == max(first[0], first[1 + canvas.cued_item])
        assert sequence.crops.shape == (dataset.steps, 64, 64, 3)
        orders.add(first[0] < first[1 + canvas.cued_item])
        assert not cue_first or first[0] == min(first)
    assert orders == ({True} if cue_first else {True, False})


def test_frames_are_where_the_canvas_has_them():
    canvas = data().dataset("train").sequence(0).canvas
    color = canvas.image[canvas.cue_box[1], canvas.cue_box[0]]
    left, top, right, bottom = canvas.frames[canvas.cued_item]
    framed = (canvas.image == color).all(-1)
    framed[canvas.cue_box[1] : canvas.cue_box[3], canvas.cue_box[0] : canvas.cue_box[2]] = False
    rows, columns = np.nonzero(framed)
    assert (left, top, right, bottom) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_a_sequence_is_a_function_of_seed_split_epoch_and_index():
    module = data()
    first = module.dataset("train")[3, 5]
    torch.testing.assert_close(data().dataset("train")[3, 5], first, rtol=0, atol=0)
    torch.testing.assert_close(data(seed=9).dataset("train")[3, 5], first, rtol=0, atol=0)
    others = [module.dataset("train")[4, 5], module.dataset("train")[3, 6], module.dataset("val")[5]]
    others.append(data(canvas_seed=1).dataset("train")[3, 5])
    assert not any(torch.equal(other[0], first[0]) for other in others)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches(workers):
    module = data(batch_size=4, num_workers=workers, num_train=10)
    module.setup("fit")
    crops, labels, known = next(iter(module.train_dataloader()))
    assert crops.shape == (4, 4, 3, 64, 64) and crops.dtype == torch.float32
    assert labels.shape == known.shape == (4,) and labels.dtype == known.dtype == torch.int64
    assert 0 <= crops.min() and crops.max() <= 2  # of pixels in [0, 1]: minus 0, over 0.5
    assert len(module.train_dataloader()) == 2 and len(module.val_dataloader()) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_items": 1}, "num_items must be at least 2"),
        ({"steps": 2}, "steps must be at least 3, for each item and the cue one, got 2"),
        ({"crop_size": 31}, "crop_size must be 32, an item with its frame, to 192"),
        ({"crop_size": 200}, "crop_size must be 32, an item with its frame, to 192"),
        ({"source": "faces"}, "source must be one of .*, got 'faces'"),
    ],
)
def test_wrong_arguments_are_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        data(**arguments)


def test_crops_that_are_too_large_are_said():
    images, labels = np.full((4, 8, 8), 255, np.uint8), np.arange(4)
    spec = CanvasSpec(192, 2, 16, True, 0.0, 4, 16, 16)
    with pytest.raises(ValueError, match="crops of 192 pixels do not find the cue alone on canvases of 192 with 2"):
        crop_sequence(np.random.default_rng(0), images, labels, spec, 192, 4)
