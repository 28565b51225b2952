"""A pack in parts equals the pack of the whole: any split, any order of merging, extreme scores, masked tiles."""

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luna_vision.layers import LunaAttention

B, L, C, H = 2, 3, 16, 4
FORMS = ("absorbed", "projected")


def layer(tie_kv=True, pack_heads=H, form="absorbed") -> LunaAttention:
    torch.manual_seed(0)
    return LunaAttention(C, H, pack_heads, tie_kv, pack_form=form).double()


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
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    scale=st.sampled_from([1.0, 30.0, 1e4]),
    tie_kv=st.booleans(),
    form=st.sampled_from(FORMS),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_split_and_order_of_merging_equals_the_whole(sizes, scale, tie_kv, form, masked, seed):
    attn = layer(tie_kv, form=form)
    x, memory, valid = tokens(sum(sizes), scale)
    want = attn(x, memory, valid if masked else None)[1]

    query = attn.pack_query(memory)
    tiles, masks = x.split(sizes, dim=1), valid.split(sizes, dim=1)
    states = [attn.pack_tile(t, query, m if masked else None) for t, m in zip(tiles, masks, strict=True)]
    torch.testing.assert_close(merge_in_random_order(states, random.Random(seed)).finish(), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("logit", [1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_of_ten_thousand_do_not_overflow(logit, dtype):
    """One patch scores +-10,000, in its own tile and for every slot; exp of that is infinite, or zero."""
    attn = layer().to(dtype)
    x, memory, _ = (t.to(dtype) if t.is_floating_point() else t for t in tokens(9))
    query = attn.pack_query(memory)
    direction = query.sum(dim=1)
    x[:, 4] = direction * logit / (query @ direction[:, :, None]).amin(dim=(1, 2), keepdim=True)[:, 0].abs()
    want = attn(x, memory)[1]
    states = [attn.pack_tile(t, query) for t in x.split(2, dim=1)]
    got = merge_in_random_order(states, random.Random(0)).finish()
    assert torch.isfinite(got).all()
    assert (query @ x.transpose(1, 2)).abs().max() > 5e3
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}[dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_tiles_without_a_valid_patch_change_nothing(form):
    attn = layer(form=form)
    x, memory, valid = tokens(12)
    valid[:, :4] = False
    valid[0, 8:] = False  # masked for one image of the batch only
    query = attn.pack_query(memory)
    states = [attn.pack_tile(x[:, i : i + 4], query, valid[:, i : i + 4]) for i in (0, 4, 8)]
    want = attn(x, memory, valid)[1]
    for order in ((0, 1, 2), (2, 0, 1)):
        merged = states[order[0]].merge(states[order[1]]).merge(states[order[2]])
        torch.testing.assert_close(merged.finish(), want, rtol=1e-10, atol=1e-10)
    assert torch.isfinite(states[0].finish()).all()  # nothing read at all


@pytest.mark.parametrize("form, tie_kv", itertools.product(FORMS, [True, False]))
def test_gradients_pass_through_the_parts(form, tie_kv):
    """Also at a masked tile, where a careless -inf would give NaN."""
    attn = layer(tie_kv, pack_heads=2, form=form)
    x, memory, valid = tokens(11)
    valid[:, :3] = False

    def gradients(pack):
        leaves = [x.clone().requires_grad_(), memory.clone().requires_grad_()]
        params = [p for n, p in attn.named_parameters() if n.startswith("pack")]
        return torch.autograd.grad(pack(*leaves).sin().sum(), [*leaves, *params])

    def parts(x, memory):
        query = attn.pack_query(memory)
        states = [attn.pack_tile(x[:, i : i + 3], query, valid[:, i : i + 3]) for i in range(0, 11, 3)]
        return states[0].merge(states[1]).merge(states[3].merge(states[2])).finish()

    want = gradients(lambda x, memory: attn(x, memory, valid)[1])
    for a, b in zip(gradients(parts), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_a_state_is_small(form):
    attn = layer(form=form)
    x, memory, _ = tokens(70)
    assert sum(t.numel() for t in attn.pack_tile(x, attn.pack_query(memory))) == B * L * (C + 2 * H)


def test_autocast_folds_in_its_own_type_and_sums_in_float32():
    """As in `pack_absorbed`."""
    attn = layer().float()
    x, memory, _ = (t.float() for t in tokens(40))
    want = attn.pack_query(memory)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attn.pack_query(memory)
        packed = attn.pack_tile(x, got).finish()
        whole = attn(x, memory)[1]
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.03, atol=0.03 * float(want.detach().std()))
    assert packed.dtype == torch.float32
    torch.testing.assert_close(packed, whole.float(), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_patches_are_summed_in_float32(form):
    attn = layer(form=form).float()
    x, memory, _ = tokens(40)
    want = attn.pack_tile(x.float(), attn.pack_query(memory.float())).finish()
    attn = attn.bfloat16()
    got = attn.pack_tile(x.bfloat16(), attn.pack_query(memory.bfloat16())).finish()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("form", FORMS)
def test_many_patches_stay_in_the_range_of_float16(form, rows):
    attn = layer(form=form).half()
    x, memory = torch.full((1, 80_000, C), 2.0, dtype=torch.float16), torch.zeros(1, L, C, dtype=torch.float16)
    query = attn.pack_query(memory)
    found = attn.pack_tile(x, query, rows=rows).finish()
    torch.testing.assert_close(found, attn.pack_tile(x[:, :8], query).finish(), rtol=2e-3, atol=2e-3)
