"""Kernel and low-rank mixers against their formulas, in which every N x N (or N x K) matrix is built."""

from fractions import Fraction

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from luna_vision.mixers.external import ExternalMixer, double_normalise
from luna_vision.mixers.linear import LinearMixer
from luna_vision.mixers.linformer import LinformerMixer
from luna_vision.mixers.performer import PerformerMixer
from luna_vision.mixers.random_features import RandomProjection
from luna_vision.mixers.rfa import RfaMixer
from luna_vision.mixers.softmax import SoftmaxMixer

DIM, HEADS = 24, 3
CASES = [
    (LinearMixer, {}),
    (PerformerMixer, {"num_features": 11}),
    (RfaMixer, {"num_features": 5}),
    (RfaMixer, {"num_features": 40}),
    (LinformerMixer, {"proj_len": 6, "ref_size": 4}),
    (LinformerMixer, {"proj_len": 3, "ref_size": 5}),
    (ExternalMixer, {"num_slots": 7}),
]
IDS = [f"{cls.__name__}-{'-'.join(map(str, args.values()))}" for cls, args in CASES]
every_case = pytest.mark.parametrize("cls, args", CASES, ids=IDS)


def build(cls, dim: int = DIM, num_heads: int = HEADS, **args) -> torch.nn.Module:
    """A mixer whose weights are all at work."""
    torch.manual_seed(0)
    mixer = cls(dim, num_heads, dtype=torch.float64, **args).eval()
    for name, p in mixer.named_parameters():
        if "bias" in name or "log_scale" in name:
            torch.nn.init.normal_(p, std=0.3)
    return mixer


def randn(*shape) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def masks(batch: int, grid: tuple[int, int]) -> dict[str, torch.Tensor | None]:
    """No mask, images that are smaller than the grid, and patches missing anywhere."""
    padded = torch.zeros(batch, *grid, dtype=torch.bool)
    for i in range(batch):
        padded[i, : max(1, grid[0] - i), : max(1, grid[1] - 2 * i)] = True
    scattered = torch.rand(batch, grid[0] * grid[1], generator=torch.Generator().manual_seed(2)) < 0.5
    scattered[:, 0] = True
    return {"none": None, "padded": padded.flatten(1), "scattered": scattered}


# ---------------------------------------------------------------- the formulas


def qkv(mixer, x):
    B, N, C = x.shape
    return [t.view(B, N, mixer.num_heads, -1).transpose(1, 2) for t in mixer.qkv(x).chunk(3, dim=-1)]


def attend(mixer, weights, v):
    """Weights (B, H, N, K) that need not sum to 1 yet, and values (B, H, K, E)."""
    y = (weights / weights.sum(dim=-1, keepdim=True)) @ v
    return mixer.proj(y.transpose(1, 2).flatten(2))


def naive_softmax(mixer, x, grid, valid, unit=False):
    q, k, v = qkv(mixer, x)
    scale = q.shape[-1] ** -0.5
    if unit:
        q, k, scale = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True), 1.0
    return attend(mixer, (q @ k.transpose(-2, -1) * scale).exp() * valid[:, None, None, :], v)


def naive_linear(mixer, x, grid, valid):
    q, k, v = qkv(mixer, x)
    phi_q, phi_k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    return attend(mixer, phi_q @ phi_k.transpose(-2, -1) * valid[:, None, None, :], v)


def naive_performer(mixer, x, grid, valid):
    q, k, v = qkv(mixer, x)
    w = mixer.features.weight

    def phi(x):
        x = x / x.shape[-1] ** 0.25
        y = torch.einsum("bhne,hfe->bhnf", x, w)
        return (y - x.square().sum(dim=-1, keepdim=True) / 2).exp() / w.shape[1] ** 0.5

    return attend(mixer, phi(q) @ phi(k).transpose(-2, -1) * valid[:, None, None, :], v)


def naive_rfa(mixer, x, grid, valid):
    q, k, v = qkv(mixer, x)
    counted = valid[:, None, None, :].expand(-1, HEADS, -1, -1).double()
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    w = mixer.features.weight * mixer.log_scale.exp()[:, None, :]
    apart = q[:, :, :, None, :] - k[:, :, None, :, :]
    weights = torch.einsum("bhnme,hfe->bhnmf", apart, w).cos().mean(dim=-1) * counted
    least = counted.sum(dim=-1, keepdim=True) / (2 * w.shape[1]) ** 0.5
    y = weights / torch.maximum(weights.sum(dim=-1, keepdim=True), least) @ v
    return mixer.proj(y.transpose(1, 2).flatten(2))


def resampled(weight: torch.Tensor, R: int, grid: tuple[int, int], valid: torch.Tensor) -> torch.Tensor:
    """A projection (K, R * R) on the grid of one image, (K, N), by the areas that patches and cells have in common."""
    used = [valid.view(grid).any(dim=1).nonzero()[:, 0].tolist(), valid.view(grid).any(dim=0).nonzero()[:, 0].tolist()]
    area = torch.zeros(R, R, *grid, dtype=torch.float64)

    def common(i, n, cell):
        return max(Fraction(0), min(Fraction(i + 1, n), Fraction(cell + 1, R)) - max(Fraction(i, n), Fraction(cell, R)))

    for r in range(R):
        for s in range(R):
            for i, row in enumerate(used[0]):
                for j, column in enumerate(used[1]):
                    area[r, s, row, column] = float(common(i, len(used[0]), r) * common(j, len(used[1]), s))
    area = area.flatten(2).flatten(0, 1) * valid
    total = area.sum(dim=1, keepdim=True)
    filled = total[:, 0] > 0
    weight = weight * weight.abs().sum(dim=1, keepdim=True) / weight[:, filled].abs().sum(dim=1, keepdim=True)
    return weight[:, filled] @ (area[filled] / total[filled])


def naive_linformer(mixer, x, grid, valid):
    q, k, v = qkv(mixer, x)
    out = []
    for i in range(x.shape[0]):
        w_k = resampled(mixer.proj_k, mixer.ref_size, grid, valid[i])
        w_v = resampled(mixer.proj_v, mixer.ref_size, grid, valid[i])
        weights = (q[i : i + 1] @ (w_k @ k[i]).transpose(-2, -1) * q.shape[-1] ** -0.5).exp()
        out.append(attend(mixer, weights, (w_v @ v[i])[None]))
    return torch.cat(out)


def naive_external(mixer, x, grid, valid):
    weights = (mixer.query(x) @ mixer.m_key.T).exp() * valid[:, :, None]
    weights = weights / weights.sum(dim=1, keepdim=True)  # over the patches
    # patches that are not valid have no weights at all; their output means nothing
    weights = weights / weights.sum(dim=2, keepdim=True).where(valid[:, :, None], torch.tensor(1.0).double())
    return mixer.proj(weights @ mixer.m_value)


NAIVE = {
    LinearMixer: naive_linear,
    PerformerMixer: naive_performer,
    RfaMixer: naive_rfa,
    LinformerMixer: naive_linformer,
    ExternalMixer: naive_external,
}


@every_case
@pytest.mark.parametrize("grid", [(5, 7), (9, 2), (1, 1)])
@pytest.mark.parametrize("mask", ["none", "padded", "scattered"])
def test_equals_the_formula_in_values_and_gradients(cls, args, grid, mask):
    mixer = build(cls, **args)
    valid = masks(3, grid)[mask]
    every = torch.ones(3, grid[0] * grid[1], dtype=torch.bool) if valid is None else valid
    x = randn(3, grid[0] * grid[1], DIM).requires_grad_()
    results = []
    for y in (mixer(x, grid, valid), NAIVE[cls](mixer, x, grid, every)):
        y = y[every]
        grads = torch.autograd.grad((y * randn(*y.shape)).sum(), [x, *mixer.parameters()])
        results.append([y, grads[0][every], *grads[1:]])
    for a, b in zip(*results, strict=True):
        close(a, b)


@every_case
def test_invalid_patches_may_be_not_a_number(cls, args):
    mixer = build(cls, **args)
    valid = masks(2, (5, 7))["scattered"]
    x = randn(2, 35, DIM)
    y = mixer(x.masked_fill(~valid[:, :, None], float("nan")), (5, 7), valid)
    close(y[valid], mixer(x, (5, 7), valid)[valid])
    if cls is ExternalMixer:
        y[valid].sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in mixer.parameters())


# ---------------------------------------------------------------- what they have to do with softmax


@pytest.mark.parametrize("cls, unit", [(PerformerMixer, False), (RfaMixer, True)])
@pytest.mark.parametrize("mask", ["none", "scattered"])
def test_random_features_approach_softmax(cls, unit, mask):
    """At the rate of a mean of independent draws, 1 / sqrt(F): 8 times closer for 64 times the features."""
    grid = (5, 4)
    valid = masks(2, grid)[mask]
    every = torch.ones(2, 20, dtype=torch.bool) if valid is None else valid
    x = 0.5 * randn(2, 20, DIM)  # the positive features of long vectors have long tails
    errors = []
    for num_features, draws in ((256, 16), (256 * 64, 3)):
        mixer = build(cls, num_features=num_features)
        if unit:
            torch.nn.init.zeros_(mixer.log_scale)
        with torch.no_grad():
            want = naive_softmax(mixer, x, grid, every, unit)[every]
            squares = []
            for _ in range(draws):
                mixer.features.init_weights()
                squares.append((mixer(x, grid, valid)[every] - want).square().mean())
            errors.append(float(sum(squares) / draws / (want - mixer.proj.bias).square().mean()) ** 0.5)
    assert errors[1] < 0.02
    assert 5 < errors[0] / errors[1] < 13


def test_orthogonal_features_estimate_the_same_with_less_variance():
    """The mean of exp(w.z) is exp(|z|^2 / 2)."""
    torch.manual_seed(0)
    z = torch.full((8,), 0.4)
    estimates = [(RandomProjection(4000, 8, 8, orthogonal=o).weight @ z).exp().mean(dim=1) for o in (True, False)]
    for estimate in estimates:
        assert abs(estimate.mean() / (z.square().sum() / 2).exp() - 1) < 0.03
    assert estimates[0].var() < 0.9 * estimates[1].var()


@pytest.mark.parametrize("mask", ["none", "scattered"])
def test_linformer_with_the_identity_is_softmax(mask):
    grid = (5, 5)
    mixer = build(LinformerMixer, proj_len=25, ref_size=5)
    with torch.no_grad():
        mixer.proj_k.copy_(torch.eye(25))
        mixer.proj_v.copy_(torch.eye(25))
    softmax = build(SoftmaxMixer)
    softmax.load_state_dict(mixer.state_dict(), strict=False)
    x, valid = randn(3, 25, DIM), masks(3, grid)[mask]
    if valid is not None:  # all rows and columns stay in use
        valid.view(3, 5, 5)[:, range(5), range(5)] = True
    every = torch.ones(3, 25, dtype=torch.bool) if valid is None else valid
    close(mixer(x, grid, valid)[every], softmax(x, grid, valid)[every])


def test_linformer_approaches_softmax_as_its_projection_grows():
    """With the identity, each token that is attended to is the mean of a cell, of fewer patches each time."""
    grid, x, errors = (12, 12), randn(1, 144, DIM), []
    for ref_size in (1, 2, 4, 6, 12):
        mixer = build(LinformerMixer, proj_len=ref_size**2, ref_size=ref_size)
        softmax = build(SoftmaxMixer)
        with torch.no_grad():
            mixer.proj_k.copy_(torch.eye(ref_size**2))
            mixer.proj_v.copy_(torch.eye(ref_size**2))
            mixer.load_state_dict(softmax.state_dict(), strict=False)
        errors.append((mixer(x, grid) - softmax(x, grid)).abs().mean())
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.01 and errors[-1] < 1e-10


def test_linformer_on_the_reference_grid_is_the_papers_formula():
    mixer = build(LinformerMixer, proj_len=6, ref_size=4)
    x = randn(2, 16, DIM)
    q, k, v = qkv(mixer, x)
    weights = (q @ (mixer.proj_k @ k).transpose(-2, -1) * q.shape[-1] ** -0.5).exp()
    close(mixer(x, (4, 4)), attend(mixer, weights, mixer.proj_v @ v))


@pytest.mark.parametrize("factor", [2, 3])
def test_linformer_reads_an_enlarged_image_as_the_image(factor):
    """Of every patch there are factor^2, in larger and in smaller grids than the reference."""
    mixer = build(LinformerMixer, proj_len=6, ref_size=6)
    for h, w in ((3, 2), (7, 9)):
        x = randn(1, h, w, DIM)
        large = x.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        y = mixer(large.flatten(1, 2), (h * factor, w * factor)).view(1, h * factor, w * factor, DIM)
        close(y[:, ::factor, ::factor].flatten(1, 2), mixer(x.flatten(1, 2), (h, w)))


def test_external_memory():
    mixer = ExternalMixer(24)
    assert mixer.m_key.shape == (64, 24)
    assert torch.equal(mixer.m_value, mixer.m_key) and mixer.m_value is not mixer.m_key


# ---------------------------------------------------------------- random features


def test_orthogonal_vectors():
    torch.manual_seed(0)
    w = RandomProjection(2, 20, 8, orthogonal=True, dtype=torch.float64).weight
    for group in (w[:, :8], w[:, 8:16], w[:, 16:]):  # the last one is not full
        gram = group @ group.transpose(-2, -1)
        close(gram, torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1)))
    assert PerformerMixer(8, 2).features.orthogonal and not RfaMixer(8, 2).features.orthogonal
    many = RandomProjection(1, 40000, 4, orthogonal=True).weight[0]
    torch.testing.assert_close(many.T @ many / 40000, torch.eye(4), rtol=0, atol=0.05)  # each is Gaussian
    torch.testing.assert_close(many.pow(4).mean(dim=0), torch.full((4,), 3.0), rtol=0, atol=0.2)


def test_vectors_are_redrawn_in_training_only_and_as_often_as_asked():
    torch.manual_seed(0)

    def redraws(interval, training, passes):
        module = RandomProjection(1, 4, 2, interval).train(training)
        count = 0
        for _ in range(passes):
            before = module.weight.clone()
            used = module()
            assert torch.equal(used, module.weight)
            count += not torch.equal(before, used)
        return count

    assert redraws(1, True, 20) == 20
    assert 60 < redraws(4, True, 400) < 140
    assert redraws(None, True, 20) == redraws(1, False, 20) == 0


@pytest.mark.parametrize("interval", [1, None])
def test_compiled_training_redraws_too(interval):
    torch._dynamo.reset()
    module = RandomProjection(1, 4, 2, interval).train()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    before = module.weight.clone()
    used = compiled()
    assert torch.equal(used, module.weight) and torch.equal(before, used) == (interval is None)


@pytest.mark.parametrize("cls", [PerformerMixer, RfaMixer])
def test_gradient_checkpointing_and_redrawing_go_together(cls):
    """Both runs of a block must see the same vectors, whether these were redrawn or not."""
    x = randn(2, 6, DIM)
    for seed in range(6):
        grads = []
        for again in (False, True):
            mixer = build(cls, num_features=8, redraw_interval=2).train()
            torch.manual_seed(seed)
            y = checkpoint(mixer, x, (2, 3), use_reentrant=False) if again else mixer(x, (2, 3))
            y.square().sum().backward()
            grads.append([p.grad for p in mixer.parameters()])
        for a, b in zip(*grads, strict=True):
            close(a, b)


def test_a_redraw_does_not_disturb_an_earlier_pass():
    mixer = build(PerformerMixer, num_features=8, redraw_interval=1).train()
    x = randn(1, 6, DIM)
    first = mixer(x, (2, 3))
    mixer(x, (2, 3))
    first.sum().backward()


# ---------------------------------------------------------------- numbers at their limits


@every_case
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e3, 1e6])
def test_no_division_by_nothing(cls, args, scale):
    """Values and gradients of inputs without any size and with a very large one."""
    mixer = build(cls, **args).float()
    if scale == 0.0:
        for name, p in mixer.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.zeros_(p)
    x = (randn(2, 12, DIM) * scale).float().requires_grad_()
    y = mixer(x, (3, 4))
    y.sum().backward()
    for t in (y, x.grad, *(p.grad for p in mixer.parameters())):
        assert torch.isfinite(t).all()


def test_features_that_vanish():
    mixer = build(LinearMixer).float()
    with torch.no_grad():
        mixer.qkv.bias[: 2 * DIM] = -1e4
    x = randn(1, 6, DIM).float().requires_grad_()
    mixer(x, (2, 3)).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_performer_is_exact_where_all_features_underflow():
    """Keys so long that exp(-|k|^2 / 2) is zero in float64: only their differences count."""
    mixer = build(PerformerMixer, num_features=16)
    mixer.features.weight.zero_()
    with torch.no_grad():
        mixer.qkv.bias[DIM : 2 * DIM] = 300.0
    x = randn(1, 6, DIM)
    _, k, v = qkv(mixer, x)
    weights = (-k.square().sum(dim=-1) / 2 * k.shape[-1] ** -0.5).softmax(dim=-1)[:, :, None, :]
    want = mixer.proj((weights @ v).transpose(1, 2).flatten(2)).expand(-1, 6, -1)
    torch.testing.assert_close(mixer(x, (2, 3)), want, rtol=1e-8, atol=1e-8)


def test_external_reads_with_weights_that_underflow():
    """One patch has so little of every slot that its share is zero in float32, and still reads the nearest one."""
    scores = torch.zeros(1, 5, 3)
    scores[0, 0] = torch.tensor([-200.0, -201.0, -300.0])
    weights = double_normalise(scores)
    torch.testing.assert_close(weights[0, 0], torch.tensor([-200.0, -201.0, -300.0]).softmax(dim=0))
    torch.testing.assert_close(weights[0, 1], torch.full((3,), 1 / 3))


@every_case
@pytest.mark.parametrize("autocast", [False, True])
def test_sums_over_many_patches_keep_their_precision(cls, args, autocast):
    """Patches that are all the same read what one alone reads. A sum in bfloat16 stops growing at 256 terms."""
    mixer = build(cls, **args).float()
    x = randn(1, 1, DIM).float()
    if not autocast:
        mixer, x = mixer.bfloat16(), x.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        one, many = mixer(x, (1, 1)), mixer(x.expand(1, 70 * 70, -1), (70, 70))
    assert one.dtype == torch.bfloat16
    torch.testing.assert_close(many, one.expand_as(many), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("cls, args", CASES[:6], ids=IDS[:6])  # those that have queries, keys and values
def test_autocast_changes_nothing_in_how_patches_are_summed(cls, args):
    mixer = build(cls, **args).float()
    q, k, v = randn(3, 2, HEADS, 35, DIM // HEADS).bfloat16()
    want = mixer.mix(q, k, v, (5, 7))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mixer.mix(q, k, v, (5, 7)), want)


@pytest.mark.parametrize(
    "cls, args, message",
    [
        (ExternalMixer, {"num_slots": 0}, "num_slots must be at least 1, got 0"),
        (LinearMixer, {"num_heads": 5}, r"dim \(24\) must be a multiple of num_heads \(5\)"),
        (LinformerMixer, {"proj_len": 0}, "proj_len must be at least 1, got 0"),
        (LinformerMixer, {"ref_size": 0}, "ref_size must be at least 1, got 0"),
        (PerformerMixer, {"num_features": 0}, "num_features must be at least 1, got 0"),
        (RfaMixer, {"redraw_interval": 0}, "redraw_interval must be at least 1, or None for never, got 0"),
    ],
)
def test_wrong_arguments_are_said(cls, args, message):
    with pytest.raises(ValueError, match=message):
        cls(24, **{"num_heads": 3, **args})
