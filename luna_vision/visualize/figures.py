"""Figures of the memory and of patch features, for notebooks and for the command.

A figure is a `matplotlib.figure.Figure` without pyplot: a notebook shows it as the last value of a cell, and
`figure.savefig(path)` writes it.

Shapes: L memory slots.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import nn

from .features import FeatureColors, feature_maps, over
from .maps import SlotMaps, check_memory, check_slots, slot_maps
from .paint import pack_top, paint_features, paint_pack, paint_unpack, unpack_top
from .sheet import Head, Panel, draw_sheet, percent
from .view import ImageLike, View, view

__all__ = ["plot_features", "plot_memory", "plot_pack", "plot_unpack"]

COMPONENTS = "colours: the first three principal components of patch features, by layer"
PER_ROW = 8  # panels in a row, where a row has no meaning of its own


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
    """What the memory does with an image: a row for each layer, which slot each patch reads, and where slots look.

    All maps of the pack share one scale, and so do those of the unpack.

    Args:
        model: A Luna ViT.
        image: See :func:`luna_vision.visualize.view`.
        layers: Blocks, counted from 0, or from the last if negative; up to four, evenly spaced, if None.
        slots: The slots that get a column, or how many: then those that tell most, see
            :func:`luna_vision.visualize.telling_slots`.
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
    slots = check_slots(slots, maps)
    top = pack_top([layer.pack[slots] for layer in maps])
    unpacks = [layer.unpack for layer in maps if layer.unpack is not None]
    unpack_scale = unpack_top(unpacks) if unpacks else None
    features = feature_maps(model, seen, [layer.layer for layer in maps]) if colors else {}
    rows = []
    for layer in maps:
        panels = [_unpack_panel(seen, layer, unpack_scale)]
        if colors:
            panels.insert(0, _feature_panel(seen, colors[layer.layer], features[layer.layer]))
        panels += [_pack_panel(seen, layer, slot, top) for slot in slots]
        rows.append((f"layer {layer.layer}", panels))
    about = _head(model, seen, title, warning, maps, slots, top, unpack_scale, head)
    if colors:
        about.remark += f"\nfeatures, {COMPONENTS}"
    return draw_sheet(about, rows)


def plot_pack(
    model: nn.Module,
    image: ImageLike | View,
    layer: int = -1,
    slots: Sequence[int] | int | None = None,
    head: int | None = None,
    title: str | None = None,
) -> Figure:
    """Where each slot looks in one layer; all slots if `slots` is None. Else as :func:`plot_memory`."""
    check_memory(model)
    seen = view(model, image)
    maps = slot_maps(model, seen, layer, head)
    slots = check_slots(range(len(maps[0].pack)) if slots is None else slots, maps)
    top = pack_top([maps[0].pack[slots]])
    panels = [_pack_panel(seen, maps[0], slot, top) for slot in slots]
    columns = min(PER_ROW, -(-len(panels) // -(-len(panels) // PER_ROW)))  # rows of equal length
    rows = [("", panels[i : i + columns]) for i in range(0, len(panels), columns)]
    return draw_sheet(_head(model, seen, title, "", maps, slots, top, None, head), rows)


def plot_unpack(
    model: nn.Module,
    image: ImageLike | View,
    layers: Sequence[int] | int | None = None,
    head: int | None = None,
    title: str | None = None,
) -> Figure:
    """Which slot each patch reads most, a panel for each layer. Arguments and errors as in :func:`plot_memory`."""
    check_memory(model)
    seen = view(model, image)
    maps = slot_maps(model, seen, layers, head)
    unpacks = [layer.unpack for layer in maps if layer.unpack is not None]
    top = unpack_top(unpacks) if unpacks else None
    panels = [_unpack_panel(seen, layer, top, f"layer {layer.layer}") for layer in maps]
    rows = [("", panels[i : i + PER_ROW]) for i in range(0, len(panels), PER_ROW)]
    return draw_sheet(_head(model, seen, title, "", maps, None, None, top, head), rows)


def plot_features(
    model: nn.Module,
    images: Sequence[ImageLike | View] | ImageLike | View,
    layers: Sequence[int] | int = -1,
    foreground: bool = False,
    colors: dict[int, FeatureColors] | None = None,
    title: str | None = None,
    warning: str = "",
) -> Figure:
    """Patch features as colours: a row for each image, with the image and a panel for each layer.

    Args:
        model: Any timm model that has `forward_intermediates`.
        images: One or more, see :func:`luna_vision.visualize.view`.
        layers: Blocks, or stages of a hierarchical model, as in :func:`plot_memory`.
        foreground: See :class:`luna_vision.visualize.FeatureColors`.
        colors: Colours that have been fitted already, to other images perhaps; fitted to these if None.
        title: As in :func:`plot_memory`.
        warning: A line in red.

    Raises:
        ValueError: No images, no such layer, a model without `forward_intermediates`, or features that are not finite.
    """
    images = list(images) if isinstance(images, list | tuple) else [images]
    seen = [view(model, image) for image in images]
    if not seen:
        raise ValueError("at least one image is needed, got an empty list")
    colors = colors or fit_colors(model, seen, layers, foreground)
    rows = []
    for image in seen:
        panels = [Panel(image.picture, _short(image.name, 24) if len(seen) > 1 else "image")]
        for layer, features in feature_maps(model, image, list(colors)).items():
            panels.append(_feature_panel(image, colors[layer], features, f"layer {layer}"))
        rows.append(("", panels))
    title = title or (f"{len(seen)} images" if len(seen) > 1 else _short(seen[0].name))
    subtitle = _about(model, seen[0]) if len(seen) == 1 else _name(model)
    return draw_sheet(Head(None, title, subtitle, warning, remark=COMPONENTS), rows)


def fit_colors(
    model: nn.Module,
    images: Sequence[ImageLike | View],
    layers: Sequence[int] | int | None = None,
    foreground: bool = False,
) -> dict[int, FeatureColors]:
    """Colours for the features of each layer, fitted to all images together. Errors as in :func:`plot_features`."""
    maps = [feature_maps(model, image, layers) for image in images]
    if not maps:
        raise ValueError("at least one image is needed, got an empty list")
    return {layer: FeatureColors([found[layer] for found in maps], foreground) for layer in maps[0]}


def _pack_panel(seen: View, maps: SlotMaps, slot: int, top: float) -> Panel:
    times = maps.pack[slot]
    picture = paint_pack(seen.picture, seen.to_pixels(times), top)
    falling = np.sort(times, axis=None)[::-1].cumsum()
    half = (np.searchsorted(falling, falling[-1] / 2) + 1) / times.size
    return Panel(picture, f"slot {slot}", f"peak {_digits(times.max())}×, half on {percent(half)}", slot)


def _unpack_panel(seen: View, maps: SlotMaps, top: float | None, title: str = "slot read most") -> Panel:
    if maps.unpack is None:
        return Panel("no patch reads\nthe memory here:\nthe block only packs", title, " ")
    picture = paint_unpack(seen.picture, seen.to_pixels(maps.unpack), top)
    return Panel(picture, title, f"largest share {percent(maps.unpack.max())}")


def _feature_panel(seen: View, colors: FeatureColors, features: np.ndarray, title: str = "features") -> Panel:
    return Panel(paint_features(seen.picture, over(seen, colors(features))), title)


def _head(
    model: nn.Module,
    seen: View,
    title: str | None,
    warning: str,
    maps: list[SlotMaps],
    slots: list[int] | None,
    top: float | None,
    unpack_scale: float | None,
    head: int | None,
) -> Head:
    count = len(maps[0].pack)
    merged = "mean over heads" if head is None else f"head {head}"
    if len(maps) == 1:
        merged = f"layer {maps[0].layer}, {merged}"
    remark = "“half on 3%”: half of the slot's attention falls on 3% of the image"
    if slots is not None and len(slots) < count:
        remark += f"; {len(slots)} of {count} slots shown"
    return Head(
        seen.picture,
        title or _short(seen.name),
        f"{_about(model, seen)}, {merged}",
        warning,
        top,
        unpack_scale,
        count,
        remark if slots is not None else "",
    )


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


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"
