"""What users rely on in LunaAttention, LunaBlock and LocalMixing."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from luna_vision.functional import attend, naive_attend, split_heads
from luna_vision.layers import LocalMixing, LunaAttention, LunaBlock

B, H, W, L, C = 2, 5, 7, 3, 24
N = H * W


def tokens(dtype=torch.float64, n=N):
    torch.manual_seed(0)
    return torch.randn(B, n, C, dtype=dtype), torch.randn(B, L, C, dtype=dtype)


def block(**kwargs) -> LunaBlock:
    torch.manual_seed(1)
    return LunaBlock(C, 4, **kwargs).double().eval()


@pytest.mark.parametrize("queries, keys", [(3, 35), (35, 3), (1, 1), (17, 129)])
@pytest.mark.parametrize("masked", [False, True])
def test_attend_equals_the_formula(queries, keys, masked):
    torch.manual_seed(0)
    q, k, v = (split_heads(torch.randn(B, n, C, dtype=torch.float64), 4) for n in (queries, keys, keys))
    valid = torch.rand(B, keys) > 0.3 if masked else None
    if masked:
        valid[:, 0] = True
    grads = []
    for fn in (attend, naive_attend):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        y = fn(*leaves, valid)
        grads.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tie_kv, pack_heads", itertools.product([True, False], [1, 4, None]))
def test_padded_patch_changes_nothing_in_attention(tie_kv, pack_heads):
    attn = LunaAttention(C, 4, pack_heads, tie_kv).double()
    x, memory = tokens()
    y, packed = attn(x, memory)
    padded = torch.cat([x[:, :10], torch.full((B, 6, C), 1e3, dtype=x.dtype), x[:, 10:]], dim=1)
    valid = torch.ones(B, N + 6, dtype=torch.bool)
    valid[:, 10:16] = False
    y_padded, packed_padded = attn(padded, memory, valid)
    torch.testing.assert_close(packed_padded, packed, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y_padded[valid].view_as(y), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("local_mixing", ["before", "mlp"])
@pytest.mark.parametrize("norm_first, memory_mlp", itertools.product([True, False], ["none", "own", "shared"]))
def test_padded_patch_changes_nothing_in_block(norm_first, memory_mlp, local_mixing):
    """Local mixing included: beyond the valid grid it must see what it sees beyond the border of an image."""
    b = block(norm_first=norm_first, memory_mlp=memory_mlp, local_mixing=local_mixing)
    torch.nn.init.normal_((b.local or b.mlp.local).conv.weight)
    x, memory = tokens()
    y, memory_out = b(x, memory, (H, W))
    padded = torch.full((B, H + 2, W + 3, C), 50.0, dtype=x.dtype)
    padded[:, :H, :W] = x.view(B, H, W, C)
    valid = torch.zeros(B, H + 2, W + 3, dtype=torch.bool)
    valid[:, :H, :W] = True
    y_padded, memory_padded = b(padded.flatten(1, 2), memory, (H + 2, W + 3), valid.flatten(1))
    torch.testing.assert_close(memory_padded, memory_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y_padded.view_as(padded)[:, :H, :W].flatten(1, 2), y, rtol=1e-12, atol=1e-12)


def test_invalid_slot_is_not_read():
    attn = LunaAttention(C, 4).double()
    x, memory = tokens()
    valid = torch.tensor([[True, True, False]] * B)
    y, _ = attn(x, memory, memory_valid=valid)
    torch.testing.assert_close(y, attn(x, memory[:, :2])[0], rtol=1e-12, atol=1e-12)


def test_local_mixing_is_a_convolution_over_the_grid():
    local = LocalMixing(C).double()
    x, _ = tokens()
    grid = x.view(B, H, W, C).permute(0, 3, 1, 2).contiguous()
    want = local.conv(grid).flatten(2).transpose(1, 2)
    torch.testing.assert_close(local(x, (H, W)), want, rtol=1e-12, atol=1e-12)
    # rows and columns are not mixed up: a patch reaches its neighbour in the row, not W patches further on
    torch.nn.init.constant_(local.conv.weight, 1.0)
    delta = torch.zeros(1, N, C, dtype=x.dtype)
    delta[0, 0] = 1.0
    reached = (local(delta, (H, W)) - local.conv.bias).abs().sum(-1)[0].nonzero().flatten()
    assert reached.tolist() == [0, 1, W, W + 1]


@pytest.mark.parametrize(
    "norm_first, tie_kv, memory_mlp",
    [(True, True, "none"), (True, False, "own"), (False, True, "shared"), (False, False, "none")],
)
@pytest.mark.parametrize("read", ["both", "memory", "patches"])
def test_every_parameter_gets_a_gradient(norm_first, tie_kv, memory_mlp, read):
    b = block(
        norm_first=norm_first,
        tie_kv=tie_kv,
        memory_mlp=memory_mlp,
        read=read,
        init_values=0.1,
    ).train()
    y, memory_out = b(*tokens(), (H, W))
    # squared, since the sum of what a norm returns does not depend on its input
    ((y.square().sum() if read != "memory" else 0) + (memory_out.square().sum() if read != "patches" else 0)).backward()
    assert [n for n, p in b.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_dropout_and_drop_path_act_in_training_only():
    for kwargs in ({"attn_drop": 0.5}, {"proj_drop": 0.5}, {"drop_path": 0.5}):
        b, plain = block(**kwargs), block()
        x, memory = tokens()
        torch.testing.assert_close(b(x, memory, (H, W)), plain(x, memory, (H, W)))
        y, memory_out = b.train()(x, memory, (H, W))
        assert not torch.allclose(y, plain(x, memory, (H, W))[0])
        assert not torch.allclose(memory_out, plain(x, memory, (H, W))[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [0.0, 1.0, 6e4])
@pytest.mark.parametrize("norm_first", [True, False])
def test_never_nan(dtype, scale, norm_first):
    b = block(norm_first=norm_first).to(dtype)
    x, memory = tokens()
    limit = torch.finfo(torch.float16).max
    x, memory = ((t * scale).clamp(-limit, limit).to(dtype) for t in (x, memory))
    y, memory_out = b(x, memory, (H, W))
    assert torch.isfinite(y).all() and torch.isfinite(memory_out).all()
    y, memory_out = LunaAttention(C, 4).to(dtype)(x, memory)
    assert not y.isnan().any() and not memory_out.isnan().any()


def test_fully_masked_row_is_finite_in_a_block_which_leaves_the_check_to_the_model():
    b = block().float()
    x, memory = tokens(torch.float32)
    valid = torch.ones(B, N, dtype=torch.bool)
    valid[1] = False
    with pytest.raises(ValueError, match="patch_valid has a row without any valid token"):
        b.attn(x, memory, valid)
    for run in (b, torch.compile(b, fullgraph=True, backend="eager")):
        assert all(torch.isfinite(y).all() for y in run(x, memory, (H, W), valid))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(B, N, C + 1)}, r"x must have shape \(batch, patches, 24\), got \[2, 35, 25\]"),
        ({"x": torch.zeros(N, C)}, r"x must have shape \(batch, patches, 24\), got \[35, 24\]"),
        ({"memory": torch.zeros(B + 1, L, C)}, r"memory must have shape \(2, slots, 24\), got \[3, 3, 24\]"),
        (
            {"patch_valid": torch.ones(B, N + 1, dtype=torch.bool)},
            r"patch_valid must have shape \(2, 35\), got \[2, 36\]",
        ),
        ({"patch_valid": torch.ones(B, N)}, "patch_valid must be a bool tensor"),
        ({"memory_valid": torch.ones(B, N, dtype=torch.bool)}, r"memory_valid must have shape \(2, 3\), got \[2, 35\]"),
        ({"memory_valid": torch.zeros(B, L, dtype=torch.bool)}, "memory_valid has a row without any valid token"),
    ],
)
def test_what_does_not_fit_is_said(change, message):
    x, memory = tokens(torch.float32)
    with pytest.raises(ValueError, match=message):
        LunaAttention(C, 4)(**{"x": x, "memory": memory, **change})


def test_grid_and_heads_that_do_not_fit_are_said():
    x, memory = tokens()
    with pytest.raises(ValueError, match="grid_size 5 x 6 does not have the 35 patches"):
        block()(x, memory, (5, 6))
    with pytest.raises(ValueError, match="local mixing needs grid_size"):
        block()(x, memory)
    with pytest.raises(ValueError, match=r"dim \(24\) must be a multiple of num_heads \(5\)"):
        LunaAttention(C, 5)
    with pytest.raises(ValueError, match=r"dim \(24\) must be a multiple of pack_heads \(7\)"):
        LunaAttention(C, 4, pack_heads=7)


def test_attention_maps_are_the_weights_of_the_forward_pass():
    attn = LunaAttention(C, 4, pack_heads=2).double()
    x, memory = tokens()
    pack, unpack = attn.attention_maps(x, memory)
    assert pack.shape == (B, 2, L, N) and unpack.shape == (B, 4, N, L)
    y, packed = attn(x, memory)
    values = split_heads(attn.pack_kv(x), 2)
    torch.testing.assert_close((pack @ values).transpose(1, 2).flatten(2), packed, rtol=1e-12, atol=1e-12)
    values = split_heads(attn.unpack_kv(packed), 4)
    torch.testing.assert_close(attn.proj((unpack @ values).transpose(1, 2).flatten(2)), y, rtol=1e-12, atol=1e-12)


def test_cost_is_linear_in_patches():
    """FLOPs on the meta device, where the counter sees the attention (fused CPU kernels count as nothing)."""
    attn = LunaAttention(64, 4, device="meta")

    def flops(n):
        with FlopCounterMode(display=False) as counter:
            attn(torch.empty(1, n, 64, device="meta"), torch.empty(1, L, 64, device="meta"))
        return counter.get_total_flops()

    per_image = flops(2000) - 2 * (flops(2000) - flops(1000))  # the part that does not grow
    assert flops(4000) - per_image == 4 * (flops(1000) - per_image)


def test_query_gain_scales_the_initial_queries_and_nothing_else():
    torch.manual_seed(0)
    plain = LunaAttention(32, 2)
    torch.manual_seed(0)
    sharp = LunaAttention(32, 2, query_gain=8.0)
    for (name, a), b in zip(plain.named_parameters(), sharp.parameters(), strict=True):
        scale = 8.0 if name in ("pack_q.weight", "unpack_q.weight") else 1.0
        torch.testing.assert_close(b, scale * a, rtol=0, atol=0)
    with pytest.raises(ValueError, match="query_gain must be above 0, got 0"):
        LunaAttention(32, 2, query_gain=0)
