"""The number of rows of patches in a band, and the memory that encoding needs with it.

Shapes: H', W' patch grid, C width, L slots, H heads, p side of a patch.
"""

import math
import re
from typing import NamedTuple

import torch

from ..images.pixels import Pixels
from ..models import LunaVit

__all__ = ["BAND_PATCHES", "Plan", "make_plan", "parse_bytes"]

# Patches in a band, if a row is not longer. Larger bands were slower on two models and two lengths of rows: their
# activations do not fit into the caches, and the allocator returns their memory to the system after each layer.
BAND_PATCHES = 2**12
GPU_PATCHES = 2**16  # on a GPU, which has work for all of it then; not measured
SLACK = 1.2  # for memory that allocators leave unused, and for copies inside of a library's product or convolution
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class Plan(NamedTuple):
    """How an image goes through a model."""

    band: int
    """Rows of patches that go through a layer together, where all patches are valid."""
    bytes: int
    """Bytes to be allocated at most, beyond the model, Python and the libraries."""


def parse_bytes(text: str | int) -> int:
    """Read a number of bytes, or a text such as "8GB", "500 MB" (powers of 1000) or "2GiB" (powers of 1024).

    Raises:
        ValueError: Neither of them, or not above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", str(text).upper())
    factor = _UNITS[match[2]] if match else 0
    if match and match[3]:
        factor = 1024 ** round(math.log(factor, 1000)) if factor > 1 else 0
    size = int(float(match[1]) * factor) if match else 0
    if size < 1:
        raise ValueError(f"a memory budget is a number of bytes or a text such as '8GB' or '500MiB', got {text!r}")
    return size


def say_bytes(size: int) -> str:
    """A size, rounded up, that `parse_bytes` reads."""
    unit, factor = ("MB", 10**6) if size >= 10**7 else ("KB", 10**3)
    return f"{math.ceil(size / factor)} {unit}"


def make_plan(
    model: LunaVit,
    pixels: Pixels,
    grid_size: tuple[int, int],
    store_dtype: torch.dtype,
    in_file: bool,
    budget: int | None = None,
    band: int | None = None,
    count: int | None = None,
    others: int = 0,
    more: int = 0,
    free: int | None = None,
) -> Plan:
    """Choose the band, and estimate the memory.

    Args:
        model, pixels: The model and the image.
        grid_size: H', W'.
        store_dtype: Type in which the patches are kept.
        in_file: The patches are kept in a file and not in memory.
        budget: Bytes that may be allocated.
        band: Rows of a band, if the caller has chosen them.
        count: Patches that are kept, if that is not the whole grid.
        others: Bytes that are allocated besides.
        more: Numbers of a patch in work besides those of its block.
        free: Bytes that are free on the GPU, if the model is on one: a band in work takes half of them at most.

    Raises:
        ValueError: The budget is too small.
    """
    height, columns = grid_size
    count = height * columns if count is None else count
    model_dtype = next(model.parameters()).dtype
    settled = band is not None
    usual = BAND_PATCHES if free is None else GPU_PATCHES
    band = min(height, band if settled else max(usual // columns, _least_rows(model, in_file)))
    patch = (max(block.tile_numbers(model.memory_len) for block in model.stages()) + more) * _itemsize(model)
    small = 4 * model.blocks[0].small_numbers(model.memory_len)

    def in_work(band: int, in_file: bool) -> int:
        rows = min(band + 2, height)  # a halo, and rows that wait for the next band
        work = max(_stem_bytes(model, pixels, rows, columns), patch * rows * columns)
        # patches that are read from a file or converted to another type are copies
        copies = (store_dtype.itemsize if in_file else 0) + (_itemsize(model) if store_dtype != model_dtype else 0)
        work += copies * rows * columns * model.embed_dim
        return int(SLACK * work)

    def total(band: int, in_file: bool = in_file) -> int:
        kept = count + min((band + 1) * columns, count)
        store = 0 if in_file else kept * model.embed_dim * store_dtype.itemsize
        held = pixels.held_bytes + pixels.ahead_bytes(min(band + 2, height) * model.patch_embed.patch_size[0])
        return held + small + store + others + in_work(band, in_file)

    while not settled and free is not None and band > 1 and in_work(band, in_file) > free // 2:
        band -= max(1, band // 50)
    if budget is not None:
        while not settled and band > 1 and total(band) > budget:
            band -= max(1, band // 50)
        if total(band) > budget:
            image = f"a band of {band} rows of patches" if settled else "this image"
            hint = "" if in_file else f", or {say_bytes(total(band, True))} with a store on disk"
            raise ValueError(
                f"a memory budget of {say_bytes(budget)} is too small for {image}: it takes {say_bytes(total(band))} "
                f"at least{hint}"
            )
    return Plan(band, total(band))


def _least_rows(model: LunaVit, in_file: bool) -> int:
    """Rows of a band, at least, if memory allows. Each band has a fixed cost: two more rows for local mixing, through
    all of a block's second half or only through a convolution, and with a file a state on the disk."""
    if any(block.unpack_halo for block in model.stages()):
        return 8
    return 4 if in_file else 2


def _itemsize(model: LunaVit) -> int:
    # a CPU may compute half precision in float32
    return max(4, next(model.parameters()).dtype.itemsize)


def _stem_bytes(model: LunaVit, pixels: Pixels, rows: int, columns: int) -> int:
    """Bytes of the patch embedding of a band, from its pixels to its patches."""
    p, q = model.patch_embed.patch_size
    numbers = 4 * model.embed_dim
    if model.mask_stem:  # the largest are the first convolution, its norm and its activation
        channels = model.patch_embed.stem[0].conv.out_channels
        numbers += 3 * channels * (p // 2) * (q // 2)
    return pixels.band_bytes(rows * p, columns * q) + numbers * rows * columns * _itemsize(model)
