"""Images without labels: any folder, shards, or random regions of large TIFFs and slides; one view or many."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

from luna_vision.data.base import hold_out, train_or_val
from luna_vision.data.images import Source, TransformedDataset
from luna_vision.data.litdata_module import INDEX, LitDataSource
from luna_vision.data.sampling import sample_seed
from luna_vision.data.webdataset_module import INFO, ShardDataset, TarShards, WebDatasetDataModule
from luna_vision.images.decode import SampleError, read_image
from luna_vision.images.find import find_images
from luna_vision.images.formats import ChunkedImage, open_image
from luna_vision.images.transforms import SeededTransform
from luna_vision.images.values import Raster, Values
from luna_vision.utils.checks import check_at_least


class ImageFiles:
    """(image, 0) of image files, or of a random region of each.

    Args:
        files: Paths.
        region: Side of the region in pixels; None reads whole images.
        seed: Of the place of the region.

    Raises:
        SampleError: On access: an image cannot be read, or is smaller than the region.
    """

    def __init__(self, files: list[str], region: int | None = None, seed: int = 0) -> None:
        self.files, self.region, self.seed = files, region, seed

    def __len__(self) -> int:
        return len(self.files)

    def at_seed(self, seed: int) -> "ImageFiles":
        """The same images, with regions at other places."""
        other = copy.copy(self)
        other.seed = seed
        return other

    def sample_file(self, index: int) -> str:
        """The path of an image."""
        return self.files[index]

    def __getitem__(self, index: int) -> tuple[Image.Image | Raster, int]:
        path = self.files[index]
        return (read_image(path) if self.region is None else read_region(path, self.region, self.seed)), 0


def read_region(path: str, side: int, seed: int) -> Raster:
    """A square of a large image at a random place. Of a tiled TIFF or slide, only the tiles that it is in are read.

    Raises:
        SampleError: The image is smaller than the square.
        ValueError, OSError: It cannot be read.
    """
    image = open_image(path)
    height, width = image.shape[:2]
    if min(height, width) < side:
        raise SampleError(f"{path} of {width} x {height} pixels is smaller than a region of {side} x {side}")
    rng = np.random.default_rng(seed)
    top, left = (int(rng.integers(0, n - side + 1)) for n in (height, width))
    rows, columns = slice(top, top + side), slice(left, left + side)
    pixels = image.window(rows, columns) if isinstance(image, ChunkedImage) else image[rows][:, columns]
    pixels = np.ascontiguousarray(pixels if pixels.ndim == 3 else pixels[:, :, None])
    return Raster(pixels, getattr(image, "top", None), getattr(image, "nodata", None), path)


class MultiCrop:
    """Several views of an image, each augmented by its own seed.

    Args:
        parts: A transform and its number of views, for each size.
    """

    def __init__(self, parts: list[tuple[SeededTransform, int]]) -> None:
        self.parts = parts

    @property
    def values(self) -> Values:
        """What the numbers of files mean."""
        return self.parts[0][0].values

    def set_values(self, values: Values, std: Sequence[float]) -> None:
        """Change what the numbers of files mean, and how they are normalised, for all views."""
        for transform, _ in self.parts:
            transform.set_values(values, std)

    def __call__(self, image: Image.Image | np.ndarray, seed: int = 0) -> list[Tensor]:
        """For each size, its views (V, C, H, W)."""
        return [
            torch.stack([transform(image, sample_seed(seed, part, view)) for view in range(count)])
            for part, (transform, count) in enumerate(self.parts)
        ]


class _Unlabelled:
    """Mixin of a dataset whose samples are tuples of views, and whose augmentation may repeat.

    Attributes:
        repeat_epochs: Epochs after which the augmentation is that of the first again; None for never.
    """

    repeat_epochs: int | None = None

    def prepare(self, image: Any, label: int, epoch: int, *args: Any) -> tuple[Tensor, ...]:
        views, _ = super().prepare(image, 0, self.draw(epoch), *args)
        return (views,) if isinstance(views, Tensor) else tuple(views)

    def draw(self, epoch: int) -> int:
        """The epoch whose augmentation an epoch has."""
        return epoch % self.repeat_epochs if self.repeat_epochs else epoch


class UnlabelledDataset(_Unlabelled, TransformedDataset):
    """Views by index; keys as of :class:`TransformedDataset`."""

    def source_at(self, epoch: int, index: int, size: tuple[int, int] | None = None) -> Source:
        if not hasattr(self.source, "at_seed"):
            return super().source_at(epoch, index, size)
        return self.source.at_seed(sample_seed(self.seed, self.draw(epoch), index))


class UnlabelledShards(_Unlabelled, ShardDataset):
    """Views from tar shards."""


class UnlabelledDataModule(WebDatasetDataModule):
    """Images without labels, for training that needs none.

    ``root`` is one of these:

    - a folder: all images in it, and in all folders in it, are taken, of any size and format;
    - a folder with the shards of WebDataset (``_info.json``), whose labels, if there are any, are not read;
    - a folder with the chunks of LitData (``index.json``, here or in ``train``), likewise.

    Batches are tuples: (images (B, C, H, W),) with one view, else (global views (B, V, C, H, W), local views likewise
    but smaller, if there are any). Validation has the whole image where training has one view, else such views, always
    the same. Sizes of views do not depend on those of images: a smaller image is enlarged.

    Args:
        global_views: Views of ``img_size``, random parts of the image with ``crop_scale`` of its area.
        local_views: Further views of ``local_size``, with ``local_scale`` of the area.
        local_size: Their side in pixels; by default three sevenths of ``img_size``, rounded down to whole patches.
        local_scale: [smallest, largest] share of the area; by default [0.05, 0.3].
        region: For images larger than memory (tiled TIFFs and slides) and other large ones: side in pixels of a square
            at a random place of the image, which takes the image's place. A smaller image cannot be used.
        repeat_epochs: Epochs after which each image has the same views again, so that a teacher's outputs can be kept.
        **kwargs: The arguments of :class:`ImageDataModule` and ``shuffle_buffer``. ``val_fraction`` of the images is
            held out.

    Raises:
        ValueError: An argument out of its range, or (on setup) there are fewer training images than a batch has.
    """

    num_classes = None
    class_names: tuple[str, ...] = ()

    def __init__(
        self,
        root: str = "photos",
        img_size: int | list[int] = 224,
        val_fraction: float = 0.05,
        crop_pct: float | None = None,
        global_views: int = 1,
        local_views: int = 0,
        local_size: int | None = None,
        local_scale: list[float] | None = None,
        region: int | None = None,
        repeat_epochs: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, img_size=img_size, val_fraction=val_fraction, crop_pct=crop_pct, **kwargs)
        check_at_least(1, global_views=global_views, region=region or 1, repeat_epochs=repeat_epochs or 1)
        check_at_least(0, local_views=local_views)
        self.region, self.repeat_epochs = region, repeat_epochs
        self.views = (global_views, local_views)
        self._files: dict[str, list[str]] | None = None
        if self.views == (1, 0):
            return
        if self.train_sizes:
            raise ValueError("train_sizes is for one view an image: leave out global_views and local_views")
        parts = [(self.train_transform, global_views)]
        if local_views:
            side = local_size or min(self.img_size) * 3 // 7 // self.patch_size * self.patch_size or self.patch_size
            check_at_least(1, local_size=side)
            local = self.augmented(size=(side, side), crop="resized", crop_scale=tuple(local_scale or (0.05, 0.3)))
            parts.append((local, local_views))
        self.train_transform = MultiCrop(parts)

    def timm_cfg(self) -> dict[str, Any]:
        cfg = super().timm_cfg()
        return {name: value for name, value in cfg.items() if name not in ("num_classes", "label_names")}

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        if stage == "fit" and (count := len(self.dataset("train"))) < self.batch_size:
            raise ValueError(
                f"{self.root} has {count} images to train on, fewer than batch_size={self.batch_size}: give more "
                "images or a smaller batch"
            )

    def make_source(self, split: str) -> Source | IterableDataset | None:
        if split == "test":
            return None
        root = Path(self.root)
        if (root / INFO).is_file():
            return super().make_source(split)
        for folder in (root, root / "train"):
            if (folder / INDEX).is_file():
                return train_or_val(LitDataSource(folder), split, self.val_fraction)
        if self._files is None:
            files = np.array(find_images(self.root, say=self._say), dtype=object)
            kept, held = hold_out(np.zeros(len(files)), self.val_fraction)
            self._files = {"train": files[kept].tolist(), "val": files[held].tolist()}
        return ImageFiles(self._files[split], self.region) if self._files[split] else None

    def _arguments(self, split: str) -> tuple:
        transform, in_chans, _, *others = super()._arguments(split)
        return transform if self.views == (1, 0) else self.train_transform, in_chans, 1, *others

    def _tensors(self, source: Source | IterableDataset, split: str) -> UnlabelledDataset | UnlabelledShards:
        arguments = (source, *self._arguments(split), self.max_error_share)
        if isinstance(source, TarShards):
            buffer = self.shuffle_buffer if split == "train" else 0
            dataset = UnlabelledShards(*arguments, shuffle_buffer=buffer, labelled=False)
        else:
            dataset = UnlabelledDataset(*arguments, sized=self.sized_transforms if split == "train" else None)
        if split == "train":
            dataset.repeat_epochs = self.repeat_epochs
        return dataset
