"""Draw docs/figures/memory_maps.png: `python -m experiments.figures.memory_maps`. Where the memory of the weights that
come with the package looks, on a photo that comes with scikit-image (CC0)."""

from pathlib import Path

import skimage.data
import timm
from PIL import Image

import luna_vision  # noqa: F401 - registers the models
from luna_vision.utils.files import save_figure
from luna_vision.visualize import plot_memory


def main() -> None:
    model = timm.create_model("luna_vit_nano_patch8", pretrained=True).eval()
    photo = Image.fromarray(skimage.data.chelsea()).resize((384, 256))
    figure = plot_memory(model, photo, slots=4, title="luna_vit_nano_patch8.tiny_imagenet_64")
    save_figure(figure, Path(__file__).parents[2] / "docs" / "figures" / "memory_maps.png", dpi=110)


if __name__ == "__main__":
    main()
