"""Maps at the strides that were asked for, from any image size, and padding that changes nothing."""

import pytest
import timm
import torch

from luna_vision.downstream.pyramid import PyramidBackbone, SimpleFeaturePyramid, patches_of_images


def test_patches_of_images():
    valid = patches_of_images([(16, 48), (33, 1)], (48, 48), (16, 16)).view(2, 3, 3)
    assert valid[0].tolist() == [[True] * 3, [False] * 3, [False] * 3]
    assert valid[1].tolist() == [[True, False, False]] * 3  # what an image covers in part belongs to it
    with pytest.raises(ValueError, match="image sizes must be 1 x 1 to 48 x 48, got 49 x 48"):
        patches_of_images([(49, 48)], (48, 48), (16, 16))


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_strides(stride: int):
    strides = (4, 8, 16, 32, 64)
    pyramid = SimpleFeaturePyramid(24, stride, strides, out_channels=8)
    x = torch.randn(2, 24, 64 // stride * 2, 64 // stride * 3, requires_grad=True)
    levels = pyramid(x)
    assert [tuple(y.shape) for y in levels] == [(2, 8, 128 // s, 192 // s) for s in strides]
    sum(y.sum() for y in levels).backward()
    assert all(p.grad is not None for p in pyramid.parameters())


@pytest.mark.parametrize(
    "strides, message",
    [
        ([12], "strides must be 16 times a power of two, or divided by one, got 12"),
        ([48], "got 48"),
        ([0], "got 0"),
        ([-16], "got -16"),
        ([], "at least one"),
    ],
)
def test_impossible_strides(strides, message):
    with pytest.raises(ValueError, match=message):
        SimpleFeaturePyramid(8, 16, strides)


@pytest.mark.parametrize("mixer", ["luna", "softmax"])
def test_any_size_and_a_gradient_for_every_parameter(mixer: str):
    backbone = PyramidBackbone("test_luna_vit", strides=(4, 8, 16, 32), out_channels=8, mixer=mixer)
    maps = backbone(torch.randn(1, 3, 50, 77))  # 4 x 5 patches
    assert {name: tuple(y.shape[2:]) for name, y in maps.items()} == {
        "0": (16, 20),
        "1": (8, 10),
        "2": (4, 5),
        "3": (2, 3),
    }
    sum(y.square().sum() for y in maps.values()).backward()
    assert not [name for name, p in backbone.named_parameters() if p.grad is None]


def test_padding_changes_nothing():
    """Maps of an image in a padded batch are those of the image alone, whatever lies in the padding."""
    backbone = PyramidBackbone("test_luna_vit", strides=(16,), out_channels=8).double().eval()
    sizes = [(48, 96), (80, 64)]
    images = [torch.randn(1, 3, *size, dtype=torch.float64) for size in sizes]
    batch = torch.full((2, 3, 80, 96), 7.0, dtype=torch.float64)
    for row, image in zip(batch, images, strict=True):
        row[:, : image.shape[2], : image.shape[3]] = image
    indices = dict(indices=1, norm=True, intermediates_only=True)
    valid = patches_of_images(sizes, (80, 96), (16, 16))
    (padded,) = backbone.body.forward_intermediates(batch, patch_valid=valid, **indices)
    for i, image in enumerate(images):
        (alone,) = backbone.body.forward_intermediates(image, **indices)
        torch.testing.assert_close(padded[i : i + 1, :, : alone.shape[2], : alone.shape[3]], alone)
    found = backbone(batch, sizes)["0"]
    noise = batch.clone()
    noise[0, :, 48:], noise[1, :, :, 64:] = 100.0, torch.nan
    torch.testing.assert_close(backbone(noise, sizes)["0"], found)
    assert not torch.allclose(backbone(batch)["0"], found)  # without the sizes, the padding is part of the image


def test_weights_of_a_whole_model():
    backbone = PyramidBackbone("test_luna_vit", strides=(16,))
    full = timm.create_model("test_luna_vit", num_classes=0)
    backbone.load_body(full)
    x = torch.randn(1, 3, 32, 32)
    wanted = full.eval().forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[0]
    found = backbone.eval().body.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[0]
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224"])
def test_vits_take_any_size(name: str):
    backbone = PyramidBackbone(name, out_channels=4, depth=1).eval()
    with torch.no_grad():
        maps = backbone(torch.rand(1, 3, 100, 140))  # 7 x 9 patches
    assert [tuple(level.shape[2:]) for level in maps.values()] == [(28, 36), (14, 18), (7, 9), (4, 5)]
    backbone.load_body(timm.create_model(name, num_classes=0, depth=1))


def test_a_model_of_one_size_says_so():
    with pytest.raises(ValueError, match="cait_xxs24_224 takes images of 224 x 224 alone, got 100 x 140"):
        PyramidBackbone("cait_xxs24_224", out_channels=4, depth=1)(torch.rand(1, 3, 100, 140))


def test_other_models():
    backbone = PyramidBackbone("test_vit", strides=(8, 16), out_channels=8, img_size=64)
    assert [tuple(y.shape[2:]) for y in backbone(torch.randn(1, 3, 64, 64)).values()] == [(8, 8), (4, 4)]
    with pytest.raises(ValueError, match="test_resnet has no maps of a single stride"):
        PyramidBackbone("test_resnet")
    with pytest.raises(ValueError, match="unknown model name 'luna_vit_smal'"):
        PyramidBackbone("luna_vit_smal")
    with pytest.raises(ValueError, match="patches must be square, got 8 x 16"):
        PyramidBackbone("luna_vit_tiny", patch_size=(8, 16), embed_dim=32, depth=1, num_heads=2)
