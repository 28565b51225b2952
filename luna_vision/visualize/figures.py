"""Figures of the memory and of patch features, for notebooks and for the command.

Each function returns a `matplotlib.figure.Figure` that pyplot does not know: a notebook shows it as the last value of
a cell, and `figure.savefig(path)` writes it.

Shapes: L memory slots, H' x W' patches, h x w pixels of the picture that is drawn.
"""

from collections.abc import Sequence
from typing import Any

import colorcet
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import nn

from .features import FeatureColors, feature_maps, fit_colors
from .maps import SlotMaps, check_memory, check_slots, slot_maps
from .view import ImageLike, View, view

__all__ = ["plot_features", "plot_memory", "slot_colors"]

LEAST_TOP = 4.0  # the scale of the pack reaches at least this multiple of the mean, so that a flat map looks flat
OPAQUE = 0.92  # opacity of the strongest attention: the picture shimmers through
INK, QUIET, ALARM = "#1a1a1a", "#5c5c5c", "#c00000"
PACK_KEY = """where a slot looks (pack):
its attention, in multiples of the mean
“half on 3%”: half of it falls on 3% of the image"""
UNPACK_KEY = "slot that a patch reads most (unpack);\nthe larger its share, the stronger the colour"
SIDEBAR, PANEL, TEXT = 3.0, 2.2, 0.35  # inches: width of the sidebar, longer side of a panel, height of a line

# from transparent (the mean) to opaque (the top of the scale); opacity rises fast, so that a colour is seen at once
LEVELS = np.linspace(0, 1, 256)
HEAT = ListedColormap(
    np.column_stack([matplotlib.colormaps["inferno"](0.38 + 0.62 * LEVELS)[:, :3], OPAQUE * np.sqrt(LEVELS)])
)


def plot_memory(
    model: nn.Module,
    image: ImageLike | View,
    layers: Sequence[int] | int | None = None,
    slots: Sequence[int] | int = 6,
    head: int | None = None,
    colors: dict[int, FeatureColors] | None = None,
    title: str | None = None,
    warning: str = "",
) -> Figure:
    """Draw what the memory does with an image: a row for each layer, with the slot that each patch reads most and a
    panel for each slot that shows where it looks.

    All maps of the pack share one scale, and so do those of the unpack.

    Args:
        model: A Luna ViT.
        image: See :func:`luna_vision.visualize.view`.
        layers: Blocks, counted from 0, or from the last if negative; up to four, evenly spaced, if None.
        slots: The slots that get a panel, or their number: :func:`luna_vision.visualize.telling_slots` chooses then.
        head: One head; the mean over heads if None.
        colors: Adds a column of patch features in these colours, see :func:`luna_vision.visualize.fit_colors`.
        title: First line of the figure; the image's name if None.
        warning: A line in red.

    Raises:
        ValueError: The model has no memory, no such layer, slot or head, or its weights give no finite maps.
    """
    check_memory(model)
    seen = view(model, image)
    maps = slot_maps(model, seen, layers, head)
    count, slots = len(maps[0].pack), check_slots(slots, maps)
    largest = max(np.quantile(layer.pack[slot], 0.995) for layer in maps for slot in slots)
    norm = LogNorm(1, 2 ** np.round(np.log2(max(largest, LEAST_TOP))), clip=True)
    shares = [np.quantile(layer.unpack.max(0), 0.99) for layer in maps]
    strongest = min(1.0, max([1.5 / count, *shares]))
    features = feature_maps(model, seen, [layer.layer for layer in maps]) if colors else {}

    about = f"{_about(model, seen)}, {'mean over heads' if head is None else f'head {head}'}"
    if colors:
        about += "\nfeatures: the first three principal components, by layer"
    columns = len(slots) + (2 if colors else 1)
    title = title or _short(seen.name)
    figure, grid, sidebar = _figure(seen, (len(maps), columns), title, about, warning, SIDEBAR)
    for row, layer in zip(grid, maps, strict=True):
        row[0].set_ylabel(f"layer {layer.layer}", fontsize=11, fontweight="bold")
        panels = list(row)
        if colors:
            _draw(panels.pop(0), seen, colors[layer.layer](features[layer.layer]), "features")
        _draw_unpack(panels.pop(0), seen, layer, strongest)
        for axes, slot in zip(panels, slots, strict=True):
            _draw_pack(axes, seen, layer, slot, norm)
    shown = "" if len(slots) == count else f"\n{len(slots)} of {count} slots shown"
    _draw_key(sidebar, seen, norm, count, shown)
    return figure


def plot_features(
    model: nn.Module,
    images: Sequence[ImageLike | View] | ImageLike | View,
    layers: Sequence[int] | int = -1,
    colors: dict[int, FeatureColors] | None = None,
    title: str | None = None,
    warning: str = "",
) -> Figure:
    """Draw patch features as colours: a row for each image, with the image and a panel for each layer.

    Args:
        model: Any timm model that has `forward_intermediates`.
        images: One or more, see :func:`luna_vision.visualize.view`.
        layers: Blocks, or stages of a hierarchical model, as in :func:`plot_memory`.
        colors: Colours that have been fitted to other images; they are fitted to these if None.
        title: As in :func:`plot_memory`.
        warning: A line in red.

    Raises:
        ValueError: No images, no such layer, a model without `forward_intermediates`, or features that are not finite.
    """
    seen = [view(model, image) for image in (images if isinstance(images, list | tuple) else [images])]
    if not seen:
        raise ValueError("at least one image is needed, got an empty list")
    colors = colors or fit_colors(model, seen, layers)
    title = title or (f"{len(seen)} images" if len(seen) > 1 else _short(seen[0].name))
    about = _about(model, seen[0]) if len(seen) == 1 else _name(model)
    about += "\nthe first three principal components of patch features, by layer"
    figure, grid, _ = _figure(seen[0], (len(seen), 1 + len(colors)), title, about, warning)
    for row, image in zip(grid, seen, strict=True):
        if len(seen) > 1:
            row[0].set_ylabel(_short(image.name, 24))
        _draw(row[0], image, None, "image")
        for axes, (layer, features) in zip(row[1:], feature_maps(model, image, list(colors)).items(), strict=True):
            _draw(axes, image, colors[layer](features), f"layer {layer}")
    return figure


def slot_colors(slots: int) -> np.ndarray:
    """A vivid colour for each slot (L, 3): colorcet's Glasbey colours without the dull ones, repeated if necessary."""
    colors = np.array(colorcet.glasbey_bw_minc_20_minl_30)
    return np.resize(colors[np.ptp(colors, axis=1) > 0.35], (slots, 3))


def _figure(
    seen: View, shape: tuple[int, int], title: str, about: str, warning: str, sidebar: float = 0.0
) -> tuple[Figure, np.ndarray, np.ndarray | None]:
    """A figure, its grid of axes (rows, columns), and the two axes of a sidebar of that width if there is one."""
    height, width = seen.picture.shape[:2]
    panel = max(PANEL * min(1, width / height), 1.6), max(PANEL * min(1, height / width), 0.5) + TEXT
    size = max(shape[1] * panel[0] + sidebar, 7.0), max(shape[0] * panel[1], 1.4 * sidebar) + 3 * TEXT
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    head = {"fontsize": 13, "fontweight": "bold", "parse_math": False}
    figure.suptitle(f"{warning}\n{title}" if warning else title, color=ALARM if warning else INK, **head)
    figure.supxlabel(about, fontsize=9, color=QUIET, parse_math=False)
    left, right = figure.subfigures(1, 2, width_ratios=[sidebar, size[0] - sidebar]) if sidebar else (None, figure)
    grid = right.subplots(*shape, squeeze=False)
    return figure, grid, left.subplots(2, 1, height_ratios=[1, 0.06]) if sidebar else None


def _draw(axes: Axes, seen: View, values: np.ndarray | None, title: str, note: str = "", **colors: Any) -> None:
    """Draw patch values (H', W') or colours (H', W', 3 or 4) over the picture in dark greys; the picture for None."""
    grey = seen.picture @ np.array([0.299, 0.587, 0.114]) / 255
    axes.imshow(seen.picture if values is None else np.repeat(0.06 + 0.4 * grey[..., None], 3, axis=-1))
    if values is not None:
        channels_first = np.moveaxis(values, (0, 1), (-2, -1))
        axes.imshow(np.moveaxis(seen.to_pixels(channels_first), (-2, -1), (0, 1)), **colors)
    axes.set(xticks=[], yticks=[], frame_on=False)
    if axes.get_subplotspec().is_first_row():
        axes.set_title(title, fontsize=10, parse_math=False)
    axes.set_xlabel(note, fontsize=8.5, color=QUIET)


def _draw_pack(axes: Axes, seen: View, maps: SlotMaps, slot: int, norm: LogNorm) -> None:
    """Draw where a slot looks; the picture stays as it is where the slot reads no more than the mean."""
    times = maps.pack[slot]
    falling = np.sort(times, axis=None)[::-1].cumsum()
    half = (np.searchsorted(falling, falling[-1] / 2) + 1) / times.size
    peak = f"{times.max():.0f}" if times.max() >= 10 else f"{times.max():.1f}"
    _draw(axes, seen, times, f"slot {slot}", f"peak {peak}×, half on {_percent(half)}", cmap=HEAT, norm=norm)
    color = slot_colors(len(maps.pack))[slot]
    axes.title.set(color=_ink_on(color), fontweight="bold")
    axes.title.set_bbox({"facecolor": color, "edgecolor": "none", "boxstyle": "round,pad=0.25"})


def _draw_unpack(axes: Axes, seen: View, maps: SlotMaps, strongest: float) -> None:
    """Draw the slot that each patch reads most, in the slot's colour; opacity grows from an even share upwards."""
    even = 1 / len(maps.unpack) if len(maps.unpack) > 1 else 0
    shares = maps.unpack.max(0)
    alpha = OPAQUE * np.sqrt(((shares - even) / (strongest - even)).clip(0, 1))
    colors = np.dstack([slot_colors(len(maps.unpack))[maps.unpack.argmax(0)], alpha])
    _draw(axes, seen, colors, "slot read most", f"largest share {_percent(shares.max())}")


def _draw_key(axes: np.ndarray, seen: View, norm: LogNorm, slots: int, shown: str) -> None:
    """Draw the image, the scale of the pack, and the colours of the slots."""
    image, scale = axes
    _draw(image, seen, None, "image")
    image.set_anchor("N")
    bar = scale.figure.colorbar(ScalarMappable(norm, HEAT), cax=scale, orientation="horizontal")
    scale.set_facecolor("#333333")  # a picture's greys, through which the colours are seen
    ticks = 2.0 ** np.arange(0, np.log2(norm.vmax) + 0.01, max(1, round(np.log2(norm.vmax) / 5)))
    bar.set_ticks(ticks, labels=[f"{'≥ ' if tick == norm.vmax else ''}{tick:g}×" for tick in ticks], fontsize=8.5)
    bar.minorticks_off()
    bar.set_label(PACK_KEY + shown, fontsize=8.5)
    chips = [Patch(color=color, label=str(slot)) for slot, color in enumerate(slot_colors(slots))]
    style = {"ncols": 4 if slots <= 16 else 8, "fontsize": 8.5, "title_fontsize": 8.5, "frameon": False}
    scale.figure.legend(handles=chips, loc="outside lower center", title=UNPACK_KEY, handlelength=1, **style)


def _ink_on(color: np.ndarray) -> str:
    return "white" if np.dot(color, (0.299, 0.587, 0.114)) < 0.55 else INK


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.095 else f"{share:.1%}"


def _name(model: nn.Module) -> str:
    return model.pretrained_cfg.get("architecture") or type(model).__name__


def _about(model: nn.Module, seen: View) -> str:
    height, width = seen.pixels.shape[-2:]
    text = f"{_name(model)} sees {width} × {height} pixels"
    if seen.patch_size:
        rows, columns = seen.patch_size
        text += f" in {-(-width // columns)} × {-(-height // rows)} patches"
    return text


def _short(name: str, longest: int = 60) -> str:
    """The last part of a path, shortened in the middle."""
    name = " ".join(name.replace("\\", "/").rsplit("/", 1)[-1].split())
    half = (longest - 1) // 2
    return name if len(name) <= longest else f"{name[:half]}…{name[-half:]}"
