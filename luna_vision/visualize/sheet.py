"""The sheet that all pictures share: a head with the image and the key to the colours, and rows of panels below.

There is no pyplot here, so nothing needs a display or has to be closed. Lengths are inches, from the top left.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .paint import heat, opacity, slot_colors

GAP, MARGIN, LABEL = 0.12, 0.22, 0.8
NARROWEST = 1.6  # room for what stands below a panel
IMAGE = 2.0  # the longer side of the image in the head, at most
TITLE, NOTE = 0.34, 0.26  # room above and below a panel
LINE, KEY, CHIP = 0.24, 0.5, 0.3
KEY_TEXT, BAR = 3.2, 2.6  # width of the words and of the bars in the key
INK, QUIET, ALARM = "#1a1a1a", "#5c5c5c", "#c00000"


@dataclass
class Panel:
    """One picture of a sheet.

    Attributes:
        picture: RGB (h, w, 3), or words where there is nothing to show.
        title: What stands above it.
        note: What stands below it.
        slot: The slot whose colour stands behind the title.
    """

    picture: np.ndarray | str
    title: str = ""
    note: str = ""
    slot: int | None = None


@dataclass
class Head:
    """The head of a sheet.

    Attributes:
        image: uint8 (h, w, 3); the words begin at the left if None.
        title: First line.
        subtitle: Second line.
        warning: Third line, in red; left out if empty.
        pack_top: Top of the scale of the pack; no key to it if None.
        unpack_top: Top of the scale of the unpack; no key to it if None.
        slots: L, whose colours the key to the unpack shows.
        remark: Last lines; left out if empty.
    """

    image: np.ndarray | None
    title: str
    subtitle: str
    warning: str = ""
    pack_top: float | None = None
    unpack_top: float | None = None
    slots: int = 0
    remark: str = ""


class _Paper:
    """A figure that is drawn on in inches from the top left."""

    def __init__(self, width: float, height: float) -> None:
        self.figure = Figure(figsize=(width, height), facecolor="white", dpi=150)
        self.width, self.height = width, height

    def axes(self, x: float, y: float, width: float, height: float, label: str) -> Axes:
        box = x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height
        return self.figure.add_axes(box, label=label)

    def text(self, x: float, y: float, words: str, **style: Any) -> None:
        style = {"va": "center", "color": INK, "fontsize": 10, "parse_math": False, **style}
        self.figure.text(x / self.width, 1 - y / self.height, words, **style)

    def panel(self, x: float, y: float, width: float, height: float, panel: Panel, slots: int, label: str) -> None:
        axes = self.axes(x, y, width, height, label)
        axes.set_xticks([])
        axes.set_yticks([])
        if isinstance(panel.picture, str):
            axes.text(0.5, 0.5, panel.picture, ha="center", va="center", color=QUIET, fontsize=9)
            axes.set_facecolor("#f2f2f2")
        else:
            axes.imshow(panel.picture)
        for side in axes.spines.values():
            side.set_visible(False)
        style: dict[str, Any] = {"fontsize": 10, "color": INK, "pad": 7, "parse_math": False}
        if panel.slot is not None:
            background = slot_colors(slots)[panel.slot]
            style.update(color=_ink_on(background), fontweight="bold")
            style["bbox"] = {"facecolor": background, "edgecolor": "none", "boxstyle": "round,pad=0.25"}
        if panel.title:
            axes.set_title(panel.title, **style)
        if panel.note:
            axes.set_xlabel(panel.note, fontsize=8.5, color=QUIET, labelpad=4)


def draw_sheet(head: Head, rows: list[tuple[str, list[Panel]]]) -> Figure:
    """Draw a sheet: its head, and rows of (label, panels) that all show the same area.

    Titles that stand above a panel of the same title are left out.
    """
    columns = max(len(panels) for _, panels in rows)
    label = LABEL if any(name for name, _ in rows) else 0.0
    side = float(np.clip(10.0 / columns, 1.7, 2.6))
    panel_width, panel_height = _panel_size(rows, side)
    chips = max(1, int((BAR + KEY_TEXT) / CHIP))
    key_height = (head.pack_top is not None) * KEY
    if head.unpack_top is not None:
        key_height += KEY + CHIP * -(-head.slots // chips)
    words = LINE * (2.3 + bool(head.warning) + (head.remark.count("\n") + 1) * bool(head.remark)) + key_height
    shrink = min(1.0, IMAGE / max(panel_width, panel_height))
    image_width, image_height = panel_width * shrink, panel_height * shrink
    picture_width = image_width + 0.3 if head.image is not None else 0.0
    head_height = max(image_height, words) if picture_width else words
    content = max(columns * (panel_width + GAP) - GAP, picture_width + KEY_TEXT + BAR)
    width = content + label + 2 * MARGIN

    titles = [[panel.title for panel in panels] for _, panels in rows]
    titled = [i == 0 or titles[i] != titles[i - 1] for i in range(len(rows))]
    noted = [any(panel.note for panel in panels) for _, panels in rows]
    heights = [TITLE * t + panel_height + NOTE * n + GAP for t, n in zip(titled, noted, strict=True)]
    paper = _Paper(width, MARGIN + head_height + GAP + sum(heights) + MARGIN - GAP)

    if head.image is not None:
        paper.panel(MARGIN + label, MARGIN, image_width, image_height, Panel(head.image), 0, "image")
    _draw_head(paper, head, MARGIN + label + picture_width, MARGIN, chips)
    y = MARGIN + head_height + GAP
    for (name, panels), with_title, height in zip(rows, titled, heights, strict=True):
        top = y + TITLE * with_title
        if name:
            paper.text(MARGIN, top + panel_height / 2, name, fontsize=11, fontweight="bold")
        for j, panel in enumerate(panels):
            if not with_title:
                panel = Panel(panel.picture, "", panel.note)
            x = MARGIN + label + j * (panel_width + GAP)
            paper.panel(x, top, panel_width, panel_height, panel, head.slots, f"{name} {titles[0][j]}".strip())
        y += height
    return paper.figure


def _panel_size(rows: list[tuple[str, list[Panel]]], side: float) -> tuple[float, float]:
    """Width and height of a panel; very long images, and images of different shapes, do not fill theirs."""
    shapes = [panel.picture.shape for _, panels in rows for panel in panels if not isinstance(panel.picture, str)]
    height, width = (max(shape[axis] / max(shape[:2]) for shape in shapes) for axis in (0, 1))
    panel_width = max(NARROWEST, side * min(1.0, width / height))
    return panel_width, float(np.clip(panel_width * height / width, 0.5, 1.8 * side))


def _draw_head(paper: _Paper, head: Head, x: float, y: float, chips: int) -> None:
    y += LINE / 2
    paper.text(x, y, head.title, fontsize=14, fontweight="bold")
    y += 1.1 * LINE
    paper.text(x, y, head.subtitle, color=QUIET)
    if head.warning:
        y += LINE
        paper.text(x, y, head.warning, color=ALARM, fontweight="bold")
    y += 1.2 * LINE
    if head.pack_top is not None:
        paper.text(x, y, "where a slot looks", fontweight="bold")
        paper.text(x, y + 0.75 * LINE, "pack: its attention, in multiples of the mean", color=QUIET, fontsize=9)
        levels = np.geomspace(1.0, head.pack_top, 256)
        colors, alpha = heat(levels, head.pack_top)
        ticks = 2.0 ** np.arange(0, np.log2(head.pack_top) + 0.01, max(1, round(np.log2(head.pack_top) / 5)))
        bar = _bar(paper, x, y, colors * alpha + 0.2 * (1 - alpha), LogNorm(1.0, head.pack_top), "pack scale")
        bar.set_ticks(ticks, labels=[f"{'≥ ' if tick == head.pack_top else ''}{tick:g}×" for tick in ticks])
        bar.minorticks_off()
        y += KEY
    if head.unpack_top is not None:
        paper.text(x, y, "which slot a patch reads most", fontweight="bold")
        paper.text(x, y + 0.75 * LINE, "unpack: the stronger, the larger its share", color=QUIET, fontsize=9)
        alpha = opacity(np.linspace(0, 1, 256))[:, None]
        even = 1 / head.slots if head.slots > 1 else 0.0
        bar = _bar(paper, x, y, alpha + 0.2 * (1 - alpha), Normalize(even, head.unpack_top), "unpack scale")
        ticks = np.linspace(even, head.unpack_top, 3)
        bar.set_ticks(ticks, labels=[percent(tick) for tick in ticks])
        y += KEY - 0.04
        for slot, color in enumerate(slot_colors(head.slots)):
            left, top = x + slot % chips * CHIP, y + slot // chips * CHIP
            _chip(paper, left, top, color, str(slot))
        y += CHIP * -(-head.slots // chips)
    for line in head.remark.splitlines():
        paper.text(x, y, line, color=QUIET, fontsize=9)
        y += LINE


def _bar(paper: _Paper, x: float, y: float, colors: np.ndarray, norm: Normalize, label: str) -> Any:
    axes = paper.axes(x + KEY_TEXT, y - 0.09, BAR, 0.16, label)
    colors = np.broadcast_to(colors, (len(colors), 3))
    bar = paper.figure.colorbar(ScalarMappable(norm, ListedColormap(colors)), cax=axes, orientation="horizontal")
    bar.outline.set_visible(False)
    axes.tick_params(labelsize=8.5, length=3, color=QUIET, labelcolor=INK)
    return bar


def _chip(paper: _Paper, x: float, y: float, color: np.ndarray, words: str) -> None:
    size = CHIP - 0.05
    box = x / paper.width, 1 - (y + size / 2) / paper.height
    paper.figure.patches.append(
        Rectangle(
            box,
            size / paper.width,
            size / paper.height,
            facecolor=color,
            transform=paper.figure.transFigure,
            figure=paper.figure,
        )
    )
    paper.text(x + size / 2, y, words, color=_ink_on(color), fontsize=8.5, ha="center", fontweight="bold")


def _ink_on(color: np.ndarray) -> str:
    return "white" if float(np.dot(color, (0.299, 0.587, 0.114))) < 0.55 else INK


def percent(share: float) -> str:
    """A share in percent, with a decimal where it is small."""
    return f"{share:.0%}" if share >= 0.095 else f"{share:.1%}"
