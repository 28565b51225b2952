"""Colours for patch features: their three principal components as red, green and blue.

Shapes: C width of the features, H' x W' patches.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from sklearn.decomposition import PCA
from torch import nn

from .maps import check_layers
from .view import ImageLike, View, run, view

FIT_PATCHES = 1024  # of each image


def feature_maps(
    model: nn.Module, image: ImageLike | View, layers: Sequence[int] | int | None = None
) -> dict[int, np.ndarray]:
    """Patch features of any timm model that has `forward_intermediates`.

    Args:
        model: The model.
        image: See :func:`luna_vision.visualize.view`.
        layers: Blocks, or stages of a hierarchical model, as in :func:`luna_vision.visualize.slot_maps`.

    Returns:
        float32 (C, H', W') for each layer, in the order given.

    Raises:
        ValueError: The model has no `forward_intermediates` or no such layer, or its features are not finite.
    """
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"{type(model).__name__} has no forward_intermediates, which patch features are read with")
    layers = check_layers(layers, len(model.feature_info))
    seen = view(model, image)
    maps = run(model, seen.pixels, "forward_intermediates", indices=sorted(layers), intermediates_only=True)
    found = {layer: y[0].float().cpu().numpy() for layer, y in zip(sorted(layers), maps, strict=True)}
    for layer in layers:
        if not np.isfinite(found[layer]).all():
            raise ValueError(f"the features of layer {layer} are not finite for {seen.name}: the weights are broken")
    return {layer: found[layer] for layer in layers}


class FeatureColors:
    """Turns patch features into colours. It is fitted once, so that a colour means the same in all images.

    The first three principal components are red, green and blue. The 1st percentile of a component is dark and the
    99th bright, so that a few outliers do not leave the rest grey. The sign of a component is arbitrary: it is chosen
    so that the longer tail is bright. Rare features then stand out from common ones.
    """

    def __init__(self, maps: Sequence[np.ndarray]) -> None:
        """
        Args:
            maps: Features (C, ...) of the images to fit to, which may have different sizes.
        """
        patches = np.concatenate([m.reshape(len(m), -1).T for m in maps]).astype(np.float64)
        spread = np.abs(patches - patches.mean(0)).max()
        rank = min(3, *patches.shape) if spread > 1e-6 * np.abs(patches).max() else 0
        self.pca = PCA(rank, svd_solver="covariance_eigh").fit(patches) if rank else None
        if self.pca:
            scores = self.pca.transform(patches)
            self.sign = np.where((scores**3).mean(0) < 0, -1.0, 1.0)
            self.low, self.high = np.percentile(scores * self.sign, (1, 99), axis=0)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Features (C, H', W') to float32 (H', W', 3) in [0, 1]; 0.5 where there are fewer than three components."""
        colors = np.full((*features.shape[1:], 3), 0.5, np.float32)
        if self.pca:
            scores = self.pca.transform(features.reshape(len(features), -1).T) * self.sign
            scores = ((scores - self.low) / np.maximum(self.high - self.low, 1e-12)).clip(0, 1)
            colors[..., : scores.shape[1]] = scores.reshape(*features.shape[1:], -1)
        return colors


def fit_colors(
    model: nn.Module, images: Iterable[ImageLike | View], layers: Sequence[int] | int | None = None
) -> dict[int, FeatureColors]:
    """Colours for the features of each layer, fitted to all images together.

    Raises:
        ValueError: As in :func:`feature_maps`, or there are no images.
    """
    patches: dict[int, list[np.ndarray]] = {}
    for image in images:
        for layer, features in feature_maps(model, image, layers).items():
            features = features.reshape(len(features), -1)
            step = -(-features.shape[1] // FIT_PATCHES)
            patches.setdefault(layer, []).append(features[:, ::step].copy())
    if not patches:
        raise ValueError("at least one image is needed, got an empty list")
    return {layer: FeatureColors(maps) for layer, maps in patches.items()}
