"""Figures for notebooks: one panel for what was asked for, titled, without pyplot."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import timm
import torch
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text

import luna_vision  # noqa: F401  registers the models
from luna_vision.visualize import fit_colors, plot_features, plot_memory, view
from luna_vision.visualize.figures import slot_colors
from luna_vision.visualize.maps import SlotMaps

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 57, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("test_luna_vit")


def titles(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def overlay(figure: Figure, title: str) -> np.ndarray:
    """The colours (h, w, RGBA) over the picture of the first panel of that title."""
    axes = next(axes for axes in figure.axes if axes.get_title() == title)
    image = axes.images[-1]
    return image.to_rgba(image.get_array(), norm=image.get_array().ndim == 2)


@pytest.fixture
def crafted(model, monkeypatch):
    """Three slots. Slot 1 looks at two patches, at one of them more; one patch reads evenly, two read slots 1 and 2."""
    pack = np.full((3, 3, 4), 0.5, np.float32)
    pack[1, 0, 0], pack[1, 1, 2] = 2.0, 8.0
    unpack = np.full((3, 3, 4), 1 / 3, np.float32)
    unpack[:, 0, 0], unpack[:, 1, 2] = [0.25, 0.5, 0.25], [0.05, 0.05, 0.9]
    monkeypatch.setattr("luna_vision.visualize.figures.slot_maps", lambda *_: [SlotMaps(0, pack, unpack)])
    return model


def test_memory_has_a_row_for_each_layer_and_a_column_for_each_slot(model):
    figure = plot_memory(model, IMAGE, layers=[0, 3], slots=[5, 2])
    assert isinstance(figure, Figure)
    assert titles(figure) == ["slot read most", "slot 5", "slot 2", "image"]  # once, above the first row
    assert len(figure.axes) == 2 * 3 + 2
    text = words(figure)
    assert "sees 57 × 40 pixels in 4 × 3 patches, mean over heads" in text
    assert "layer 0" in text and "layer 3" in text and "2 of 8 slots shown" in text


def test_the_slots_that_tell_most_are_shown(model):
    assert len(titles(plot_memory(model, IMAGE, layers=0, slots=3))) == 2 + 3
    assert len(titles(plot_memory(model, IMAGE, layers=0, slots=99))) == 2 + 8


def test_titles_and_legend_have_the_colours_of_the_slots(model):
    figure = plot_memory(model, IMAGE, layers=0, slots=[6])
    (axes,) = [axes for axes in figure.axes if axes.get_title() == "slot 6"]
    np.testing.assert_allclose(axes.title.get_bbox_patch().get_facecolor()[:3], slot_colors(8)[6])
    (legend,) = figure.findobj(Legend)
    assert [patch.get_facecolor()[:3] for patch in legend.get_patches()] == [tuple(color) for color in slot_colors(8)]


def test_the_picture_stays_as_it_is_where_a_slot_looks_no_more_than_elsewhere(crafted):
    colors = overlay(plot_memory(crafted, IMAGE, slots=[1]), "slot 1")
    weak, strong = colors[0, 0], colors[20, 40]
    np.testing.assert_array_equal(colors[39, 56, 3], 0)
    assert 0.2 < weak[3] < strong[3] and weak[:3].sum() < strong[:3].sum()


def test_unpack_has_the_colour_of_the_slot_and_is_the_stronger_the_larger_its_share(crafted):
    colors = overlay(plot_memory(crafted, IMAGE), "slot read most")
    np.testing.assert_allclose(colors[39, 56, 3], 0, atol=1e-3)  # an even share says nothing
    np.testing.assert_allclose(colors[0, 0, :3], slot_colors(3)[1])
    np.testing.assert_allclose(colors[20, 40, :3], slot_colors(3)[2])
    assert 0.2 < colors[0, 0, 3] < colors[20, 40, 3]


@pytest.mark.parametrize("slots", [16, 64])
def test_slots_have_colours_of_their_own(slots):
    colors = slot_colors(slots)
    distance = np.linalg.norm(colors[:, None] - colors, axis=-1) + 9 * np.eye(slots)
    assert distance.min() > (0.2 if slots == 16 else 0.08)
    assert np.ptp(colors, axis=1).min() > 0.3  # none is grey


def test_memory_with_features(model):
    seen = view(model, IMAGE)
    figure = plot_memory(model, seen, layers=[1], slots=[0], colors=fit_colors(model, [seen], [1]))
    assert titles(figure) == ["features", "slot read most", "slot 0", "image"]
    assert "features: the first three principal components" in words(figure)


def test_title_and_warning(model):
    text = words(plot_memory(model, IMAGE, layers=0, title="A $strange^ name_", warning="RANDOM WEIGHTS"))
    assert "RANDOM WEIGHTS\nA $strange^ name_\n" in text


def test_features_of_one_image_and_of_several(model):
    assert titles(plot_features(model, IMAGE, [0, 2])) == ["image", "layer 0", "layer 2"]
    figure = plot_features(model, [IMAGE, IMAGE[:20]], layers=-1)
    assert titles(figure) == ["image", "layer 3"] and len(figure.axes) == 4


def test_a_patch_has_one_colour(model):
    colors = overlay(plot_features(model, IMAGE, [0]), "layer 0")
    assert colors.shape[:2] == (40, 57)  # cropped to the image, padding not shown
    np.testing.assert_array_equal(colors[:16, :16], np.broadcast_to(colors[0, 0], (16, 16, 4)))
    assert not np.array_equal(colors[15, 15], colors[16, 16])


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1)])
def test_any_shape_can_be_drawn(model, shape, tmp_path):
    image = np.full((*shape, 3), 128, np.uint8)
    plot_memory(model, image, layers=[0], slots=1).savefig(tmp_path / "x.png", dpi=40)
    plot_features(model, image).savefig(tmp_path / "y.png", dpi=40)


def test_nothing_is_left_in_pyplot(model):
    plot_memory(model, IMAGE)
    assert plt.get_fignums() == []


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: plot_memory(m, IMAGE, slots=[8]), "slot 8 does not exist: the memory has 8, 0 to 7"),
        (lambda m: plot_memory(m, IMAGE, slots=[]), "at least one slot must be shown"),
        (lambda m: plot_memory(m, IMAGE, slots=0), "at least one slot must be shown, got 0"),
        (lambda m: plot_memory(m, IMAGE, layers=7), "layer 7 does not exist"),
        (lambda m: plot_memory(m, IMAGE, head=5), "head 5 does not exist"),
        (lambda m: plot_features(m, []), "at least one image is needed"),
    ],
)
def test_mistakes(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)
