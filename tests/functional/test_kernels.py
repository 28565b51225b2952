"""The Triton kernels equal their reference in float64, values and gradients: on a GPU, or in Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from luna_vision import functional as LF
from luna_vision.functional.kernels import (
    Norm,
    mix_residual,
    ops,
    pack_normed,
    supports_kernels,
    unpack_normed,
)

TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
needs_kernels = pytest.mark.skipif(
    not TRITON or (DEVICE == "cpu" and not INTERPRETED), reason="needs Triton, and a GPU or TRITON_INTERPRET=1"
)

FILES = [__file__, str(Path(__file__).parents[1] / "layers" / "test_block_kernels.py")]

MANY = 333 if DEVICE == "cuda" else 133  # several tiles, of which the last is not full

# B, N, C, H, L, tied keys and values, masks, biases
SHAPES = [
    (2, 1, 64, 1, 3, True, False, True),
    (2, 37, 64, 4, 5, False, True, False),
    (1, 70, 192, 3, 8, True, True, True),
    (2, MANY, 128, 2, 6, False, True, True),
    (1, MANY, 384, 1, 16, True, False, False),
    (1, 20, 64, 16, 64, True, False, True),
]
LIMITS = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 8e-2}


@pytest.mark.slow
@pytest.mark.skipif(not TRITON or INTERPRETED, reason="needs Triton, and starts its interpreter")
def test_kernels_in_the_interpreter():
    """Triton must be told before it is imported, which torch does."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *FILES]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


def test_without_triton_nothing_is_missed():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from luna_vision.functional.kernels import supports_kernels\n"
        "assert not supports_kernels(torch.zeros(1, 2, 64), 1, 8)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "TRITON_INTERPRET": "1"})


def inputs(shape):
    """Tokens, norms and projections in float64, and masks."""
    B, N, C, H, L, tied, masked, biased = shape
    generator = torch.Generator("cpu").manual_seed(0)
    on_cpu = {"generator": generator, "dtype": torch.float64, "device": "cpu"}

    def draw(*size, std=1.0):
        return std * torch.randn(*size, **on_cpu)

    def bias():
        return draw(C, std=0.3) if biased else None

    def projections():
        w_query, w_key, w_out = (draw(C, C, std=2 / C**0.5) for _ in range(3))
        w_value = None if tied else draw(C, C, std=2 / C**0.5)
        return LF.Projections(H, w_query, bias(), w_key, w_value, bias(), w_out, bias())

    leaves = {
        "x": 1 + draw(B, N, C),
        "memory": draw(B, L, C),
        "packed": draw(B, L, C),
        "norm": (1 + draw(C, std=0.2), draw(C, std=0.2)),
        "norm2": (1 + draw(C, std=0.2), draw(C, std=0.2)),
        "pack": projections(),
        "unpack": projections(),
    }
    masks = {}
    if masked:
        masks = {name: torch.rand(B, n, **on_cpu) < 0.6 for name, n in (("patches", N), ("slots", L))}
        for mask in masks.values():
            mask[:, 0] = True
        if B > 1:
            masks["patches"][-1] = False  # such an image gives finite numbers
    return leaves, masks


def convert(leaves, device, dtype):
    return torch.utils._pytree.tree_map(
        lambda t: t.detach().to(device, dtype).requires_grad_() if isinstance(t, torch.Tensor) else t, leaves
    )


def reference(leaves, masks):
    of = leaves
    h = F.layer_norm(of["x"], of["x"].shape[2:], *of["norm"], 1e-6)
    packed = LF.pack_absorbed(of["memory"], h, of["pack"], masks.get("patches"))
    y = of["x"] + LF.unpack_absorbed(h, of["packed"], of["unpack"], masks.get("slots"))
    return packed, y, F.layer_norm(y, y.shape[2:], *of["norm2"], 1e-6)


def fused(leaves, masks):
    of = leaves
    norm, norm2 = Norm(*of["norm"], 1e-6), Norm(*of["norm2"], 1e-6)
    packed = pack_normed(of["memory"], of["x"], norm, of["pack"], masks.get("patches"))
    return packed, *unpack_normed(of["x"], of["packed"], norm, of["unpack"], masks.get("slots"), norm2)


def values_and_gradients(function, leaves, masks):
    found = function(leaves, masks)
    generator = torch.Generator("cpu").manual_seed(1)
    given = [
        torch.randn(t.shape, generator=generator, dtype=torch.float64, device="cpu").to(t.device, t.dtype)
        for t in found
    ]
    flat = [t for t in torch.utils._pytree.tree_leaves(leaves) if isinstance(t, torch.Tensor)]
    gradients = torch.autograd.grad(found, flat, given, allow_unused=True)
    return [*found, *(torch.zeros_like(t) if g is None else g for t, g in zip(flat, gradients, strict=True))]


def assert_near(found, expected, limit):
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        error = (a.detach().cpu().double() - b.detach()).norm()
        # the gradients of a pack's queries vanish for one patch: not relative to themselves alone
        assert error <= limit * (b.norm() + 0.5 * b.numel() ** 0.5), f"result {i}: {error / b.norm():.1e}"


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_kernels_equal_the_reference(shape, dtype):
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter multiplies bfloat16 as integers")
    if dtype == torch.float16 and DEVICE == "cpu" and shape[1] > 100:
        pytest.skip("float32 says as much")
    leaves, masks = inputs(shape)
    expected = values_and_gradients(reference, convert(leaves, "cpu", torch.float64), masks)
    here = convert(leaves, DEVICE, dtype)
    assert supports_kernels(here["x"], shape[3], shape[4])
    found = values_and_gradients(fused, here, {name: mask.to(DEVICE) for name, mask in masks.items()})
    assert all(t.dtype == dtype for t in found)
    assert_near(found, expected, LIMITS[dtype])


@needs_kernels
def test_autocast_keeps_the_residual_stream_wide():
    leaves, masks = inputs(SHAPES[2])
    expected = values_and_gradients(reference, convert(leaves, "cpu", torch.float64), masks)
    with torch.autocast(DEVICE, torch.float16):
        here, masks = convert(leaves, DEVICE, torch.float32), {name: mask.to(DEVICE) for name, mask in masks.items()}
        found = values_and_gradients(fused, here, masks)
    assert [t.dtype for t in found[:3]] == [torch.float16, torch.float32, torch.float16]
    assert all(t.dtype == torch.float32 for t in found[3:])
    assert_near(found, expected, LIMITS[torch.float16])


def mixed(x, weight, bias, valid, H, W):
    """The formula of local mixing with its residual."""
    h = x if valid is None else x.masked_fill(~valid[:, :, None], 0.0)
    h = h.unflatten(1, (H, W)).permute(0, 3, 1, 2)
    return x + F.conv2d(h, weight, bias, padding=1, groups=len(bias)).flatten(2).transpose(1, 2)


@needs_kernels
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1, 64), (2, 5, 18, 64), (1, 3, 16, 128)], ids=str)
@pytest.mark.parametrize("dtype", [*LIMITS, "mixed"], ids=str)
def test_local_mixing_equals_the_convolution(shape, masked, dtype):
    B, H, W, C = shape
    if dtype != torch.float32 and DEVICE == "cpu" and shape[0] == 1:
        pytest.skip("float32 says as much")
    x_type, dtype = (torch.float32, torch.float16) if dtype == "mixed" else (dtype, dtype)
    generator = torch.Generator("cpu").manual_seed(0)
    on_cpu = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    leaves = [torch.randn(*size, **on_cpu) for size in ((B, H * W, C), (C, 1, 3, 3), (C,))]
    given, valid = torch.randn(B, H * W, C, **on_cpu), None
    if masked:
        valid = torch.rand(B, H * W, **on_cpu) < 0.6
        leaves[0] = leaves[0].masked_fill(~valid[:, :, None], 1e4)  # which nobody may read
    results = []
    for function, device, types in (
        (mixed, "cpu", [torch.float64] * 3),
        (mix_residual, DEVICE, [x_type, dtype, dtype]),
    ):
        here = [t.to(device, to).requires_grad_() for t, to in zip(leaves, types, strict=True)]
        y = function(*here, None if valid is None else valid.to(device), H, W)
        results.append([y, *torch.autograd.grad(y, here, given.to(device, types[0]))])
    assert [t.dtype for t in results[1]] == [x_type, x_type, dtype, dtype]
    if masked:  # the patches that do not count pass through, and would hide the others in the norm
        for found in results:
            found[0] = found[0].masked_fill(~valid.to(found[0].device)[:, :, None], 0.0)
    assert_near(results[1], results[0], LIMITS[dtype])


@needs_kernels
def test_local_mixing_stays_finite_in_float16():
    x = torch.full((1, 12, 64), 6e4, device=DEVICE, dtype=torch.float16)
    weight, bias = (torch.ones(size, device=DEVICE, dtype=torch.float16) for size in ((64, 1, 3, 3), 64))
    assert mix_residual(x, weight, bias, None, 3, 4).isfinite().all()


@needs_kernels
@pytest.mark.parametrize("masked", [True, False])
def test_operators_keep_the_rules_of_pytorch(masked):
    """Shapes and types of fake tensors, gradients, tracing with sizes that change."""
    x = torch.randn(2, 37, 64, device=DEVICE, requires_grad=True)
    m, k, v = (torch.randn(2, 10, 64, device=DEVICE, requires_grad=True) for _ in range(3))
    shift = torch.randn(2, 10, device=DEVICE, requires_grad=True)
    valid = torch.ones(2, 37, dtype=torch.bool, device=DEVICE) if masked else None
    norm = tuple(torch.randn(64, device=DEVICE, requires_grad=True) for _ in range(2)) if masked else (None, None)
    torch.library.opcheck(ops.normed_pack, (x, m, valid, 1e-6))
    torch.library.opcheck(ops.normed_unpack, (x, k, shift, v, 5, 1e-6, *norm, 1e-6))
    weight, bias = (torch.randn(size, device=DEVICE, requires_grad=True) for size in ((64, 1, 3, 3), 64))
    torch.library.opcheck(ops.mix_residual, (x[:, :8], weight, bias, None if valid is None else valid[:, :8], 2, 4))


@needs_kernels
def test_a_compiled_graph_has_no_break():
    leaves, masks = inputs(SHAPES[1])
    here, masks = convert(leaves, DEVICE, torch.float32), {name: mask.to(DEVICE) for name, mask in masks.items()}
    expected = values_and_gradients(fused, here, masks)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    for a, b in zip(values_and_gradients(compiled, here, masks), expected, strict=True):
        torch.testing.assert_close(a, b)


@needs_kernels
def test_a_second_norm_can_be_left_out():
    leaves, _ = inputs(SHAPES[0])
    of = convert(leaves, DEVICE, torch.float32)
    y, h = unpack_normed(of["x"], of["packed"], Norm(*of["norm"], 1e-6), of["unpack"])
    _, expected, _ = fused(of, {})
    assert h is None and torch.equal(y, expected)


def test_what_the_kernels_do_not_take_is_known():
    x = torch.zeros(1, 2, 64, device=DEVICE)
    assert not supports_kernels(x.double(), 1, 8) and not supports_kernels(x[..., :48], 1, 8)
    assert not supports_kernels(x, 1, 65) and not supports_kernels(x, 17, 8) and not supports_kernels(x[:0], 1, 8)
