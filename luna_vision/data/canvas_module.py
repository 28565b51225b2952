"""The data module of megapixel canvases; :mod:`luna_vision.data.canvas` draws them."""

from collections.abc import Callable
from dataclasses import replace

import torchvision.datasets as tvd

from luna_vision.data.base import ImageDataModule, hold_out
from luna_vision.data.canvas import CanvasDataset, CanvasSpec
from luna_vision.data.datasets import Arrays, digits_splits, download_torchvision, open_torchvision
from luna_vision.data.images import Source
from luna_vision.images.decode import MODES
from luna_vision.utils.checks import check_at_least, check_option


def _digits(root: str) -> dict[str, Arrays]:
    return digits_splits()


def _fashion_mnist(root: str) -> dict[str, Arrays]:
    train = open_torchvision(tvd.FashionMNIST, root, True, "FashionMNIST/raw")
    test = open_torchvision(tvd.FashionMNIST, root, False, "FashionMNIST/raw")
    images, labels = train.data.numpy(), train.targets.numpy()
    kept, held = hold_out(labels, 0.1)
    return {
        "train": (images[kept], labels[kept]),
        "val": (images[held], labels[held]),
        "test": (test.data.numpy(), test.targets.numpy()),
    }


# where items come from: root folder to disjoint images and labels for each split
ITEM_SOURCES: dict[str, Callable[[str], dict[str, Arrays]]] = {"digits": _digits, "fashion_mnist": _fashion_mnist}


class CanvasDataModule(ImageDataModule):
    """Megapixel canvases at any side, from digits or Fashion-MNIST, plain or cued; see :mod:`luna_vision.data.canvas`.

    The items of training, validation and test canvases are disjoint. Canvases are drawn when asked for, each a function
    of ``canvas_seed``, its split and its index; the dataset's ``source.canvas(index)`` also gives boxes and masks.
    By default there is no augmentation: colour jitter would change the cue, and a flip changes digits.

    Args:
        source: Where items come from, a key of :data:`ITEM_SOURCES`: "digits" or "fashion_mnist".
        root: Folder that contains FashionMNIST/raw; digits need none.
        download: Fetch Fashion-MNIST if it is missing.
        side: Side of the canvas, and of the images, in pixels.
        num_items: Items on a canvas.
        item_size: Side of an item in pixels.
        cued: Cued canvases, the harder task; needs ``in_chans=3``.
        noise: Standard deviation of Gaussian noise in grey levels of 0 to 255.
        frame: Thickness of frames, and of the gap between frame and item, in pixels; by default a 14th of the item.
        cue_size: Side of the cue in pixels; by default a quarter of the item.
        grid: Everything on a canvas stands at multiples of this number of pixels.
        num_train: Canvases for training.
        num_val: Canvases for validation.
        num_test: Canvases for testing.
        canvas_seed: Seed of the canvases; ``seed`` is that of the shuffle and of augmentation.
        **kwargs: The other arguments of :class:`ImageDataModule`; ``img_size`` is ``side``. With ``train_sizes``, which
            are sides, canvases are drawn at each side, with the same number of items of the same size.
    """

    num_classes = 10
    MEAN, STD = (0.0,), (0.5,)  # an empty canvas is zero

    def __init__(
        self,
        source: str = "digits",
        root: str = "data",
        download: bool = False,
        side: int = 512,
        num_items: int = 5,
        item_size: int = 28,
        cued: bool = False,
        noise: float = 0.0,
        frame: int | None = None,
        cue_size: int | None = None,
        grid: int = 1,
        num_train: int = 5000,
        num_val: int = 1000,
        num_test: int = 1000,
        canvas_seed: int = 0,
        in_chans: int = 3,
        batch_size: int = 16,
        augmentation: str = "none",
        crop: str = "none",
        hflip: float = 0.0,
        color_jitter: float = 0.0,
        **kwargs,
    ) -> None:
        super().__init__(
            root=root,
            img_size=side,
            in_chans=in_chans,
            batch_size=batch_size,
            augmentation=augmentation,
            crop=crop,
            hflip=hflip,
            color_jitter=color_jitter,
            **kwargs,
        )
        check_option("source", source, ITEM_SOURCES)
        check_option("in_chans", in_chans, tuple(MODES))
        if cued and in_chans != 3:
            raise ValueError("cued canvases are told apart by colour: in_chans must be 3")
        self.lengths = {"train": num_train, "val": num_val, "test": num_test}
        check_at_least(1, num_train=num_train, num_val=num_val, num_test=num_test)
        self.spec = CanvasSpec(side, num_items, item_size, cued, noise, frame, cue_size, grid)
        for height, width in self.train_sizes:
            if height != width:
                raise ValueError(f"canvases are square: train_sizes must be sides, got {[height, width]}")
            replace(self.spec, side=height)  # ValueError where the items do not fit
        self.item_source, self.download, self.canvas_seed = source, download, canvas_seed
        names = tvd.FashionMNIST.classes if source == "fashion_mnist" else range(10)
        self.class_names = [str(name) for name in names]

    def prepare_data(self) -> None:
        if self.download and self.item_source == "fashion_mnist":
            download_torchvision(tvd.FashionMNIST, self.root)

    def make_source(self, split: str) -> Source:
        images, labels = ITEM_SOURCES[self.item_source](self.root)[split]
        return CanvasDataset(images, labels, self.spec, self.lengths[split], self.canvas_seed, split)
