"""A pack in parts equals the pack of the whole: any split, any order of merging, extreme scores, masked tiles."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luna_vision import functional as LF
from luna_vision.layers import LunaAttention

B, L, C, H = 2, 3, 16, 4


def layer(tie_kv=True, pack_heads=H) -> LunaAttention:
    torch.manual_seed(0)
    return LunaAttention(C, H, pack_heads, tie_kv, pack_form="absorbed").double()


def tokens(n, scale=1.0):
    torch.manual_seed(n)
    x, memory = torch.randn(B, n, C, dtype=torch.float64), torch.randn(B, L, C, dtype=torch.float64)
    valid = torch.rand(B, n) > 0.4
    valid[:, n // 2] = True
    return x * scale, memory, valid


def merge_in_random_order(states, rng):
    states = list(states)
    while len(states) > 1:
        rng.shuffle(states)
        states.append(states.pop().merge(states.pop()))
    return states[0]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    scale=st.sampled_from([1.0, 30.0, 1e4]),
    tie_kv=st.booleans(),
    masked=st.booleans(),
    project=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_split_and_order_of_merging_equals_the_whole(sizes, scale, tie_kv, masked, project, seed):
    attn = layer(tie_kv)
    x, memory, valid = tokens(sum(sizes), scale)
    want = attn(x, memory, valid if masked else None)[1]

    start = attn.pack_state(memory)
    tiles, masks = x.split(sizes, dim=1), valid.split(sizes, dim=1)
    states = [start.update(t, m if masked else None) for t, m in zip(tiles, masks, strict=True)]
    if project:
        states = [s.project() for s in states]
    torch.testing.assert_close(merge_in_random_order(states, random.Random(seed)).finish(), want, rtol=1e-9, atol=1e-9)

    chained = start
    for tile, mask in zip(tiles, masks, strict=True):
        chained = chained.update(tile, mask if masked else None)
    torch.testing.assert_close(chained.finish(), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("logit", [1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_of_ten_thousand_do_not_overflow(logit, dtype):
    """One patch scores +-10,000, in its own tile and for every slot; exp of that is infinite, or zero."""
    attn = layer().to(dtype)
    x, memory, _ = (t.to(dtype) if t.is_floating_point() else t for t in tokens(9))
    state = attn.pack_state(memory)
    direction = state.queries.sum(dim=1)
    x[:, 4] = direction * logit / (state.queries @ direction[:, :, None]).amin(dim=(1, 2), keepdim=True)[:, 0].abs()
    want = attn(x, memory)[1]
    got = merge_in_random_order([state.update(t) for t in x.split(2, dim=1)], random.Random(0)).finish()
    assert torch.isfinite(got).all()
    assert (state.queries @ x.transpose(1, 2)).abs().max() > 5e3
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}[dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_tiles_without_a_valid_patch_change_nothing():
    attn = layer()
    x, memory, valid = tokens(12)
    valid[:, :4] = False
    valid[0, 8:] = False  # masked for one image of the batch only
    start = attn.pack_state(memory)
    states = [start.update(x[:, i : i + 4], valid[:, i : i + 4]) for i in (0, 4, 8)]
    want = attn(x, memory, valid)[1]
    for order in ((0, 1, 2), (2, 0, 1)):
        merged = states[order[0]].merge(states[order[1]]).merge(states[order[2]])
        torch.testing.assert_close(merged.finish(), want, rtol=1e-10, atol=1e-10)
    assert torch.isfinite(states[0].finish()).all()  # nothing read at all


def test_gradients_pass_through_the_parts():
    """Also at a masked tile, where a careless -inf would give NaN."""
    attn = layer(tie_kv=False, pack_heads=2)
    x, memory, valid = tokens(11)
    valid[:, :3] = False

    def gradients(pack):
        leaves = [x.clone().requires_grad_(), memory.clone().requires_grad_()]
        params = [p for n, p in attn.named_parameters() if n.startswith("pack")]
        return torch.autograd.grad(pack(*leaves).sin().sum(), [*leaves, *params])

    def parts(x, memory):
        start = attn.pack_state(memory)
        states = [start.update(x[:, i : i + 3], valid[:, i : i + 3]) for i in range(0, 11, 3)]
        return states[0].project().merge(states[1].project()).merge(states[3].merge(states[2]).project()).finish()

    want = gradients(lambda x, memory: attn(x, memory, valid)[1])
    for a, b in zip(gradients(parts), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_projected_state_is_small_and_reads_no_more():
    attn = layer()
    x, memory, _ = tokens(7)
    state = attn.pack_state(memory).update(x)
    projected = state.project()
    numbers = sum(t.numel() for t in (projected.maximum, projected.total, projected.weighted))
    assert numbers == B * L * (C + 2 * H)
    with pytest.raises(ValueError, match="reads no more patches"):
        projected.update(x)
    with pytest.raises(ValueError, match="merges with projected ones only"):
        projected.merge(state)


def test_autocast_folds_in_float32():
    """As in `pack_absorbed`: what is folded and summed is not rounded to the type of autocast."""
    attn = layer().float()
    x, memory, _ = (t.float() for t in tokens(40))
    want = attn.pack_state(memory)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attn.pack_state(memory)
        packed = got.update(x).finish()
        whole = attn(x, memory)[1]
    torch.testing.assert_close(got.queries, want.queries)
    assert packed.dtype == torch.float32
    torch.testing.assert_close(packed, whole.float(), rtol=0.01, atol=0.01)


def test_bfloat16_patches_are_packed_in_float32():
    attn = layer().float()
    x, memory, _ = tokens(40)
    want = LF.PackState.finish(attn.pack_state(memory.float()).update(x.float()))
    got = attn.pack_state(memory.bfloat16()).update(x.bfloat16()).finish()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0.03, atol=0.03)
