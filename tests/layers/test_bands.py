"""Blocks in bands of rows give the values and gradients of blocks as they are."""

import pytest
import timm
import torch
import torch.nn.functional as F

from luna_vision import LunaVit
from luna_vision.execution.bands import block_by_bands, set_band_checkpointing


def tiny(**kwargs) -> LunaVit:
    """In training mode, with weights that are all at work."""
    torch.manual_seed(0)
    arguments = {"num_classes": 3, "embed_dim": 16, "patch_size": 4, "depth": 3, "memory_len": 3, **kwargs}
    model = timm.create_model("test_luna_vit", **arguments).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def image(*shape) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def step(model: LunaVit, x: torch.Tensor, memory=None, **kwargs) -> dict[str, torch.Tensor]:
    """Logits and all gradients of a training step, those of the image and of a memory that is handed in included."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(5)  # of what is dropped
    logits = model(x, memory=memory, **kwargs)
    logits = logits if logits.dim() == 2 else logits.mean(1)[:, :3]
    F.cross_entropy(logits, torch.arange(len(x)) % 3).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {"logits": logits.detach(), "image": x.grad, **grads}


def same(got: dict, want: dict, tolerance: float = 1e-10) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert (got[name] is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(
                got[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


VARIANTS = [
    *({"local_mixing": name} for name in ("none", "before", "attn", "mlp")),
    *({"global_pool": name} for name in ("", "max", "avgmax", "map", "token", "both")),
    *({"global_pool": "token", "local_mixing": name} for name in ("none", "attn", "mlp")),
    *({"pos_embed": name} for name in ("learn", "none")),
    {"norm_first": False},
    {"norm_first": False, "local_mixing": "mlp", "global_pool": "both", "memory_mlp": "own"},
    {"memory_mlp": "shared", "global_pool": "both"},
    {"tie_kv": False, "pack_heads": 1},
    {"tie_kv": False, "pack_heads": 1, "global_pool": "token"},
    {"norm_first": False, "global_pool": "token"},
    *({"pack_by_row": True, "pack_form": form} for form in ("projected", "absorbed")),
    {"mlp": "swiglu", "local_mixing": "mlp", "memory_mlp": "shared", "global_pool": "both"},
    {"stem": "conv", "init_values": 0.1},
    {"pack_form": "projected", "unpack_form": "projected"},
    {"qkv_bias": False, "proj_bias": False},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gradients_are_those_of_the_ordinary_step(variant):
    model, x = tiny(**variant), image(2, 3, 26, 19)  # 7 x 5 patches
    want = step(model, x)
    for rows in (1, 3, 100, 0):
        set_band_checkpointing(model, rows)
        same(step(model, x), want)


@pytest.mark.parametrize("size", [(1, 1), (4, 30), (33, 3), (17, 18)])
def test_odd_sizes(size):
    model, x = tiny(), image(1, 3, *size)
    want = step(model, x)
    set_band_checkpointing(model, 2)
    same(step(model, x), want)


@pytest.mark.parametrize("local_mixing", ["before", "attn", "mlp"])
def test_masks(local_mixing):
    """Bands without a single valid patch included."""
    model, x = tiny(local_mixing=local_mixing), image(2, 3, 24, 16)
    valid = torch.zeros(2, 6, 4, dtype=torch.bool)
    valid[0, :2, :3] = valid[1] = True
    want = step(model, x, patch_valid=valid.flatten(1))
    for rows in (1, 4):
        set_band_checkpointing(model, rows)
        same(step(model, x, patch_valid=valid.flatten(1)), want)


def test_a_memory_that_is_handed_in_gets_its_gradient():
    model, x = tiny(), image(2, 3, 20, 12)
    grads = []
    for rows in (0, 2):
        set_band_checkpointing(model, rows)
        memory = image(2, 3, 16).requires_grad_()
        patches, after = model.encode(x, memory=memory)
        (after * image(2, 3, 16)).sum().backward()  # and of the patches nothing is read
        grads.append(memory.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-10, atol=1e-10)


def test_a_gradient_that_is_handed_in_is_left_alone():
    """One that is a single number everywhere, as a sum's is, and one that two memories have in common."""
    model, x, grads = tiny(), image(2, 3, 20, 12), []
    ours = image(2, 3, 16)
    for rows in (0, 2):
        set_band_checkpointing(model, rows)
        for handed in (torch.ones(()).double().expand(2, 3, 16), ours):
            model.zero_grad()
            (model.encode(x)[1] + model.encode(x.flip(0))[1]).backward(handed)
            grads.append({name: p.grad for name, p in model.named_parameters()})
    assert torch.equal(ours, image(2, 3, 16))
    same(grads[2], grads[0])
    same(grads[3], grads[1])


@pytest.mark.parametrize("rates", [{"drop_path_rate": 0.5}, {"patch_drop_rate": 0.5, "pos_drop_rate": 0.3}], ids=str)
def test_what_is_dropped_is_dropped_in_all_bands(rates):
    model, x = tiny(global_pool="both", **rates), image(5, 3, 24, 16)
    want = step(model, x)
    after = torch.get_rng_state()
    set_band_checkpointing(model, 2)
    same(step(model, x), want)
    assert torch.equal(torch.get_rng_state(), after)
    if "drop_path_rate" in rates:
        plain = tiny(global_pool="both")
        assert not torch.allclose(step(plain, x)["logits"], want["logits"])  # something was dropped


def test_frozen_parameters_and_images_without_gradients():
    model, x = tiny(), image(1, 3, 24, 16)
    model.blocks[1].requires_grad_(False)
    grads = []
    for rows in (0, 2):
        set_band_checkpointing(model, rows)
        model.zero_grad()
        model(x).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    same(grads[1], grads[0])
    assert grads[1]["blocks.1.norm1.weight"] is None and grads[1]["blocks.0.norm1.weight"] is not None


def test_bfloat16_store_and_autocast_are_near():
    model, x = tiny(), image(2, 3, 24, 16)
    want = step(model, x)
    set_band_checkpointing(model, 2, torch.bfloat16)
    got = step(model, x)
    torch.testing.assert_close(got["logits"], want["logits"])
    gap = torch.cat([(got[n] - want[n]).flatten() for n in want]).norm()
    size = torch.cat([want[n].flatten() for n in want]).norm()
    assert 0 < gap / size < 0.02
    model.float()
    found = []
    for rows in (0, 2):
        set_band_checkpointing(model, rows)
        with torch.autocast("cpu", torch.bfloat16):  # backward within, where a cache of cast weights would be in use
            found.append(step(model, x.float()))
    for name, value in found[0].items():
        assert (found[1][name] - value).norm() < 0.1 * value.norm() + 1e-3, name


@pytest.mark.parametrize("local_mixing", ["before", "attn"])
def test_with_a_bfloat16_store_gradients_do_not_depend_on_the_bands(local_mixing):
    """Though of rounded inputs some bands have scores above the maximum that was kept, and others have not."""
    model, x, grads = tiny(local_mixing=local_mixing), image(2, 3, 24, 16), []
    for rows in (1, 2, 100):
        set_band_checkpointing(model, rows, torch.bfloat16)
        grads.append(step(model, x))
    same(grads[1], grads[0])
    same(grads[2], grads[0])


def test_intermediates_and_evaluation():
    model, x = tiny().eval(), image(1, 3, 24, 16)
    with torch.no_grad():
        want = model.forward_intermediates(x, return_prefix_tokens=True, intermediates_only=True)
        set_band_checkpointing(model, 4)
        got = model.forward_intermediates(x, return_prefix_tokens=True, intermediates_only=True)
    for ours, theirs in zip(sum(got, ()), sum(want, ()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_nothing_but_inputs_is_kept():
    """Numbers that autograd holds of a block: those of its patches, and little else, at any size."""
    model = tiny(depth=1, embed_dim=32, global_pool="token")
    set_band_checkpointing(model, 1)
    block = model.blocks[0]

    def kept(patches: int) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            x, memory = image(1, patches * 4, 32).requires_grad_(), image(1, 3, 32)
            block_by_bands(block, x, memory, (patches, 4), None, 1)
        return sum(sizes)

    assert kept(64) - kept(32) == 32 * 4 * 32


@pytest.mark.parametrize(
    "kwargs, arguments, message",
    [
        ({}, {"rows": -1}, "rows must be at least 0, got -1"),
        ({}, {"rows": 2, "store_dtype": torch.int8}, "store_dtype must be a floating-point type, got torch.int8"),
        ({"mixer": "softmax"}, {"rows": 2}, "band checkpointing needs a memory"),
        ({"proj_drop_rate": 0.1}, {"rows": 2}, "bands need attn_drop_rate=0 and proj_drop_rate=0"),
        ({"attn_drop_rate": 0.1}, {"rows": 2}, "bands need attn_drop_rate=0 and proj_drop_rate=0"),
    ],
)
def test_what_does_not_go_is_said(kwargs, arguments, message):
    with pytest.raises(ValueError, match=message):
        set_band_checkpointing(tiny(**kwargs), **arguments)
