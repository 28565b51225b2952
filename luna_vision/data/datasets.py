"""Small, well-known datasets: scikit-learn's digits, Fashion-MNIST, CIFAR-10 and CIFAR-100."""

import os

import numpy as np
import torchvision.datasets as tvd
from sklearn.datasets import load_digits

from luna_vision.data.base import ImageDataModule, hold_out, train_or_val
from luna_vision.data.images import Source

Arrays = tuple[np.ndarray, np.ndarray]


class ArraySource:
    """Images (n, H, W[, 3]) uint8 and labels (n,) in memory."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.targets = images, labels

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.targets[index])


def digits_splits(val_fraction: float = 0.2) -> dict[str, Arrays]:
    """scikit-learn's 1,797 digits as uint8 (n, 8, 8) and labels, in fixed stratified splits.

    A fifth is for testing; ``val_fraction`` is a share of the others.
    """
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)  # given as 0..16
    rest, test = hold_out(digits.target, 0.2)
    train, val = hold_out(digits.target[rest], val_fraction)
    return {
        name: (images[index], digits.target[index].astype(np.int64))
        for name, index in (("train", rest[train]), ("val", rest[val]), ("test", test))
    }


class DigitsDataModule(ImageDataModule):
    """scikit-learn's handwritten digits: 1,797 greys of 8 x 8, upsampled to ``img_size``. Nothing to download.

    A fixed fifth of the images is the test set; ``val_fraction`` is a share of the rest.
    Arguments not listed here are those of :class:`ImageDataModule`.
    """

    num_classes = 10
    class_names = [str(digit) for digit in range(10)]
    MEAN, STD = (0.306,), (0.376,)

    def __init__(
        self,
        img_size: int | list[int] = 32,
        in_chans: int = 1,
        batch_size: int = 64,
        num_workers: int = 0,
        val_fraction: float = 0.2,
        crop: str = "pad",
        crop_padding: int = 3,
        hflip: float = 0.0,
        rotate: float = 10.0,
        color_jitter: float = 0.0,
        **kwargs,
    ) -> None:
        super().__init__(
            img_size=img_size,
            in_chans=in_chans,
            batch_size=batch_size,
            num_workers=num_workers,
            val_fraction=val_fraction,
            crop=crop,
            crop_padding=crop_padding,
            hflip=hflip,
            rotate=rotate,
            color_jitter=color_jitter,
            **kwargs,
        )

    def make_source(self, split: str) -> Source | None:
        images, labels = digits_splits(self.val_fraction)[split]
        return ArraySource(images, labels) if len(labels) else None


class _TorchvisionDataModule(ImageDataModule):
    """A torchvision dataset with a training and a test part; validation is held out of the training part."""

    dataset_class: type[tvd.VisionDataset]
    folder: str  # below root

    def __init__(self, download: bool = False, **kwargs) -> None:
        super().__init__(**kwargs)
        self.download = download

    def prepare_data(self) -> None:
        if self.download:
            for train in (True, False):
                download_torchvision(self.dataset_class, self.root, train)

    def make_source(self, split: str) -> Source | None:
        data = open_torchvision(self.dataset_class, self.root, split != "test", self.folder)
        return data if split == "test" else train_or_val(data, split, self.val_fraction)


def download_torchvision(dataset_class: type[tvd.VisionDataset], root: str, train: bool = True) -> None:
    """Fetch a torchvision dataset unless it is there; an OSError names the dataset and the folder."""
    try:
        dataset_class(root, train=train, download=True)
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise OSError(f"{dataset_class.__name__} is not in {root} and could not be downloaded: {reason}") from error


def open_torchvision(dataset_class: type[tvd.VisionDataset], root: str, train: bool, folder: str) -> tvd.VisionDataset:
    """Open a torchvision dataset that is on disk; a FileNotFoundError names the folder."""
    try:
        return dataset_class(root, train=train)
    except RuntimeError as error:  # "Dataset not found" or "... or corrupted"
        raise FileNotFoundError(
            f"no complete {dataset_class.__name__} in {os.path.join(root, folder)}: "
            f"pass root=, the folder that contains {folder.split('/')[0]}/, or download=True to fetch it there"
        ) from error


class FashionMNISTDataModule(_TorchvisionDataModule):
    """Fashion-MNIST: 60,000 + 10,000 greys of 28 x 28, ten kinds of garment (arXiv 1708.07747).

    ``download=True`` fetches it into ``root``/FashionMNIST/raw. Validation: ``val_fraction`` of the training images.
    Arguments not listed here are those of :class:`ImageDataModule`.
    """

    dataset_class, folder = tvd.FashionMNIST, "FashionMNIST/raw"
    num_classes = 10
    class_names = list(tvd.FashionMNIST.classes)
    MEAN, STD = (0.2860,), (0.3530,)

    def __init__(
        self,
        root: str = "data",
        download: bool = False,
        img_size: int | list[int] = 28,
        in_chans: int = 1,
        crop: str = "pad",
        crop_padding: int = 2,
        color_jitter: float = 0.0,
        **kwargs,
    ) -> None:
        super().__init__(
            root=root,
            download=download,
            img_size=img_size,
            in_chans=in_chans,
            crop=crop,
            crop_padding=crop_padding,
            color_jitter=color_jitter,
            **kwargs,
        )


class CIFAR10DataModule(_TorchvisionDataModule):
    """CIFAR-10: 50,000 + 10,000 photos of 32 x 32 in ten classes (Krizhevsky 2009).

    ``download=True`` fetches it into ``root``. Validation: ``val_fraction`` of the training images.
    Arguments not listed here are those of :class:`ImageDataModule`.
    """

    dataset_class, folder = tvd.CIFAR10, tvd.CIFAR10.base_folder
    num_classes = 10
    class_names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

    def __init__(
        self,
        root: str = "data",
        download: bool = False,
        img_size: int | list[int] = 32,
        crop: str = "pad",
        crop_padding: int = 4,
        **kwargs,
    ) -> None:
        super().__init__(
            root=root, download=download, img_size=img_size, crop=crop, crop_padding=crop_padding, **kwargs
        )


class CIFAR100DataModule(CIFAR10DataModule):
    """CIFAR-100: as :class:`CIFAR10DataModule`, in a hundred classes."""

    dataset_class, folder = tvd.CIFAR100, tvd.CIFAR100.base_folder
    num_classes = 100
    MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    # fmt: off
    class_names = [
        "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
        "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
        "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish",
        "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion",
        "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange",
        "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine",
        "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk",
        "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank",
        "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale",
        "willow_tree", "wolf", "woman", "worm",
    ]
    # fmt: on
