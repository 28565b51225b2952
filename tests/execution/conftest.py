"""Small models with weights far from where they start, a real picture, and what the ordinary forward makes of it."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import timm
import torch
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

import luna_vision  # noqa: F401  registers the models
from luna_vision.images.pixels import pixel_statistics

from .ranks import Ranks

# what every execution is tried on
OPTIONS = [
    *({"local_mixing": m, "norm_first": n} for m in ("none", "before", "attn", "mlp") for n in (True, False)),
    *({"memory_mlp": m, "norm_first": n} for m in ("own", "shared") for n in (True, False)),
    *({"global_pool": g} for g in ("avg", "max", "avgmax", "map", "token", "both")),
    *({"pos_embed": p, "stem": s} for p in ("none", "learn", "fourier") for s in ("patch", "conv")),
    *({"pack_form": f, "unpack_form": f} for f in ("projected", "absorbed")),
    {"tie_kv": False},
    {"tie_kv": False, "qkv_bias": False, "proj_bias": False},
    {"pack_heads": 1},
    *({"pack_by_row": True, "pack_form": form} for form in ("projected", "absorbed")),
    {"mlp": "swiglu", "local_mixing": "mlp", "memory_mlp": "shared", "global_pool": "both"},
    {"init_values": 0.5, "final_norm": False},
    {"patch_size": (4, 6)},
    {"patch_size": 5},
    {"in_chans": 1},
    {"num_classes": 0},
    {"depth": 1},
]


@pytest.fixture(scope="session")
def photo() -> np.ndarray:
    """(427, 640, 3) uint8."""
    return load_sample_image("china.jpg")


@pytest.fixture(scope="session")
def ranks(tmp_path_factory) -> Iterator[Ranks]:
    """Four processes."""
    ranks = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def make() -> Callable[..., nn.Module]:
    def make(name: str = "test_luna_vit", dtype: torch.dtype = torch.float64, **arguments) -> nn.Module:
        torch.manual_seed(0)
        small = {"embed_dim": 16, "depth": 3, "num_heads": 2, "patch_size": 4, "memory_len": 3, "num_classes": 5}
        model = timm.create_model(name, **{**small, **arguments}).eval().to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return model

    return make


def normalised(model: nn.Module, image: np.ndarray) -> Tensor:
    """(1, channels, H, W), computed in the model's type."""
    dtype = next(model.parameters()).dtype
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(dtype)
    mean, std = (torch.tensor(s, dtype=dtype).view(-1, 1, 1) for s in pixel_statistics(model))
    return ((x / 255 if image.dtype == np.uint8 else x) - mean)[None] / std


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Equal to `tolerance` of the largest number."""
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * want.abs().max().item())
