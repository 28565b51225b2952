"""How many rows of patches go through a layer together, and the memory that it takes.

Shapes: H', W' patch grid, C width, L slots, H heads, p side of a patch.
"""

import math
import re
from functools import partial
from typing import NamedTuple

import torch

from ..images.pixels import Pixels
from ..models import LunaVit
from .store import ring_bytes

__all__ = ["BAND_PATCHES", "Plan", "make_plan", "parse_bytes"]

# Of a band, where its rows are not too long for that: what a layer makes of more leaves the caches, and is handed back
# to the system and fetched again. Both were slower, on two models and two lengths of rows.
BAND_PATCHES = 2**12
# what allocators leave unused between blocks of memory, and what libraries copy inside of a product or a convolution
SLACK = 1.2
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class Plan(NamedTuple):
    """How an image goes through a model."""

    band: int
    """Rows of patches that go through a layer together."""
    margin: int
    """Free rows of the ring."""
    bytes: int
    """What is allocated at most, beyond the model, Python and the libraries."""


def parse_bytes(text: str | int) -> int:
    """A number of bytes, from itself or from a text such as "8GB", "500 MB" (powers of 1000) or "2GiB" (of 1024).

    Raises:
        ValueError: It is neither, or not above 0.
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
) -> Plan:
    """
    Args:
        model, pixels: What runs, and on what.
        grid_size: H', W'.
        store_dtype: Type in which the patches are kept.
        in_file: They are kept in a file, and take no memory.
        budget: Bytes that may be allocated.
        band: Rows of patches that go through a layer together, if that is settled.

    Raises:
        ValueError: The budget is too small.
    """
    height, columns = grid_size
    model_dtype = next(model.parameters()).dtype
    settled = band is not None
    band = min(height, band if settled else max(BAND_PATCHES // columns, _least_rows(model, in_file)))
    store_rows = partial(ring_bytes, columns=columns, width=model.embed_dim, dtype=store_dtype)

    patch = max(block.tile_numbers(model.memory_len) for block in model.blocks) * _itemsize(model)
    small = 4 * model.blocks[0].small_numbers(model.memory_len)

    def total(band: int, in_file: bool = in_file) -> int:
        rows = min(band + 2, height)  # a halo, and what waits for the next band
        store = 0 if in_file else store_rows(height, band + 1)
        work = max(_stem_bytes(model, pixels, rows, columns), patch * rows * columns)
        # what is read from a file or widened is a copy
        copies = (store_dtype.itemsize if in_file else 0) + (_itemsize(model) if store_dtype != model_dtype else 0)
        work += copies * rows * columns * model.embed_dim
        return pixels.held_bytes + small + store + int(SLACK * work)

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
    return Plan(band, band + 1, total(band))


def _least_rows(model: LunaVit, in_file: bool) -> int:
    """Rows of a band that keep what each costs besides its patches small, where memory allows: two more rows for local
    mixing, which go through all of a block's second half or only through a convolution, and a state on the disk."""
    if any(block.unpack_halo for block in model.blocks):
        return 8
    return 4 if in_file else 2


def _itemsize(model: LunaVit) -> int:
    # half precision is widened where it is slow
    return max(4, next(model.parameters()).dtype.itemsize)


def _stem_bytes(model: LunaVit, pixels: Pixels, rows: int, columns: int) -> int:
    """Of a band, from its pixels to its patches."""
    p, q = model.patch_embed.patch_size
    numbers = 4 * model.embed_dim
    if model.mask_stem:  # the first convolution, its norm and its activation are the largest
        channels = model.patch_embed.stem[0].conv.out_channels
        numbers += 3 * channels * (p // 2) * (q // 2)
    return pixels.band_bytes(rows * p, columns * q) + numbers * rows * columns * _itemsize(model)
