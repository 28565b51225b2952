"""Attention over a picture: what is drawn in each panel, as RGB arrays.

Shapes: L memory slots, h x w pixels of the picture that is drawn.
"""

import colorcet
import matplotlib
import numpy as np

LEAST_TOP = 4.0  # the scale of the pack reaches at least this many times the mean: what is flat has to look flat
OPAQUE = 0.92  # opacity of the strongest attention: the picture shimmers through


def dimmed(picture: np.ndarray) -> np.ndarray:
    """A picture (h, w, 3) as dark greys in float32 [0, 1], on which colours stand out."""
    grey = picture.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32) / 255
    return np.repeat(0.06 + 0.4 * grey[..., None], 3, axis=-1)


def heat(times: np.ndarray, top: float) -> tuple[np.ndarray, np.ndarray]:
    """Colours (..., 3) and opacity (..., 1) of attention in multiples of the mean, on a log scale from 1 to `top`."""
    level = np.log2(times.clip(1.0, top)) / np.log2(top)
    colors = matplotlib.colormaps["inferno"](0.38 + 0.62 * level)[..., :3]
    return colors, opacity(level)[..., None]


def opacity(level: np.ndarray) -> np.ndarray:
    """Opacity of a level from 0 to 1; it rises fast, for a colour has to be seen before it can be told apart."""
    return OPAQUE * np.sqrt(level)


def paint_pack(picture: np.ndarray, times: np.ndarray, top: float) -> np.ndarray:
    """Where one slot looks.

    Args:
        picture: uint8 (h, w, 3).
        times: (h, w), attention in multiples of its mean. Up to 1 the picture stays as it is.
        top: What has the brightest colour.

    Returns:
        float (h, w, 3) in [0, 1].
    """
    colors, alpha = heat(times, top)
    return dimmed(picture) * (1 - alpha) + colors * alpha


def pack_top(maps: list[np.ndarray]) -> float:
    """The top of the scale for attention maps in multiples of the mean: a power of two, near the largest values."""
    largest = max(float(np.quantile(m, 0.995)) for m in maps)
    return float(2 ** np.round(np.log2(max(largest, LEAST_TOP))))


def slot_colors(slots: int) -> np.ndarray:
    """A colour for each slot (L, 3), as far apart as may be, and vivid, as they stand on greys.

    They are colorcet's Glasbey colours without the dull ones; after the last they begin again.
    """
    colors = np.array(colorcet.glasbey_bw_minc_20_minl_30)
    return np.resize(colors[np.ptp(colors, axis=1) > 0.35], (slots, 3))


def strength(shares: np.ndarray, slots: int, top: float) -> np.ndarray:
    """How far above an even share (0) and up to `top` (1) the largest share of a patch is."""
    even = 1 / slots
    return ((shares - even) / max(top - even, 1e-6)).clip(0, 1) if slots > 1 else np.ones_like(shares)


def paint_unpack(picture: np.ndarray, shares: np.ndarray, top: float) -> np.ndarray:
    """Which slot each patch reads most, in its colour; the stronger, the larger its share.

    Args:
        picture: uint8 (h, w, 3).
        shares: (L, h, w), what each patch reads of each slot. Where all shares are even the picture stays as it is.
        top: The share that is drawn strongest.

    Returns:
        float (h, w, 3) in [0, 1].
    """
    alpha = opacity(strength(shares.max(0), len(shares), top))[..., None]
    return dimmed(picture) * (1 - alpha) + slot_colors(len(shares))[shares.argmax(0)] * alpha


def unpack_top(maps: list[np.ndarray]) -> float:
    """The top of the scale for unpack maps (L, H', W'): near the largest share, at least 1.5 times an even one."""
    largest = max(float(np.quantile(m.max(0), 0.99)) for m in maps)
    return min(1.0, max(largest, 1.5 / len(maps[0])))


def paint_features(picture: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Colours of features (h, w, 3), with the dimmed picture where they are NaN."""
    return np.where(np.isnan(colors), dimmed(picture), colors)
