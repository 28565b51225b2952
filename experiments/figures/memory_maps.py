"""Draw docs/figures/memory_maps.png, what a small trained memory does: `python -m experiments.figures.memory_maps`.

The first run trains the model of experiments/configs/memory_maps.yaml and keeps it in runs/memory_maps: 18 minutes on
one thread of a busy machine with two cores. Later runs only draw. The picture shows the first canvas of the test set.
"""

import argparse
from pathlib import Path

import torch

from experiments.runs import CONFIGS, fit
from luna_vision.utils.files import save_figure
from luna_vision.visualize import plot_memory, view

TEST_IMAGE = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", default="data", help="folder of Fashion-MNIST (default: data)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the order of sums, and so the weights, depend on it
    here = {"data": {"init_args": {"root": args.root}}}
    cli, _ = fit([CONFIGS / "memory_maps.yaml", here], Path("runs/memory_maps"))
    data = cli.datamodule
    canvas = data.dataset("test").source.canvas(TEST_IMAGE)
    seen = view(cli.model.model, canvas.image, mean=data.mean, std=data.std)
    title = f"which class is in the majority? {data.class_names[canvas.label]}"
    figure = plot_memory(cli.model.model, seen, slots=4, title=title)
    save_figure(figure, Path(__file__).parents[2] / "docs" / "figures" / "memory_maps.png", dpi=110)


if __name__ == "__main__":
    main()
