"""An image in bands gives what the ordinary forward gives, whatever the model, the size and the band."""

import io
import re

import numpy as np
import pytest
import torch

from luna_vision.execution import encode
from luna_vision.mixers import MIXERS

from .conftest import OPTIONS, close, normalised

EXACT = {torch.float64: 1e-10, torch.float32: 1e-4}
EVERY_OPTION = [
    *OPTIONS,
    {"global_pool": ""},
    *({"last_block": b, "global_pool": "token"} for b in ("patches", "both", "final_pack")),
    *({"last_block": b, "global_pool": ""} for b in ("patches", "both", "final_pack")),
    *({"global_pool": "token", "local_mixing": m} for m in ("none", "before", "attn")),
    {"query_gain": 1.0},
    {"drop_rate": 0.5, "proj_drop_rate": 0.5, "attn_drop_rate": 0.5, "drop_path_rate": 0.5, "patch_drop_rate": 0.5},
]


@torch.no_grad()
def check(model, image, tmp_path, tolerance, **arguments):
    """Embedding, logits, memory and grid against the model's own."""
    x = normalised(model, image)
    features = model.forward_features(x)[0]
    path = tmp_path / "grid.npy"
    got = encode(model, image, grid=path, progress=False, **arguments)
    close(got.memory, features[: model.memory_len], tolerance)
    close(got.raw_memory, model.encode(x)[1][0], tolerance)
    grid = torch.from_numpy(np.load(path))
    assert grid.shape[:2] == got.grid_size
    close(grid.flatten(0, 1), features[model.memory_len :], tolerance)
    without_grid = encode(model, image, progress=False, **arguments)
    if model.global_pool == "":
        assert got.embedding is None and got.logits is None and without_grid.embedding is None
        return
    for result in (got, without_grid):
        close(result.embedding, model.forward_head(features[None], pre_logits=True)[0], tolerance)
        close(result.memory, features[: model.memory_len], tolerance)
        if model.num_classes:
            close(result.logits, model(x)[0], tolerance)
    assert (got.logits is None) == (model.num_classes == 0)


@pytest.mark.parametrize("options", EVERY_OPTION, ids=str)
def test_every_option(options, make, photo, tmp_path):
    model = make(**options)
    image = photo[100:153, 200:241, : model.in_chans]  # no whole patches
    check(model, image, tmp_path, 1e-10, band_rows=5)


@pytest.mark.parametrize("band", [1, 2, 3, 4, 7, 14, 15, 100])
def test_every_band(band, make, photo, tmp_path):
    check(make(), photo[:57, :30], tmp_path, 1e-10, band_rows=band)
    check(make(local_mixing="mlp", stem="conv"), photo[:57, :30], tmp_path, 1e-10, band_rows=band)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (4, 4), (5, 9), (8, 64), (33, 3), (97, 31)])
def test_every_size(size, make, photo, tmp_path):
    for mixing in ("before", "attn", "mlp"):
        check(make(local_mixing=mixing), photo[: size[0], : size[1]], tmp_path, 1e-10, band_rows=3)


@pytest.mark.parametrize("name", ["luna_vit_tiny", "luna_vit_tiny_patch8", "luna_vit_small_paper", "test_luna_vit"])
def test_variants_in_float32(name, photo, tmp_path):
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, depth=2, num_classes=5).eval()
    check(model, photo[:83, :121], tmp_path, 1e-4, band_rows=2)


@pytest.mark.parametrize("mixing", ["none", "before", "attn", "mlp"])
def test_float32(mixing, make, photo, tmp_path):
    check(make(dtype=torch.float32, local_mixing=mixing), photo[:201, :183], tmp_path, 1e-4, band_rows=7)


@torch.no_grad()
def test_a_store_in_bfloat16_is_as_close_as_bfloat16(make, photo, tmp_path):
    """Rounded to 8 bits once a layer; the result errs by about that, and not by nothing."""
    model, image = make(dtype=torch.float32, depth=4), photo[:201, :183]
    want = model.forward_features(normalised(model, image))[0]
    for store in (None, tmp_path / "store"):
        path = tmp_path / "grid.npy"
        got = encode(model, image, grid=path, band_rows=7, store=store, store_dtype=torch.bfloat16, progress=False)
        grid = torch.from_numpy(np.load(path)).flatten(0, 1)
        error = (grid - want[model.memory_len :]).norm() / want[model.memory_len :].norm()
        assert 2**-12 < error < 4 * 2**-8
        close(got.memory, want[: model.memory_len], 4 * 2**-8)


def test_a_model_in_bfloat16(make, photo):
    image, model = photo[:101, :83], make(dtype=torch.float32)
    want = encode(model, image, progress=False).embedding
    got = encode(make(dtype=torch.bfloat16), image, band_rows=3, progress=False).embedding
    assert got.dtype == torch.bfloat16
    close(got.float(), want, 0.05)


@torch.no_grad()
def test_the_memory_of_an_earlier_image(make, photo):
    model = make()
    first = encode(model, photo[:40, :40], progress=False)
    got = encode(model, photo[40:80, :40], memory=first.raw_memory, progress=False)
    raw = model.encode(normalised(model, photo[:40, :40]))[1]
    close(got.logits, model(normalised(model, photo[40:80, :40]), memory=raw)[0], 1e-10)


def test_the_result_can_be_trained_on(make, photo):
    """A linear probe of an embedding, and a memory that is handed on to a step of training."""
    model = make()
    result = encode(model, photo[:30, :40], progress=False)
    probe = torch.nn.Linear(16, 2).double()
    probe(result.embedding).square().sum().backward()
    assert bool(probe.weight.grad.any())
    model(normalised(model, photo[:30, :40]), memory=result.raw_memory[None]).square().sum().backward()
    assert bool(model.patch_embed.proj.weight.grad.any())


@torch.no_grad()
def test_a_model_that_was_changed(make, photo, tmp_path):
    model = make()
    model.prune_intermediate_layers([1], prune_head=False)
    check(model, photo[:30, :40], tmp_path, 1e-10, band_rows=2)
    model = make(global_pool="both")
    model.reset_classifier(3, "max")
    check(model, photo[:30, :40], tmp_path, 1e-10, band_rows=2)


def test_a_model_in_training_mode_is_put_in_eval_mode(make, photo):
    model = make(proj_drop_rate=0.9)
    want = encode(model, photo[:30, :40], progress=False)
    close(encode(model.train(), photo[:30, :40], progress=False).logits, want.logits, 0)


def test_progress_with_the_time_that_is_left(make, photo, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for progress, pattern in ((True, r"encoding: 100%.*\[\d\d:\d\d<\d\d:\d\d, .*row/s\]"), (False, "^$")):
        terminal = Terminal()
        monkeypatch.setattr("sys.stderr", terminal)
        encode(make(), photo[:40, :40], band_rows=2, progress=progress)
        assert re.search(pattern, terminal.getvalue())


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize("mixer", [name for name in MIXERS if name != "luna"])
def test_mixers_without_a_memory_are_refused(mixer, make, photo):
    with pytest.raises(ValueError, match="needs a memory.*mixer='luna'"):
        encode(make(mixer=mixer), photo)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"band_rows": 0}, "band_rows must be at least 1, got 0"),
        ({"memory_budget": "much"}, "such as '8GB' or '500MiB', got 'much'"),
        ({"memory_budget": 0}, "number of bytes"),
        ({"store_dtype": torch.int8}, "store_dtype must be one of torch.float64, .* got torch.int8"),
        ({"grid": "grid.png"}, "must end in .npy or .zarr, got grid.png"),
        ({"mean": (0.5, 0.5)}, "mean must be 1 or 3 finite numbers"),
        ({"std": 0.0}, "std must be 1 or 3 finite numbers, above 0"),
        ({"memory": torch.zeros(2, 16)}, r"memory must have shape \[1, 3, 16\], got \[1, 2, 16\]"),
    ],
    ids=str,
)
def test_mistakes(arguments, message, make, photo):
    with pytest.raises(ValueError, match=message):
        encode(make(), photo[:20, :20], **arguments)


def test_another_model(photo):
    with pytest.raises(ValueError, match="needs a Luna ViT, got Linear"):
        encode(torch.nn.Linear(2, 2), photo)
