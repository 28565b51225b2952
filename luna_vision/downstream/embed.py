"""Embeddings of image files: `python -m luna_vision.downstream.embed --help`.

A row for each image: its path, the embedding that the model's head would read, and, if asked for, the memory and the
patch grid. Images keep their size; those of similar size go through a Luna ViT together, padded and masked. The command
can be stopped at any time: what is done is kept in `OUT.partial/`, and the same command goes on from there.

The columns of a parquet file are `path`, `embedding` (C), `memory` (L, C), `grid` (flat) and `grid_shape` (H', W', C).
A .npz file has arrays of these names over all images; `grid` is (patches of all images, C) there, and that of image i
is `grid[grid_offset[i]:grid_offset[i + 1]].reshape(grid_shape[i])`. Both hold what they were made with as JSON: in the
parquet schema's metadata under "luna_vision", in the .npz as `about`.
"""

import argparse
import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

import luna_vision
from luna_vision._commands import Parser, add_model_arguments, at_least, load_model, random_weights, run_command
from luna_vision.images import find_images
from luna_vision.images.decode import one_line
from luna_vision.utils.text import printable

from ._features import Extractor
from ._files import check_output
from ._parts import WRITERS, PartFolder, describe
from ._windows import Settings, crop, normalisation, read_windows

Paths = str | os.PathLike | Sequence[str | os.PathLike]

__all__ = ["Embeddings", "Settings", "embed_images", "embed_to_file", "main"]


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
        progress: Show a progress bar on stderr, if that is a terminal.

    Raises:
        ValueError: There are no images, not one of them can be used, or what is wanted does not go with the model.
        OSError: Not one of the files and folders is there.
    """
    settings = settings or Settings()
    files, failures = _find(paths)
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
    _check(out, overwrite)
    files, missing = _find(paths)
    return missing + _write(model, files, out, settings or Settings(), random_weights, progress)


def _write(
    model: nn.Module, files: list[str], out: Path, settings: Settings, random_weights: bool, progress: bool = True
) -> list[tuple[str, str]]:
    """`embed_to_file`, of files that have been found; returns those that could not be used."""
    extractor = Extractor(model, settings.memory, settings.grid)
    parts = PartFolder(out, _about(extractor, files, settings) | {"random_weights": random_weights})
    with _bar(len(files), parts.done, progress) as bar:
        for window in read_windows(extractor, files, settings, parts.done, bar.update):
            parts.add(window)
    parts.finish(files)
    return [(files[i], reason) for i, reason in parts.failures]


def _check(out: Path, overwrite: bool) -> None:
    check_output(out, list(WRITERS), overwrite)
    if out.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError("a .parquet file takes pyarrow (pip install 'luna-vision[downstream]'); .npz does not")


def _find(paths: Paths, say: Callable[[str], object] = lambda line: None) -> tuple[list[str], list[tuple[str, str]]]:
    """All image files, each once, and (path, reason) of what is not there, has no images or cannot be searched.

    `say` is told, in a line for each folder, what was skipped.

    Raises:
        ValueError, OSError: There is not a single image.
    """
    files: dict[str, str] = {}
    errors: list[tuple[str, Exception]] = []
    for path in [paths] if isinstance(paths, str | os.PathLike) else paths:
        try:
            for file in find_images(path, lambda error: errors.append((error.filename, error)), say):
                files.setdefault(os.path.abspath(file), file)
        except (ValueError, OSError) as error:
            errors.append((os.fspath(path), error))
    if not files:
        raise errors[0][1] if errors else ValueError("there are no images: the list of paths is empty")
    return list(files.values()), [(path, printable(one_line(error))) for path, error in errors]


def _bar(total: int, done: int, progress: bool) -> tqdm:
    # None: only on a terminal
    return tqdm(total=total, initial=done, desc="embedding", unit="image", disable=None if progress else True)


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


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m luna_vision.downstream.embed",
        usage="%(prog)s IMAGE [IMAGE ...] --out FILE [options]",
        description="Embeddings of images, a row for each. A run that was stopped goes on with the same command.",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, and folders that are searched for images")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=".parquet or .npz")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE, which is refused otherwise")
    add_model_arguments(parser)
    group = parser.add_argument_group("what is written")
    group.add_argument("--memory", action="store_true", help="the memory slots (L, C), too; takes a Luna ViT")
    group.add_argument("--grid", action="store_true", help="the patch grid (H', W', C), too")
    group = parser.add_argument_group("images", "They keep their size, unless one of the first two is given.")
    group.add_argument("--max-size", type=at_least(1), metavar="N", help="longer side at most, in pixels; shrinks only")
    group.add_argument(
        "--img-size",
        type=at_least(1),
        metavar="N",
        help="squares of this side, by the evaluation transform with the model's crop_pct and crop_mode",
    )
    group.add_argument(
        "--mean", type=float, nargs="+", help="of pixels in [0, 1], 1 or 3 numbers (default: the model's)"
    )
    group.add_argument("--std", type=float, nargs="+", help="likewise")
    group.add_argument(
        "--max-pixels",
        type=at_least(1),
        default=Settings.max_pixels,
        metavar="N",
        help="images with more pixels are refused, as decompression bombs may be (default: %(default)s, Pillow's)",
    )
    group.add_argument("--batch-size", type=at_least(1), default=32, metavar="N", help="at most (default: %(default)s)")
    group.add_argument(
        "--workers",
        type=at_least(0),
        default=0,
        metavar="N",
        help="processes that decode (default: 0, this one does)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; returns the exit code: 1 if an image could not be used, 130 after Ctrl-C."""
    args = _parser().parse_args(argv)
    names = ("max_size", "img_size", "mean", "std", "memory", "grid", "batch_size", "max_pixels", "workers")
    settings = Settings(**{name: getattr(args, name) for name in names})
    _check(args.out, args.overwrite)
    files, missing = _find(args.images, partial(print, file=sys.stderr))
    model = load_model(args, num_classes=0)
    try:
        failures = missing + _write(model, files, args.out, settings, random_weights(args))
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    total = len(files) + len(missing)
    used = total - len(failures)
    print(f"{args.out}: {used} of {total} images" if used else f"{args.out} is not written: it would be empty")
    if failures:
        print(f"{len(failures)} of {total} images could not be used:", file=sys.stderr)
    for path, reason in failures:
        name = printable(path)
        print(f"  {reason if name in reason else f'{name}: {reason}'}", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    run_command(main)
