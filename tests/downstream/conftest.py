"""Photographs of many sizes, and small models with weights that are always the same."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from torch import nn

import luna_vision  # noqa: F401  registers the models

# (width, height): three of one size, some of one patch grid, long ones, and a single pixel
SIZES = [(64, 48), (61, 33), (96, 80), (33, 64), (64, 48), (1, 1), (50, 47), (120, 9), (64, 48), (7, 100), (90, 78)]


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Parts of scikit-learn's two photographs, of the sizes above."""
    photos = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    return [photos[i % 2].crop((20 * i, 10 * i, 20 * i + w, 10 * i + h)) for i, (w, h) in enumerate(SIZES)]


@pytest.fixture
def photos(tmp_path: Path, pictures: list[Image.Image]) -> Path:
    """A folder of them, with one in a folder of its own."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for i, picture in enumerate(pictures):
        picture.save(folder / ("more" if i == 4 else "") / f"{i:02d}.png")
    return folder


@pytest.fixture
def tiny() -> Callable[..., nn.Module]:
    """Makes the test model, smaller than it is, with parameters far from where they start."""

    def make(**arguments) -> nn.Module:
        torch.manual_seed(0)
        defaults = {"embed_dim": 32, "depth": 2, "num_classes": 0}
        model = timm.create_model(arguments.pop("name", "test_luna_vit"), **{**defaults, **arguments}).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return model

    return make


@pytest.fixture
def weights(tmp_path: Path, tiny: Callable[..., nn.Module]) -> list[str]:
    """The words of a command line that name that model."""
    save_file(tiny().state_dict(), tmp_path / "tiny.safetensors")
    arguments = ["--model", "test_luna_vit", "--model-args", "embed_dim=32", "depth=2"]
    return [*arguments, "--checkpoint", str(tmp_path / "tiny.safetensors"), "--device", "cpu"]


@pytest.fixture
def odd_files(tmp_path: Path, pictures: list[Image.Image]) -> Path:
    """A folder of images that all show the same greys, in every way that a file may hold them; one is turned."""
    folder = tmp_path / "odd"
    folder.mkdir()
    grey = pictures[0].convert("L")
    exif = Image.Exif()
    exif[0x0112] = 3  # to be turned by 180 degrees
    grey.save(folder / "0-grey.png")
    grey.rotate(180).save(folder / "1-exif.png", exif=exif)
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(folder / "2-sixteen.png")
    grey.convert("RGB").convert("CMYK").save(folder / "3-cmyk.tif")
    grey.convert("RGBA").save(folder / "4-rgba.png")
    grey.convert("P").save(folder / "5-palette.png")
    grey.save(folder / "6-animated.webp", save_all=True, append_images=[grey.rotate(90)], lossless=True)
    return folder
