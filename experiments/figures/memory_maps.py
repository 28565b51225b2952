"""Draw docs/figures/memory_maps.png, what a small trained memory does: `python -m experiments.figures.memory_maps`.

The first run trains the model on canvases of Fashion-MNIST, which are fetched into --root if missing, and keeps it in
runs/memory_maps: 18 minutes on one thread of a busy machine with two cores. Later runs only draw. The picture shows the
first canvas of the test set.
"""

import argparse
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything

from luna_vision.data import CanvasDataModule
from luna_vision.tasks import ClassificationTask
from luna_vision.visualize import plot_memory, view

CHECKPOINT = Path("runs/memory_maps/last.ckpt")
SIDE, TEST_IMAGE = 128, 0


def train(data: CanvasDataModule) -> None:
    """Train for one pass over the canvases, and write `CHECKPOINT`."""
    shape = dict(img_size=SIDE, embed_dim=64, depth=4, num_heads=2, pack_heads=1, memory_len=8, global_pool="both")
    task = ClassificationTask("luna_vit_tiny_patch8", num_classes=10, model_kwargs=shape, lr=2e-3, warmup_epochs=0.1)
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, accelerator="cpu", gradient_clip_val=1.0)
    trainer.fit(task, data)
    trainer.save_checkpoint(CHECKPOINT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", default="data", help="folder of Fashion-MNIST (default: data)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the order of sums, and so the weights, depend on it
    seed_everything(0)
    canvases = dict(side=SIDE, num_items=3, num_train=48_000, batch_size=32, num_workers=0)
    data = CanvasDataModule("fashion_mnist", args.root, download=True, **canvases)
    if not CHECKPOINT.exists():
        train(data)
    data.prepare_data()
    model = ClassificationTask.load_from_checkpoint(CHECKPOINT, weights_only=True, map_location="cpu").model
    canvas = data.dataset("test").source.canvas(TEST_IMAGE)
    name = data.class_names[canvas.label]
    seen = view(model, canvas.image, mean=data.mean, std=data.std)
    figure = plot_memory(model, seen, slots=4, title=f"which class is in the majority? {name}")
    figure.savefig(Path(__file__).parents[2] / "docs" / "figures" / "memory_maps.png", dpi=110)


if __name__ == "__main__":
    main()
