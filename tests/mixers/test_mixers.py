"""What every mixer has to do, in the shell and alone."""

import pytest
import timm
import torch
from timm.models._features_fx import create_feature_extractor
from torch.export import Dim
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from luna_vision import LunaVit
from luna_vision.layers import LunaAttention
from luna_vision.mixers import MIXERS, create_mixer

CASES = [(name, {}) for name in MIXERS]
MEMORY_FREE = [case for case in CASES if case[0] != "luna"]
ALONE = [case for case in CASES if MIXERS[case[0]] is not None]
# those that have a state of their own, which training changes
STATEFUL = [(name, args) for name, args in ALONE if any(True for _ in create_mixer(name, args, dim=8).buffers())]


def each(cases):
    return pytest.mark.parametrize("name, args", cases, ids=["-".join([n, *a]) for n, a in cases])


def tiny(name, args, **kwargs) -> LunaVit:
    """A model of two blocks with weights that are all at work: local mixing starts near zero."""
    torch.manual_seed(0)
    kwargs = {"num_classes": 5, "depth": 2, **kwargs}
    model = timm.create_model("test_luna_vit", mixer=name, mixer_args=args, **kwargs).double().eval()
    for parameter, p in model.named_parameters():
        if "local" in parameter:
            torch.nn.init.normal_(p, std=0.2)
    return model


def alone(name, args, **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_mixer(name, args, **{"dim": 32, "num_heads": 2, "dtype": torch.float64, **kwargs}).eval()


def randn(*shape) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------- sizes and masks


@each(CASES)
def test_any_size_runs(name, args):
    model = tiny(name, args)
    for height, width in ((1, 1), (5, 40), (33, 17), (100, 250)):
        features = model.forward_features(randn(1, 3, height, width))
        assert features.shape == (1, model.num_prefix_tokens + -(-height // 16) * -(-width // 16), 64)
        assert torch.isfinite(features).all()


@each(CASES)
def test_a_batch_without_images_gives_none(name, args):
    """A process of a distributed evaluation may have none left."""
    model, x, valid = tiny(name, args), randn(0, 3, 48, 80), torch.ones(0, 15, dtype=torch.bool)
    assert model(x).shape == (0, 5) and model(x, valid).shape == (0, 5)
    model.train()(x).sum().backward()
    assert torch.equal(model.head.weight.grad, torch.zeros(5, 64, dtype=torch.float64))


@each(MEMORY_FREE)
def test_there_are_no_prefix_tokens(name, args):
    model = tiny(name, args)
    assert model.num_prefix_tokens == 0 and model.memory is None
    assert model.forward_features(randn(2, 3, 48, 80)).shape == (2, 15, 64)


@each(CASES)
def test_batch_of_sizes_equals_each_image_alone(name, args):
    model = tiny(name, args)
    batch = randn(3, 3, 112, 144)
    valid = torch.zeros(3, 7, 9, dtype=torch.bool)
    sizes = [(7, 5), (2, 9), (1, 1)]
    for i, (rows, columns) in enumerate(sizes):
        valid[i, :rows, :columns] = True
    features, logits = model.forward_features(batch, valid.flatten(1)), model(batch, valid.flatten(1))
    for i, (rows, columns) in enumerate(sizes):
        x = batch[i : i + 1, :, : rows * 16, : columns * 16]
        want = model.forward_features(x)[0]
        prefix = model.num_prefix_tokens
        close(features[i, :prefix], want[:prefix])
        close(features[i, prefix:][valid[i].flatten()], want[prefix:])
        close(logits[i], model(x)[0])


@each(CASES)
def test_padding_may_hold_anything(name, args):
    """Also what is not a number, as uninitialised padding does; values and gradients."""
    model = tiny(name, args)
    x = randn(2, 3, 80, 112)
    valid = torch.ones(2, 5, 7, dtype=torch.bool)
    valid[1, 3:] = False
    results = []
    for fill in (0.0, float("nan"), float("inf")):
        x[1, :, 48:] = fill
        model.zero_grad()
        y = model(x, valid.flatten(1))
        y.square().sum().backward()
        results.append([y, *(p.grad.clone() for p in model.parameters())])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            close(a, b)


@each(ALONE)
@pytest.mark.parametrize("fill", [1e3, float("nan")])
def test_invalid_patches_anywhere_change_nothing(name, args, fill):
    mixer = alone(name, args)
    x = randn(2, 35, 32)
    valid = torch.rand(2, 35, generator=torch.Generator().manual_seed(0)) < 0.6
    valid[:, 0] = True
    results = []
    for value in (0.0, fill):
        x = x.masked_fill(~valid[:, :, None], value)
        mixer.zero_grad()
        y = mixer(x, (5, 7), valid)
        assert torch.isfinite(y).all()
        y[valid].square().sum().backward()
        results.append([y[valid], *(p.grad.clone() for p in mixer.parameters())])
    for a, b in zip(*results, strict=True):
        close(a, b)


@each(ALONE)
def test_a_mask_of_valid_patches_only_changes_nothing(name, args):
    mixer = alone(name, args)
    x = randn(2, 35, 32)
    close(mixer(x, (5, 7), torch.ones(2, 35, dtype=torch.bool)), mixer(x, (5, 7)))


@each(ALONE)
def test_an_image_does_not_depend_on_its_batch(name, args):
    mixer = alone(name, args)
    x = randn(3, 35, 32)
    close(mixer(x, (5, 7))[1:2], mixer(x[1:2], (5, 7)))


@each(ALONE)
@pytest.mark.parametrize(
    "valid, message",
    [
        (torch.ones(2, 6), "patch_valid must be a bool tensor"),
        (torch.ones(2, 5, dtype=torch.bool), r"patch_valid must have shape \(2, 6\), got \[2, 5\]"),
    ],
    ids=["float", "shape"],
)
def test_wrong_masks_are_said(name, args, valid, message):
    with pytest.raises(ValueError, match=message):
        alone(name, args)(randn(2, 6, 32), (2, 3), valid)


# ---------------------------------------------------------------- cost


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.size = max(self.size, t.numel())
        return out


def growth(name: str, args: dict) -> tuple[float, float]:
    """Factors by which FLOPs and the largest tensor grow when the patches become four times as many, for a large image.

    On the meta device, and by plain products: a fused attention would count as nothing.
    """
    flops, largest = [], []
    for side in (96, 192):
        x = torch.empty(1, side * side, 64, device="meta")
        if name == "luna":
            mixer = LunaAttention(64, 2, device="meta")
            inputs = (x, torch.empty(1, 16, 64, device="meta"))
        else:
            mixer, inputs = create_mixer(name, args, dim=64, num_heads=2, device="meta"), (x, (side, side))
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:
            with LargestTensor() as tensors:
                mixer.eval()(*inputs)
        flops.append(counter.get_total_flops())
        largest.append(tensors.size)
    return flops[1] / flops[0], largest[1] / largest[0]


# what is not linear in the number of patches N: between which factors its FLOPs have to grow for 4 N
NOT_LINEAR = {
    "softmax": (14.0, 16.0),  # N^2
    "routing": (8.0, 16.0),  # N^2 for a fixed number of clusters, the patches of each growing with N
    "strided": (4.5, 8.0),  # N sqrt(N)
}
LINEAR = [case for case in CASES if case[0] not in (*NOT_LINEAR, "identity")]


@each(LINEAR)
def test_cost_is_linear(name, args):
    flops, largest = growth(name, args)
    assert 3.8 < flops <= 4.05
    assert 3.8 < largest <= 4.05


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_cost_of_the_others_is_seen_not_to_be(name):
    least, most = NOT_LINEAR[name]
    flops, largest = growth(name, {})
    assert least < flops <= most
    if name == "softmax":
        assert largest == 16.0  # its N x N matrix


# ---------------------------------------------------------------- training, evaluation, state


@each(CASES)
def test_every_parameter_gets_a_gradient(name, args):
    model = tiny(name, args, init_values=0.1).train()
    model(randn(2, 3, 80, 112)).square().mean().backward()
    for parameter, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), parameter
        assert p.grad.abs().sum() > 0, parameter


@each(CASES)
def test_gradient_checkpointing_gives_the_same_gradients(name, args):
    results = []
    for enable in (False, True):
        model = tiny(name, args).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        for _ in range(2):
            model(randn(2, 3, 48, 64)).square().sum().backward()
        results.append([*(p.grad for p in model.parameters()), *model.buffers()])
    for a, b in zip(*results, strict=True):
        close(a, b)


@each(CASES)
def test_evaluation_is_deterministic_and_leaves_the_state_alone(name, args):
    model = tiny(name, args)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x = randn(2, 3, 80, 112)
    assert torch.equal(model(x), model(x))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@each(CASES)
def test_state_dict_fits_any_image_size_and_is_all_there_is(name, args):
    source = tiny(name, args, img_size=32)
    target = tiny(name, args, img_size=(512, 320))
    with torch.no_grad():
        for t in (*target.parameters(), *target.buffers()):
            t.normal_()
    target.load_state_dict(source.state_dict())
    assert {k: v.shape for k, v in source.state_dict().items()} == {k: v.shape for k, v in target.state_dict().items()}
    x = randn(2, 3, 80, 48)
    assert torch.equal(source(x), target(x))


@each(ALONE)
def test_a_mixer_is_initialised_on_its_own_and_with_factory_arguments(name, args):
    assert all(torch.isfinite(v).all() for v in alone(name, args).state_dict().values())
    meta = alone(name, args, device="meta", dtype=torch.bfloat16)
    assert {(v.device.type, v.dtype) for v in meta.state_dict().values() if v.is_floating_point()} == {
        ("meta", torch.bfloat16)
    }


@each(ALONE)
def test_drop_rates_act_in_training_only(name, args):
    x = randn(2, 35, 32)
    mixer, plain = alone(name, args, proj_drop=0.5, attn_drop=0.5), alone(name, args)
    close(mixer(x, (5, 7)), plain(x, (5, 7)))
    torch.manual_seed(0)
    y = mixer.train()(x, (5, 7))
    assert 0.3 < (y == 0).double().mean() < 0.7


@each(CASES)
def test_half_precision_is_finite_and_near(name, args):
    model = tiny(name, args).float()
    x = randn(2, 3, 80, 112).float()
    want = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = model(x)
    half = model.bfloat16()(x.bfloat16())
    for y in (autocast, half):
        assert torch.isfinite(y).all()
        if name != "routing":  # rounding moves patches from one cluster to another
            torch.testing.assert_close(y.float(), want, rtol=0.1, atol=0.1)


# ---------------------------------------------------------------- compilers and timm's interface


@pytest.mark.parametrize(
    "name, args, training", [*((*case, False) for case in ALONE), *((*case, True) for case in STATEFUL)]
)
def test_compiles_as_one_graph(name, args, training):
    torch._dynamo.reset()
    mixer = alone(name, args).train(training)
    valid = torch.ones(2, 35, dtype=torch.bool)
    valid[1, 28:] = False
    inputs = (randn(2, 35, 32), (5, 7), valid)
    y = torch.compile(mixer, fullgraph=True, backend="eager")(*inputs)
    assert torch.isfinite(y).all()
    if not training:
        close(y, mixer(*inputs))


@each(ALONE)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript(name, args):
    mixer = alone(name, args)
    scripted = torch.jit.script(mixer)
    valid = torch.ones(2, 35, dtype=torch.bool)
    valid[1, 28:] = False
    x = randn(2, 35, 32)
    close(scripted(x, (5, 7)), mixer(x, (5, 7)))
    close(scripted(x, (5, 7), valid), mixer(x, (5, 7), valid))


@each(MEMORY_FREE)
def test_fx_takes_the_mixer_as_a_leaf(name, args):
    model = tiny(name, args, depth=1)
    features = create_feature_extractor(model, ["blocks.0.mlp"])
    assert features(randn(2, 3, 48, 80))["blocks.0.mlp"].shape == (2, 15, 64)


@each(MEMORY_FREE)
def test_features_and_classifier(name, args):
    model = tiny(name, args)
    x = randn(2, 3, 48, 80)
    features, maps = model.forward_intermediates(x)
    close(features, model.forward_features(x))
    assert [m.shape for m in maps] == [(2, 64, 3, 5)] * 2
    close(model.norm(maps[-1].flatten(2).transpose(1, 2)), features)
    pairs = model.forward_intermediates(x, indices=1, return_prefix_tokens=True, intermediates_only=True)
    assert pairs[0][1].shape == (2, 0, 64)

    only = tiny(name, args, features_only=True, out_indices=(0, 1))
    only.load_state_dict({f"model.{k}": v for k, v in model.state_dict().items()}, strict=False)
    for a, b in zip(only(x), maps, strict=True):
        close(a, b)

    model.reset_classifier(7, "max")
    close(model(x), model.head(features.amax(dim=1)))
    model.reset_classifier(0, "")
    close(model(x), features)


@each(MEMORY_FREE)
@pytest.mark.parametrize("pool", ["token", "both"])
def test_pooling_a_memory_that_is_not_there_is_refused(name, args, pool):
    with pytest.raises(ValueError, match=f"global_pool='{pool}' reads the memory, and mixer='{name}' has none"):
        tiny(name, args, depth=1, global_pool=pool)
    with pytest.raises(ValueError, match=f"global_pool='{pool}' reads the memory, and this model's mixer has none"):
        tiny(name, args, depth=1).reset_classifier(5, pool)


# ---------------------------------------------------------------- names


def test_an_unknown_mixer_lists_the_options():
    with pytest.raises(ValueError, match="mixer must be one of .*, got 'lunar'") as error:
        tiny("lunar", {})
    assert all(repr(name) in str(error.value) for name in MIXERS)


@pytest.mark.parametrize("name", MIXERS)
def test_an_unknown_argument_lists_the_options(name):
    with pytest.raises(ValueError, match=f"mixer '{name}' takes .* in mixer_args, got 'slotz'"):
        tiny(name, {"slotz": 3})
    with pytest.raises(ValueError, match="takes .* in mixer_args, got 'num_heads'"):  # the shell's to set
        tiny(name, {"num_heads": 3})


@each([case for case in ALONE if case[0] != "external"])  # which has one head
def test_heads_that_do_not_divide_the_width_are_refused(name, args):
    with pytest.raises(ValueError, match=r"dim \(32\) must be a multiple of num_heads \(5\)"):
        alone(name, args, num_heads=5)


# ---------------------------------------------------------------- export


class OnPatches(torch.nn.Module):
    """A mixer behind a patch embedding that averages: the grid is computed from the image, as in a model."""

    def __init__(self, mixer: torch.nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        rows, columns = (image.shape[2] + 3) // 4, (image.shape[3] + 3) // 4
        x = torch.nn.functional.pad(image, (0, columns * 4 - image.shape[3], 0, rows * 4 - image.shape[2]))
        x = torch.nn.functional.avg_pool2d(x, 4).flatten(2).transpose(1, 2)
        return self.mixer(x, (rows, columns))


# those whose work is cut into pieces, of which a small image has one
IN_PIECES = [("local", {}), ("star", {}), ("longformer", {}), ("routing", {}), ("linformer", {})]


@pytest.mark.slow
@each(IN_PIECES)
def test_exported_with_dynamic_sizes(name, args):
    """Grids of one block and of many, and of fewer patches than clusters."""
    model = OnPatches(alone(name, args))
    dims = {0: Dim("batch", min=1), 2: Dim("height", min=5), 3: Dim("width", min=5)}
    exported = torch.export.export(model, (randn(2, 32, 40, 24),), dynamic_shapes=(dims,)).module()
    for size in ((1, 32, 5, 8), (3, 32, 13, 22), (1, 32, 75, 90), (2, 32, 23, 24)):
        x = randn(*size)
        close(exported(x), model(x))
