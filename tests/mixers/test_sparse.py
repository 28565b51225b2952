"""The sparse mixers against their formulas, written as dense attention over every pair of patches with a mask."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from timm.models import get_notrace_modules
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from luna_vision.mixers import create_mixer

# small budgets, so that 5 x 7 patches are more than a block, a window or a cluster
ARGS = {
    "local": {"block_size": 3, "margin": 2},
    "strided": {},
    "longformer": {"window_size": 6, "num_global_tokens": 2},
    "star": {"radius": 2},
    "routing": {"num_clusters": 4},
}
GRIDS = [(5, 7), (11, 3), (1, 20), (1, 1)]
C, H = 12, 3


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def mixer(name: str, **kwargs):
    """A mixer in float64 whose biases are at work."""
    torch.manual_seed(0)
    m = create_mixer(name, kwargs.pop("args", ARGS.get(name)), dim=C, num_heads=H, **kwargs).double()
    for p in m.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return m


def patches(batch: int, grid: tuple[int, int], seed: int = 1) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, grid[0] * grid[1], C, dtype=torch.float64, generator=g)


def some_valid(batch: int, grid: tuple[int, int]) -> torch.Tensor:
    """Images in the upper left corner of the grid, smaller each time, the last one patch; the second has holes."""
    valid = torch.zeros(batch, *grid, dtype=torch.bool)
    for i in range(batch):
        valid[i, : max(grid[0] - i, 1), : max(grid[1] - 2 * i, 1)] = True
    valid = valid.flatten(1)
    if batch > 1:
        valid[1, 2::5] = False
    valid[-1, 1:] = False
    return valid


# ---------------------------------------------------------------- formulas


def split(x):
    """(N, C) to (H, N, E)."""
    return x.view(len(x), H, -1).transpose(0, 1)


def attention(q, k, v, allowed):
    """Every matrix is built: (H, Q, E), (H, K, E) twice, and which pairs are allowed, (Q, K) or (H, Q, K)."""
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v


def read_by_extra(tokens, x, w_q, w_k, w_v):
    """Further tokens (G, C) read the patches and themselves, by their own projections: (G, C)."""
    seen = torch.cat([tokens, x])
    everything = torch.ones(len(tokens), len(seen), dtype=torch.bool)
    y = attention(split(w_q(tokens)), split(w_k(seen)), split(w_v(seen)), everything)
    return y.transpose(0, 1).flatten(1)


def with_extra(m, x, tokens, near):
    """Patches (N, C) attend to further tokens (G, C) and to the patches that are near, (N, N)."""
    q, k, v = (split(y) for y in m.qkv(torch.cat([tokens, x])).chunk(3, -1))
    allowed = torch.cat([torch.ones(len(x), len(tokens), dtype=torch.bool), near], dim=1)
    return attention(q[:, len(tokens) :], k, v, allowed)


def naive_softmax(m, x, row, column, grid):
    q, k, v = (split(y) for y in m.qkv(x).chunk(3, -1))
    return attention(q, k, v, torch.ones(len(x), len(x), dtype=torch.bool))


def naive_local(m, x, row, column, grid):
    q, k, v = (split(y) for y in m.qkv(x).chunk(3, -1))
    b, margin = m.block_size, m.margin
    allowed = torch.ones(len(x), len(x), dtype=torch.bool)
    for at in (row, column):
        first = (at // b * b)[:, None]
        allowed &= (at >= first - margin) & (at < first + b + margin)
    return attention(q, k, v, allowed)


def naive_strided(m, x, row, column, grid):
    q, k, v = (split(y) for y in m.qkv(x).chunk(3, -1))
    same_row, same_column = row == row[:, None], column == column[:, None]
    return attention(q, k, v, torch.stack([same_row, same_row, same_column]))  # 3 heads: two for rows


def naive_longformer(m, x, row, column, grid):
    tokens = m.global_tokens[0]
    tokens = tokens + m.proj(read_by_extra(tokens, x, m.global_q, m.global_k, m.global_v))
    i = torch.arange(len(x))
    return with_extra(m, x, tokens, (i - i[:, None]).abs() <= m.reach)


def naive_star(m, x, row, column, grid):
    relay = x.mean(0, keepdim=True)
    relay = m.relay_norm(m.relay_proj(read_by_extra(relay, x, m.relay_q, m.relay_k, m.relay_v)).relu())
    near = ((row - row[:, None]).abs() <= m.radius) & ((column - column[:, None]).abs() <= m.radius)
    return with_extra(m, x, relay, near)


def normalised(x):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def naive_routing(m, x, row, column, grid):
    q, k, v = (split(y) for y in m.qkv(x).chunk(3, -1))
    q, k = normalised(q), normalised(k)
    size = -(-len(x) // m.num_clusters)
    total, times = torch.zeros_like(v), torch.zeros(H, len(x), 1, dtype=torch.float64)
    for c in range(m.num_clusters):
        mu = m.centroids[:, c, :, None]
        in_q, in_k = ((y @ mu)[..., 0].argsort(1, descending=True).argsort(1) < size for y in (q, k))
        # queries outside the cluster attend to something too, and do not count
        y = attention(q, k, v, in_k[:, None].expand(-1, len(x), -1))
        total, times = total + y * in_q[..., None], times + in_q[..., None]
    return total / times.clamp(min=1)


NAIVE = {
    "softmax": naive_softmax,
    "local": naive_local,
    "strided": naive_strided,
    "longformer": naive_longformer,
    "star": naive_star,
    "routing": naive_routing,
}


def naive(name, m, x, grid, valid):
    """The formula for each image alone, without its invalid patches; zeros in their place."""
    row, column = (i.flatten() for i in torch.meshgrid(*(torch.arange(s) for s in grid), indexing="ij"))
    y = torch.zeros_like(x)
    for i, own in enumerate(valid):
        heads = NAIVE[name](m, x[i, own], row[own], column[own], grid)
        y[i, own] = m.proj(heads.transpose(0, 1).flatten(1))
    return y


@pytest.mark.parametrize("name, grid, masked", itertools.product(NAIVE, GRIDS, [False, True]))
def test_equals_its_formula_in_values_and_gradients(name, grid, masked):
    m = mixer(name)
    x = patches(3, grid).requires_grad_()
    valid = some_valid(3, grid) if masked else torch.ones(3, grid[0] * grid[1], dtype=torch.bool)
    weight = patches(3, grid, seed=2)
    leaves = [x, *m.parameters()]
    results = []
    for y in (m.eval()(x, grid, valid if masked else None), naive(name, m, x, grid, valid)):
        loss = (y * weight)[valid].sum()
        results.append((y[valid], *torch.autograd.grad(loss, leaves, allow_unused=True)))
    for a, b in zip(*results, strict=True):
        close(a, torch.zeros_like(a) if b is None else b)


@pytest.mark.parametrize("name", ["local", "strided"])
def test_is_softmax_where_everything_is_in_reach(name):
    """One block of all patches, or a margin as large as the image; one row for the heads of rows."""
    grid = (5, 7)
    choices = [{"block_size": 7, "margin": 0}, {"block_size": 2, "margin": 6}] if name == "local" else [{}]
    for args in choices:
        m = mixer(name, args=args)
        x, valid = patches(3, grid), some_valid(3, grid)
        softmax = mixer("softmax", args={})
        softmax.load_state_dict(m.state_dict())
        if name == "local":
            for mask in (None, valid):
                keep = torch.ones_like(valid) if mask is None else mask
                close(m(x, grid, mask)[keep], softmax(x, grid, mask)[keep])
        else:
            for line in ((1, 35), (35, 1)):
                q, k, v = (t.unflatten(-1, (H, -1)).transpose(1, 2) for t in m.qkv(x).chunk(3, -1))
                heads = slice(0, 2) if line[0] == 1 else slice(2, 3)
                close(m.mix(q, k, v, line)[:, heads], softmax.mix(q, k, v, line)[:, heads])


def test_local_approaches_softmax_as_the_margin_grows():
    grid = (6, 9)
    x = patches(1, grid)
    softmax = mixer("softmax", args={})
    errors = []
    for margin in (0, 1, 2, 4, 6):
        m = mixer("local", args={"block_size": 3, "margin": margin})
        errors.append((m(x, grid) - softmax(x, grid)).abs().mean())
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.05 and errors[-1] < 1e-10


def test_routing_with_one_cluster_is_softmax_of_normalised_queries_and_keys():
    grid = (5, 7)
    m = mixer("routing", args={"num_clusters": 1})
    x = patches(2, grid)
    q, k, v = (t.unflatten(-1, (H, -1)).transpose(1, 2) for t in m.qkv(x).chunk(3, -1))
    close(m.mix(q, k, v, grid), F.scaled_dot_product_attention(normalised(q), normalised(k), v))


def test_routing_approaches_softmax_as_clusters_grow():
    grid = (6, 8)
    x = patches(2, grid)
    errors = []
    for clusters in (16, 8, 4, 2, 1):
        m = mixer("routing", args={"num_clusters": clusters})
        q, k, v = (t.unflatten(-1, (H, -1)).transpose(1, 2) for t in m.qkv(x).chunk(3, -1))
        softmax = F.scaled_dot_product_attention(normalised(q), normalised(k), v)
        errors.append((m.mix(q, k, v, grid) - softmax).abs().mean())
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.05 and errors[-1] < 1e-10


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("name", ARGS)
def test_batch_of_sizes_equals_each_image_alone(name):
    m = mixer(name).eval()
    sizes, grid = [(5, 7), (4, 9), (1, 1), (6, 2)], (6, 9)
    batch = patches(4, grid).unflatten(1, grid) * 10  # what lies outside an image must not matter
    valid = torch.zeros(4, *grid, dtype=torch.bool)
    for i, (r, c) in enumerate(sizes):
        valid[i, :r, :c] = True
    y = m(batch.flatten(1, 2), grid, valid.flatten(1)).unflatten(1, grid)
    for i, (r, c) in enumerate(sizes):
        close(y[i, :r, :c].flatten(0, 1), m(batch[i : i + 1, :r, :c].flatten(1, 2), (r, c))[0])


@pytest.mark.parametrize("name", ARGS)
def test_invalid_patches_change_nothing(name):
    """Not the others' values, the gradients, or what training leaves in the buffers."""
    grid = (5, 7)
    valid = some_valid(3, grid)
    results = []
    for seed in (1, 2):
        m = mixer(name).train()
        x = torch.where(valid[..., None], patches(3, grid), 100 * patches(3, grid, seed)).requires_grad_()
        for _ in range(2):
            y = m(x, grid, valid)
        y[valid].square().sum().backward()
        assert (x.grad[~valid] == 0).all()
        results.append([y[valid], x.grad, *(p.grad for p in m.parameters()), *m.buffers()])
    for a, b in zip(*results, strict=True):
        close(a, b)


@pytest.mark.parametrize("name", ARGS)
def test_neighbourhoods_without_valid_patches_stay_finite(name, monkeypatch):
    """Not every release and backend of PyTorch makes zeros of a softmax over nothing, so there must be none."""
    attend = F.scaled_dot_product_attention

    def attend_something(q, k, v, attn_mask, dropout_p):
        assert attn_mask.any(-1).all()
        return attend(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend_something)
    m = mixer(name)
    x = patches(2, (8, 9)).requires_grad_()
    valid = torch.zeros(2, 72, dtype=torch.bool)
    valid[:, 0] = True
    y = m(x, (8, 9), valid)
    y.square().sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in m.parameters())


# ---------------------------------------------------------------- types, dropout, cost


@pytest.mark.parametrize("name", ARGS)
def test_every_parameter_gets_a_gradient(name):
    m = mixer(name).train()
    m(patches(1, (5, 7)), (5, 7)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in m.parameters())


@pytest.mark.parametrize("name", ARGS)
def test_half_precision_and_autocast(name):
    m = mixer(name).float().eval()
    if name == "routing":
        m.num_clusters = 1  # rounding may send a patch to another cluster
        m.centroids = m.centroids[:, :1]
    x = patches(2, (5, 7)).float()
    valid = some_valid(2, (5, 7))
    want = m(x, (5, 7), valid)[valid]
    with torch.autocast("cpu", torch.bfloat16):
        y = m(x, (5, 7), valid)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y[valid].float(), want, rtol=0.1, atol=0.1)
    y = m.bfloat16()(x.bfloat16(), (5, 7), valid)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y[valid].float(), want, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ARGS)
def test_attention_dropout_acts_in_training_only(name):
    m, plain = mixer(name, attn_drop=0.5), mixer(name)
    x = patches(2, (5, 7))
    close(m.eval()(x, (5, 7)), plain.eval()(x, (5, 7)))
    y = m.train()(x, (5, 7))
    assert not torch.allclose(y, m(x, (5, 7))) and y.isfinite().all()


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest tensor had that an operation made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.numel())
        return out


@pytest.mark.parametrize("name", ARGS)
def test_no_tensor_has_an_element_for_every_pair_of_patches(name):
    args = {"num_clusters": 32} if name == "routing" else ARGS[name]
    with LargestTensor() as seen:
        mixer(name, args=args)(patches(1, (36, 36)), (36, 36), some_valid(1, (36, 36))).sum().backward()
    assert 36**2 * C < seen.largest < (36**2) ** 2 / 4


# ---------------------------------------------------------------- compilers


@pytest.mark.parametrize("name, how", itertools.product(ARGS, ["compile", "script"]))
def test_compiled_and_scripted_mixers_train_as_eager_ones(name, how):
    grid = (5, 7)
    x, valid = patches(2, grid), some_valid(2, grid)
    m, copy = mixer(name).train(), mixer(name).train()
    other = torch.jit.script(copy) if how == "script" else torch.compile(copy, fullgraph=True, backend="eager")
    for _ in range(2):
        y, z = m(x, grid, valid), other(x, grid, valid)
        close(y, z)
        y.square().sum().backward()
        z.square().sum().backward()
    for a, b in zip(m.buffers(), other.buffers(), strict=True):
        close(a, b)
    for a, b in zip(m.parameters(), other.parameters(), strict=True):
        close(a.grad, b.grad)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ARGS)
def test_is_a_leaf_of_fx(name):
    assert type(mixer(name)) in get_notrace_modules()


# ---------------------------------------------------------------- routing's centroids


def test_centroids_follow_the_nearest_queries_and_keys():
    """By the formula, one pass later; only in training; centroids that are nearest to nothing stay."""
    grid = (5, 7)
    m = mixer("routing", args={"num_clusters": 40, "decay": 0.9})
    x, valid = patches(2, grid), some_valid(2, grid)
    start = m.centroids.clone()
    m.eval()(x, grid, valid)
    close(m.next_centroids, start)
    m.train()(x, grid, valid)
    close(m.centroids, start)

    q, k, _ = (t.unflatten(-1, (H, -1)) for t in m.qkv(x)[valid].chunk(3, -1))
    tokens = normalised(torch.cat([q, k]))  # (T, H, E)
    nearest = torch.einsum("the,hce->thc", tokens, start).argmax(-1)
    want = start.clone()
    for h, c in itertools.product(range(H), range(40)):
        mine = tokens[nearest[:, h] == c, h]
        if len(mine):
            want[h, c] = normalised(0.9 * start[h, c] + 0.1 * mine.mean(0))
    assert 0 < (want == start).all(-1).sum() < H * 40
    close(m.next_centroids, want)
    m(x, grid, valid)
    close(m.centroids, want)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_sees_the_same_clusters_twice(use_reentrant):
    grid = (5, 7)
    results = []
    for recompute in (False, True):
        m = mixer("routing", args={"num_clusters": 4, "decay": 0.0}).train()
        for step in range(3):
            x = patches(2, grid, seed=step).requires_grad_()
            y = checkpoint(m, x, grid, use_reentrant=use_reentrant) if recompute else m(x, grid)
            y.square().sum().backward()
        results.append([x.grad, *(p.grad for p in m.parameters()), *m.buffers()])
    for a, b in zip(*results, strict=True):
        close(a, b)


def test_centroids_come_from_the_generator_and_go_into_the_state_dict():
    a, b = mixer("routing"), mixer("routing")
    close(a.centroids, b.centroids)
    assert ((a.centroids.square().mean(-1) - 1).abs() < 0.01).all()  # on the sphere
    for grid in ((5, 7), (9, 2)):
        a.train()(patches(2, grid), grid)
    b.load_state_dict(a.state_dict())
    assert not torch.equal(a.centroids, mixer("routing").centroids)
    close(b.eval()(patches(2, (4, 4)), (4, 4)), a.eval()(patches(2, (4, 4)), (4, 4)))
    close(b.next_centroids, a.next_centroids)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "name, args, message",
    [
        ("local", {"block_size": 0}, "block_size must be at least 1, got 0"),
        ("local", {"margin": -1}, "margin must be at least 0, got -1"),
        ("longformer", {"window_size": 5}, "window_size must be an even number of at least 2, got 5"),
        ("longformer", {"window_size": 0}, "window_size must be an even number of at least 2, got 0"),
        ("longformer", {"num_global_tokens": 0}, "num_global_tokens must be at least 1, got 0"),
        ("star", {"radius": 0}, "radius must be at least 1, got 0"),
        ("routing", {"num_clusters": 0}, "num_clusters must be at least 1, got 0"),
        ("routing", {"decay": 1.5}, r"decay must be in \[0, 1\], got 1.5"),
        ("strided", {"stride": 3}, "mixer 'strided' takes no arguments in mixer_args, got 'stride'"),
    ],
)
def test_wrong_arguments_are_said(name, args, message):
    with pytest.raises(ValueError, match=message):
        mixer(name, args=args)


def test_strided_needs_two_heads():
    with pytest.raises(ValueError, match="num_heads must be at least 2, for rows and for columns, got 1"):
        create_mixer("strided", dim=8, num_heads=1)


@pytest.mark.parametrize("name", ["local", "strided", "star"])
def test_wrong_grid_is_said(name):
    with pytest.raises(ValueError, match="grid_size 5 x 6 does not have the 35 patches of x"):
        mixer(name)(patches(1, (5, 7)), (5, 6))
