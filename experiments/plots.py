"""Shares with their intervals, as cells of tables and in plots."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from luna_vision.utils.files import save_figure

__all__ = ["cell", "error_bars", "figure_file", "wilson"]


def wilson(correct: int, images: int, z: float = 1.959964) -> tuple[float, float]:
    """95% interval of a share, Wilson 1927."""
    share = correct / images
    centre = (share + z**2 / (2 * images)) / (1 + z**2 / images)
    half = z / (1 + z**2 / images) * math.sqrt(share * (1 - share) / images + z**2 / (4 * images**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def cell(found: dict[str, Any] | None) -> str:
    """A share and its 95% interval, in %, for a table."""
    if found is None:
        return "-"
    low, high = wilson(found["correct"], found["images"])
    return f"{100 * found['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def error_bars(tests: list[dict[str, Any]]) -> list[list[float]]:
    """Lengths of the 95% intervals downwards and upwards, in %, as `Axes.errorbar` takes them."""
    bounds = [wilson(one["correct"], one["images"]) for one in tests]
    down = [100 * (one["accuracy"] - low) for one, (low, _) in zip(tests, bounds, strict=True)]
    return [down, [100 * (high - one["accuracy"]) for one, (_, high) in zip(tests, bounds, strict=True)]]


@contextlib.contextmanager
def figure_file(out: Path, size: tuple[float, float] = (6, 4)) -> Iterator[Axes]:
    """Axes to draw on, written to `out` at the end, with a grid and a legend.

    Args:
        out: The picture.
        size: Width and height, inches.
    """
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    yield axes
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    save_figure(figure, out, dpi=120)
