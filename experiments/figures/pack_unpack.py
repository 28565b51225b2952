"""Draw docs/figures/pack_unpack.png, the picture of pack and unpack: `python -m experiments.figures.pack_unpack`."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, Rectangle

from luna_vision.utils.files import save_figure

PATCH, SLOT, INK = "#4c78a8", "#f58518", "#333333"


def grid(ax, x, y, side, n, shades):
    """A square patch grid of n x n cells, shaded by `shades` in 0..1."""
    cell = side / n
    for i in range(n):
        for j in range(n):
            ax.add_patch(
                Rectangle(
                    (x + j * cell, y + (n - 1 - i) * cell),
                    cell * 0.9,
                    cell * 0.9,
                    color=PATCH,
                    alpha=shades[i, j],
                    lw=0,
                )
            )


def slots(ax, x, y, height, n):
    """A column of n memory slots."""
    step = height / n
    for i in range(n):
        ax.add_patch(Rectangle((x, y + i * step), 0.42, step * 0.75, color=SLOT, alpha=0.45 + 0.5 * i / n, lw=0))


def arrow(ax, start, end, text, above):
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=16, lw=1.6, color=INK))
    middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + (0.16 if above else -0.34))
    ax.text(*middle, text, ha="center", fontsize=10, color=INK)


def main() -> None:
    fig, ax = plt.subplots(figsize=(9.2, 3.3), dpi=150)
    rng = np.random.default_rng(4)
    grid(ax, 0.0, 0.5, 2.2, 8, rng.uniform(0.25, 0.9, (8, 8)))
    slots(ax, 3.95, 0.75, 1.75, 6)
    grid(ax, 6.2, 0.5, 2.2, 8, rng.uniform(0.45, 0.75, (8, 8)))
    arrow(ax, (2.35, 1.6), (3.8, 1.6), "pack", True)
    arrow(ax, (4.5, 1.6), (6.05, 1.6), "unpack", True)
    ax.text(3.08, 1.22, "each slot reads\nall patches", ha="center", va="top", fontsize=8.5, color=INK)
    ax.text(5.28, 1.22, "each patch reads\nall slots", ha="center", va="top", fontsize=8.5, color=INK)
    ax.text(1.1, 0.12, "patches X: N x d", ha="center", fontsize=10, color=INK)
    ax.text(4.16, 0.12, "memory P: L x d, L = 16", ha="center", fontsize=10, color=INK)
    ax.text(7.3, 0.12, "patches, mixed: N x d", ha="center", fontsize=10, color=INK)
    loop = FancyArrowPatch(
        (4.16, 2.6),
        (8.75, 2.6),
        connectionstyle="arc3,rad=-0.22",
        arrowstyle="-|>",
        mutation_scale=14,
        lw=1.3,
        color=SLOT,
    )
    ax.add_patch(loop)
    ax.text(6.9, 3.32, "the memory goes on to the next block", ha="center", fontsize=9, color=INK)
    ax.text(1.1, 2.95, "cost N x L, not N x N", ha="center", fontsize=10, color=INK, weight="bold")
    ax.set_xlim(-0.2, 9.2)
    ax.set_ylim(0, 3.6)
    ax.axis("off")
    out = Path(__file__).parents[2] / "docs" / "figures" / "pack_unpack.png"
    out.parent.mkdir(exist_ok=True)
    save_figure(fig, out, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    main()
