"""The two walks of docs/gigapixel.md, from a file to a picture: `python -m experiments.figures.walk --help`.

`labels` makes training images and masks of a part of a slide or a scene. Its masks come from thresholds of smoothed
colours, and stand for what a user would draw. `draw` shows what the commands between them have written.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tifffile
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from PIL import Image
from scipy.ndimage import binary_opening, gaussian_filter

from experiments.command import Parser
from luna_vision.images import open_image
from luna_vision.utils.files import save_figure, write_text

CLASSES = {"slide": ("glass", "epithelium", "stroma"), "scene": ("water", "land", "cloud")}
COLOURS = {"slide": ("white", "indigo", "hotpink"), "scene": ("steelblue", "olivedrab", "white")}
TRAINED = {"slide": (0.5, 1.0), "scene": (0.4, 1.0)}  # rows that have labels, as shares of the height
SIDES = {"slide": 256, "scene": 96}  # of the training images, px


def labels_of(kind: str, image: np.ndarray) -> np.ndarray:
    """The class of each pixel (H, W), by thresholds that were found by looking at these two files."""
    sigma = {"slide": 10, "scene": 1}[kind]
    red, green, blue = (gaussian_filter(image[:, :, i].astype(np.float32), sigma) for i in range(3))
    low, high = np.minimum(np.minimum(red, green), blue), np.maximum(np.maximum(red, green), blue)
    if kind == "slide":
        return np.where(high - low > 28, np.where(red - blue < 18, 1, 2), 0).astype(np.uint8)
    land = binary_opening((low <= 95) & (red > 0.95 * blue) & (red > 22))
    return np.where(low > 95, 2, land).astype(np.uint8)


def write_labels(kind: str, path: Path, out: Path) -> int:
    """Write images and masks for `luna-vision finetune --task segment`; returns how many."""
    opened = open_image(path)
    image = opened[0 : opened.shape[0]]
    mask, side, count = labels_of(kind, image), SIDES[kind], 0
    top, bottom = (int(share * len(image)) for share in TRAINED[kind])
    rows = range(top, bottom - side + 1, side)
    for number, (y, x) in enumerate((y, x) for y in rows for x in range(0, image.shape[1] - side + 1, side)):
        area = slice(y, y + side), slice(x, x + side)
        empty = (image[area] == 0).all(2).mean() if kind == "scene" else (mask[area] == 0).mean()
        if empty > 0.9:
            continue
        folder = out / ("val" if number % 5 == 4 else "train")
        for name, array in (("images", image), ("masks", mask)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array[area]).save(folder / name / f"{y}_{x}.png")
        count += 1
    write_text(out / "classes.txt", "\n".join(CLASSES[kind]) + "\n")
    return count


def draw(kind: str, path: Path, classes: Path, attention: Path, out: Path) -> None:
    """The image, the classes that were found, and where two slots of the memory look."""
    opened = open_image(path)
    image, found, maps = opened[0 : opened.shape[0]], tifffile.imread(classes), tifffile.imread(attention)
    step = max(1, len(image) // 700)
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.25 * len(image) / image.shape[1] + 0.4), layout="constrained")
    axes[0].imshow(image[::step, ::step])
    number = len(CLASSES[kind])
    shown = np.ma.masked_greater(found[::step, ::step], number - 1)
    axes[1].imshow(shown, cmap=ListedColormap(COLOURS[kind]), vmin=0, vmax=number - 1, interpolation="nearest")
    axes[1].set_facecolor("0.8")
    boundary = TRAINED[kind][0] * len(image) / step
    axes[1].axhline(boundary, color="k", lw=0.8, ls="--")
    handles = [
        Patch(fc=colour, ec="0.5", label=name) for colour, name in zip(COLOURS[kind], CLASSES[kind], strict=True)
    ]
    axes[1].legend(handles=handles, fontsize=7, loc="upper right")
    spread = maps.reshape(len(maps), -1).std(1)
    for ax, slot in zip(axes[2:], np.argsort(-spread)[:2], strict=True):
        ax.imshow(maps[slot], cmap="magma", vmin=0, vmax=np.quantile(maps[slot], 0.99))
        ax.set_title(f"where slot {slot} of the memory looks")
    axes[0].set_title(path.name)
    axes[1].set_title("classes; labels were below the line")
    for ax in axes:
        ax.set(xticks=[], yticks=[])
    save_figure(figure, out, dpi=90)


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; returns the exit code."""
    parser = Parser(prog="python -m experiments.figures.walk", description="Labels and pictures of docs/gigapixel.md.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("labels", "draw"):
        command = commands.add_parser(name)
        command.add_argument("kind", choices=list(CLASSES))
        command.add_argument("image", type=Path)
        if name == "draw":
            command.add_argument("classes", type=Path, help="what `luna-vision predict` wrote")
            command.add_argument("attention", type=Path, help="what `luna-vision encode --attention` wrote")
        command.add_argument("--out", type=Path, required=True, help="folder of labels, or the picture")
    args = parser.parse_args(argv)
    if args.command == "labels":
        print(f"{write_labels(args.kind, args.image, args.out)} images in {args.out}")
    else:
        draw(args.kind, args.image, args.classes, args.attention, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
