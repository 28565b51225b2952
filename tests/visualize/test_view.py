"""What the model sees of an image is the image, and the patch grid lies where its pixels came from."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import luna_vision  # noqa: F401  registers the models
from luna_vision.visualize import View, view

MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)


@pytest.fixture(scope="module")
def model():
    return timm.create_model("test_luna_vit", num_classes=0)


def ramp(height: int, width: int) -> np.ndarray:
    return (np.arange(height * width * 3).reshape(height, width, 3) % 251).astype(np.uint8)


def to_pixels(grid, input_size, patch_size=None, size=None):
    picture = np.zeros((*(size or input_size), 3), np.uint8)
    return View("", picture, torch.zeros(1, 3, *input_size), patch_size).to_pixels(grid)


def test_each_pixel_gets_the_value_of_its_patch_and_padding_is_cropped():
    grid = np.array([[[1, 2, 3], [4, 5, 6]]])  # patches of 4 x 4 over 5 x 9 pixels: 3 rows and 3 columns are padding
    out = to_pixels(grid, (5, 9), (4, 4))
    assert out.shape == (1, 5, 9)
    np.testing.assert_array_equal(out[0, 0], [1, 1, 1, 1, 2, 2, 2, 2, 3])
    np.testing.assert_array_equal(out[0, :, 0], [1, 1, 1, 1, 4])


def test_patches_need_not_be_square():
    out = to_pixels(np.array([[1, 2], [3, 4]]), (5, 5), (3, 4))
    np.testing.assert_array_equal(out, np.kron([[1, 2], [3, 4]], np.ones((3, 4), int))[:5, :5])


@pytest.mark.parametrize("factor", [2, 5])
def test_a_larger_picture_shows_the_same_area(factor):
    grid = np.arange(6).reshape(2, 3)
    exact = to_pixels(grid, (5, 9), (4, 4))
    larger = to_pixels(grid, (5, 9), (4, 4), (5 * factor, 9 * factor))
    np.testing.assert_array_equal(larger, exact.repeat(factor, 0).repeat(factor, 1))


def test_without_padding_the_grid_covers_the_picture():
    out = to_pixels(np.array([[1, 2], [3, 4]]), (224, 224), None, (4, 6))
    np.testing.assert_array_equal(out, np.kron([[1, 2], [3, 4]], np.ones((2, 3), int)))


def test_an_open_photo_is_turned_upright_as_its_file_is(model, tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # to be turned to the right
    Image.fromarray(ramp(12, 20)).save(tmp_path / "a.png", exif=exif)
    want, seen = view(model, tmp_path / "a.png"), view(model, Image.open(tmp_path / "a.png"))
    assert seen.picture.shape == (20, 12, 3) and np.array_equal(seen.picture, want.picture)
    assert torch.equal(seen.pixels, want.pixels)


def test_the_model_sees_the_normalised_pixels(model):
    image = ramp(37, 51)
    seen = view(model, image, mean=MEAN, std=STD)
    expected = (torch.from_numpy(image).permute(2, 0, 1) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
        :, None, None
    ]
    torch.testing.assert_close(seen.pixels[0], expected)
    np.testing.assert_array_equal(seen.picture, image)
    assert seen.patch_size == (16, 16)


def test_normalisation_is_that_of_the_models_cfg(model):
    seen = view(model, np.full((4, 4, 3), 255, np.uint8))
    expected = (1 - torch.tensor(model.pretrained_cfg["mean"])) / torch.tensor(model.pretrained_cfg["std"])
    torch.testing.assert_close(seen.pixels[0, :, 0, 0], expected)


def test_a_grey_model_sees_grey_and_the_picture_stays_coloured():
    model = timm.create_model("test_luna_vit", in_chans=1)
    seen = view(model, ramp(20, 30))
    assert seen.pixels.shape == (1, 1, 20, 30)
    np.testing.assert_array_equal(seen.picture, ramp(20, 30))


def test_large_images_are_reduced_for_the_model_and_for_drawing(model):
    seen = view(model, np.zeros((1200, 2400, 3), np.uint8), max_size=300)
    assert seen.pixels.shape == (1, 3, 150, 300)
    assert seen.picture.shape == (512, 1024, 3)


def test_a_picture_has_a_pixel_for_every_patch():
    model = timm.create_model("test_luna_vit", patch_size=1)
    seen = view(model, np.zeros((3, 1500, 3), np.uint8), max_size=1500)
    assert seen.picture.shape[1] == 1500


@pytest.mark.parametrize(
    "name, shape", [("test_vit", (80, 112)), ("test_convnext", (96, 128)), ("vit_tiny_patch16_224", (224, 224))]
)
def test_other_models_see_sizes_that_they_take(name, shape):
    seen = view(timm.create_model(name), ramp(70, 101))
    assert seen.pixels.shape[-2:] == shape and seen.patch_size is None
    assert seen.picture.shape == (70, 101, 3)


def save(path, image: Image.Image, **options) -> str:
    image.save(path, **options)
    return str(path)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1", "LA"])
def test_files_of_any_mode(model, tmp_path, mode):
    path = save(tmp_path / "image.tif", Image.fromarray(ramp(20, 30)).convert(mode))
    assert view(model, path).picture.shape == (20, 30, 3)


def test_16_bit_animated_and_rotated_files(model, tmp_path):
    grey = np.linspace(0, 65535, 600).reshape(20, 30).astype(np.uint16)
    seen = view(model, save(tmp_path / "deep.png", Image.fromarray(grey)))
    np.testing.assert_array_equal(seen.picture[..., 0], np.round(grey / 257))

    first, second = Image.new("RGB", (30, 20), "red"), Image.new("RGB", (30, 20), "blue")
    seen = view(model, save(tmp_path / "moving.gif", first, save_all=True, append_images=[second]))
    np.testing.assert_array_equal(seen.picture[0, 0], (255, 0, 0))

    exif = Image.Exif()
    exif[274] = 6  # turn by a quarter
    seen = view(model, save(tmp_path / "turned.jpg", Image.fromarray(ramp(20, 30)), exif=exif))
    assert seen.picture.shape == (30, 20, 3) and seen.pixels.shape[-2:] == (30, 20)


@pytest.mark.parametrize(
    "image, arguments, message",
    [
        (np.zeros((4, 4, 3), np.uint8), {"max_size": 0}, "max_size must be at least 1 pixel, got 0"),
        (np.zeros((4, 4, 3), np.uint8), {"mean": (0.1, 0.2)}, "mean must be 1 or 3 finite numbers"),
        (np.zeros((4, 4, 3), np.uint8), {"std": (0.0,)}, "std must be 1 or 3 finite numbers, above 0"),
        (np.zeros((0, 4, 3), np.uint8), {}, "the image has no pixels"),
        ("empty.png", {}, "empty.png is empty"),
        ("words.png", {}, "cannot decode image file words.png"),
    ],
)
def test_mistakes(model, image, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.png").touch()
    (tmp_path / "words.png").write_text("no image")
    with pytest.raises(ValueError, match=message):
        view(model, image, **arguments)


def test_bands_are_drawn_as_their_mean():
    model, image = timm.create_model("test_luna_vit", in_chans=5), np.zeros((4, 4, 5), np.uint16)
    image[:2] = 10 * np.arange(5)
    seen = view(model, image, value_range=(0, 40))
    assert seen.pixels.shape == (1, 5, 4, 4) and np.unique(seen.picture[:2]).tolist() == [128]
    assert not seen.picture[2:].any()
    with pytest.raises(ValueError, match="has 3 bands, and the model takes 5"):
        view(model, ramp(4, 4))


def test_a_file_of_a_mode_that_pillow_does_not_convert_is_named(tmp_path):
    path = save(tmp_path / "lab.tif", Image.new("LAB", (4, 4)))
    with pytest.raises(ValueError, match="cannot use .*lab.tif: conversion from LAB to "):
        view(timm.create_model("test_luna_vit", in_chans=1), path)
