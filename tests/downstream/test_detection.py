"""torchvision's detectors and segmentation heads run on the backbone, and see no padding."""

import copy
import threading

import pytest
import segmentation_models_pytorch as smp
import torch

from luna_vision.downstream.detection import DETECTORS, build_detector
from luna_vision.downstream.pyramid import PyramidBackbone
from luna_vision.downstream.segmentation import FCN

IMAGES = [torch.rand(3, 90, 120, generator=torch.Generator().manual_seed(i)) for i in range(1)]
IMAGES += [torch.rand(3, 150, 100, generator=torch.Generator().manual_seed(9))]
TARGETS = [
    {"boxes": torch.tensor([[10.0, 10.0, 50.0, 60.0]]), "labels": torch.tensor([3])},
    {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},  # nothing to find
]


def detector(name: str = "faster_rcnn", **kwargs):
    torch.manual_seed(0)
    backbone = PyramidBackbone("test_luna_vit", strides=(8, 16, 32), out_channels=8)
    return build_detector(name, backbone, 10, **{"min_size": 96, "max_size": 160} | kwargs)


@pytest.mark.parametrize("name", DETECTORS)
def test_losses_gradients_and_boxes(name: str):
    model = detector(name)
    losses = model(IMAGES, TARGETS)
    assert losses and all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if name == "retinanet":  # only training could teach it that no object has label 0
        bias = model.head.classification_head.cls_logits.bias
        torch.nn.init.constant_(bias.data.view(-1, 11)[:, :3], 2.0)
    found = model.eval()([*IMAGES, torch.rand(3, 33, 1)])
    assert name != "retinanet" or all(len(result["labels"]) for result in found)
    for image, result in zip(IMAGES, found, strict=False):
        assert set(result) == {"boxes", "labels", "scores"}
        assert (result["boxes"] >= 0).all() and (result["boxes"][:, 2] <= image.shape[2]).all()
        assert ((result["labels"] >= 1) & (result["labels"] <= 10)).all()


def test_the_backbone_is_told_the_sizes_of_the_images(monkeypatch):
    seen = []
    forward = PyramidBackbone.forward

    def spy(self, x, image_sizes=None):
        seen.append((tuple(x.shape[2:]), image_sizes))
        return forward(self, x, image_sizes)

    monkeypatch.setattr(PyramidBackbone, "forward", spy)
    model = copy.deepcopy(detector().eval())  # as EMA and DDP make copies
    model(IMAGES)
    (padded, sizes) = seen[0]
    assert sizes == [(96, 128), (144, 96)] and padded == (160, 128)  # whole patches of the coarsest map
    model.backbone(torch.rand(1, 3, 64, 64))  # by itself: no sizes are left over
    assert seen[1] == ((64, 64), None)


def test_threads_do_not_see_each_others_sizes(monkeypatch):
    """One thread is held between torchvision's transform and the backbone, while another runs as a whole."""
    model = detector().eval()
    seen = []
    forward = PyramidBackbone.forward

    def spy(self, x, image_sizes=None):
        seen.append(image_sizes)
        return forward(self, x, image_sizes)

    monkeypatch.setattr(PyramidBackbone, "forward", spy)
    transform = model.transform.forward
    between, go_on = threading.Event(), threading.Event()

    def held(images, targets=None):
        out = transform(images, targets)
        if threading.current_thread() is slow:
            between.set()
            go_on.wait(60)
        return out

    monkeypatch.setattr(model.transform, "forward", held)
    slow = threading.Thread(target=lambda: model(IMAGES[:1]))
    slow.start()
    assert between.wait(60)
    model(IMAGES[1:])
    go_on.set()
    slow.join()
    assert seen == [[(144, 96)], [(96, 128)]]


def test_an_image_is_not_changed_by_what_it_is_batched_with():
    """What the backbone makes of the smaller image does not depend on the larger one."""
    model = detector().eval().double()
    images = [image.double() for image in IMAGES]
    maps = []
    model.backbone.register_forward_hook(lambda module, args, output: maps.append(output["1"][0]))
    for other in (images[1], torch.rand(3, 150, 100, dtype=torch.float64)):
        model([images[0], other])
    torch.testing.assert_close(*maps)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "yolo"}, "detector must be one of 'faster_rcnn', 'retinanet', got 'yolo'"),
        ({"anchor_sizes": [32, 64]}, r"anchor_sizes must be one for each of the strides \[8, 16, 32\], got \[32, 64\]"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        detector(**arguments)


def test_a_grey_model_is_normalised_by_the_means_over_the_colours():
    for in_chans, mean, std in ((1, [0.449], [0.226]), (3, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])):
        backbone = PyramidBackbone("test_luna_vit", strides=(8,), out_channels=8, in_chans=in_chans)
        transform, fcn = build_detector("retinanet", backbone, 3).transform, FCN(backbone, 3)
        for found in ((transform.image_mean, transform.image_std), (fcn.image_mean.flatten(), fcn.image_std.flatten())):
            torch.testing.assert_close([torch.as_tensor(x) for x in found], [torch.tensor(mean), torch.tensor(std)])


def test_fcn_of_any_size_and_of_padded_batches():
    torch.manual_seed(0)
    model = FCN(PyramidBackbone("test_luna_vit", strides=(4,), out_channels=8), 5).double()
    image = torch.rand(1, 3, 50, 77, dtype=torch.float64)
    logits = model(image)
    assert logits.shape == (1, 5, 50, 77)
    logits.sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    model.eval()
    batch = torch.full((2, 3, 96, 96), 0.5, dtype=torch.float64)
    batch[0, :, :50, :77] = image[0]
    first = model(batch, [(50, 77), (96, 96)])
    batch[0, :, 50:], batch[0, :, :, 77:], batch[1] = 0.9, 0.1, 0.2
    torch.testing.assert_close(first[0], model(batch, [(50, 77), (96, 96)])[0])
    with pytest.raises(ValueError, match="num_classes must be at least 2, with the background, got 1"):
        FCN(model.backbone, 1)


def test_dpt_of_segmentation_models_pytorch():
    model = smp.DPT("tu-luna_vit_small", encoder_weights=None, decoder_readout="add", classes=3)
    logits = model(torch.rand(1, 3, 64, 96))
    assert logits.shape == (1, 3, 64, 96)
    logits.mean().backward()
    assert model.encoder.model.memory.grad is not None
