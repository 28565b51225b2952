"""One model with any prefix of its memory."""

import numpy as np
import pytest
import timm
import torch

from luna_vision import LunaVit
from luna_vision.execution import encode
from luna_vision.export import export_program, save_for_hf


def tiny(**kwargs) -> LunaVit:
    torch.manual_seed(0)
    arguments = {"num_classes": 5, "embed_dim": 16, "patch_size": 4, "depth": 2, **kwargs}
    return timm.create_model("test_luna_vit", **arguments).double().eval()


def image(*shape) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def prefix_of(model: LunaVit, k: int, **kwargs) -> LunaVit:
    """A model that was built with k slots and has the first k of another."""
    short = tiny(memory_len=k, **kwargs)
    state = dict(model.state_dict())
    state["memory"] = state["memory"][:, :k]
    short.load_state_dict(state)
    return short


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("kwargs", [{}, {"global_pool": "token"}, {"global_pool": "both", "tie_kv": False}], ids=str)
def test_a_prefix_is_the_model_that_was_built_with_so_many(k, kwargs):
    model = tiny(**kwargs)
    names = {name: value.shape for name, value in model.state_dict().items()}
    short = prefix_of(model, k, **kwargs)
    model.set_memory_len(k)
    x = image(2, 3, 20, 28)
    memory = image(2, k, 16)
    assert model.num_prefix_tokens == model.memory_len == k
    assert {name: value.shape for name, value in model.state_dict().items()} == names
    assert torch.equal(model(x), short(x))
    assert torch.equal(model.forward_features(x), short.forward_features(x))
    assert torch.equal(model.encode(x, memory=memory)[1], short.encode(x, memory=memory)[1])
    ours, theirs = (
        m.forward_intermediates(x, return_prefix_tokens=True, intermediates_only=True) for m in (model, short)
    )
    assert all(torch.equal(a, b) for a, b in zip(sum(ours, ()), sum(theirs, ()), strict=True))
    assert ours[0][1].shape == (2, k, 16)
    assert model.get_attention_maps(x)[0].pack.shape == (2, 2, k, 5, 7)


def test_the_forms_are_chosen_for_the_slots_in_use():
    model, k = tiny(embed_dim=64, memory_len=64), 2
    short = prefix_of(model, k, embed_dim=64)
    before = model.blocks[0].attn.absorb_pack
    model.set_memory_len(k)
    assert model.blocks[0].attn.absorb_pack == short.blocks[0].attn.absorb_pack != before


def test_the_number_can_be_raised_again():
    model, x = tiny(), image(1, 3, 16, 16)
    full = model(x)
    model.set_memory_len(2)
    assert not torch.allclose(model(x), full)
    model.set_memory_len(8)
    assert torch.equal(model(x), full)


def test_slots_beyond_get_a_gradient_of_zero_and_no_other():
    model = tiny()
    model.set_memory_len(3)
    model(image(1, 3, 16, 16)).sum().backward()
    assert bool(model.memory.grad[:, :3].any()) and not bool(model.memory.grad[:, 3:].any())


@torch.no_grad()
def test_streaming_and_a_memory_that_is_handed_in_have_so_many_slots():
    model = tiny()
    model.set_memory_len(3)
    pixels = np.random.default_rng(0).random((20, 28, 3))
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    result = encode(model, pixels, mean=0, std=1, band_rows=2, progress=False)
    torch.testing.assert_close(result.logits, model(x)[0].detach(), rtol=1e-10, atol=1e-10)
    assert result.raw_memory.shape == (3, 16)
    again = encode(model, pixels, mean=0, std=1, memory=result.raw_memory, progress=False)
    torch.testing.assert_close(again.logits, model(x, memory=result.raw_memory[None])[0].detach())
    with pytest.raises(ValueError, match=r"memory must have shape \[1, 3, 16\], got \[1, 8, 16\]"):
        model(x, memory=image(1, 8, 16))


@torch.no_grad()
def test_graphs_have_so_many_slots(tmp_path):
    model = tiny().float()
    model.set_memory_len(3)
    export_program(model, tmp_path / "model.pt2", "embedding", memory=True)  # which compares it with the model
    program = torch.export.load(tmp_path / "model.pt2").module()
    x, memory = torch.randn(2, 3, 24, 40), torch.randn(2, 3, 16)
    embedding, new_memory = program(x, memory)
    assert new_memory.shape == (2, 3, 16)
    torch.testing.assert_close(embedding, model.forward_head(model.forward_features(x, memory=memory), True))
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
    with pytest.raises(ValueError, match=r"keeps all 8 slots of the memory, and the model is set to 3: call"):
        save_for_hf(model, tmp_path / "folder")


@pytest.mark.parametrize("k", [0, 9, -1])
def test_a_number_that_there_is_not_is_said(k):
    with pytest.raises(ValueError, match=f"memory_len must be 1 to 8, as built, got {k}"):
        tiny().set_memory_len(k)


def test_a_mixer_without_a_memory_is_said():
    with pytest.raises(ValueError, match="this model's mixer has none"):
        tiny(mixer="softmax").set_memory_len(1)
