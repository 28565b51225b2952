"""Encodings of large image files: a row for each in one table, whatever their size.

Each image goes through `luna_vision.execution.encode` by itself. A run can be stopped at any time: `OUT.partial/` keeps
the rows that are done, and a store the image in work. Processes of torchrun share the images.

The columns are `path`, `mask` and `region` (text, empty for none), `embedding` (C), `logits` (K) where the model has
them, `memory` (L, C), `size` (H, W), `grid_size` (H', W'), `patches` that were looked at, and `broken_tiles`. The
schema's metadata under "luna_vision" has the model and the options, as JSON.
"""

import errno
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from luna_vision.execution.check import check_model
from luna_vision.execution.encode import Encoded, encode
from luna_vision.images.find import Listed, region_text
from luna_vision.images.formats import open_image
from luna_vision.utils.errors import is_check, one_line
from luna_vision.utils.progress import progress_bar
from luna_vision.utils.ranks import ALONE, Ranks

from .parts import PartFolder, describe_model

__all__ = ["concerns_image", "encode_files", "encode_row", "row_of"]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # of the disk that is written to
NOT_OF_THE_RESULT = ("memory_budget", "band_rows")  # but by rounding


def encode_row(
    model: nn.Module,
    item: Listed,
    choice: dict[str, Any],
    keep: Callable[[dict[str, np.ndarray]], object] = lambda row: None,
    **how: Any,
) -> dict[str, np.ndarray]:
    """Encode an image: the columns of its row but for the path, (1, ...) each.

    Args:
        model: A Luna ViT.
        item: The image.
        choice: Arguments of `open_image`.
        keep: Called with the row before a store is emptied.
        **how: Arguments of `encode`.
    """
    row: dict[str, np.ndarray] = {}
    image = open_image(item.path, **choice | ({} if item.region is None else {"region": item.region}))

    def save(result: Encoded) -> None:
        row.update(row_of(item, image.shape[:2], result))
        keep(row)

    encode(model, image, **how | {"mask": item.mask}, save=save, progress=False)
    return row


def row_of(item: Listed, size: tuple[int, int], result: Encoded) -> dict[str, np.ndarray]:
    """The columns of the row of an image of a size (H, W), but for the path, (1, ...) each."""
    tensors = {name: getattr(result, name) for name in ("embedding", "logits", "memory")}
    valid, grid_size = result.patch_valid, result.grid_size
    return {
        "mask": np.array([item.mask or ""], np.str_),
        "region": np.array([region_text(item.region or ())], np.str_),
        **{name: value.float().numpy()[None] for name, value in tensors.items() if value is not None},
        "size": np.array([size], np.int32),
        "grid_size": np.array([grid_size], np.int32),
        "patches": np.array([math.prod(grid_size) if valid is None else int(valid.sum())], np.int64),
        "broken_tiles": np.array([result.broken_tiles], np.int32),
    }


def concerns_image(error: Exception) -> bool:
    """Whether an error of `encode_row` says that an image cannot be used: it is no bug, and no full disk."""
    cause: BaseException | None = error
    while cause is not None:  # errors with a message of ours come from that of the system
        if isinstance(cause, OSError) and cause.errno in FULL:
            return False
        cause = cause.__cause__
    return not isinstance(error, ValueError) or is_check(error)


def encode_files(
    model: nn.Module,
    items: Sequence[Listed],
    out: Path,
    choice: dict[str, Any],
    store: Path | None = None,
    grid: Path | None = None,
    attention: Path | None = None,
    overwrite: bool = False,
    random_weights: bool = False,
    progress: bool = True,
    ranks: Ranks = ALONE,
    **how: Any,
) -> list[tuple[str, str]]:
    """Write a .parquet file with a row for each image; continue where an earlier call was stopped.

    Args:
        model: A Luna ViT, on its device; it is put in eval mode.
        items: The images.
        out: The file. If images cannot be used, `OUT.partial` stays, and a call with `overwrite` tries them again.
        choice: Arguments of `open_image` for all of them.
        store: A folder of stores, one for each image in work, from which it is resumed.
        grid: A folder for the patch grids, `NAME.npy` each.
        attention: A folder for the maps of the memory, `NAME.tif` each.
        overwrite: Replace grids and maps that are no result of this run.
        random_weights: The model was not trained; the file then says so.
        progress: Show a progress bar.
        ranks: The processes that share the images, all of which call this.
        **how: Other arguments of `luna_vision.execution.encode`, for all of them; a `mask`, as a word or a file, for
            those without one of their own.

    Returns:
        (path, reason) of each image that could not be used; of several processes, to the first.

    Raises:
        ValueError: A model that cannot stream, or `OUT.partial` has parts of another run.
        OSError: A file is in the way, or cannot be written, as on a full disk.
    """
    check_model(model, "streaming")
    mask = how.pop("mask", None)
    items = [item._replace(mask=item.mask or mask) for item in items]
    names = _names(items)
    # what `encode` writes of each image, besides the row
    folders = {"store": (store, ""), "grid": (grid, ".npy"), "attention": (attention, ".tif")}
    files = [
        {what: folder / f"{name}{suffix}" for what, (folder, suffix) in folders.items() if folder is not None}
        for name in names
    ]
    about = _about(model, items, choice | how) | {"random_weights": random_weights}
    failures: dict[int, str] = {}
    adding = False

    def add(i: int, row: dict[str, np.ndarray]) -> None:
        nonlocal adding
        adding = True
        parts.add([i], row, {})
        adding = False

    parts = PartFolder(out, about, ranks)
    todo = [i for i, own in enumerate(files) if i not in parts.done or not _is_complete(own)]
    _check_free([files[i] for i in todo if i not in parts.done], overwrite)
    ranks.gather()
    # slides of one patient, which lie side by side, are alike in size: each process takes some of them
    own = [i for i in todo if i % ranks.count == ranks.rank]
    bar = {"total": len(own), "desc": "encoding", "unit": "image"}
    with progress_bar(own, show=progress and ranks.first, **bar) as positions:
        for i in positions:
            try:
                encode_row(model, items[i], choice, partial(add, i), **how | files[i])
            except (OSError, ValueError, MemoryError) as error:
                if adding or not concerns_image(error):
                    raise
                failures[i] = one_line(error)
    every = {i: reason for part in ranks.gather(failures) for i, reason in part.items()}
    if not ranks.first:
        return []
    parts.finish([item.path for item in items], keep=bool(every))
    if store is not None:
        with suppress(OSError):  # it is not empty, or has another use
            store.rmdir()
    return [(items[i].path, reason) for i, reason in sorted(every.items())]


def _names(items: Sequence[Listed]) -> list[str]:
    """A name for what belongs to each image: that of its file, with its number where several have the same.

    Names that differ only in case are the same, as they are on some disks.
    """
    names = [Path(item.path).stem for item in items]
    while len(counts := Counter(map(str.casefold, names))) < len(names):  # a new name may be that of another file
        names = [name if counts[name.casefold()] == 1 else f"{name}-{i}" for i, name in enumerate(names)]
    return names


def _is_complete(files: dict[str, Path]) -> bool:
    """Whether all that belongs to an image is there, and its store is not."""
    return all(path.exists() != (what == "store") for what, path in files.items())


def _check_free(files: Sequence[dict[str, Path]], overwrite: bool) -> None:
    """Raise an OSError where a result would replace what is not of this run."""
    for path in (path for own in files for what, path in own.items() if what != "store"):
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists: give --overwrite (overwrite=True) to replace it")


def _about(model: nn.Module, items: Sequence[Listed], options: dict[str, Any]) -> dict[str, Any]:
    """Everything that the rows depend on, up to rounding."""
    images = json.dumps([(os.path.abspath(path), *own) for path, *own in items])
    return {
        **describe_model(model),
        "images": hashlib.sha256(os.fsencode(images)).hexdigest(),
        **{name: str(value) for name, value in options.items() if name not in NOT_OF_THE_RESULT},
    }
