"""Draw docs/figures/neighbours.png, images and those whose embeddings are nearest: `python docs/make_neighbours.py`.

The first run trains a small model on Fashion-MNIST, which is fetched into --root if missing, and keeps it in
runs/neighbours: ten minutes on one thread. Later runs only embed and draw. The embeddings are those of
`python -m luna_vision.downstream.embed`, which reads image files, so the images are written to a folder first.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything
from PIL import Image
from sklearn.neighbors import NearestNeighbors

from luna_vision.data import FashionMNISTDataModule
from luna_vision.downstream.embed import Settings, embed_images
from luna_vision.tasks import ClassificationTask

FOLDER = Path("runs/neighbours")
CHECKPOINT = FOLDER / "last.ckpt"
SHAPE = dict(img_size=28, patch_size=4, embed_dim=96, depth=6, num_heads=3)
SEARCHED, QUERIES, NEIGHBOURS = 3000, 6, 7


def train(data: FashionMNISTDataModule) -> None:
    """Train for two passes over the images, and write `CHECKPOINT`."""
    task = ClassificationTask(
        "luna_vit_tiny", num_classes=10, in_chans=1, model_kwargs=SHAPE, lr=1.5e-3, warmup_epochs=0.1
    )
    trainer = Trainer(max_epochs=2, logger=False, enable_checkpointing=False, accelerator="cpu", gradient_clip_val=1.0)
    trainer.fit(task, data)
    trainer.save_checkpoint(CHECKPOINT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", default="data", help="folder of Fashion-MNIST (default: data)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seed_everything(0)
    data = FashionMNISTDataModule(
        root=args.root, download=True, img_size=28, in_chans=1, val_fraction=0.0, batch_size=64, num_workers=0
    )
    if not CHECKPOINT.exists():
        train(data)
    data.prepare_data()
    source = data.dataset("test").source
    images = FOLDER / "images"
    images.mkdir(parents=True, exist_ok=True)
    for i in range(SEARCHED):
        Image.fromarray(np.asarray(source[i][0])).save(images / f"{i:05d}.png")
    model = ClassificationTask.load_from_checkpoint(CHECKPOINT, weights_only=True, map_location="cpu").model
    result = embed_images(model.eval(), images, Settings(mean=data.mean, std=data.std))
    search = NearestNeighbors(n_neighbors=NEIGHBOURS + 1, metric="cosine").fit(result.embedding)
    labels = [int(source[int(Path(path).stem)][1]) for path in result.paths]
    queries = [labels.index(label) for label in range(0, 10, 2)] + [labels.index(9)]
    _, nearest = search.kneighbors(result.embedding[queries])
    figure, axes = plt.subplots(QUERIES, NEIGHBOURS + 1, figsize=(NEIGHBOURS + 1, QUERIES + 0.4))
    for row, found in zip(axes, nearest, strict=True):
        for i, (ax, index) in enumerate(zip(row, found, strict=True)):
            ax.imshow(plt.imread(result.paths[index]), cmap="gray")
            ax.set(xticks=[], yticks=[])
            right = labels[index] == labels[found[0]]
            for spine in ax.spines.values():
                spine.set(color="black" if not i else "tab:green" if right else "tab:red", linewidth=2)
    axes[0, 0].set_title("asked for", fontsize=9)
    axes[0, 1].set_title("nearest of the other 2,999, green: same class", fontsize=9, loc="left")
    figure.tight_layout(pad=0.4)
    figure.savefig(Path(__file__).parent / "figures" / "neighbours.png", dpi=110)


if __name__ == "__main__":
    main()
