"""Targets for detectors and segmentation are the truth about the canvas."""

import pytest
import torch

from luna_vision.data import CanvasDetectionDataModule, CanvasSegmentationDataModule

SMALL = {"side": 96, "num_items": 3, "item_size": 12, "num_train": 10, "num_val": 6, "num_test": 4, "num_workers": 0}


def test_boxes_labels_and_masks():
    data = CanvasDetectionDataModule(**SMALL)
    data.setup("fit")
    images, targets = next(iter(data.val_dataloader()))
    assert len(images) == len(targets) == 4
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        canvas = data.dataset("val").source.canvas(i)
        assert image.shape == (3, 96, 96) and 0 <= image.min() and image.max() <= 1
        torch.testing.assert_close(image[1] * 255, torch.from_numpy(canvas.image).float())
        assert target["labels"].tolist() == (canvas.classes + 1).tolist()
        assert target["boxes"].tolist() == canvas.boxes.tolist()
        assert torch.equal(target["masks"], torch.from_numpy(canvas.masks))


def test_semantic_masks():
    data = CanvasSegmentationDataModule(**SMALL, in_chans=1)
    data.setup("test")
    images, masks = next(iter(data.test_dataloader()))
    assert images.shape == (4, 1, 96, 96) and masks.shape == (4, 96, 96) and masks.dtype == torch.int64
    for i in range(4):
        canvas = data.dataset("test").source.canvas(i)
        for number, mask in zip(canvas.classes, canvas.masks, strict=True):
            assert (masks[i][torch.from_numpy(mask)] == number + 1).all()
        assert (masks[i] > 0).sum() == canvas.masks.sum()
        assert ((images[i, 0] > 0) == (masks[i] > 0)).all()


def test_each_epoch_has_an_order_of_its_own():
    data = CanvasSegmentationDataModule(**SMALL | {"batch_size": 5})
    orders = []
    for epoch in (0, 1, 0):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        orders.append(torch.cat([masks for _, masks in loader]))
    assert torch.equal(orders[0], orders[2]) and not torch.equal(orders[0], orders[1])


def test_there_is_nothing_to_predict():
    with pytest.raises(ValueError, match="CanvasDetectionDataModule has no images to predict"):
        CanvasDetectionDataModule(**SMALL).predict_dataloader()


@pytest.mark.parametrize("source", ["digits", "fashion_mnist"])
def test_sources(source: str, fashion_root: str):
    data = CanvasDetectionDataModule(source=source, root=fashion_root, **SMALL)
    data.setup()
    assert data.num_classes == len(data.class_names) == 10 and data.img_size == (96, 96)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"source": "mnist"}, "source must be one of 'digits', 'fashion_mnist', got 'mnist'"),
        ({"in_chans": 2}, "in_chans must be one of 1, 3, got 2"),
        ({"num_val": 0}, "num_val must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"item_size": 60}, "do not fit loosely"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        CanvasDetectionDataModule(**SMALL | arguments)
