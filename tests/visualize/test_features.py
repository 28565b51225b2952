"""Feature colours: the same in each run and in all images of a fit, whatever sign and scale the features have."""

import numpy as np
import pytest
import timm
import torch

import luna_vision  # noqa: F401  registers the models
from luna_vision.visualize import FeatureColors, feature_maps, fit_colors

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (40, 57, 3), dtype=np.uint8)


def blobs(height: int = 12, width: int = 20) -> np.ndarray:
    """Features (8, height, width) of three parts: a large one, and two small ones on the left."""
    centres = RNG.normal(size=(3, 8)) * 3
    parts = np.zeros((height, width), int)
    parts[:3, :4], parts[6:8, :5] = 1, 2
    return np.moveaxis(centres[parts] + RNG.normal(size=(height, width, 8)) * 0.1, -1, 0)


def test_colours_are_the_same_in_each_run():
    features = blobs()
    np.testing.assert_array_equal(FeatureColors([features])(features), FeatureColors([features])(features))


def test_parts_have_colours_of_their_own():
    features = blobs()
    colors = FeatureColors([features])(features)
    assert colors.shape == (12, 20, 3) and colors.min() >= 0 and colors.max() <= 1
    means = np.array([colors[9:, 9:].mean((0, 1)), colors[:3, :4].mean((0, 1)), colors[6:8, :5].mean((0, 1))])
    assert min(np.abs(means[i] - means[j]).max() for i, j in ((0, 1), (0, 2), (1, 2))) > 0.3


def test_a_rotation_reflection_or_scaling_of_the_features_changes_nothing():
    features = blobs()
    rotation = np.linalg.qr(RNG.normal(size=(8, 8)))[0]
    turned = np.einsum("dc,chw->dhw", -100 * rotation, features) + 7
    before, after = FeatureColors([features])(features), FeatureColors([turned])(turned)
    np.testing.assert_allclose(before[..., :2], after[..., :2], atol=1e-4)  # the third axis is noise


def test_outliers_do_not_leave_the_rest_grey():
    features = blobs(40, 40)
    plain = FeatureColors([features])(features)
    features[:, 0, 0] *= 20
    colors = FeatureColors([features])(features)
    for result in (plain, colors):
        low, high = np.percentile(result.reshape(-1, 3), (2, 98), axis=0)
        assert (high - low).max() > 0.7


def test_colours_mean_the_same_in_all_images():
    first, second = blobs(), blobs(9, 7)
    colors = FeatureColors([first, second])
    joined = np.concatenate([first[:, :1, :1], second[:, :1, :1]], 2)
    np.testing.assert_allclose(colors(joined)[0, 0], colors(first)[0, 0], atol=1e-6)
    np.testing.assert_allclose(colors(joined)[0, 1], colors(second)[0, 0], atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 1, 1), (8, 1, 2), (2, 5, 5), (1, 4, 3)])
def test_few_patches_and_few_channels(shape):
    for features in (np.full(shape, 3.0), RNG.normal(size=shape)):
        colors = FeatureColors([features])(features)
        assert colors.shape == (*shape[1:], 3)
        assert colors.min() >= 0 and colors.max() <= 1
    np.testing.assert_array_equal(FeatureColors([np.full(shape, 3.0)])(np.full(shape, 3.0)), 0.5)


@pytest.mark.parametrize(
    "name, layer, shape",
    [("test_luna_vit", 1, (64, 3, 4)), ("test_vit", 2, (64, 3, 4)), ("test_convnext", 0, (24, 16, 16))],
)
def test_features_of_any_timm_model(name, layer, shape):
    assert feature_maps(timm.create_model(name), IMAGE, layer)[layer].shape == shape


def test_a_model_without_memory_has_features():
    model = timm.create_model("test_luna_vit", mixer="softmax")
    assert list(feature_maps(model, IMAGE, [3, 0])) == [3, 0]


def test_mistakes():
    model = timm.create_model("test_luna_vit")
    with pytest.raises(ValueError, match="at least one image"):
        fit_colors(model, [])
    with pytest.raises(ValueError, match="layer 9 does not exist"):
        feature_maps(model, IMAGE, 9)
    with pytest.raises(ValueError, match="Linear has no forward_intermediates"):
        feature_maps(torch.nn.Linear(1, 1), IMAGE)
