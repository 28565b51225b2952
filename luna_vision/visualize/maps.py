"""Attention maps of the memory as arrays, and the choice of the slots to show.

Shapes: L memory slots, H' x W' patches, h x w pixels of the picture that is drawn.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

from .view import ImageLike, View, run, view


class SlotMaps(NamedTuple):
    """The attention maps of one block for one image, heads merged."""

    layer: int
    pack: np.ndarray
    """(L, H', W'): how much slot l reads of each patch, in multiples of its mean over the patches."""
    unpack: np.ndarray
    """(L, H', W'): the share of slot l in what each patch reads, summing to 1."""


def check_layers(layers: Sequence[int] | int | None, depth: int) -> list[int]:
    """Layers as numbers from 0. Negative ones count from the last; None means up to four, evenly spaced.

    Raises:
        ValueError: A layer that does not exist.
    """
    if layers is None:
        return sorted({round(i * (depth - 1) / 3) for i in range(4)})
    layers = [layers] if isinstance(layers, int) else list(layers)
    for layer in layers:
        if not -depth <= layer < depth:
            raise ValueError(f"layer {layer} does not exist: the model has {depth}, 0 to {depth - 1}")
    return list(dict.fromkeys(layer % depth for layer in layers))


def has_memory(model: nn.Module) -> bool:
    """Whether the model has memory slots to show."""
    return getattr(model, "memory", None) is not None and hasattr(model, "get_attention_maps")


def check_memory(model: nn.Module) -> None:
    """Raise a ValueError unless the model has a memory."""
    if not has_memory(model):
        raise ValueError(
            "this model has no memory to show: only a luna_vit with mixer='luna' has one. Its patch features can be "
            "shown (--kind features, plot_features)"
        )


def slot_maps(
    model: nn.Module, image: ImageLike | View, layers: Sequence[int] | int | None = None, head: int | None = None
) -> list[SlotMaps]:
    """The attention maps of an image on the grid of its patches.

    Args:
        model: A Luna ViT.
        image: See :func:`luna_vision.visualize.view`.
        layers: Blocks, counted from 0, or from the last if negative; up to four, evenly spaced, if None.
        head: One head; the mean over heads if None.

    Returns:
        One item for each layer, in the order given.

    Raises:
        ValueError: The model has no memory, no such layer or head, or its weights give no finite maps.
    """
    check_memory(model)
    layers = check_layers(layers, len(model.blocks))
    seen = view(model, image)
    wanted = sorted(layers)
    found = {}
    for layer, maps in zip(wanted, run(model, seen.pixels, "get_attention_maps", indices=wanted), strict=True):
        pack = _merge_heads(maps.pack, head, f"pack of layer {layer}", seen.name)
        unpack = _merge_heads(maps.unpack, head, f"unpack of layer {layer}", seen.name)
        found[layer] = SlotMaps(layer, pack * pack[0].size, unpack)
    return [found[layer] for layer in layers]


def _merge_heads(maps: Tensor, head: int | None, what: str, name: str) -> np.ndarray:
    """(1, heads, L, H', W') to (L, H', W')."""
    heads = maps.shape[1]
    if head is not None and not 0 <= head < heads:
        raise ValueError(f"head {head} does not exist: the {what} has {heads}, 0 to {heads - 1}")
    maps = maps[0].float().mean(0) if head is None else maps[0, head].float()
    if not maps.isfinite().all():
        raise ValueError(f"the {what} is not finite for {name}: the weights are broken")
    return maps.cpu().numpy()


def pack_maps(model: nn.Module, image: ImageLike | View, layer: int = -1, head: int | None = None) -> np.ndarray:
    """Where each slot looks: float32 (L, h, w) over the picture, in multiples of the slot's mean over the patches.

    A slot with uniform attention has the value 1 everywhere. Arguments and errors as in :func:`slot_maps`.
    """
    seen = view(model, image)
    return seen.to_pixels(slot_maps(model, seen, layer, head)[0].pack)


def unpack_maps(model: nn.Module, image: ImageLike | View, layer: int = -1, head: int | None = None) -> np.ndarray:
    """What each patch reads: float32 (L, h, w) over the picture, shares of the slots that sum to 1.

    Arguments and errors as in :func:`slot_maps`.
    """
    seen = view(model, image)
    return seen.to_pixels(slot_maps(model, seen, layer, head)[0].unpack)


def check_slots(slots: Sequence[int] | int, maps: Sequence[SlotMaps]) -> list[int]:
    """The slots to show: those of a list, or as many as a number says, chosen by `telling_slots`.

    Raises:
        ValueError: A slot that does not exist, or none at all.
    """
    count = len(maps[0].pack)
    if isinstance(slots, int):
        if slots < 1:
            raise ValueError(f"at least one slot must be shown, got {slots}")
        return telling_slots(maps, slots)
    for slot in slots:
        if not 0 <= slot < count:
            raise ValueError(f"slot {slot} does not exist: the memory has {count}, 0 to {count - 1}")
    if not len(slots):
        raise ValueError("at least one slot must be shown, got an empty list")
    return list(dict.fromkeys(slots))


def telling_slots(maps: Sequence[SlotMaps], count: int) -> list[int]:
    """Choose slots that look at a small part of the image, each at another part.

    The first is the slot whose pack is farthest from uniform (Kullback-Leibler divergence, mean over the layers). Each
    further one has the largest product of this divergence and its total variation distance to the nearest chosen slot.

    Args:
        maps: Of one image, one item for each layer.
        count: The number of slots, at most.

    Returns:
        Slots in ascending order.
    """
    times = np.stack([layer.pack.reshape(len(layer.pack), -1) for layer in maps])  # layers, L, N
    focus = (times * np.log2(times.clip(min=1e-12))).mean((0, 2))
    chosen = [int(focus.argmax())]
    distance = np.full(len(focus), np.inf)
    while len(chosen) < min(count, len(focus)):
        distance = np.minimum(distance, np.abs(times - times[:, chosen[-1:]]).mean((0, 2)) / 2)
        score = focus * distance
        score[chosen] = -1.0
        chosen.append(int(score.argmax()))
    return sorted(chosen)
