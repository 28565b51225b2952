"""The figures and the page of a report."""

from __future__ import annotations

import base64
import csv
import io
import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
import numpy as np
from lightning.pytorch import Trainer
from matplotlib.figure import Figure
from PIL import Image

from luna_vision.data.images import describe_split
from luna_vision.downstream.segmentation import voc_palette
from luna_vision.utils.files import new_file, save_figure, write_text
from luna_vision.utils.record import machine
from luna_vision.utils.text import printable, utf8

from .base import TimmTask
from .outcomes import NOTHING, Calibration, LabelsOutcome, Outcome
from .pictures import sheet

if TYPE_CHECKING:
    from .report import Example

PAGE = "report.html"
SCORES = {"test_ap": "average precision", "test_iou": "IoU"}
CLASSES = "Found: the share of what is there that is found. Right: the share of what is predicted that is right."
CONFUSION = "Each row has all that is there of a class, and what it is taken for."
CALIBRATION = "Points below the line: the model is surer than it is right."
MOST = 30  # classes in a figure; the table has all of them
PAIRS = 10  # of confused classes in the table
INK, QUIET, BLUE, ORANGE = "#1a1a1a", "#5c5c5c", "#1f6fb4", "#d9730d"
Curve = tuple[list[float], list[float]]  # steps and values
Table = list[list[str]]


def write_report(
    run: Path, trainer: Trainer, task: TimmTask, outcome: Outcome, best: Sequence[Example], worst: Sequence[Example]
) -> Path:
    """Write the folder ``report`` of a run: report.html and its pictures.

    Args:
        run: Folder of the run, whose ``metrics.csv`` has the curves.
        trainer: After a test, with its scores.
        task: That was tested.
        outcome: Of the test.
        best, worst: Images.

    Returns:
        The page.

    Raises:
        OSError: It cannot be written.
    """
    folder = run / "report"
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("test_")}
    sections: list[dict[str, Any]] = []

    def add(title: str, name: str, picture: Figure | Image.Image, **more: Any) -> None:
        sections.append({"title": title, "picture": _write(picture, folder / f"{name}.png"), **more})

    if curves := read_curves(run / "metrics.csv"):
        add("Training", "curves", plot_curves(curves))
    rows = class_rows(metrics, outcome)
    kind = _kind(metrics)
    table = {"table": class_table(rows, kind, outcome), "colors": [row.color for row in rows]}
    add("Classes", "classes", plot_classes(rows, kind), text=CLASSES, **table)
    if isinstance(outcome, LabelsOutcome):
        add("Found and missed", "confusion", plot_labels(outcome))
    else:
        title = "What is taken for what"
        add(title, "confusion", plot_confusion(outcome), text=CONFUSION, table=confused(outcome))
    error = f"Expected calibration error {outcome.calibration.error:.3f}, of {outcome.confident}. {CALIBRATION}"
    add("Calibration", "calibration", plot_calibration(outcome.calibration), text=error)
    for title, name, examples in (("Best images", "best", best), ("Worst images", "worst", worst)):
        if examples:
            side = max(max(one.picture.size) for one in examples)
            _write(sheet([one.picture.copy() for one in examples], 2, side), folder / f"{name}.png")
            shown = [{"name": printable(e.name), "words": e.words, "picture": _inline(e.picture)} for e in examples]
            sections.append({"title": title, "text": task.outcome.shown, "examples": shown})
    scores = [(name.removeprefix("test_"), f"{value:.4f}") for name, value in metrics.items() if "/" not in name]
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    own = machine()
    of = ", ".join([own["cpu"], *(f"{name} {own[name]}" for name in ("torch", "timm", "luna_vision"))])
    content = {"title": f"Report of {printable(str(run))}", "about": _about(trainer, task), "scores": scores}
    page = jinja2.Template(template, autoescape=True).render(**content, sections=sections, machine=of)
    write_text(folder / PAGE, utf8(page))
    return folder / PAGE


def _about(trainer: Trainer, task: TimmTask) -> str:
    data = trainer.datamodule
    parameters = sum(parameter.numel() for parameter in task.model.parameters())
    dataset = getattr(trainer.test_dataloaders, "dataset", None)
    # which says whether these are images of validation, on which the best weights were chosen
    images = "" if dataset is None else f", {describe_split('test', dataset, None).removeprefix('test: ')}"
    source = "" if data is None else f", tested on {type(data).__name__} {getattr(data, 'root', '')}{images}"
    weights = f", weights of {trainer.ckpt_path}" if trainer.ckpt_path else ""
    name = f"{type(task).__name__} with {task.hparams.model_name}"
    return printable(f"{name}, {parameters:,} parameters{weights}{source}".strip())


def _write(picture: Figure | Image.Image, path: Path) -> str:
    """Write a PNG, and return it as an address that a page can hold."""
    if isinstance(picture, Figure):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # classes may have names in any script
            save_figure(picture, path, dpi=110)
    else:
        with new_file(path) as file:
            picture.save(file, "PNG")
    return _address(path.read_bytes(), "png")


def _inline(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=88)
    return _address(file.getvalue(), "jpeg")


def _address(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


# ---- curves


def read_curves(path: Path) -> dict[str, Curve]:
    """The logged numbers of a run by name; empty where there is no file of them. Of a step that is there twice, as
    after a resume, the last one counts."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                for name, text in row.items():
                    if text and name not in ("step", "epoch") and not name.startswith("test_"):
                        found[name][int(row["step"])] = float(text)
    return {name: (sorted(steps), [steps[at] for at in sorted(steps)]) for name, steps in found.items()}


def plot_curves(curves: dict[str, Curve]) -> Figure:
    """Losses, validation scores and learning rate over the steps."""
    losses = [name for name in ("train_loss", "train_loss_epoch", "val_loss") if name in curves]
    scores = [name for name in curves if name.startswith("val_") and name != "val_loss"]
    panels = [("loss", losses), ("validation", scores), ("learning rate", [name for name in ("lr",) if name in curves])]
    panels = [(title, names) for title, names in panels if names]
    figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name in names:
            faint = {"alpha": 0.35, "linewidth": 0.8} if name == "train_loss" else {"marker": ".", "markersize": 4}
            axes.plot(*curves[name], label=name, **faint)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


# ---- classes


class ClassRow(NamedTuple):
    """A class of a report."""

    name: str
    color: str  # of its masks or boxes, as HTML has it; empty where there is none
    there: int  # how often it is there
    score: float  # its average precision or IoU, NaN where there is none
    found: float  # the share of those that are there that is found
    right: float  # the share of those that are predicted that is right


def _kind(metrics: dict[str, float]) -> str:
    """The name of the score of a class, empty where the test has none."""
    return next((SCORES[name.partition("/")[0]] for name in metrics if "/" in name), "")


def class_rows(metrics: dict[str, float], outcome: Outcome) -> list[ClassRow]:
    """The classes that are there or were predicted."""
    each = {name.partition("/")[2]: value for name, value in metrics.items() if "/" in name}
    if isinstance(outcome, LabelsOutcome):
        there, predicted = outcome.confusion.sum(2)[:, 1], outcome.confusion.sum(1)[:, 1]
        hits = outcome.confusion[:, 1, 1]
    else:
        there, predicted, hits = outcome.confusion.sum(1), outcome.confusion.sum(0), outcome.confusion.diagonal()
    rows, palette = [], voc_palette().tolist()
    for i, name in enumerate(outcome.names):
        color = "" if outcome.first_color is None else "rgb({}, {}, {})".format(*palette[i + outcome.first_color])
        found, right = (float(hits[i] / total[i]) if total[i] else math.nan for total in (there, predicted))
        if (there[i] or predicted[i]) and name is not NOTHING:
            rows.append(ClassRow(name, color, int(there[i]), each.get(name, math.nan), found, right))
    return rows


def class_table(rows: list[ClassRow], kind: str, outcome: Outcome) -> Table:
    """A header, and a row for each class."""
    table = [["class", outcome.counted, *([kind] if kind else []), "found", "right"]]
    for row in rows:
        shares = [row.score] * bool(kind) + [row.found, row.right]
        table.append([printable(row.name), f"{row.there:,}", *("-" if math.isnan(x) else f"{x:.3f}" for x in shares)])
    return table


def plot_classes(rows: list[ClassRow], kind: str) -> Figure:
    """A bar for the score of each class, the least one on top; without a score, for the share that is found."""
    values = [(row.score if kind else row.found, row.name) for row in rows]
    values = sorted((value, name) for value, name in values if not math.isnan(value))
    cut, values = len(values) > MOST, values[:MOST]
    figure = Figure(figsize=(7, 0.9 + 0.26 * max(len(values), 1)), layout="constrained")
    axes = figure.subplots()
    at = np.arange(len(values))
    bars = axes.barh(at, [value for value, _ in values], color=BLUE, height=0.7)
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8.5)
    axes.set_yticks(at, [_short(name) for _, name in values], parse_math=False)
    axes.set(xlim=(0, 1.08), ylim=(len(values) - 0.4, -0.6), xlabel=kind or "share that is found")
    axes.set_title(f"the {MOST} classes with the least" if cut else "", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    return figure


def plot_confusion(outcome: Outcome) -> Figure:
    """What is predicted where each class is, as shares of it."""
    confusion, names = outcome.confusion, outcome.names
    wrong = confusion.sum(0) + confusion.sum(1) - 2 * confusion.diagonal()
    cut = len(names) > MOST
    if cut:
        kept = np.sort(np.argsort(-wrong, kind="stable")[:MOST])
    else:
        kept = np.flatnonzero(confusion.sum(0) + confusion.sum(1))
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    shares, names = shares[np.ix_(kept, kept)], [_short(names[i], 18) for i in kept]
    side = max(4.0, 1.8 + 0.42 * len(kept))
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    at = np.arange(len(kept))
    axes.set_xticks(at, names, rotation=60, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(at, names, parse_math=False)
    axes.set(xlabel="predicted", ylabel="there")
    axes.set_title(f"the {MOST} classes with the most mistakes" if cut else "", fontsize=10)
    for i, j in zip(*np.nonzero(shares >= 0.005), strict=True):
        color = "white" if shares[i, j] > 0.6 else INK
        axes.text(j, i, f"{shares[i, j]:.2f}".removeprefix("0"), ha="center", va="center", fontsize=7.5, color=color)
    figure.colorbar(image, shrink=0.7, label="share of what is there")
    return figure


def confused(outcome: Outcome) -> Table:
    """The pairs of classes that are taken for each other most often; empty if there are none."""
    wrong = outcome.confusion * (1 - np.eye(len(outcome.names), dtype=np.int64))
    order = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
    pairs = [(int(i), int(j)) for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True) if wrong[i, j]]
    names, there = [printable(name) for name in outcome.names], outcome.confusion.sum(1)
    rows = [[names[i], names[j], f"{wrong[i, j]:,}", f"{wrong[i, j] / there[i]:.1%}"] for i, j in pairs]
    return [["there", "predicted", outcome.counted, "of what is there"], *rows] if rows else []


def plot_labels(outcome: LabelsOutcome) -> Figure:
    """For each label, the images in which it is found, missed, and wrong."""
    hits, missed, wrong = (outcome.confusion[:, i, j] for i, j in ((1, 1), (1, 0), (0, 1)))
    kept = np.argsort(-(missed + wrong), kind="stable")[:MOST]
    figure = Figure(figsize=(7, 1.2 + 0.26 * len(kept)), layout="constrained")
    axes, at = figure.subplots(), np.arange(len(kept))
    axes.barh(at, hits[kept], color=BLUE, label="found")
    axes.barh(at, missed[kept], left=hits[kept], color="#9bc2e6", label="missed")
    axes.barh(at, -wrong[kept], color=ORANGE, label="found, but not there")
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(at, [_short(outcome.names[i]) for i in kept], parse_math=False)
    axes.set(xlabel="images", ylim=(len(kept) - 0.4, -0.6))
    axes.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    figure.legend(loc="outside upper center", ncols=3, fontsize="small", frameon=False)
    return figure


def plot_calibration(calibration: Calibration) -> Figure:
    """The share of right predictions by confidence, and below it how many there are of each."""
    count, confidence, right = calibration.sums
    there = count > 0
    figure = Figure(figsize=(4.8, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=[4, 1], sharex=True)
    upper.plot([0, 1], [0, 1], color=QUIET, linestyle="--", linewidth=1, label="as sure as right")
    x, y = confidence[there] / count[there], right[there] / count[there]
    upper.plot(x, y, color=BLUE, marker="o", markersize=4, label="the model")
    upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="share that is right")
    upper.legend(fontsize="small")
    upper.grid(alpha=0.3)
    edges = np.linspace(0, 1, calibration.BINS + 1)
    lower.bar(edges[:-1], count / max(count.sum(), 1), width=1 / calibration.BINS, align="edge", color=BLUE)
    lower.set(xlabel="confidence", ylabel="share of all")
    return figure


def _short(name: str, longest: int = 30) -> str:
    name = printable(name)
    return name if len(name) <= longest else f"{name[: longest - 1]}…"
