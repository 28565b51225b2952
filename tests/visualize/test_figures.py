"""Figures for notebooks: one panel for what was asked for, titled, without pyplot."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import timm
import torch
from matplotlib.figure import Figure

import luna_vision  # noqa: F401  registers the models
from luna_vision.visualize import fit_colors, plot_features, plot_memory, plot_pack, plot_unpack, view
from luna_vision.visualize.paint import slot_colors

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 57, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("test_luna_vit")


def panels(figure: Figure) -> list[str]:
    """The panels by name; the image of the head and the scales are not among them."""
    return [axes.get_label() for axes in figure.axes if axes.get_label() not in ("image", "pack scale", "unpack scale")]


def titles(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.texts)


def test_memory_has_a_row_for_each_layer_and_a_column_for_each_slot(model):
    figure = plot_memory(model, IMAGE, layers=[0, 3], slots=[5, 2])
    assert isinstance(figure, Figure)
    assert panels(figure) == [f"layer {n} {what}" for n in (0, 3) for what in ("slot read most", "slot 5", "slot 2")]
    assert titles(figure) == ["slot read most", "slot 5", "slot 2"]  # once, above the first row
    assert len(figure.axes) == 6 + 3
    assert "sees 57 × 40 pixels in 4 × 3 patches, mean over heads" in words(figure)
    assert "2 of 8 slots shown" in words(figure)


def test_the_slots_that_tell_most_are_shown(model):
    assert len(titles(plot_memory(model, IMAGE, layers=0, slots=3))) == 1 + 3
    assert len(titles(plot_memory(model, IMAGE, layers=0, slots=99))) == 1 + 8


def test_titles_have_the_colours_of_the_slots(model):
    figure = plot_memory(model, IMAGE, layers=0, slots=[6])
    (axes,) = [axes for axes in figure.axes if axes.get_title() == "slot 6"]
    np.testing.assert_allclose(axes.title.get_bbox_patch().get_facecolor()[:3], slot_colors(8)[6])


def test_memory_with_features(model):
    seen = view(model, IMAGE)
    figure = plot_memory(model, seen, layers=[1], slots=[0], colors=fit_colors(model, [seen], [1]))
    assert panels(figure) == ["layer 1 features", "layer 1 slot read most", "layer 1 slot 0"]
    assert "features, colours: the first three principal components" in words(figure)


def test_title_and_warning(model):
    text = words(plot_memory(model, IMAGE, layers=0, title="A $strange^ name_", warning="RANDOM WEIGHTS"))
    assert text.startswith("A $strange^ name_\n") and "RANDOM WEIGHTS" in text


def test_pack_shows_all_slots_of_a_layer(model):
    figure = plot_pack(model, IMAGE, layer=2)
    assert titles(figure) == [f"slot {i}" for i in range(8)]
    assert "layer 2, mean over heads" in words(figure)
    assert titles(plot_pack(model, IMAGE, slots=[3], head=1)) == ["slot 3"]


def test_many_slots_stand_in_rows():
    model = timm.create_model("test_luna_vit", memory_len=18)
    figure = plot_pack(model, IMAGE)
    assert len(panels(figure)) == 18
    assert len({round(axes.get_position().y0, 3) for axes in figure.axes if axes.get_title()}) == 3


def test_unpack_shows_each_layer_and_a_legend_of_all_slots(model):
    figure = plot_unpack(model, IMAGE)
    assert titles(figure) == ["layer 0", "layer 1", "layer 2", "layer 3"]
    assert [patch.get_facecolor()[:3] for patch in figure.patches] == [tuple(color) for color in slot_colors(8)]


def test_a_last_block_that_only_packs_says_so():
    model = timm.create_model("test_luna_vit", global_pool="token")
    for figure in (plot_memory(model, IMAGE), plot_unpack(model, IMAGE), plot_memory(model, IMAGE, layers=-1)):
        assert sum("only packs" in text.get_text() for axes in figure.axes for text in axes.texts) == 1


def test_features_of_one_image_and_of_several(model):
    assert titles(plot_features(model, IMAGE, [0, 2])) == ["image", "layer 0", "layer 2"]
    figure = plot_features(model, [IMAGE, IMAGE[:20]], layers=-1, foreground=True)
    assert titles(figure) == ["the image", "layer 3"]  # the same above both rows
    assert len(figure.axes) == 4


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1)])
def test_any_shape_can_be_drawn(model, shape, tmp_path):
    image = np.full((*shape, 3), 128, np.uint8)
    plot_memory(model, image, layers=[0], slots=1).savefig(tmp_path / "x.png", dpi=40)
    plot_features(model, image).savefig(tmp_path / "y.png", dpi=40)


def test_a_panel_shows_what_was_painted(model):
    image = np.zeros((40, 57, 3), np.uint8)
    figure = plot_pack(model, image, layer=0, slots=[0])
    (axes,) = [axes for axes in figure.axes if axes.get_title()]
    assert axes.images[0].get_array().shape == (40, 57, 3)  # cropped to the image, padding not shown


def test_nothing_is_left_in_pyplot(model):
    plot_memory(model, IMAGE)
    assert plt.get_fignums() == []


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: plot_memory(m, IMAGE, slots=[8]), "slot 8 does not exist: the memory has 8, 0 to 7"),
        (lambda m: plot_memory(m, IMAGE, slots=[]), "at least one slot must be shown"),
        (lambda m: plot_memory(m, IMAGE, slots=0), "at least one slot must be shown, got 0"),
        (lambda m: plot_pack(m, IMAGE, layer=7), "layer 7 does not exist"),
        (lambda m: plot_unpack(m, IMAGE, head=5), "head 5 does not exist"),
        (lambda m: plot_features(m, []), "at least one image is needed"),
    ],
)
def test_mistakes(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)
