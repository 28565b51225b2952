"""Colours for patch features: their three principal components as red, green and blue.

Shapes: C width of the features, H' x W' patches, h x w pixels of the picture that is drawn.
"""

from collections.abc import Sequence

import numpy as np
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torch import nn

from .maps import check_layers
from .view import ImageLike, View, run, view

FIT_PATCHES = 65_536  # at most so many patches are fitted to; more would hardly change the colours


def feature_maps(
    model: nn.Module, image: ImageLike | View, layers: Sequence[int] | int | None = None
) -> dict[int, np.ndarray]:
    """Patch features of any timm model that has `forward_intermediates`.

    Args:
        model: The model.
        image: See :func:`luna_vision.visualize.view`.
        layers: As in :func:`luna_vision.visualize.slot_maps`.

    Returns:
        float32 (C, H', W') for each layer, in the order given.

    Raises:
        ValueError: The model has no `forward_intermediates` or no such layer, or its features are not finite.
    """
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"{type(model).__name__} has no forward_intermediates, which patch features are read with")
    layers = check_layers(layers, len(model.feature_info))
    seen = view(model, image)
    wanted = sorted(layers)
    maps = run(model, seen.pixels, "forward_intermediates", indices=wanted, intermediates_only=True)
    found = {}
    for layer, features in zip(wanted, maps, strict=True):
        if not features.isfinite().all():
            raise ValueError(f"the features of layer {layer} are not finite for {seen.name}: the weights are broken")
        found[layer] = features[0].float().cpu().numpy()
    return {layer: found[layer] for layer in layers}


class FeatureColors:
    """Turns patch features into colours; fitted once, so that colours mean the same in all images.

    The first three principal components are red, green and blue, each from its 1st to its 99th percentile, so that a
    few outliers do not leave the rest grey. A component's sign, which means nothing, is chosen so that its longer tail
    is bright: what is rare in the images stands out from what is common.
    """

    def __init__(self, maps: Sequence[np.ndarray], foreground: bool = False) -> None:
        """
        Args:
            maps: Features (C, H', W') of the images to fit to, which may have different sizes.
            foreground: Colour only the foreground: the smaller of two clusters of patches along the first component,
                as DINOv2's figures (Oquab et al. 2023, arXiv 2304.07193) do by a threshold. The colours are fitted to
                these patches alone.

        Raises:
            ValueError: There are no maps.
        """
        if not maps:
            raise ValueError("colours need the features of at least one image")
        patches = _sample(maps)
        self._foreground = None
        if foreground:
            first = _Components(patches, 1)
            scores = first(patches)
            if scores.min() < scores.max():
                clusters = KMeans(2, n_init=1, random_state=0).fit(scores)
                rare = int(np.bincount(clusters.labels_, minlength=2).argmin())
                self._foreground = first, clusters, rare
                patches = patches[clusters.labels_ == rare]
        self._colors = _Components(patches, 3)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Features (C, H', W') to float32 (H', W', 3) in [0, 1]; NaN where a patch is background."""
        patches = features.reshape(len(features), -1).T
        colors = self._colors(patches)
        if self._foreground:
            first, clusters, rare = self._foreground
            colors[clusters.predict(first(patches)) != rare] = np.nan
        return colors.reshape(*features.shape[1:], 3)


class _Components:
    """Principal components of patches, each in [0, 1] with the longer tail up; 0.5 where a component is missing."""

    def __init__(self, patches: np.ndarray, count: int) -> None:
        self.count = count
        centred = patches - patches.mean(0)
        rank = min(count, *patches.shape) if np.abs(centred).max() > 1e-6 * np.abs(patches).max() else 0
        self.pca = PCA(rank, svd_solver="covariance_eigh").fit(patches) if rank else None
        if self.pca:
            scores = self.pca.transform(patches)
            self.sign = np.where((scores**3).mean(0) < 0, -1.0, 1.0)
            self.low, self.high = np.percentile(scores * self.sign, (1, 99), axis=0)

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        out = np.full((len(patches), self.count), 0.5, np.float32)
        if self.pca:
            scores = self.pca.transform(patches) * self.sign
            spread = np.maximum(self.high - self.low, 1e-12)
            out[:, : scores.shape[1]] = ((scores - self.low) / spread).clip(0, 1)
        return out


def _sample(maps: Sequence[np.ndarray]) -> np.ndarray:
    """Evenly spaced patches of all images, (patches, C)."""
    step = -(-sum(m[0].size for m in maps) // FIT_PATCHES)
    return np.concatenate([m.reshape(len(m), -1)[:, ::step].T for m in maps]).astype(np.float64)


def thinned(features: np.ndarray, images: int) -> np.ndarray:
    """Evenly spaced patches (C, n, 1) of features (C, H', W'): the share of one of so many images in a fit."""
    step = -(-features[0].size * images // FIT_PATCHES)
    return features.reshape(len(features), -1, 1)[:, ::step].copy()


def feature_colors(
    model: nn.Module, images: Sequence[ImageLike | View], layer: int = -1, foreground: bool = False
) -> list[np.ndarray]:
    """Colours of the patch features of several images, which mean the same in all of them.

    Args:
        model: Any timm model that has `forward_intermediates`.
        images: One or more, see :func:`luna_vision.visualize.view`.
        layer: Block, or stage of a hierarchical model.
        foreground: As in :class:`FeatureColors`.

    Returns:
        float32 (h, w, 3) in [0, 1] over the picture of each image; NaN where it is background.

    Raises:
        ValueError: As in :func:`feature_maps`, or no images.
    """
    seen = [view(model, image) for image in images]
    (maps,) = zip(*(feature_maps(model, image, layer).values() for image in seen), strict=True) if seen else ((),)
    colors = FeatureColors(maps, foreground)
    return [over(image, colors(features)) for image, features in zip(seen, maps, strict=True)]


def over(image: View, colors: np.ndarray) -> np.ndarray:
    """Lay colours of patches (H', W', 3) over the picture: (h, w, 3)."""
    return np.moveaxis(image.to_pixels(np.moveaxis(colors, -1, 0)), 0, -1)
