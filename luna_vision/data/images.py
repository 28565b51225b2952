"""Datasets that turn images into tensors, with clear errors."""

import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image
from timm.data.readers.shared_count import SharedCount
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from luna_vision.data.faults import SkipFaults
from luna_vision.data.sampling import sample_seed
from luna_vision.data.sizes import BatchDataset
from luna_vision.images.decode import SampleError, read_image, to_channels
from luna_vision.images.transforms import SeededTransform
from luna_vision.images.values import Raster
from luna_vision.utils.errors import one_line
from luna_vision.utils.text import printable


class Source(Protocol):
    """Images and labels by index: (image, label).

    An image is PIL, an array (H, W[, bands]), or the result of `luna_vision.images.decode.decode_image`.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image | np.ndarray | Raster, int]: ...


class TensorDataset:
    """Base of the datasets that make tensors of the images of a source, each augmented by its own seed.

    Args:
        source: Where images and labels come from.
        transform: Makes the float tensor (C, H, W) from a PIL image and a seed.
        in_chans: Channels of the image that the transform gets.
        num_classes: Labels must be in [0, num_classes).
        seed: The run's seed, mixed with epoch and index.
        name: Names the source in errors, for instance "train".
        max_error_share: Share of the samples that may be unreadable: others take their place, see
            :class:`~luna_vision.data.faults.SkipFaults`. With None, one unreadable sample is an error.
    """

    def __init__(
        self,
        source: Source | IterableDataset,
        transform: SeededTransform,
        in_chans: int,
        num_classes: int,
        seed: int = 0,
        name: str = "data",
        max_error_share: float | None = None,
    ) -> None:
        self.source, self.transform, self.in_chans = source, transform, in_chans
        self.num_classes, self.seed, self.name = num_classes, seed, name
        self.faults = None if max_error_share is None else SkipFaults(len(source), max_error_share, name)

    def prepare(
        self, image: Any, label: int, epoch: int, index: int, what: str, transform: SeededTransform | None = None
    ) -> tuple[Tensor, int]:
        """The tensor of an image, and its label. A label out of range is a SampleError about ``what``."""
        if not 0 <= label < self.num_classes:
            raise SampleError(
                f"{self.name} {what} has label {label}, outside the {self.num_classes} declared classes "
                f"(0 to {self.num_classes - 1})"
            )
        return (transform or self.transform)(image, sample_seed(self.seed, epoch, index)), int(label)


class TransformedDataset(TensorDataset, Dataset):
    """(image tensor, label) by index.

    An index may be plain (epoch 0), an ``(epoch, index)`` pair of :class:`~luna_vision.data.EpochSampler`, or an
    ``(epoch, index, size)`` triple of :class:`~luna_vision.data.sizes.SizeSampler`. A source with a method ``at(size)``
    makes its images at that size.

    Args:
        *args, **kwargs: As in :class:`TensorDataset`.
        sized: Transforms to other sizes (height, width), for keys that have one.

    Raises:
        SampleError: On access, if the source cannot deliver the sample or its label is out of range.
    """

    def __init__(self, *args: Any, sized: dict[tuple[int, int], SeededTransform] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sized = sized or {}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int] | tuple[int, int, tuple[int, int]]) -> tuple[Tensor, int]:
        epoch, index, *size = key if isinstance(key, tuple) else (0, key)
        transform = self.sized[size[0]] if size else self.transform
        read = partial(self._read, self.source_at(epoch, index, *size), transform)
        image, label = read(index) if self.faults is None else self.faults.read(read, index)
        return self.prepare(image, label, epoch, index, f"sample {index}", transform)

    def source_at(self, epoch: int, index: int, size: tuple[int, int] | None = None) -> Source:
        """The source of a sample of an epoch, for images of a size where there are several."""
        return self.source.at(size) if size and hasattr(self.source, "at") else self.source

    def _read(self, source: Source, transform: SeededTransform, index: int) -> tuple[Image.Image | np.ndarray, int]:
        try:
            image, label = source[index]
            return to_channels(image, self.in_chans, transform.values), label
        except IndexError:
            raise  # ends iteration over a map-style dataset
        except Exception as error:  # sources of others, and their decoders, raise nearly anything for a broken file
            raise SampleError(f"{self.name} sample {index}: {one_line(error)}") from error


def sample_name(dataset: Dataset, index: int) -> str:
    """The file of a sample, or its index in ``dataset`` where samples have no files.

    A source knows its files if it has a method ``sample_file(index)``, or ``samples`` of (file, label) as folders have.
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
    """The labels of a source, or of a part of one, if it has them as ``targets``; no image is read."""
    if isinstance(source, Subset):
        labels = known_labels(source.dataset)
        return None if labels is None else labels[source.indices]
    targets = getattr(source, "targets", None)
    return None if targets is None else np.asarray(targets)


def describe_split(split: str, source: Any, num_classes: int | None) -> str:
    """One line about a split: its images and classes (if it has any), where they are, and what was left out.

    ``source`` is a source or a dataset of one, a part of either, a stream, or None. A source may have the attributes
    ``where`` and ``skipped``, which are in words, and a method ``holds(indices)``, which says in words what labels
    these images have.
    """
    if source is None:
        return f"{split}: no images"
    if isinstance(source, TransformedDataset):
        source = source.source
    try:
        count = f"{len(source)} images"
    except TypeError:
        count = "a stream of images"
    labels = known_labels(source)
    count_classes = num_classes if labels is None else len(np.unique(labels))
    classes = "" if num_classes is None else f", {count_classes} classes"
    whole, part = (source.dataset, source.indices) if isinstance(source, Subset) else (source, None)
    if whole is not source and len(source) < len(whole):
        count += f" held out of {len(whole)}" if split != "train" else f" of {len(whole)}"
    where, skipped = getattr(whole, "where", ""), getattr(whole, "skipped", "")
    holds = ""
    if hasattr(whole, "holds"):
        holds = whole.holds(np.arange(len(whole)) if part is None else np.unique(part))
    return printable(f"{split}: {count}{where and f' in {where}'}{classes}{holds}{skipped}")


class StreamDataset(TensorDataset, IterableDataset):
    """(image tensor, label) from a stream of (image, label): an IterableDataset of timm.

    A stream has no indices, so the checksum of the image takes the place of one: an image has the same augmentation in
    any worker, and another one in each epoch. Arguments as in :class:`TensorDataset`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.epoch = SharedCount()  # in shared memory, to reach workers that live on

    def __len__(self) -> int:
        return len(self.source.reader)  # TypeError where timm's reader does not know; Lightning can do without

    def share(self, num_workers: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        """Set who reads the stream, and the size of the batches. To be called before it is iterated."""
        self.source.set_loader_cfg(num_workers)  # timm's readers find out the rest themselves

    def set_epoch(self, epoch: int) -> None:
        """To be called before the stream is iterated."""
        self.epoch.value = epoch
        self.source.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for image, label in self.source:
            image = to_channels(image, self.in_chans, self.transform.values)
            yield self.prepare(image, label, self.epoch.value, zlib.crc32(image.tobytes()), "stream: an image")


class PredictDataset(Dataset):
    """(image tensor, id) for prediction. An id is the path of the file, or the position in the source as a string."""

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


class Unread(NamedTuple):
    """An image that cannot be used, and why."""

    name: str
    reason: str


class ReadableDataset(Dataset):
    """A `PredictDataset` that gives an `Unread` for an image that cannot be used, for a `ReadableLoader`.

    Args:
        dataset: The dataset.
        unread: The loader adds the images that cannot be used.
    """

    def __init__(self, dataset: PredictDataset, unread: list[Unread]) -> None:
        self.dataset, self.unread = dataset, unread

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, str] | Unread:
        try:
            return self.dataset[index]
        except (SampleError, OSError) as error:
            item = self.dataset.source[index]
            return Unread(item if isinstance(item, str) else str(index), one_line(error))


class ReadableLoader(DataLoader):
    """The batches of a `ReadableDataset`, without the images that cannot be used.

    Its ``collate_fn`` is `collate_readable` with that of the batches as its first argument.
    """

    def __iter__(self) -> Iterator[Any]:
        for batch, unread in super().__iter__():
            self.dataset.unread += unread
            if batch is not None:
                yield batch


def collate_readable(collate_fn: Callable[[list], Any], samples: list) -> tuple[Any, list[Unread]]:
    """A batch of the samples that could be read, None if there is none of them, and the others."""
    unread = [sample for sample in samples if isinstance(sample, Unread)]
    found = [sample for sample in samples if not isinstance(sample, Unread)]
    return collate_fn(found) if found else None, unread
