"""A data set that fits on the GPU: it stays there as uint8, and is augmented there, a whole batch at once."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.transforms.v2.functional import rgb_to_grayscale
from tqdm import tqdm

from luna_vision.data.datasets import ArraySource
from luna_vision.data.folders import ImageFolderDataModule
from luna_vision.data.images import Source, TransformedDataset
from luna_vision.data.sampling import sample_seed
from luna_vision.data.transforms import Augmentation
from luna_vision.images.transforms import eval_transform
from luna_vision.images.values import MASK, Values
from luna_vision.utils.errors import one_line

DRAWS = 14  # random numbers for each image and epoch, see `augment_batch`


class Keys(NamedTuple):
    """Which images a batch has, as it comes from the loader. The data module turns it into images on the device."""

    split: str  # "train", "val" or "test"
    epoch: int  # of the random numbers
    index: Tensor  # int64 (B,), index of each image


class ResidentDataset(TransformedDataset):
    """All images of a source in one uint8 tensor. By index it gives keys alone.

    Args:
        source, *args: As in :class:`TransformedDataset`; the transform gives pixels in [0, 1], all images of one size.
        split: "train", "val" or "test".
        threads: How many read the images.
        as_it_is: Shape of the arrays that the transform would not change.

    Attributes:
        images: uint8 (n, C, H, W).
        labels: int64 (n,).
    """

    def __init__(self, source: Source, *args: Any, split: str, threads: int, as_it_is: tuple[int, ...]) -> None:
        super().__init__(source, *args)
        self.split, self._drawn = split, (-1, torch.empty(0))
        whole, at = (source.dataset, source.indices) if isinstance(source, Subset) else (source, slice(None))
        if isinstance(whole, ArraySource) and whole.images.shape[1:] == as_it_is:
            self.images = torch.from_numpy(whole.images[at]).permute(0, 3, 1, 2).contiguous()
            self.labels = torch.from_numpy(whole.targets[at]).long()
            return
        with ThreadPoolExecutor(max(threads, 1)) as pool:
            found = pool.map(self._read_pixels, range(len(self.source)))
            bar = tqdm(found, f"reading {split} images", len(self.source), leave=False, mininterval=1)
            images, labels = zip(*bar, strict=True)
        self.images, self.labels = torch.stack(images), torch.tensor(labels)

    def _read_pixels(self, index: int) -> tuple[Tensor, int]:
        image, label = super().__getitem__(index)
        return image.mul_(255).round_().byte(), label

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[int, int]:
        return key if isinstance(key, tuple) else (0, key)

    def collate(self, keys: list[tuple[int, int]]) -> Keys:
        epochs, indices = zip(*keys, strict=True)
        return Keys(self.split, epochs[0], torch.tensor(indices))

    def batch(self, keys: Keys) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, C, H, W) with pixels in [0, 1], labels (B,), and random numbers in [0, 1) (B, DRAWS), which are
        those of an epoch and an index. All images move to the device of the keys, and stay there."""
        device = keys.index.device
        if self.images.device != device:
            self.images, self.labels = self.images.to(device), self.labels.to(device)
        if self._drawn[0] != keys.epoch or self._drawn[1].device != device:
            generator = torch.Generator().manual_seed(sample_seed(self.seed, keys.epoch, 0))
            self._drawn = keys.epoch, torch.rand(len(self), DRAWS, generator=generator).to(device)
        return self.images[keys.index].float().div_(255), self.labels[keys.index], self._drawn[1][keys.index]


class GpuDataModule(ImageFolderDataModule):
    """Images of folders or of one file, which stay on the GPU as uint8 and are augmented there in batches.

    For data sets of small images that fit: 100,000 of 64 px take 1.2 GB. The images are read once, by ``num_workers``
    threads, and brought to ``img_size`` as for evaluation; random crops are cut out of that. There is no augmentation
    library behind it: ``augmentation`` is not used (but for "none"), and ``random_erasing`` fills with the mean.
    Augmentation depends on (seed, epoch, image) alone. Files to predict go the way of :class:`ImageFolderDataModule`.

    Arguments not listed here are those of :class:`ImageDataModule`.

    Args:
        root: A folder as for :class:`ImageFolderDataModule`, or an ``.npz`` file with uint8 arrays ``x_train``
            (n, H, W[, 3]) and integers ``y_train`` (n,), perhaps the same for ``val`` and ``test``, and ``classes``,
            the names of the classes. Without ``val``, ``val_fraction`` of the training images is held out; without
            ``test``, testing uses ``val``.

    Raises:
        ValueError: An argument that has no place here, or a file without these arrays.
    """

    def __init__(self, root: str = "data/imagenet", augmentation: str = "torchvision", **kwargs: Any) -> None:
        for name, off in {"auto_augment": None, "train_sizes": None, "on_error": "raise"}.items():
            if kwargs.get(name, off) != off:
                raise ValueError(f"GpuDataModule has no {name}: leave it out, or take ImageFolderDataModule")
        super().__init__(root=root, augmentation=augmentation, **kwargs)
        if self.values.fill == MASK:
            raise ValueError("GpuDataModule keeps no missing pixels: give another fill, or take ImageFolderDataModule")
        self._threads, self.num_workers, self.persistent_workers = self.num_workers, 0, False
        self._augmented = augmentation != "none"
        self._sent: tuple[Any, Tensor, Tensor] | None = None

    @property
    def class_names(self) -> list[str]:
        if not self._is_file:
            return super().class_names
        arrays = self._arrays
        names = arrays.get("classes", np.arange(arrays["y_train"].max() + 1))
        return [str(name) for name in names]

    def make_source(self, split: str) -> Source | None:
        if not self._is_file:
            return super().make_source(split)
        return self.split_source(split, self._array_source)

    @property
    def _is_file(self) -> bool:
        return self.root.endswith(".npz")

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        return read_arrays(Path(self.root))

    def _array_source(self, split: str) -> ArraySource | None:
        if f"x_{split}" not in self._arrays:
            return None
        return ArraySource(self._arrays[f"x_{split}"], self._arrays[f"y_{split}"])

    def unused(self) -> list[str]:
        return [] if self._is_file else super().unused()

    def _tensors(self, source: Source, split: str) -> ResidentDataset:
        zeros, ones = (0.0,) * self.in_chans, (1.0,) * self.in_chans
        _, *arguments = self._arguments(split)
        pixels = eval_transform(self.img_size, zeros, ones, self.crop_pct, values=self.values)
        as_it_is = (*self.img_size, self.in_chans) if self.crop_pct in (None, 1) else ()
        return ResidentDataset(source, pixels, *arguments, split=split, threads=self._threads, as_it_is=as_it_is)

    def set_values(self, values: Values, std: Sequence[float] | None = None) -> None:
        if replace(values, mean=()) != replace(self.values, mean=()):
            self._datasets.clear()  # their pixels mean something else
        super().set_values(values, std)

    def _loader(self, dataset: Any, *args: Any, **kwargs: Any) -> DataLoader:
        loader = super()._loader(dataset, *args, **kwargs)
        if isinstance(dataset, ResidentDataset):
            loader.collate_fn = dataset.collate
        return loader

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The images and labels of the keys, on their device: images float32 (B, C, H, W), normalised; labels (B,)."""
        if not isinstance(batch, Keys):
            return batch  # files to predict
        dataset = self.dataset(batch.split)
        images, labels, draws = dataset.batch(batch)
        augment = batch.split == "train" and self._augmented
        if augment:
            images = augment_batch(images, draws, self._augment)
        mean, std = self._statistics(images.device)
        images = images.sub_(mean).div_(std)
        if augment and self._erasing:
            images = erase_batch(images, draws, self._erasing)
        return images, labels

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation on a device, which are sent there once: sending would wait for it."""
        key = device, self.mean, self.std
        if self._sent is None or self._sent[0] != key:
            self._sent = key, *(torch.tensor(values, device=device).view(-1, 1, 1) for values in (self.mean, self.std))
        return self._sent[1:]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a data set in one ``.npz`` file, see :class:`GpuDataModule`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It has not the arrays that it must have.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (ValueError, BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is no .npz file of plain arrays: {one_line(error)}") from error
    for split in ("train", "val", "test"):
        x, y = arrays.get(f"x_{split}"), arrays.get(f"y_{split}")
        if (x is None) != (y is None) or (x is None and split == "train"):
            raise ValueError(f"{path} must have x_{split} and y_{split}, it has {', '.join(arrays) or 'nothing'}")
        if x is None:
            continue
        if x.dtype != np.uint8 or not (x.ndim == 3 or (x.ndim == 4 and x.shape[3] == 3)):
            raise ValueError(f"x_{split} of {path} must be uint8 (n, H, W) or (n, H, W, 3), got {x.dtype} {x.shape}")
        if y.dtype.kind not in "iu" or y.shape != (len(x),) or len(x) == 0:
            raise ValueError(f"y_{split} of {path} must be {len(x)} integers, at least one, got {y.dtype} {y.shape}")
        count = len(arrays["classes"]) if "classes" in arrays else arrays["y_train"].max() + 1
        if not 0 <= y.min() <= y.max() < count:
            raise ValueError(f"y_{split} of {path} must be in [0, {count}), got {y.min()} to {y.max()}")
    return arrays


def augment_batch(images: Tensor, draws: Tensor, aug: Augmentation) -> Tensor:
    """Crop, flip, rotate and change the colours of each image by its own random numbers.

    Args:
        images: Pixels in [0, 1], (B, C, H, W).
        draws: Numbers in [0, 1), (B, DRAWS).
        aug: What to do. `auto_augment` is left out.

    Returns:
        (B, C, H, W), in [0, 1]. Cubic interpolation, as the crops of "resized" are enlarged.
    """
    H, W = images.shape[2:]
    u = draws.unbind(1)
    scale_x, scale_y = torch.ones_like(u[0]), torch.ones_like(u[0])
    shift_x, shift_y = torch.zeros_like(u[0]), torch.zeros_like(u[0])
    if aug.crop == "resized":
        area = _between(u[0], *aug.crop_scale)
        ratio = _between(u[1], *map(math.log, aug.crop_ratio)).exp() * (H / W)  # of shares of the sides
        scale_x, scale_y = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        shift_x, shift_y = (1 - scale_x) * _between(u[2], -1, 1), (1 - scale_y) * _between(u[3], -1, 1)
    elif aug.crop == "pad":
        steps = 2 * aug.crop_padding + 1
        shift_x, shift_y = (
            ((draw * steps).floor() - aug.crop_padding) * (2 / side) for draw, side in ((u[2], W), (u[3], H))
        )
    flip = torch.where(u[4] < aug.hflip, -1.0, 1.0)
    angle = _between(u[5], -1, 1) * math.radians(aug.rotate)
    cos, sin = angle.cos(), angle.sin()
    rows = [
        torch.stack([scale_x * flip * cos, -scale_x * flip * sin * (H / W), shift_x], 1),
        torch.stack([scale_y * sin * (W / H), scale_y * cos, shift_y], 1),
    ]
    if aug.crop != "none" or aug.hflip or aug.rotate:
        grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
        border = "zeros" if aug.crop == "pad" or aug.rotate else "border"
        images = F.grid_sample(images, grid, "bicubic", border, align_corners=False).clamp_(0, 1)
    if aug.color_jitter:
        brightness, contrast, saturation = (
            _between(draw, max(0.0, 1 - aug.color_jitter), 1 + aug.color_jitter).view(-1, 1, 1, 1) for draw in u[6:9]
        )
        images = images.mul(brightness).clamp_(0, 1)
        images = torch.lerp(rgb_to_grayscale(images).mean((2, 3), keepdim=True), images, contrast).clamp_(0, 1)
        if images.shape[1] == 3:
            images = torch.lerp(rgb_to_grayscale(images), images, saturation).clamp_(0, 1)
    return images


def erase_batch(images: Tensor, draws: Tensor, probability: float) -> Tensor:
    """Set a rectangle of some of the images to 0, the mean of normalised ones (Zhong et al. 2017, arXiv 1708.04896).

    Its area is 2% to a third of the image, its aspect ratio 0.3 to 3.3, as in timm.
    """
    H, W = images.shape[2:]
    chosen, area, ratio, x, y = draws[:, 9:14].unbind(1)
    area, ratio = _between(area, 0.02, 1 / 3) * H * W, _between(ratio, math.log(0.3), math.log(1 / 0.3)).exp()
    height, width = (area * ratio).sqrt().clamp(max=H), (area / ratio).sqrt().clamp(max=W)
    inside = []
    for side, length, at in ((H, height, y), (W, width, x)):
        first = (at * (side - length + 1)).floor()[:, None]
        place = torch.arange(side, device=images.device)
        inside.append((place >= first) & (place < first + length[:, None].round()))
    erased = inside[0][:, :, None] & inside[1][:, None, :] & (chosen < probability)[:, None, None]
    return images.masked_fill(erased[:, None], 0.0)


def _between(draw: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * draw
