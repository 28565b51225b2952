"""What tests of pixels need."""

from collections.abc import Callable, Iterator

import pytest
import timm
import torch
from torch import nn

import luna_vision  # noqa: F401  registers the models
from luna_vision.images import values


@pytest.fixture(autouse=True)
def warnings_of_each_test() -> Iterator[None]:
    """A process names a few files only."""
    values.warned.clear()
    yield


@pytest.fixture(scope="session")
def make() -> Callable[..., nn.Module]:
    """Makes a small model with weights far from where they start."""

    def make(**arguments) -> nn.Module:
        torch.manual_seed(0)
        small = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4, "num_classes": 0}
        model = timm.create_model("test_luna_vit", **{**small, **arguments}).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return model

    return make
