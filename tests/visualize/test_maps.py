"""Attention maps: what a map says of a patch is laid over the pixels of that patch, in the unit that is stated."""

import numpy as np
import pytest
import timm
import torch

import luna_vision  # noqa: F401  registers the models
from luna_vision.models.luna_vit import AttentionMaps
from luna_vision.visualize import pack_maps, slot_maps, telling_slots, unpack_maps, view
from luna_vision.visualize.maps import SlotMaps

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 57, 3), dtype=np.uint8)  # 3 x 4 patches of 16, with padding


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("test_luna_vit", num_classes=0)


@pytest.fixture
def crafted(model, monkeypatch):
    """Two slots and two heads: slot 0 of head 0 looks at the patch in row 1, column 2 alone, all else is uniform."""
    pack = torch.full((1, 2, 2, 3, 4), 1 / 12)
    pack[0, 0, 0] = 0
    pack[0, 0, 0, 1, 2] = 1
    unpack = torch.full((1, 2, 2, 3, 4), 0.5)
    unpack[0, :, 0, 2, 3], unpack[0, :, 1, 2, 3] = 0.1, 0.9
    monkeypatch.setattr(model, "get_attention_maps", lambda x, indices: [AttentionMaps(pack, unpack) for _ in indices])
    return model


def test_a_slot_that_looks_at_one_patch_lights_its_pixels_alone(crafted):
    maps = pack_maps(crafted, IMAGE, layer=0, head=0)
    expected = np.zeros((40, 57))
    expected[16:32, 32:48] = 12  # all attention on one of 12 patches is 12 times the mean
    np.testing.assert_allclose(maps[0], expected, rtol=1e-6)
    np.testing.assert_allclose(maps[1], 1.0, rtol=1e-6)


def test_heads_are_merged_by_their_mean(crafted):
    maps = pack_maps(crafted, IMAGE, layer=0)
    assert maps.dtype == np.float32
    np.testing.assert_allclose(maps[0, 20, 40], 6.5, rtol=1e-6)
    np.testing.assert_allclose(maps[0, 0, 0], 0.5, rtol=1e-6)


def test_a_patch_at_the_edge_keeps_the_part_that_is_image(crafted):
    maps = unpack_maps(crafted, IMAGE, layer=0)
    corner = np.zeros((40, 57), bool)
    corner[32:, 48:] = True
    np.testing.assert_allclose(maps[1], np.where(corner, 0.9, 0.5), rtol=1e-6)


def test_real_maps_are_those_of_the_model(model):
    seen = view(model, IMAGE)
    maps = slot_maps(model, seen, [3, -4])
    assert [layer.layer for layer in maps] == [3, 0]
    with torch.inference_mode():
        true = model.eval().get_attention_maps(seen.pixels, indices=[0])[0]
    np.testing.assert_allclose(maps[1].pack, true.pack[0].mean(0) * 12, rtol=1e-6)
    for layer in maps:
        np.testing.assert_allclose(layer.pack.mean((1, 2)), 1.0, rtol=1e-5)
        np.testing.assert_allclose(layer.unpack.sum(0), 1.0, rtol=1e-5)


def test_the_models_mode_is_left_as_it_was(model):
    model.train()
    slot_maps(model, IMAGE, 0)
    assert model.training


def test_layers_by_default_are_four_from_first_to_last():
    model = timm.create_model("test_luna_vit", depth=12, embed_dim=16, num_heads=1)
    assert [layer.layer for layer in slot_maps(model, IMAGE)] == [0, 4, 7, 11]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"layers": 4}, "layer 4 does not exist: the model has 4, 0 to 3"),
        ({"layers": [0, -5]}, "layer -5 does not exist"),
        ({"head": 2}, "head 2 does not exist: the pack of layer 0 has 2, 0 to 1"),
    ],
)
def test_mistakes(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        slot_maps(model, IMAGE, **arguments)


@pytest.mark.parametrize("name, arguments", [("test_luna_vit", {"mixer": "softmax"}), ("test_vit", {})])
def test_a_model_without_memory(name, arguments):
    with pytest.raises(ValueError, match="no memory to show"):
        slot_maps(timm.create_model(name, **arguments), IMAGE)


def test_broken_weights(model):
    with torch.no_grad():
        model.memory.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite for the image: the weights are broken"):
        slot_maps(model, IMAGE)


def test_the_slots_that_tell_most_are_focused_and_differ():
    pack = np.ones((5, 2, 2), np.float32)  # slots 0 and 3 look everywhere
    pack[1] = pack[2] = [[3.7, 0.1], [0.1, 0.1]]
    pack[4] = [[0.2, 0.2], [0.2, 3.4]]
    maps = [SlotMaps(0, pack, None)]
    assert telling_slots(maps, 1) in ([1], [2])
    assert telling_slots(maps, 2) in ([1, 4], [2, 4])
    assert telling_slots(maps, 9) == [0, 1, 2, 3, 4]
