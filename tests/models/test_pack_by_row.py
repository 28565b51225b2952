"""`pack_by_row`: the memory reads each row of the patch grid by itself, and takes the mean."""

import pytest
import timm
import torch
from torch import Tensor

from luna_vision import LunaVit
from luna_vision.layers import LunaAttention

COLUMNS = 7


def make(**arguments) -> LunaVit:
    torch.manual_seed(0)
    small = {"embed_dim": 16, "depth": 3, "num_heads": 2, "patch_size": 4, "memory_len": 3, "num_classes": 5}
    return timm.create_model("test_luna_vit", **{**small, "global_pool": "both", **arguments}).eval().double()


class Row:
    """A pack, one row and one image after the other."""

    def __init__(self, attn: LunaAttention) -> None:
        self.pack = attn.pack

    def __call__(self, x: Tensor, memory: Tensor, patch_valid: Tensor | None = None) -> Tensor:
        packed = []
        for b, image in enumerate(x):
            seen = torch.ones(len(image), dtype=torch.bool) if patch_valid is None else patch_valid[b]
            rows = [row[of] for row, of in zip(image.split(COLUMNS), seen.split(COLUMNS), strict=True) if of.any()]
            parts = [len(row) * self.pack(row[None], memory[b : b + 1]) for row in rows]
            packed.append(sum(parts) / sum(map(len, rows)))
        return torch.cat(packed)


@pytest.mark.parametrize("form", ["projected", "absorbed"])
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_the_mean_of_the_packs_of_the_rows(form, masked, monkeypatch):
    model, x = make(pack_form=form, tie_kv=False, pack_heads=1), torch.randn(2, 3, 20, 4 * COLUMNS, dtype=torch.float64)
    mask = torch.rand(2, 5 * COLUMNS) < 0.5 if masked else None
    if masked:
        mask[0, COLUMNS : 2 * COLUMNS] = False  # a row without any
    usual = model(x, patch_valid=mask)
    with monkeypatch.context() as patch:
        for block in model.stages():
            patch.setattr(block.attn, "pack", Row(block.attn))
        want = model(x, patch_valid=mask)
    model.set_pack_by_row()
    got = model(x, patch_valid=mask)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert (got - usual).abs().max() > 1e-3
    got.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model.set_pack_by_row(False)
    assert torch.equal(model(x, patch_valid=mask), usual)


def test_an_image_of_one_row_is_packed_as_ever():
    x = torch.randn(1, 3, 4, 36, dtype=torch.float64)
    torch.testing.assert_close(make(pack_by_row=True)(x), make()(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types(dtype):
    model, x = make(pack_by_row=True), torch.randn(1, 3, 33, 57)
    want = model(x.double())
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        got = model.float()(x)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_mistakes():
    with pytest.raises(ValueError, match="mixer"):
        make(mixer="softmax", global_pool="avg", pack_by_row=True)
    with pytest.raises(ValueError, match="attn_drop_rate"):
        make(attn_drop_rate=0.1).set_pack_by_row()
    with pytest.raises(ValueError, match="pack_by_row"):
        make(pack_by_row=True).get_attention_maps(torch.randn(1, 3, 8, 8, dtype=torch.float64))
    with pytest.raises(torch.jit.Error, match="TorchScript does not pack by row"):
        torch.jit.script(make(pack_by_row=True))(torch.randn(1, 3, 32, 32, dtype=torch.float64))
