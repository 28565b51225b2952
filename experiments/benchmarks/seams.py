"""Dense answers of large scenes, whole and in tiles: `python -m experiments.benchmarks.seams --help`.

The same weights answer in four ways, each in a process of its own: "whole", the streaming engine of this package, as
`luna-vision predict` runs it; "rows", the same with `--pack-by-row`; "tiles", windows of 512 px side by side; and
"windows", the usual cure of their seams: for classes of pixels MONAI's sliding windows, half a window apart, blended by
a Gaussian, and for objects SAHI, whose windows overlap by a fifth and whose boxes are merged.

A scene is that of the training, larger: as many items of Fashion-MNIST's test images for each pixel, of the same size,
and more than half of them of one class. Two numbers tell what seams do: the score near the lines where tiles meet, and
the score of everything.
"""

import argparse
import importlib
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import ListedColormap
from PIL import Image
from torch import nn
from torchvision.ops import box_iou

import luna_vision
from experiments.command import Parser, at_least, markdown_table
from luna_vision.data.canvas_module import ITEM_SOURCES
from luna_vision.downstream.boxes import detect
from luna_vision.downstream.whole import segment
from luna_vision.utils.files import save_figure, write_text

from .jobs import Job, measure_all, peak_resident

__all__ = ["Scene", "draw_scene", "main", "measure"]

WINDOW = 512  # px, the side of training
WAYS = ("whole", "rows", "tiles", "windows")
SHAPES = {"segment": (16, 48), "detect": (5, 28)}  # items on a training canvas, and their side in px
CLASSES = 10
SCORE = 0.5  # of objects that count as found


class Scene(NamedTuple):
    """A scene and the truth about it.

    Attributes:
        image: uint8 (S, S), grey.
        mask: uint8 (S, S), 0 for background and the class + 1 on an item.
        boxes: float32 (n, 4), left, top, right, bottom of each item.
        labels: int64 (n,), its class.
    """

    image: np.ndarray
    mask: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray


def draw_scene(root: str, task: str, side: int, index: int) -> Scene:
    """Scene `index` of a task, of this side in pixels; `root` holds FashionMNIST/raw."""
    images, labels = ITEM_SOURCES["fashion_mnist"](root)["test"]
    rng = np.random.default_rng((side, index))
    number, size = SHAPES[task]
    count = number * side**2 // WINDOW**2
    common = rng.integers(CLASSES)
    classes = np.where(rng.random(count) < 0.6, common, rng.integers(CLASSES, size=count))
    image, mask = np.zeros((2, side, side), np.uint8)
    taken, boxes, kept = np.zeros((side, side), bool), [], []
    for kind in classes:
        item = Image.fromarray(images[rng.choice(np.flatnonzero(labels == kind))])
        item = np.asarray(item.resize((size, size), Image.Resampling.BILINEAR))
        while True:
            top, left = rng.integers(0, side - size, 2)
            area = slice(top, top + size), slice(left, left + size)
            if not taken[area].any():
                break
        taken[area] = True
        image[area] = item
        mask[area][item > 0] = kind + 1
        rows, columns = np.flatnonzero(item.any(1)), np.flatnonzero(item.any(0))
        boxes.append((left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1))
        kept.append(kind)
    return Scene(image, mask, np.array(boxes, np.float32), np.array(kept, np.int64))


def lines(side: int) -> np.ndarray:
    """Where tiles meet, pixels."""
    return np.arange(WINDOW, side, WINDOW)


def _classes(model: nn.Module, image: np.ndarray, way: str) -> np.ndarray:
    """The class of each pixel, uint8 (S, S)."""
    if way in ("whole", "rows"):
        import tifffile

        with tempfile.TemporaryDirectory() as folder:
            segment(model, image, Path(folder, "classes.tif"), progress=False)
            return tifffile.imread(Path(folder, "classes.tif"))
    from monai.inferers import sliding_window_inference

    blend = {"overlap": 0.0} if way == "tiles" else {"overlap": 0.5, "mode": "gaussian"}
    x = torch.from_numpy(image).expand(1, 3, -1, -1).float() / 255
    return sliding_window_inference(x, WINDOW, 4, lambda x: model(x).softmax(1), **blend)[0].argmax(0).byte().numpy()


def _objects(model: nn.Module, image: np.ndarray, way: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes (n, 4), labels (n,) from 0 and scores (n,) of what is found."""
    if way in ("whole", "rows"):
        with tempfile.TemporaryDirectory() as folder:
            detect(model, image, Path(folder, "found.geojson"), Path(folder, "found.json"), progress=False)
            found = json.loads(Path(folder, "found.json").read_text())["annotations"]
        found = [(one["bbox"], one["category_id"] - 1, one["score"]) for one in found]
        boxes = np.array([box for box, _, _ in found], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return boxes, np.array([k for _, k, _ in found], np.int64), np.array([s for *_, s in found], np.float32)
    from sahi.models.torchvision import TorchVisionDetectionModel
    from sahi.predict import get_sliced_prediction

    names = {str(i): str(i) for i in range(1, CLASSES + 1)}
    detector = TorchVisionDetectionModel(model=model, confidence_threshold=0.05, category_mapping=names, device="cpu")
    overlap = 0.0 if way == "tiles" else 0.2
    found = get_sliced_prediction(
        np.repeat(image[:, :, None], 3, 2),
        detector,
        slice_height=WINDOW,
        slice_width=WINDOW,
        overlap_height_ratio=overlap,
        overlap_width_ratio=overlap,
        perform_standard_pred=False,  # which would shrink the scene to one window
        verbose=0,
    ).object_prediction_list
    boxes = np.array([one.bbox.to_xyxy() for one in found], np.float32).reshape(-1, 4)
    labels = np.array([one.category.id - 1 for one in found], np.int64)
    return boxes, labels, np.array([one.score.value for one in found], np.float32)


def confusion(truth: np.ndarray, found: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels by class and predicted class, (K, K) each: all, and those within half an item of a line."""
    side, total, near = len(truth), np.zeros((2, CLASSES + 1, CLASSES + 1), np.int64), np.zeros(len(truth), bool)
    for line in lines(side):
        near[line - size // 2 : line + size // 2] = True
    for top in range(0, side, WINDOW):
        rows = slice(top, top + WINDOW)
        pairs = truth[rows].astype(np.int64) * (CLASSES + 1) + found[rows]
        for i, chosen in enumerate((pairs.ravel(), pairs[near[rows, None] | near])):
            total[i] += np.bincount(chosen, minlength=total[i].size).reshape(total[i].shape)
    return total[0], total[1]


def mean_iou(pairs: np.ndarray) -> float:
    """Of a confusion matrix, over classes that occur."""
    both, union = np.diag(pairs), pairs.sum(0) + pairs.sum(1) - np.diag(pairs)
    return float((both / union.clip(1))[pairs.sum(1) > 0].mean())


def matched(scene: Scene, boxes: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> dict[str, int]:
    """How many items a score of `SCORE` finds, at an IoU of 0.5 with the right class, and how many finds are none."""
    keep = np.flatnonzero(scores >= SCORE)
    order = keep[np.argsort(-scores[keep], kind="stable")]
    overlaps = box_iou(torch.from_numpy(boxes[order]), torch.from_numpy(scene.boxes)).numpy()
    overlaps[labels[order][:, None] != scene.labels] = 0
    hit = np.zeros(len(scene.boxes), bool)
    for row in overlaps:
        best = int(np.where(hit, 0, row).argmax())
        hit[best] |= row[best] >= 0.5
    cut = np.zeros(len(hit), bool)
    for line in lines(len(scene.image)):
        for low, high in ((0, 2), (1, 3)):
            cut |= (scene.boxes[:, low] < line) & (line < scene.boxes[:, high])
    return {
        "items": len(hit),
        "found": int(hit.sum()),
        "cut_items": int(cut.sum()),
        "cut_found": int(hit[cut].sum()),
        "wrong": len(order) - int(hit.sum()),
    }


@torch.inference_mode()
def measure(job: Job, checkpoints: dict[str, str], root: str, pictures: tuple[int, Path]) -> Job:
    """Answer the scenes of a job: scores, seconds and memory.

    Args:
        job: One of `jobs`.
        checkpoints: By task.
        root: Holds FashionMNIST/raw.
        pictures: The side of scenes of which a part is drawn, and the folder for it.
    """
    torch.set_num_threads(job["threads"])
    model = luna_vision.load(checkpoints[job["task"]])[0].eval()
    if job["way"] == "rows":
        for module in model.modules():
            if isinstance(module, luna_vision.LunaVit):
                module.set_pack_by_row()
    elif job["way"] != "whole":  # not within what is timed
        importlib.import_module({"segment": "monai.inferers", "detect": "sahi.predict"}[job["task"]])
    found: dict[str, Any] = {"seconds": 0.0, "resident_bytes_before": 0}
    if job["task"] == "segment":
        found |= {"pixels": np.zeros((CLASSES + 1, CLASSES + 1), np.int64)}
        found |= {"near": np.zeros_like(found["pixels"])}
    for index in range(job["scenes"]):
        scene = draw_scene(root, job["task"], job["side"], index)
        found["resident_bytes_before"] = max(found["resident_bytes_before"], peak_resident() if not index else 0)
        started = time.perf_counter()
        if job["task"] == "segment":
            answer = _classes(model, scene.image, job["way"])
            found["seconds"] += time.perf_counter() - started
            pixels, near = confusion(scene.mask, answer, SHAPES["segment"][1])
            found["pixels"] += pixels
            found["near"] += near
            if job["side"] == pictures[0] and not index:
                _save_crop(pictures[1], scene, answer, job["way"])
        else:
            answer = _objects(model, scene.image, job["way"])
            found["seconds"] += time.perf_counter() - started
            for name, number in matched(scene, *answer).items():
                found[name] = found.get(name, 0) + number
    found["peak_resident_bytes"] = peak_resident()
    if job["task"] == "segment":
        found |= {"miou": mean_iou(found["pixels"]), "miou_near": mean_iou(found["near"])}
        found |= {name: found[name].tolist() for name in ("pixels", "near")}
    return found


def _crop(scene: Scene) -> tuple[slice, slice]:
    """256 px around the first item that a line cuts from top to bottom, with the line in the middle."""
    side = len(scene.image)
    for left, top, right, bottom in scene.boxes.astype(int):
        for line in lines(side):
            if left + 8 < line < right - 8:
                y = min(max((top + bottom) // 2 - 128, 0), side - 256)
                return slice(y, y + 256), slice(line - 128, line + 128)
    return slice(0, 256), slice(WINDOW - 128, WINDOW + 128)


def _save_crop(folder: Path, scene: Scene, answer: np.ndarray, way: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, pixels in (("scene", scene.image), ("truth", scene.mask), (way, answer)):
        Image.fromarray(pixels[_crop(scene)]).save(folder / f"{name}.png")


def draw(folder: Path, out: Path) -> None:
    """A place where two tiles meet: the scene, what is there, and the answers."""
    names = {"scene": "scene", "truth": "what is there", "whole": "whole", "rows": "by row"}
    names |= {way: way for way in ("tiles", "windows")}
    figure, axes = plt.subplots(1, len(names), figsize=(15, 2.9), layout="constrained")
    colours = ListedColormap([(0, 0, 0), *plt.get_cmap("tab10").colors])
    for ax, (name, title) in zip(axes, names.items(), strict=True):
        pixels = np.asarray(Image.open(folder / f"{name}.png"))
        if name == "scene":
            ax.imshow(pixels, cmap="gray")
        else:
            ax.imshow(pixels, cmap=colours, vmin=0, vmax=CLASSES, interpolation="nearest")
        ax.axvline(len(pixels) / 2 - 0.5, color="w", lw=0.6, ls=":")
        ax.set(xticks=[], yticks=[], title=title)
    save_figure(figure, out, dpi=100)


def _cost(row: dict[str, Any]) -> tuple[str, str]:
    """Seconds of a scene, and the most memory in GB."""
    seconds = row["seconds"] / row["scenes"]
    return f"{seconds:.{0 if seconds >= 10 else 1}f}", f"{row['peak_resident_bytes'] / 1e9:.1f}"


def table(rows: list[dict[str, Any]]) -> str:
    """The results, as Markdown."""
    heads = ["scene, px", "way", "mIoU, %", "near lines, %", "items found, %", "cut items, %", "wrong finds"]
    heads += ["s, classes", "s, objects", "GB, classes", "GB, objects"]
    lines = []
    by = {(row["task"], row["side"], row["way"]): row for row in rows if "error" not in row}
    for side in sorted({side for _, side, _ in by}):
        for way in WAYS:
            masks, boxes = (by.get((task, side, way)) for task in SHAPES)
            cells = ["-"] * 9
            if masks:
                cells[0], cells[1] = (f"{100 * masks[name]:.1f}" for name in ("miou", "miou_near"))
                cells[5], cells[7] = _cost(masks)
            if boxes:
                cells[2] = f"{100 * boxes['found'] / boxes['items']:.1f}"
                cells[3] = f"{100 * boxes['cut_found'] / boxes['cut_items']:.1f}"
                cells[4] = f"{boxes['wrong']}"
                cells[6], cells[8] = _cost(boxes)
            if masks or boxes:
                lines.append([str(side), way, *cells])
    return markdown_table(heads, lines) + "\n"


def _parser() -> Parser:
    parser = Parser(
        prog="python -m experiments.benchmarks.seams",
        description="The same weights on large scenes: as a whole, in tiles, and in overlapping windows (MONAI, SAHI: "
        "pip install monai sahi). What --out has already is not measured again.",
    )
    parser.add_argument("--segmenter", metavar="FILE", help="best.ckpt of configs/canvas_segmentation.yaml")
    parser.add_argument("--detector", metavar="FILE", help="best.ckpt of configs/canvas_detection.yaml")
    parser.add_argument("--root", default="data", metavar="FOLDER", help="holds FashionMNIST/raw")
    parser.add_argument("--sides", type=at_least(WINDOW + 1), nargs="+", default=[4096, 8192], metavar="PIXELS")
    parser.add_argument("--whole-sides", type=at_least(WINDOW + 1), nargs="*", default=[16384], metavar="PIXELS")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--threads", type=at_least(1), default=2, help="of the CPU")
    parser.add_argument("--out", type=Path, default=Path("runs/seams"), metavar="FOLDER")
    return parser


def jobs(args: argparse.Namespace) -> list[Job]:
    """What is to be measured: the ways at each side, whole alone at the largest."""
    found = []
    for task, checkpoint in (("segment", args.segmenter), ("detect", args.detector)):
        for side in [*args.sides, *args.whole_sides] if checkpoint else []:
            for way in args.ways if side in args.sides else ["whole", "rows"]:
                scenes = max(1, (8192 // side) ** 2)
                found.append({"task": task, "way": way, "side": side, "scenes": scenes, "threads": args.threads})
    return found


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write; returns the exit code: 1 if something could not be measured."""
    parser = _parser()
    args = parser.parse_args(argv)
    if not args.segmenter and not args.detector:
        parser.error("give --segmenter, --detector or both")
    how = {"checkpoints": {"segment": args.segmenter, "detect": args.detector}, "root": args.root}
    answer = partial(measure, **how, pictures=(min(args.sides), args.out))
    rows = measure_all(answer, jobs(args), args.out / "seams.json", "{0[task]}, {0[side]} px, {0[way]}".format)
    write_text(args.out / "seams.md", table(rows))
    print(table(rows))
    if all((args.out / f"{name}.png").exists() for name in ("scene", "truth", *WAYS)):
        draw(args.out, args.out / "seams.png")
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
