"""What PyTorch's own tools see of the models: FLOP counters, autocast, waits for a device, replaced linear layers."""

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import luna_vision  # noqa: F401
from luna_vision.execution import encode, set_band_checkpointing
from luna_vision.layers import LunaAttention
from luna_vision.mixers import MIXERS


@pytest.mark.parametrize("mixer", MIXERS)
def test_flops_are_counted_with_and_without_gradients(mixer):
    """Module hooks of the counter want inputs of modules to be no views of parameters."""
    model, x = timm.create_model("test_luna_vit", depth=2, mixer=mixer).eval(), torch.randn(1, 3, 48, 64)
    counts = []
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context(), FlopCounterMode(display=False) as counter:
            model(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == counts[2] > 0


@pytest.mark.parametrize("args", [{}, {"init_values": 0.1}, {"mixer": "softmax"}, {"norm_first": False}])
def test_the_residual_stream_is_float32_under_autocast(args):
    model, types = timm.create_model("test_luna_vit", **args).eval(), set()
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, out: types.add((inputs[0].dtype, out[0].dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(1, 3, 48, 64))
    assert types == {(torch.float32, torch.float32)}


class Waits(TorchDispatchMode):
    """How often a value is looked at, for which a GPU would be waited for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_mask_is_looked_at_once(mixer):
    model, x = timm.create_model("test_luna_vit", mixer=mixer).eval(), torch.randn(2, 3, 48, 64)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, 9:] = False
    with Waits() as waits:
        model(x)
    assert waits.count == 0
    with Waits() as waits:
        model(x, valid)
    assert waits.count == 1
    with pytest.raises(ValueError, match="patch_valid has a row without any valid token"):
        model(x, torch.zeros(2, 12, dtype=torch.bool))


class Doubled(nn.Module):
    """What LoRA, quantisation and the like put in the place of a linear layer: other numbers than its weight says."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.weight, self.bias = linear, linear.weight, linear.bias

    def forward(self, x):
        return 2 * self.linear(x)


def replace(layer, name):
    setattr(layer, name, Doubled(getattr(layer, name)))


def hook(layer, name):
    getattr(layer, name).register_forward_hook(lambda module, args, out: 2 * out)


def forward(layer, name):
    linear = getattr(layer, name)
    linear.forward = lambda x: 2 * nn.Linear.forward(linear, x)


def scale(layer, name):
    with torch.no_grad():
        for parameter in getattr(layer, name).parameters():
            parameter.mul_(2)


@pytest.mark.parametrize("change", [replace, hook, forward])
@pytest.mark.parametrize("name", ["pack_q", "pack_kv", "unpack_q", "unpack_kv", "proj"])
def test_replaced_and_hooked_linear_layers_are_called_in_every_execution(name, change):
    def run(change):
        torch.manual_seed(0)
        model = (
            timm.create_model("test_luna_vit", depth=2, pack_form="absorbed", unpack_form="absorbed").double().eval()
        )
        change(model.blocks[1].attn, name)
        x = torch.rand(1, 3, 80, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        whole = model(x)
        set_band_checkpointing(model, 2)
        banded = model(x)
        set_band_checkpointing(model, 0)
        pixels = x[0].permute(1, 2, 0).numpy()
        maps = [m for pair in model.get_attention_maps(x) for m in pair]
        return [whole, banded, encode(model, pixels, mean=0, std=1, band_rows=2, progress=False).logits[None], *maps]

    got, want = run(change), run(scale)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got[1], got[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got[2], got[0], rtol=1e-9, atol=1e-9)


def test_a_parametrized_linear_layer_is_absorbed_with_its_effective_weight():
    layers = [LunaAttention(24, 3, pack_form=form, unpack_form=form).double() for form in ("absorbed", "projected")]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer in layers:
        nn.utils.parametrizations.weight_norm(layer.pack_kv)
        with torch.no_grad():
            layer.pack_kv.parametrizations.weight.original0.mul_(3)
    x, memory = torch.randn(2, 9, 24).double(), torch.randn(2, 4, 24).double()
    with FlopCounterMode(display=False) as counter:
        got = layers[0](x, memory)
    absorbed = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        want = layers[1](x, memory)
    assert absorbed != counter.get_total_flops()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("query_gain", [1.0, 8.0])
def test_weights_can_be_initialised_again(query_gain):
    model = timm.create_model("test_luna_vit", query_gain=query_gain)
    layer = model.blocks[0].attn
    first = float(layer.pack_q.weight.std())
    for _ in range(2):
        model.init_weights()
        gain = float(layer.pack_q.weight.std() / layer.pack_kv.weight.std())
        assert gain == pytest.approx(query_gain, rel=0.1)
    assert float(layer.pack_q.weight.std()) == pytest.approx(first, rel=0.1)
