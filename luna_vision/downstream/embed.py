"""Embeddings of image files.

A row for each image has its path, the embedding that the model's head reads and, if asked for, the memory and the patch
grid. Images keep their size; those of similar size go through a Luna ViT together, padded and masked. A run can be
stopped at any time: `OUT.partial/` keeps the finished part, and the same call, or command, continues from there.

The columns of a parquet file are `path`, `embedding` (C), `memory` (L, C), `grid` (flat) and `grid_shape` (H', W', C).
A .npz file has arrays of these names over all images; see `luna_vision.downstream.parts.write_npz` for its grids. Both
record the model and the settings as JSON: the parquet schema's metadata under "luna_vision", the .npz as `about`.
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

from luna_vision.images import find_files
from luna_vision.utils.files import check_output
from luna_vision.utils.progress import progress_bar
from luna_vision.utils.ranks import ALONE, Ranks

from .features import Extractor
from .parts import WRITERS, PartFolder, describe_model, window_columns
from .windows import Settings, data_config, pixel_values, read_windows

Paths = str | os.PathLike | Sequence[str | os.PathLike]

__all__ = ["Embeddings", "Settings", "check_target", "embed_images", "embed_to_file", "write_embeddings"]


@dataclass
class Embeddings:
    """The result of `embed_images` for n images.

    Attributes:
        paths: The images that could be used, in the order of the input.
        embedding: (n, C) float32.
        memory: (n, L, C) float32 if it was wanted.
        grid: (H', W', C) float32 of each image, if it was wanted.
        failures: (path, reason) of each image that could not be used, and of each path that does not exist.
    """

    paths: list[str]
    embedding: np.ndarray
    memory: np.ndarray | None
    grid: list[np.ndarray] | None
    failures: list[tuple[str, str]]


def embed_images(model: nn.Module, paths: Paths, settings: Settings | None = None, progress: bool = True) -> Embeddings:
    """Compute the embeddings of image files, in memory.

    Args:
        model: A timm model, on its device; it is put in eval mode.
        paths: Files, and folders that are searched for images.
        settings: How images are read, and which features are wanted.
        progress: Show a progress bar on stderr or, if that is no terminal, a line from time to time.

    Raises:
        ValueError: There are no images, none of them can be used, or the settings do not fit the model.
        OSError: None of the files and folders exists.
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
    """Write the embeddings of image files to a .parquet or .npz file; continue where an earlier call was stopped.

    The file is complete whenever it exists. The folder `OUT.partial` beside it keeps the finished part. It belongs to
    one model, list of files and settings (`batch_size` and `workers` may change), and is removed at the end. If no
    image can be used, there is no file. With `overwrite`, an old file stays until the new one is complete.

    Args:
        model, paths, settings, progress: As in `embed_images`.
        out: The file; its suffix chooses the format.
        overwrite: Replace the file if it exists.
        random_weights: The model was not trained; the file then says so.

    Returns:
        (path, reason) of each image that could not be used, and of each path that does not exist.

    Raises:
        ValueError: As in `embed_images`, though images that cannot be used are no error; or another suffix, or the
            folder has parts of another run.
        OSError: `out` cannot be written, or exists.
    """
    out = Path(out)
    check_target(out, overwrite)
    files, missing = find_files(paths)
    return missing + write_embeddings(model, files, out, settings or Settings(), random_weights, progress)


def write_embeddings(
    model: nn.Module,
    files: list[str],
    out: Path,
    settings: Settings,
    random_weights: bool,
    progress: bool = True,
    ranks: Ranks = ALONE,
) -> list[tuple[str, str]]:
    """`embed_to_file` for image files that were found before; returns those that could not be used.

    All of `ranks` call this and share the images; the first one writes the file, and returns what all could not use.
    """
    extractor = Extractor(model, settings.memory, settings.grid)
    values = pixel_values(extractor, settings, files)
    about = _about(extractor, files, settings) | values.described() | {"random_weights": random_weights}
    parts, own = PartFolder(out, about, ranks), ranks.share(len(files))
    with _bar(len(own), sum(i in parts.done for i in own), progress and ranks.first) as bar:
        for start, stop in parts.gaps(own):
            for window in read_windows(extractor, files, settings, start, bar.update, values, stop):
                parts.add(list(window.features), window_columns(window), window.failures)
    ranks.gather()
    if not ranks.first:
        return []
    parts.finish(files)
    return [(files[i], reason) for i, reason in parts.failures]


def check_target(out: Path, overwrite: bool) -> None:
    """Raise the errors of `embed_to_file` about its output before any work."""
    check_output(out, list(WRITERS), overwrite)
    if out.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError("a .parquet file needs pyarrow (pip install 'luna-vision[downstream]'); .npz does not")


def _bar(total: int, done: int, progress: bool) -> tqdm:
    return progress_bar(show=progress, total=total, initial=done, desc="embedding", unit="image")


def _about(extractor: Extractor, files: list[str], settings: Settings) -> dict[str, Any]:
    """Everything that the features depend on, up to rounding."""
    config = data_config(extractor, settings)
    if not settings.img_size:  # images are not cropped
        config |= {"crop_pct": None, "crop_mode": None}
    names = "\0".join(map(os.path.abspath, files))
    return {
        **describe_model(extractor.model),
        "images": hashlib.sha256(os.fsencode(names)).hexdigest(),
        **config,
        **{name: getattr(settings, name) for name in ("max_size", "img_size", "memory", "grid", "max_pixels")},
    }
