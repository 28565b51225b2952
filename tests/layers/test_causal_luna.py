"""Causal Luna attention: the authors' numbers, the formula, no future, linear cost, and generation step by step."""

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from luna_vision.functional import split_heads
from luna_vision.layers import CausalLunaAttention, CausalState
from luna_vision.layers.causal import naive_causal

GOLDEN = Path(__file__).parents[1] / "golden"
B, L, C, H = 2, 3, 12, 2

# the authors' name: ours
KEYS = {
    "pq_proj": "pack_q",
    "pc_proj": "pack_k",
    "q_proj": "unpack_q",
    "c_proj": "unpack_kv",
    "k_proj": "unpack_k",
    "v_proj": "unpack_v",
    "out_proj": "proj",
}


def layer(tie_kv=True, heads=H, dim=C, dtype=torch.float64, **kwargs) -> CausalLunaAttention:
    torch.manual_seed(1)
    return CausalLunaAttention(dim, heads, tie_kv, dtype=dtype, **kwargs)


def tokens(n, batch=B, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(batch, n, C, dtype=dtype), torch.randn(batch, L, C, dtype=dtype)


def naive(attn, x, memory, valid=None, keep_pack=1.0, keep=None):
    """The whole layer through `naive_causal`."""
    heads = attn.num_heads
    pack_q, pack_k, q = (
        split_heads(f(t), heads) for f, t in ((attn.pack_q, memory), (attn.pack_k, x), (attn.unpack_q, x))
    )
    k, v = (attn.unpack_kv,) * 2 if attn.tie_kv else (attn.unpack_k, attn.unpack_v)
    scores = pack_k @ pack_q.transpose(-2, -1) / math.sqrt(C // heads)
    weights = torch.log2(1 + 2**scores) * keep_pack
    valid = torch.ones(x.shape[:2], dtype=torch.bool) if valid is None else valid
    weights = weights * valid[:, None, :, None]
    count = valid.cumsum(1).clamp(min=1)
    y = naive_causal(q, split_heads(k(x), heads), split_heads(v(x), heads), weights, count, keep)
    return attn.proj(y.transpose(1, 2).flatten(2))


def close(a, b, tol=1e-10):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize("case", ["causal_tied", "causal_untied"])
@pytest.mark.parametrize("chunk", [8, 64])
def test_equals_authors(case, chunk):
    g = load_file(GOLDEN / f"{case}.safetensors")
    state = {k.removeprefix("state."): v for k, v in g.items() if k.startswith("state.")}
    attn = CausalLunaAttention(32, 4, tie_kv=case == "causal_tied", chunk=chunk).double().eval()
    attn.load_state_dict({KEYS[k.split(".")[0]] + "." + k.split(".")[1]: v for k, v in state.items()})
    x, memory = g["in.x"].requires_grad_(), g["in.memory"].requires_grad_()
    y = attn(x, memory)
    torch.testing.assert_close(y, g["out.x"], rtol=0, atol=1e-10)
    (y * g["cotangent.x"]).sum().backward()
    torch.testing.assert_close(x.grad, g["grad.x"], rtol=0, atol=1e-10)
    torch.testing.assert_close(memory.grad, g["grad.memory"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("n, batch", [(1, 1), (1, 2), (2, 1), (7, 2), (13, 1), (24, 2)])
@pytest.mark.parametrize("tie_kv, masked", itertools.product([True, False], repeat=2))
def test_equals_the_formula_at_every_chunk(n, batch, tie_kv, masked):
    """Values, and gradients of inputs and of every parameter; so the result does not depend on the chunk either."""
    attn = layer(tie_kv, heads=3)
    x, memory = tokens(n, batch)
    leaves = [x.requires_grad_(), memory.requires_grad_(), *attn.parameters()]
    valid = torch.arange(n) % 3 != 1 if masked else None
    valid = valid.expand(batch, n) if masked else None
    want = naive(attn, x, memory, valid)
    used = (
        torch.ones(batch, n, 1) if valid is None else valid[..., None].double()
    )  # what else is returned means nothing
    cotangent, want = torch.randn_like(want) * used, want * used
    grads = torch.autograd.grad((want * cotangent).sum(), leaves)
    for chunk in (1, 3, 4, n, 64):
        attn.chunk = chunk
        y = attn(x, memory, valid) * used
        close(y, want)
        for a, b in zip(torch.autograd.grad((y * cotangent).sum(), leaves), grads, strict=True):
            close(a, b)


@pytest.mark.parametrize("tie_kv, qkv_bias, n", itertools.product([True, False], [True, False], [1, 9]))
def test_every_parameter_is_learned(tie_kv, qkv_bias, n):
    attn = layer(tie_kv, qkv_bias=qkv_bias, chunk=4)
    attn(*tokens(n)).square().sum().backward()
    for name, p in attn.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 1e-6, name


@pytest.mark.parametrize("tie_kv, chunk", itertools.product([True, False], [1, 3, 64]))
def test_no_token_sees_a_later_one(tie_kv, chunk):
    """In values and in gradients, at every pair of tokens, within chunks and across them."""
    n = 8
    attn = layer(tie_kv, chunk=chunk)
    x, memory = tokens(n, 1)
    y = attn(x, memory)
    for t in range(n):
        changed = x.clone()
        changed[:, t] += 1.0
        difference = (attn(changed, memory) - y).abs().amax(dim=(0, 2))
        assert (difference[:t] == 0).all() and (difference[t:] > 1e-6).all()
    jacobian = torch.autograd.functional.jacobian(lambda x: attn(x, memory), x)  # 1, n, C, 1, n, C
    strength = jacobian.abs().amax(dim=(0, 2, 3, 5))
    assert (strength.triu(1) == 0).all()
    assert (strength[torch.ones(n, n).tril().bool()] > 1e-6).all()


@pytest.mark.parametrize("chunk", [4, 64])
def test_no_token_sees_a_later_one_under_dropout(chunk):
    attn = layer(attn_drop=0.5, chunk=chunk)
    x, memory = tokens(11)
    changed = x.clone()
    changed[:, 6] += 1.0
    outputs = []
    for t in (x, changed):
        torch.manual_seed(3)
        outputs.append(attn(t, memory))
    difference = (outputs[0] - outputs[1]).abs().amax(dim=(0, 2))
    assert (difference[:6] == 0).all() and (difference[6:] > 0).all()


def test_dropout_drops_pack_weights_and_slots(monkeypatch):
    attn = layer(attn_drop=0.5)
    x, memory = tokens(7)
    keep_pack, keep = torch.rand(2, B, H, 7, L).bernoulli().double() * 2
    drawn = [keep.unsqueeze(2), keep_pack]  # the pack's is asked for first; the slots are in one chunk

    def dropout(x, p, training=True):
        return x * drawn.pop().view_as(x) if p and training else x

    want = naive(attn, x, memory, None, keep_pack, keep)
    with monkeypatch.context() as m:
        m.setattr(F, "dropout", dropout)
        attn.proj_drop = torch.nn.Identity()
        close(attn(x, memory), want)
    assert not drawn
    attn.eval()
    close(attn(x, memory), naive(attn, x, memory))
    y_0, _ = attn.step(x[:, 0], attn.init_state(memory))
    close(y_0, attn(x, memory)[:, 0])


@pytest.mark.parametrize("fill", [1e3, float("nan"), float("inf")])
@pytest.mark.parametrize("tie_kv", [True, False])
def test_padding_changes_nothing(tie_kv, fill):
    """Neither what others read nor their number, wherever it stands; a row without any valid token stays finite."""
    attn = layer(tie_kv, chunk=4)
    x, memory = tokens(9)
    y, state = attn.read(x, attn.init_state(memory))
    junk = torch.full((B, 3, C), fill, dtype=x.dtype)
    padded = torch.cat([junk, x[:, :5], junk, x[:, 5:], junk], dim=1)
    valid = torch.tensor([0] * 3 + [1] * 5 + [0] * 3 + [1] * 4 + [0] * 3, dtype=torch.bool).expand(B, -1)
    y_padded, state_padded = attn.read(padded, attn.init_state(memory), valid)
    close(y_padded[valid].view_as(y), y)
    for a, b in zip(state_padded, state, strict=True):
        close(a, b)
    assert attn.read(padded, attn.init_state(memory), ~valid & valid)[0].isfinite().all()


@pytest.mark.parametrize("tie_kv", [True, False])
def test_steps_equal_the_parallel_form(tie_kv):
    attn = layer(tie_kv, chunk=4).eval()
    x, memory = tokens(10)
    y = attn(x, memory)
    state = attn.init_state(memory)
    shapes = [t.shape for t in state]
    for t in range(10):
        y_t, state = attn.step(x[:, t], state)
        close(y_t, y[:, t])
    assert [t.shape for t in state] == shapes


@pytest.mark.parametrize("tie_kv, prefix", itertools.product([True, False], [0, 1, 4, 6]))
def test_prefix_then_steps_then_more(tie_kv, prefix):
    """All three ways of reading continue each other, and gradients flow through the state."""
    attn = layer(tie_kv, chunk=4)
    x, memory = tokens(12)
    x.requires_grad_()
    want = attn(x, memory)
    parts = []
    y, state = attn.read(x[:, :prefix], attn.init_state(memory))
    parts.append(y)
    for t in range(prefix, prefix + 2):
        y, state = attn.step(x[:, t], state)
        parts.append(y[:, None])
    y, state = attn.read(x[:, prefix + 2 :], state)
    got = torch.cat([*parts, y], dim=1)
    close(got, want)
    assert (state.count == 12).all()
    cotangent = torch.randn_like(want)
    close(*(torch.autograd.grad((t * cotangent).sum(), x)[0] for t in (got, want)))


def test_prompts_of_different_lengths_go_on_together():
    """Right padding in the prompt, then steps; and a state can be picked apart by image."""
    attn = layer().eval()
    x, memory = tokens(9)
    lengths = torch.tensor([3, 6])
    _, state = attn.read(x[:, :6], attn.init_state(memory), torch.arange(6) < lengths[:, None])
    y, state = attn.step(x[:, 8], state)
    for i, n in enumerate(lengths.tolist()):
        alone = torch.cat([x[i : i + 1, :n], x[i : i + 1, 8:]], dim=1)
        close(y[i], attn(alone, memory[i : i + 1])[0, -1])
    swapped, _ = attn.step(x[[1, 0], 7], CausalState(*(t[[1, 0]] for t in state)))
    close(swapped[[1, 0]], attn.step(x[:, 7], state)[0])


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


@pytest.mark.parametrize("tie_kv", [True, False])
def test_nothing_of_tokens_by_slots_by_width_is_made(tie_kv):
    n, slots, dim, heads, chunk = 500, 16, 32, 2, 16
    attn = layer(tie_kv, heads, dim, torch.float32, chunk=chunk)
    x, memory = torch.randn(1, n, dim, requires_grad=True), torch.randn(1, slots, dim, requires_grad=True)
    with Largest() as mode:
        attn(x, memory).sum().backward()
    allowed = max(heads * n * max(slots, chunk), 2 * n * dim, 2 * (n // chunk + 2) * slots * dim)
    assert n * dim < mode.elements <= 1.1 * allowed < n * slots * dim / 4  # 1.1 for the padding to whole chunks
    weights, count = torch.rand(1, heads, n, slots), torch.ones(1, n)
    with Largest() as mode:
        naive_causal(*torch.rand(3, 1, heads, n, dim // heads), weights, count)
    assert mode.elements == n * slots * dim  # the recorder sees what the reference makes


@pytest.mark.parametrize("tie_kv", [True, False])
def test_flops_grow_linearly(tie_kv):
    """Forward and backward on the meta device, where the counter sees every product."""

    def flops(n, backward=False):
        attn = layer(tie_kv, 6, 384, torch.float32, device="meta")
        x, memory = (torch.empty(1, k, 384, device="meta", requires_grad=True) for k in (n, 16))
        with FlopCounterMode(display=False) as counter:
            y = attn(x, memory)
            if backward:
                y.sum().backward()
        return counter.get_total_flops()

    for backward in (False, True):
        of_memory = flops(0, backward)
        assert flops(4 * 1024, backward) - of_memory == 4 * (flops(1024, backward) - of_memory)
    projections = 2 * 384**2 * (4 if tie_kv else 5)
    besides = 4 * 64 * (384 + 6 * 16) + (8 if tie_kv else 10) * 16 * 384
    assert flops(1024) - flops(0) == 1024 * (projections + besides)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_sums_in_float32(dtype):
    """With one token a chunk, sums in half precision would stop growing after a few hundred tokens."""
    attn = layer(dtype=torch.float32, chunk=1)
    x, memory = tokens(1500, 1, torch.float32)
    x = x + 1.0
    want = attn(x, memory)
    with torch.autocast("cpu", dtype=dtype):
        y, state = attn.read(x, attn.init_state(memory))
        y_t, next_state = attn.step(x[:, 0], state)
        attn.chunk = 64
        _, state_chunked = attn.read(torch.cat([x, x[:, :1]], dim=1), attn.init_state(memory))
    torch.testing.assert_close(next_state.sums, state_chunked.sums, rtol=1e-5, atol=1e-3)  # of sums up to 3e3
    assert y.dtype == y_t.dtype == dtype
    assert state.sums.dtype == next_state.sums.dtype == torch.float32
    torch.testing.assert_close(y.float(), want, rtol=0.02, atol=0.02)
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in attn.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [0.0, 1.0, 6e4])
def test_never_nan(dtype, scale):
    attn = layer(dtype=torch.float32).to(dtype)
    x, memory = ((t * scale).clamp(-65504, 65504).to(dtype) for t in tokens(20))
    y, state = attn.read(x, attn.init_state(memory))
    assert y.dtype == dtype and state.sums.dtype == torch.float32
    assert y.isfinite().all() and attn.step(x[:, 0], state)[0].isfinite().all()


def compiled(function, **kwargs):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="eager", **kwargs)


def test_compile_fullgraph_at_several_lengths():
    attn = layer(chunk=4)
    forward = compiled(attn.forward)
    for n in (9, 11):
        x, memory = tokens(n)
        close(forward(x, memory), attn(x, memory))


def test_compile_fullgraph_of_states_masks_and_autocast():
    attn = layer(tie_kv=False, dtype=torch.float32, chunk=4)
    x, memory = tokens(9, dtype=torch.float32)
    valid = (torch.arange(9) < 7).expand(B, 9)

    def read_and_step(x, memory):
        y, state = attn.read(x, attn.init_state(memory), valid)
        return y, attn.step(x[:, 0], state)

    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            got, want = (tree_leaves(f(x, memory)) for f in (compiled(read_and_step, dynamic=False), read_and_step))
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype
            close(a, b, 1e-5)


def test_errors_name_the_problem():
    with pytest.raises(ValueError, match="multiple of num_heads"):
        CausalLunaAttention(10, 3)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        CausalLunaAttention(8, 2, chunk=0)
    attn = layer()
    x, memory = tokens(5)
    state = attn.init_state(memory)
    for call, match in (
        (lambda: attn(x[..., :6], memory), "x must have shape"),
        (lambda: attn(x[:1], memory), "x must have shape"),
        (lambda: attn(x, memory[0]), "memory must have shape"),
        (lambda: attn.step(x, state), "x must have shape"),
        (lambda: attn.step(x[:1, 0], state), "x must have shape"),
        (lambda: attn(x, memory, torch.ones(B, 5)), "bool"),
        (lambda: attn(x, memory, torch.zeros(B, 5, dtype=torch.bool)), "without any valid token"),
        (lambda: attn.read(x, state, torch.ones(B, 1, dtype=torch.bool)), "patch_valid must have shape"),
        (lambda: attn.read(x, state, torch.ones(B, 5)), "patch_valid must be bool, got torch.float32"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
