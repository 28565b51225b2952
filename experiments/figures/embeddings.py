"""Draw docs/figures/{neighbours,probe}.png from a small model's embeddings: `python -m experiments.figures.embeddings`.

The first run trains the model of experiments/configs/embeddings.yaml and keeps it in runs/embeddings: ten minutes on
one thread. Later runs only embed, probe and draw. The embeddings of the neighbours are those of
`luna-vision embed`, which reads image files, so the images are written to a folder first. The
numbers of the probes go to docs/results/probe.json.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import timm
import torch
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from torch import nn

from experiments.command import Parser, measured_on
from experiments.runs import CONFIGS, fit
from luna_vision.data import FashionMNISTDataModule
from luna_vision.downstream.embed import Settings, embed_images
from luna_vision.downstream.probe import knn_accuracy, linear_probe_accuracy, open_data, probe_model
from luna_vision.utils.files import save_figure, write_json

FOLDER = Path("runs/embeddings")
DOCS = Path(__file__).parents[2] / "docs"
SEARCHED, QUERIES, NEIGHBOURS = 3000, 6, 7
PROBED = 5000  # images, of the training and of the test set each


def draw_neighbours(model: nn.Module, data: FashionMNISTDataModule) -> None:
    """Rows of one image and those of the test set whose embeddings are nearest."""
    source = data.dataset("test").source
    images = FOLDER / "images"
    images.mkdir(parents=True, exist_ok=True)
    for i in range(SEARCHED):
        Image.fromarray(np.asarray(source[i][0])).save(images / f"{i:05d}.png")
    result = embed_images(model, images, Settings(mean=data.mean, std=data.std))
    search = NearestNeighbors(n_neighbors=NEIGHBOURS + 1, metric="cosine").fit(result.embedding)
    labels = [int(source[int(Path(path).stem)][1]) for path in result.paths]
    queries = [labels.index(label) for label in range(0, 10, 2)] + [labels.index(9)]
    _, nearest = search.kneighbors(result.embedding[queries])
    place = {
        "left": 0.01,
        "right": 0.99,
        "bottom": 0.01,
        "top": QUERIES / (QUERIES + 0.4),
        "wspace": 0.06,
        "hspace": 0.06,
    }
    size = (NEIGHBOURS + 1, QUERIES + 0.4)
    figure, axes = plt.subplots(QUERIES, NEIGHBOURS + 1, figsize=size, gridspec_kw=place)
    for row, found in zip(axes, nearest, strict=True):
        for i, (ax, index) in enumerate(zip(row, found, strict=True)):
            ax.imshow(plt.imread(result.paths[index]), cmap="gray")
            ax.set(xticks=[], yticks=[])
            right = labels[index] == labels[found[0]]
            for spine in ax.spines.values():
                spine.set(color="black" if not i else "tab:green" if right else "tab:red", linewidth=2)
    axes[0, 0].set_title("asked for", fontsize=9, loc="left")
    axes[0, 1].set_title(f"nearest of the other {SEARCHED - 1:,}, green: same class", fontsize=9, loc="left")
    save_figure(figure, DOCS / "figures" / "neighbours.png", dpi=110)


def probe(model: nn.Module | None, root: str) -> dict[str, float]:
    """Top-1 of both probes on `PROBED` images; without a model, of the pixels."""
    options = dict(root=root, img_size=28, in_chans=1)
    opened = open_data("fashion_mnist", options, PROBED, PROBED, 100)
    if model is not None:
        found = probe_model(model, opened)
        return {"kNN": found.knn, "linear": found.linear.accuracy}
    features = []
    for loader in (opened.train, opened.test):
        images, labels = zip(*((x.flatten(1).numpy(), y.numpy()) for x, y in loader), strict=True)
        features += [np.concatenate(images), np.concatenate(labels)]
    return {"kNN": knn_accuracy(*features), "linear": linear_probe_accuracy(*features).accuracy}


def draw_probes(found: dict[str, dict[str, float]]) -> None:
    """Bars of top-1, one group for each kind of features."""
    figure, ax = plt.subplots(figsize=(6, 3.2))
    for i, kind in enumerate(("kNN", "linear")):
        heights = [100 * accuracy[kind] for accuracy in found.values()]
        bars = ax.bar(np.arange(len(found)) + 0.38 * (i - 0.5), heights, 0.36, label=f"{kind} probe")
        ax.bar_label(bars, fmt="%.1f", fontsize=9)
    ax.set(ylabel="Fashion-MNIST, top-1 in %", ylim=(0, 100))
    ax.set_xticks(range(len(found)), found)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="lower right", framealpha=1)
    figure.tight_layout()
    save_figure(figure, DOCS / "figures" / "probe.png", dpi=110)


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", default="data", help="folder of Fashion-MNIST")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cli, _ = fit([CONFIGS / "embeddings.yaml", {"data": {"init_args": {"root": args.root}}}], FOLDER)
    torch.manual_seed(0)
    arguments = {"num_classes": 0, "in_chans": 1, **cli.model.hparams.model_kwargs}
    random, trained = (timm.create_model(cli.model.hparams.model_name, **arguments).eval() for _ in range(2))
    weights = cli.model.model.state_dict()
    trained.load_state_dict({name: x for name, x in weights.items() if not name.startswith("head.")})
    draw_neighbours(trained, cli.datamodule)
    models = {"pixels": None, "random weights": random, "after two epochs": trained}
    found = {name: probe(model, args.root) for name, model in models.items()}
    write_json(DOCS / "results" / "probe.json", {**measured_on(), "images": PROBED, "top1": found})
    draw_probes(found)


if __name__ == "__main__":
    main()
