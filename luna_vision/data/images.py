"""Datasets of images, which turn them into tensors with clear errors."""

import zlib
from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol

import numpy as np
from PIL import Image
from timm.data.readers.shared_count import SharedCount
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset

from luna_vision.data.faults import SkipFaults
from luna_vision.data.sampling import sample_seed
from luna_vision.data.sizes import BatchDataset
from luna_vision.images.decode import SampleError, read_image, to_channels
from luna_vision.images.transforms import SeededTransform
from luna_vision.images.values import Raster
from luna_vision.utils.errors import one_line
from luna_vision.utils.text import printable


class Source(Protocol):
    """What a data module draws from: a map-style dataset of (image, label).

    An image is PIL, an array (H, W[, bands]), or what `luna_vision.images.decode.decode_image` gives.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image | np.ndarray | Raster, int]: ...


class TransformedDataset(Dataset):
    """(image tensor, label) from a source, each sample augmented by its own seed.

    Indices may be plain (epoch 0), the ``(epoch, index)`` pairs of :class:`~luna_vision.data.EpochSampler`, or with a
    size as the third, as :class:`~luna_vision.data.sizes.SizeSampler` has them. A source that can *make* its images at
    a size, and has a method ``at(size)`` that gives a source of these, is asked to.

    Args:
        source: Where images and labels come from.
        transform: Makes the float tensor (C, H, W) from a PIL image and a seed.
        in_chans: Channels that images are converted to before the transform, 1 or 3.
        num_classes: Labels must be in [0, num_classes).
        seed: The run's seed, mixed with epoch and index.
        name: Names the source in errors, for instance "train".
        max_error_share: Share of the samples that may be unreadable: others take their place, see
            :class:`~luna_vision.data.faults.SkipFaults`. None allows not a single one.
        sized: Transforms to other sizes (height, width), for keys that have one.

    Raises:
        SampleError: On access, if the source cannot deliver the sample or its label is out of range.
    """

    def __init__(
        self,
        source: Source,
        transform: SeededTransform,
        in_chans: int,
        num_classes: int,
        seed: int = 0,
        name: str = "data",
        max_error_share: float | None = None,
        sized: dict[tuple[int, int], SeededTransform] | None = None,
    ) -> None:
        self.sized = sized or {}
        self.source, self.transform, self.in_chans = source, transform, in_chans
        self.num_classes, self.seed, self.name = num_classes, seed, name
        self.faults = None if max_error_share is None else SkipFaults(len(source), max_error_share, name)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int] | tuple[int, int, tuple[int, int]]) -> tuple[Tensor, int]:
        epoch, index, *size = key if isinstance(key, tuple) else (0, key)
        transform, source = self.transform, self.source
        if size:
            transform = self.sized[size[0]]
            source = source.at(size[0]) if hasattr(source, "at") else source
        read = partial(self._read, source, transform)
        image, label = read(index) if self.faults is None else self.faults.read(read, index)
        check_label(label, self.num_classes, f"{self.name} sample {index}")
        return transform(image, sample_seed(self.seed, epoch, index)), int(label)

    def _read(self, source: Source, transform: SeededTransform, index: int) -> tuple[Image.Image | np.ndarray, int]:
        try:
            image, label = source[index]
            return to_channels(image, self.in_chans, transform.values), label
        except IndexError:
            raise  # ends iteration over a map-style dataset
        except Exception as error:  # sources of others, and their decoders, raise nearly anything of a broken file
            raise SampleError(f"{self.name} sample {index}: {one_line(error)}") from error


def sample_name(dataset: Dataset, index: int) -> str:
    """The file that a sample is read from; its index in ``dataset`` where samples are no files of their own.

    Files are known of sources that have ``sample_file(index)``, or ``samples`` of (file, label) as folders have, and of
    parts of them.
    """
    source, at = dataset.dataset if isinstance(dataset, BatchDataset) else dataset, index
    if isinstance(source, TransformedDataset):
        at = index if source.faults is None else source.faults.replacement(index)
        source = source.source
    while isinstance(source, Subset):
        source, at = source.dataset, source.indices[at]
    if hasattr(source, "sample_file"):
        return source.sample_file(at)
    if hasattr(source, "samples"):
        return str(source.samples[at][0])
    return str(index)


def known_labels(source: Any) -> np.ndarray | None:
    """The labels of a source that has them as ``targets``, or of a part of one: without reading its images."""
    if isinstance(source, Subset):
        labels = known_labels(source.dataset)
        return None if labels is None else labels[source.indices]
    targets = getattr(source, "targets", None)
    return None if targets is None else np.asarray(targets)


def describe(split: str, source: Any, num_classes: int) -> str:
    """How many images and classes a split has, and which: a source, a part of one that is held out, a stream or None.

    A source says where its images are, and what is not among them, in its attributes ``where`` and ``skipped``.
    """
    if source is None:
        return f"{split}: no images"
    try:
        count = f"{len(source)} images"
    except TypeError:
        count = "a stream of images"
    labels = known_labels(source)
    classes = num_classes if labels is None else len(np.unique(labels))
    whole = source.dataset if isinstance(source, Subset) else source
    if whole is not source and len(source) < len(whole):
        count += f" held out of {len(whole)}" if split == "val" else f" of {len(whole)}"
    where, skipped = getattr(whole, "where", ""), getattr(whole, "skipped", "")
    return printable(f"{split}: {count}{where and f' in {where}'}, {classes} classes{skipped}")


class StreamDataset(IterableDataset):
    """As :class:`TransformedDataset`, from a stream of (image, label): an IterableDataset of timm.

    A stream has no indices, so the checksum of the image stands in for one: the augmentation of an image is still the
    same in whatever worker it turns up, and another one in each epoch.
    """

    def __init__(
        self,
        stream: IterableDataset,
        transform: SeededTransform,
        in_chans: int,
        num_classes: int,
        seed: int = 0,
        name: str = "data",
    ) -> None:
        self.stream, self.transform, self.in_chans = stream, transform, in_chans
        self.num_classes, self.seed, self.name = num_classes, seed, name
        self.epoch = SharedCount()  # in shared memory, to reach workers that live on

    def __len__(self) -> int:
        return len(self.stream.reader)  # TypeError where timm's reader does not know; Lightning can do without

    def share(self, num_workers: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        """To be called before the stream is iterated: who reads it, in batches of what size."""
        self.stream.set_loader_cfg(num_workers)  # timm's readers find out the rest themselves

    def set_epoch(self, epoch: int) -> None:
        """To be called before the stream is iterated."""
        self.epoch.value = epoch
        self.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for image, label in self.stream:
            image = to_channels(image, self.in_chans, self.transform.values)
            check_label(label, self.num_classes, f"{self.name} stream: an image")
            seed = sample_seed(self.seed, self.epoch.value, zlib.crc32(image.tobytes()))
            yield self.transform(image, seed), int(label)


def check_label(label: int, num_classes: int, what: str) -> None:
    """Raise a SampleError that names ``what`` unless the label is in [0, num_classes)."""
    if not 0 <= label < num_classes:
        raise SampleError(
            f"{what} has label {label}, outside the {num_classes} declared classes (0 to {num_classes - 1})"
        )


class PredictDataset(Dataset):
    """(image tensor, id) for prediction: ids are the file paths, or the position in the source as a string."""

    def __init__(self, source: Source | list[str], transform: SeededTransform, in_chans: int) -> None:
        self.source, self.transform, self.in_chans = source, transform, in_chans

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        item = self.source[index]
        image, name = (read_image(item), item) if isinstance(item, str) else (item[0], str(index))
        try:
            image = to_channels(image, self.in_chans, self.transform.values)
        except SampleError as error:
            raise SampleError(f"cannot use image {name}: {error}") from error
        return self.transform(image, 0), name
