"""What a GPU would run, tried without one: fake CUDA tensors have no values, so whatever waits for one raises."""

import pytest
import timm
import torch

import luna_vision  # noqa: F401  registers the models
from experiments.gpu.fake import Kernels, fake_cuda, on_fake_cuda
from experiments.gpu.gpu_check import VARIANTS
from luna_vision.models import LunaVit

# types of weights and images, and of autocast
PRECISIONS = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "autocast to bfloat16": (torch.float32, torch.bfloat16),
    "autocast to float16": (torch.float32, torch.float16),
}


def forward(model: LunaVit, precision: str, side=(80, 64), batch=2, masked=False) -> tuple[torch.Tensor, Kernels]:
    """Logits and kernels of a forward pass; the model is used up."""
    dtype, autocast = PRECISIONS[precision]
    model = model.to("meta", dtype)
    patch = model.patch_embed.patch_size[0]
    with fake_cuda(autocast), Kernels() as kernels, torch.set_grad_enabled(model.training):
        x = torch.empty(batch, 3, *side, device="cuda", dtype=dtype)
        valid = torch.empty(batch, side[0] // patch * (side[1] // patch), device="cuda", dtype=torch.bool)
        kernels.ran.clear()
        return on_fake_cuda(model)(x, valid if masked else None), kernels


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("args", VARIANTS, ids=str)
def test_every_model_runs_on_cuda_and_waits_for_nothing(args, masked):
    if args.get("mixer") in ("performer", "rfa"):  # which draw on the host whether to redraw: fake there, too
        args = args | {"mixer_args": {"redraw_interval": None}}
    some = PRECISIONS if "mixer" in args and not masked else ("bfloat16", "autocast to float16")
    for precision, training in [*((name, False) for name in some), ("autocast to bfloat16", True)]:
        model = timm.create_model("test_luna_vit", num_classes=7, depth=2, drop_path_rate=0.1, **args)
        logits, _ = forward(model.train(training), precision, masked=masked)
        dtype, autocast = PRECISIONS[precision]
        assert logits.device.type == "cuda" and logits.shape == (2, 7), precision
        assert logits.dtype == (autocast or dtype), precision


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_stays_half(precision, masked):
    """Nothing is folded or mixed in another type; only coordinates, and means over valid patches, are in float32."""
    model = timm.create_model("test_luna_vit", tie_kv=False).eval()
    _, kernels = forward(model, precision, masked=masked)
    wide = [
        k for k in kernels.ran if k.dtype in (torch.float32, torch.float64) and len(k.shape) > 2 and k.shape[-1] > 16
    ]
    assert wide == []
    casts = [k for k in kernels.ran if k.name == "aten::_to_copy" and k.shape and k.shape[-1] >= 64]
    assert casts == []  # of weights


def test_a_forward_pass_has_few_kernels():
    """An eager pass of Luna's block has twice those of a block of softmax attention, where folding in float32 for each
    head by itself had three times as many."""
    counts = {}
    for mixer in ("luna", "identity"):
        model = timm.create_model("luna_vit_small", depth=2, mixer=mixer).eval()
        _, kernels = forward(model, "bfloat16", (224, 224), 8)
        deeper = timm.create_model("luna_vit_small", depth=3, mixer=mixer).eval()
        counts[mixer] = len(forward(deeper, "bfloat16", (224, 224), 8)[1].ran) - len(kernels.ran)
    assert counts["luna"] <= 39 and counts["identity"] == 7


def test_float16_is_clamped_only_where_it_can_overflow():
    """Of tensors with a row for each patch: both scores, and the sums of the residual stream."""
    model = timm.create_model("luna_vit_small", depth=2).eval()
    _, kernels = forward(model, "float16", (224, 224), 8)
    large = [k for k in kernels.ran if k.name == "aten::clamp" and k.shape[0] == 8 and max(k.shape[1:]) >= 196]
    assert len(large) == 2 * 5
