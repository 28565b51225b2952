"""Number types by device, weights that are cast once, and results that are fetched later."""

import pytest
import timm
import torch
from torch import nn

import luna_vision  # noqa: F401  registers the models
from luna_vision.utils.device import DTYPES, cast_products, fetch, pick_dtype, to_device
from luna_vision.utils.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("card", "auto"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_bfloat16_on_a_card_that_has_it(monkeypatch, card, auto):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: card or including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Quadro RTX 6000")
    assert pick_dtype("auto", CUDA) == getattr(torch, auto)
    assert pick_dtype("float16", CUDA) == torch.float16
    if not card:
        with pytest.raises(UserError, match="Quadro RTX 6000"):
            pick_dtype("bfloat16", CUDA)


def test_a_cpu_computes_in_float32_unless_asked():
    assert [pick_dtype(name, CPU) for name in DTYPES] == [torch.float32, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("args", [{}, {"tie_kv": False}, {"mixer": "linear"}, {"global_pool": "map"}], ids=str)
def test_weights_that_are_cast_once_give_what_autocast_gives(args):
    model, x = timm.create_model("test_luna_vit", num_classes=5, depth=2, **args).eval(), torch.randn(2, 3, 48, 64)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        want = model(x)
        cast_products(model, torch.bfloat16)
        assert torch.equal(model(x), want)
    assert model.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert {m.weight.dtype for m in model.modules() if isinstance(m, nn.LayerNorm)} == {torch.float32}


def test_what_is_fetched_comes_in_float32():
    x = to_device(torch.arange(6), CPU, torch.bfloat16)
    assert x.dtype == torch.bfloat16
    values, nothing = fetch(x, None)()
    assert nothing is None and values.dtype == torch.float32 and values.tolist() == list(range(6))
