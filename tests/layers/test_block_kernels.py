"""A block with fused kernels equals the block without them: on a GPU, or in Triton's interpreter.

`tests/functional/test_kernels.py` starts the interpreter.
"""

import copy
import importlib.util
import os

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from luna_vision.layers import LunaBlock

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or (DEVICE == "cpu" and not INTERPRETED),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1",
)
B, L, C, GRID = 2, 5, 64, (4, 9)
N = GRID[0] * GRID[1]
ABSORBED = {"pack_form": "absorbed", "unpack_form": "absorbed"}


class Kernels(TorchDispatchMode):
    """Names of the operators of the package that run."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "luna_vision":
            self.ran.append(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


def pair(**kwargs) -> list[LunaBlock]:
    """The same block, without kernels in float64 on the CPU, and with them in float32."""
    torch.manual_seed(0)
    plain = LunaBlock(C, 2, **ABSORBED, **kwargs)
    for p in plain.parameters():
        nn.init.normal_(p, 0.5 if p.dim() == 1 else 0.0, 0.15)
    fused = LunaBlock(C, 2, **ABSORBED, use_kernels=True, **kwargs)
    fused.load_state_dict(plain.state_dict())
    return [plain.double(), fused.to(DEVICE)]


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(B, N, C), torch.randn(B, L, C)


def results(block: LunaBlock, masks=()) -> list[torch.Tensor]:
    p = next(block.parameters())
    leaves = [t.to(p.device, p.dtype).requires_grad_() for t in tokens()]
    y, memory = block(*leaves, GRID, *(mask.to(p.device) for mask in masks))
    gradients = torch.autograd.grad(y.sin().sum() + memory.cos().sum(), [*leaves, *block.parameters()])
    return [t.detach().cpu().double() for t in (y, memory, *gradients)]


def assert_equal(blocks, masks=()):
    expected = results(blocks[0], masks)
    with Kernels() as kernels:
        found = results(blocks[1], masks)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-4 * (b.norm() + b.numel() ** 0.5)
    return kernels.ran


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"tie_kv": False, "qkv_bias": False, "pack_heads": 1},
        {"init_values": 0.5, "local_mixing": "mlp"},
        {"memory_mlp": "shared", "local_mixing": "none", "mlp": "gelu"},
        {"read": "patches"},
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [True, False])
def test_the_block_is_the_same(kwargs, masked):
    masks = [torch.rand(B, n) < 0.7 for n in (N, L)] if masked else []
    for mask in masks:
        mask[:, 0] = True
    ran = assert_equal(pair(**kwargs), masks)
    mix = [] if "local_mixing" in kwargs else ["mix_residual", "mix_residual_backward"]
    assert sorted(ran) == [*mix, "normed_pack", "normed_pack_backward", "normed_unpack", "normed_unpack_backward"]


def test_a_block_that_only_packs_is_the_same():
    blocks = pair(read="memory", local_mixing="none")
    with Kernels() as kernels, torch.no_grad():
        found = blocks[1](*(t.to(DEVICE) for t in tokens()))
    expected = blocks[0](*(t.double() for t in tokens()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu().double(), b.cpu(), rtol=1e-5, atol=1e-5)
    assert kernels.ran == ["normed_pack"]


def test_the_same_paths_are_dropped():
    plain, fused = pair(drop_path=0.5, local_mixing="none")
    plain = copy.deepcopy(plain).float().to(DEVICE)
    found = []
    for block in (plain, fused):
        torch.manual_seed(2)
        found.append(block(*(t.to(DEVICE) for t in tokens())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "kwargs", [{"norm_first": False}, {"local_mixing": "attn"}, {"norm_layer": "rmsnorm"}], ids=str
)
def test_what_has_no_kernel_runs_without(kwargs):
    assert assert_equal(pair(**kwargs)) == []


def test_what_others_put_into_a_block_is_called():
    seen = []
    for name in ("norm1", "attn", "attn.proj"):
        _, fused = pair()
        fused.get_submodule(name).register_forward_hook(lambda module, args, y, name=name: seen.append(name))
        with Kernels() as kernels:
            fused(*(t.to(DEVICE) for t in tokens()), GRID)
        assert name in seen or name == "attn"  # pack and unpack do not call it
        assert kernels.ran == []
    _, fused = pair(attn_drop=0.5)
    with Kernels() as kernels:
        fused.train()(*(t.to(DEVICE) for t in tokens()), GRID)
        assert kernels.ran == []
        fused.eval()(*(t.to(DEVICE) for t in tokens()), GRID)
    assert kernels.ran == ["mix_residual", "normed_pack", "normed_unpack"]
    for name in ("local", "local.conv"):
        _, fused = pair()
        fused.get_submodule(name).register_forward_hook(lambda module, args, y, name=name: seen.append(name))
        with Kernels() as kernels:
            fused(*(t.to(DEVICE) for t in tokens()), GRID)
        assert name in seen and kernels.ran == ["normed_pack", "normed_unpack"]


def test_a_model_takes_them():
    torch.manual_seed(0)
    plain = timm.create_model("test_luna_vit", num_classes=3, **ABSORBED).to(DEVICE).eval()
    fused = timm.create_model("test_luna_vit", num_classes=3, use_kernels=True, **ABSORBED).to(DEVICE).eval()
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 64, 48, device=DEVICE)
    with torch.no_grad(), Kernels() as kernels:
        y = fused(x)
    assert len(kernels.ran) == 4 * 3 + 1
    torch.testing.assert_close(y, plain(x), rtol=1e-4, atol=1e-4)


def test_a_compiled_block_has_one_graph():
    _, fused = pair(drop_path=0.1)
    expected = results(fused.eval())
    torch.compiler.reset()
    fused.compile(backend="aot_eager", fullgraph=True)
    for a, b in zip(results(fused), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with torch.inference_mode(), Kernels() as kernels:
        fused.forward(*(t.to(DEVICE) for t in tokens()), GRID)
    assert kernels.ran == ["mix_residual", "normed_pack", "normed_unpack"]
