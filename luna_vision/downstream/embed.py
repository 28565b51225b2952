"""Embeddings of image files.

A row for each image: its path, the embedding that the model's head would read, and, if asked for, the memory and the
patch grid. Images keep their size; those of similar size go through a Luna ViT together, padded and masked. Writing can
be stopped at any time: what is done is kept in `OUT.partial/`, and the same call, or command, goes on from there.

The columns of a parquet file are `path`, `embedding` (C), `memory` (L, C), `grid` (flat) and `grid_shape` (H', W', C).
A .npz file has arrays of these names over all images; `grid` is (patches of all images, C) there, and that of image i
is `grid[grid_offset[i]:grid_offset[i + 1]].reshape(grid_shape[i])`. Both hold what they were made with as JSON: in the
parquet schema's metadata under "luna_vision", in the .npz as `about`.
"""

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

import luna_vision
from luna_vision.images import find_files
from luna_vision.utils.files import check_output
from luna_vision.utils.progress import progress_bar

from ._features import Extractor
from ._parts import WRITERS, PartFolder, describe
from ._windows import Settings, crop, normalisation, pixel_values, read_windows

Paths = str | os.PathLike | Sequence[str | os.PathLike]

__all__ = ["Embeddings", "Settings", "check_target", "embed_images", "embed_to_file", "write_embeddings"]


@dataclass
class Embeddings:
    """What `embed_images` returns, n images.

    Attributes:
        paths: Of the images that could be used, in the order of the input.
        embedding: (n, C) float32.
        memory: (n, L, C) float32 if it was wanted.
        grid: Of each image (H', W', C) float32, if it was wanted.
        failures: (path, reason) of each image that could not be used, and of what of the input is not there.
    """

    paths: list[str]
    embedding: np.ndarray
    memory: np.ndarray | None
    grid: list[np.ndarray] | None
    failures: list[tuple[str, str]]


def embed_images(model: nn.Module, paths: Paths, settings: Settings | None = None, progress: bool = True) -> Embeddings:
    """The embeddings of image files, in memory.

    Args:
        model: A timm model, on its device; it is put in eval mode.
        paths: Files, and folders that are searched for images.
        settings: How images are read and what is wanted of them.
        progress: Show a progress bar on stderr or, if that is no terminal, a line from time to time.

    Raises:
        ValueError: There are no images, not one of them can be used, or what is wanted does not go with the model.
        OSError: Not one of the files and folders is there.
    """
    settings = settings or Settings()
    files, failures = find_files(paths)
    extractor = Extractor(model, settings.memory, settings.grid)
    found = []
    with _bar(len(files), 0, progress) as bar:
        for window in read_windows(extractor, files, settings, advance=bar.update):
            found += window.features.items()
            failures += ((files[i], reason) for i, reason in window.failures.items())
    if not found:
        raise ValueError(f"not one of {len(failures)} images can be used; the first: {failures[0][1]}")
    return Embeddings(
        paths=[files[i] for i, _ in found],
        embedding=np.stack([features.embedding for _, features in found]),
        memory=np.stack([features.memory for _, features in found]) if settings.memory else None,
        grid=[features.grid for _, features in found] if settings.grid else None,
        failures=failures,
    )


def embed_to_file(
    model: nn.Module,
    paths: Paths,
    out: str | os.PathLike,
    settings: Settings | None = None,
    overwrite: bool = False,
    progress: bool = True,
    random_weights: bool = False,
) -> list[tuple[str, str]]:
    """Write the embeddings of image files to a .parquet or .npz file, going on where a run was stopped.

    The file is complete whenever it exists. What is done so far is in the folder `OUT.partial` beside it, which belongs
    to one model, list of files and settings (`batch_size` and `workers` may change), and is removed at the end. If
    not one image can be used, there is no file. With `overwrite`, an old file stays until the new one is complete.

    Args:
        model, paths, settings, progress: As in `embed_images`.
        out: The file; its suffix says what it is.
        overwrite: Replace the file if it exists.
        random_weights: Whether the model was not trained at all, which the file then says.

    Returns:
        (path, reason) of each image that could not be used, and of what of the input is not there.

    Raises:
        ValueError: As `embed_images`, except that it does not matter how many can be used; or another suffix, or
            parts of another run.
        OSError: `out` cannot be written, or exists.
    """
    out = Path(out)
    check_target(out, overwrite)
    files, missing = find_files(paths)
    return missing + write_embeddings(model, files, out, settings or Settings(), random_weights, progress)


def write_embeddings(
    model: nn.Module, files: list[str], out: Path, settings: Settings, random_weights: bool, progress: bool = True
) -> list[tuple[str, str]]:
    """`embed_to_file`, of files that have been found; returns those that could not be used."""
    extractor = Extractor(model, settings.memory, settings.grid)
    values = pixel_values(extractor, settings, files)
    about = _about(extractor, files, settings) | values.described() | {"random_weights": random_weights}
    parts = PartFolder(out, about)
    with _bar(len(files), parts.done, progress) as bar:
        for window in read_windows(extractor, files, settings, parts.done, bar.update, values):
            parts.add(window)
    parts.finish(files)
    return [(files[i], reason) for i, reason in parts.failures]


def check_target(out: Path, overwrite: bool) -> None:
    """Find out, before any work, whether `embed_to_file` may and can write there; it raises what that raises."""
    check_output(out, list(WRITERS), overwrite)
    if out.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError("a .parquet file takes pyarrow (pip install 'luna-vision[downstream]'); .npz does not")


def _bar(total: int, done: int, progress: bool) -> tqdm:
    return progress_bar(show=progress, total=total, initial=done, desc="embedding", unit="image")


def _about(extractor: Extractor, files: list[str], settings: Settings) -> dict[str, Any]:
    """Everything that the features depend on, but for rounding."""
    mean, std = normalisation(extractor, settings)
    crop_pct, crop_mode = crop(extractor) if settings.img_size else (None, None)
    names = "\0".join(map(os.path.abspath, files))
    return {
        "luna_vision": luna_vision.__version__,
        "model": getattr(extractor.model, "pretrained_cfg", {}).get("architecture", extractor.name),
        **describe(extractor.model),
        "images": hashlib.sha256(os.fsencode(names)).hexdigest(),
        "max_size": settings.max_size,
        "img_size": settings.img_size,
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
        "mean": mean,
        "std": std,
        "memory": settings.memory,
        "grid": settings.grid,
        "max_pixels": settings.max_pixels,
    }
