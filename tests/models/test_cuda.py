"""What a GPU would run, tried without one: fake CUDA tensors have no values, so whatever waits for one raises."""

import pytest
import timm
import torch

import luna_vision  # noqa: F401  registers the models
from experiments.gpu.fake import Kernels, fake_cuda, on_fake_cuda
from experiments.gpu.gpu_check import VARIANTS
from luna_vision.layers.mlp import linear_halves
from luna_vision.layers.patches import project_patches
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


@pytest.mark.parametrize("args", VARIANTS, ids=str)
def test_every_model_runs_on_cuda_and_waits_for_nothing(args):
    if args.get("mixer") in ("performer", "rfa"):  # which draw on the host whether to redraw: fake there, too
        args = args | {"mixer_args": {"redraw_interval": None}}
    cases = [  # precision, training, masked
        ("bfloat16", False, True),
        ("autocast to bfloat16", True, False),
        *((precision, False, False) for precision in ("float16", "autocast to float16") if "mixer" in args),
    ]
    for precision, training, masked in cases:
        model = timm.create_model("test_luna_vit", num_classes=7, depth=2, drop_path_rate=0.1, **args)
        logits, _ = forward(model.train(training), precision, masked=masked)
        dtype, autocast = PRECISIONS[precision]
        assert logits.device.type == "cuda" and logits.shape == (2, 7), precision
        assert logits.dtype == (autocast or dtype), precision


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_stays_half(precision, masked):
    """Nothing is folded or mixed in another type; coordinates, and the mean of a mask's patches, are float32."""
    model = timm.create_model("test_luna_vit", tie_kv=False).eval()
    _, kernels = forward(model, precision, masked=masked)
    wide = [k for k in kernels.ran if k.dtype in (torch.float32, torch.float64) and max(k.shape, default=0) > 16]
    mean = (2, 64) if masked else None
    assert [k for k in wide if k.shape != mean] == []
    casts = [k for k in kernels.ran if k.name == "aten::_to_copy" and k.shape != mean and max(k.shape, default=0) >= 64]
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
    assert counts["luna"] <= 40 and counts["identity"] == 9


def test_float16_is_clamped_only_where_it_can_overflow():
    """Of tensors with a row for each patch: scores, sums of the residual stream, and the gate's sum and product."""
    model = timm.create_model("luna_vit_small", depth=2).eval()
    _, kernels = forward(model, "float16", (224, 224), 8)
    large = [k for k in kernels.ran if k.name == "aten::clamp" and 196 in k.shape]
    assert len(large) == 2 * 6 + 1  # the final pack has scores, too


def test_no_pass_over_the_patches_has_two_layouts_but_around_the_convolution():
    """Patches stay row by row from the embedding on, which is a product, and so do the halves of a gated MLP."""
    model = timm.create_model("luna_vit_small", depth=2, use_kernels=False).eval()
    _, kernels = forward(model, "bfloat16", (224, 224), 64)
    names = [kernel.name for kernel in kernels.ran]
    assert names.count("aten::convolution") == 2 and names.index("aten::addmm") < names.index("aten::convolution")
    assert names.count("aten::silu") == 2
    halves = [kernel for kernel in kernels.ran if kernel.name == "aten::addmm" and kernel.shape == (64 * 196, 1024)]
    assert len(halves) == 2 * 2
    _, few = forward(timm.create_model("luna_vit_small", depth=2).eval(), "bfloat16", (224, 224), 1)
    assert [k.shape for k in few.ran if k.name == "aten::addmm"].count((196, 2048)) == 2


def test_a_patch_embedding_and_a_gate_as_products_are_the_same():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 20, dtype=torch.float64)
    conv = torch.nn.Conv2d(3, 5, 4, stride=4, dtype=torch.float64)
    torch.testing.assert_close(project_patches(x, conv.weight, conv.bias), conv(x).permute(0, 2, 3, 1))
    linear = torch.nn.Linear(20, 6, dtype=torch.float64)
    for half, want in zip(linear_halves(x, linear.weight, linear.bias), linear(x).chunk(2, dim=-1), strict=True):
        torch.testing.assert_close(half, want)
        assert half.is_contiguous()


@pytest.mark.parametrize(
    "side, precision, used",
    [((512, 512), "bfloat16", True), ((512, 512), "autocast to float16", True), ((512, 496), "bfloat16", False)],
)
def test_kernels_run_by_default_where_they_were_faster(side, precision, used):
    pytest.importorskip("triton")
    model = timm.create_model("luna_vit_small", depth=2).eval()
    ran = operators(model, side, precision)
    assert ran == (["normed_pack", "normed_unpack"] * 2 + ["normed_pack"] if used else [])


def test_kernels_can_be_forced_and_training_has_none_by_default():
    pytest.importorskip("triton")
    make = {"model_name": "luna_vit_small", "depth": 1}
    assert operators(timm.create_model(**make).eval(), (512, 512), "float32") == []
    assert operators(timm.create_model(**make, use_kernels=False).eval(), (512, 512), "bfloat16") == []
    assert operators(timm.create_model(**make).train(), (512, 512), "autocast to bfloat16") == []
    forced = operators(timm.create_model(**make, use_kernels=True).eval(), (32, 32), "float32")
    assert forced == ["mix_residual", "normed_pack", "normed_unpack", "normed_pack"]


def operators(model: LunaVit, side: tuple[int, int], precision: str) -> list[str]:
    """Names of the fused kernels of a forward pass."""
    _, kernels = forward(model, precision, side)
    return [k.name.partition("::")[2] for k in kernels.ran if k.name.startswith("luna_vision::")]
