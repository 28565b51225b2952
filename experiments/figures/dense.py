"""Draw docs/figures/{detection,segmentation}.png from trained checkpoints: `python -m experiments.figures.dense`.

The checkpoints are those that `python train.py fit --config configs/canvas_detection.yaml` and
`configs/canvas_segmentation.yaml` leave. The pictures show the first canvases of the test set.
"""

import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch, Rectangle

from experiments.command import Parser
from luna_vision.data import CanvasDetectionDataModule, CanvasSegmentationDataModule
from luna_vision.tasks import DetectionTask, SegmentationTask
from luna_vision.utils.files import save_figure

FIGURES = Path(__file__).parents[2] / "docs" / "figures"
COLOURS = plt.get_cmap("tab10").colors
SCORE = 0.5


def draw_detection(task: DetectionTask, data: CanvasDetectionDataModule, out: Path) -> None:
    """Two canvases: what is there as white frames, what was found in the colour of its class, with its score."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.9))
    for index, ax in enumerate(axes):
        image, truth = data.dataset("test")[index]
        named: list[tuple[float, float]] = []  # where there is a name already, above a box
        found = task.model([image])[0]
        ax.imshow(image.permute(1, 2, 0).clamp(0, 1))
        for left, top, right, bottom in truth["boxes"].tolist():
            ax.add_patch(Rectangle((left - 4, top - 4), right - left + 8, bottom - top + 8, fill=False, ec="w", lw=0.8))
        for (left, top, right, bottom), label, score in zip(
            found["boxes"].tolist(), found["labels"].tolist(), found["scores"].tolist(), strict=True
        ):
            if score < SCORE:
                continue
            colour = COLOURS[label - 1]
            ax.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, ec=colour, lw=1.8))
            above = top > 30 and not any(abs(x - left) < 100 and abs(y - top) < 20 for x, y in named)
            y, align = (top - 6, "bottom") if above else (bottom + 6, "top")
            named.append((left, top))
            x, side = (left, "left") if left < image.shape[-1] * 0.7 else (right, "right")
            text = f"{data.class_names[label - 1]} {score:.2f}"
            ax.text(x, y, text, color=colour, fontsize=8, va=align, ha=side)
        ax.set(xticks=[], yticks=[])
    figure.suptitle(f"found with a score above {SCORE}, in the colour of the class; thin white frames: what is there")
    figure.tight_layout()
    save_figure(figure, out, dpi=100)


def draw_segmentation(task: SegmentationTask, data: CanvasSegmentationDataModule, out: Path) -> None:
    """One canvas, its classes, and the predicted classes."""
    image, truth = data.dataset("test")[0]
    predicted = task.model(image[None]).argmax(1)[0]
    figure, axes = plt.subplots(1, 3, figsize=(13, 5.2))
    colours = ListedColormap([(0, 0, 0), *COLOURS])
    for ax, shown, title in zip(axes, (None, truth, predicted), ("canvas", "what is there", "predicted"), strict=True):
        if shown is None:
            ax.imshow(image.permute(1, 2, 0).clamp(0, 1))
        else:
            ax.imshow(shown, cmap=colours, vmin=0, vmax=len(COLOURS), interpolation="nearest")
        ax.set(xticks=[], yticks=[], title=title)
    there = np.union1d(np.unique(truth), np.unique(predicted))
    handles = [Patch(color=COLOURS[i - 1], label=data.class_names[i - 1]) for i in there if i]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    save_figure(figure, out, dpi=100)


KINDS = {
    "detection": (DetectionTask, CanvasDetectionDataModule, dict(num_items=5, item_size=28), draw_detection),
    "segmentation": (
        SegmentationTask,
        CanvasSegmentationDataModule,
        dict(num_items=16, item_size=48),
        draw_segmentation,
    ),
}


@torch.no_grad()
def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", default="data", help="folder of Fashion-MNIST")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    for name in KINDS:
        checkpoint = Path(f"runs/canvas_{name}/version_0/checkpoints/best.ckpt")
        parser.add_argument(f"--{name}", type=Path, default=checkpoint, help="its checkpoint")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    for name in args.kinds:
        task_class, data_class, canvases, draw = KINDS[name]
        task = task_class.load_from_checkpoint(getattr(args, name), weights_only=True, map_location="cpu").eval()
        draw(task, data_class("fashion_mnist", args.root, side=512, **canvases), FIGURES / f"{name}.png")


if __name__ == "__main__":
    main()
