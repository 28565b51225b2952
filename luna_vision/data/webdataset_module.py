"""Images in the tar shards of WebDataset, read one after the other.

The shards of an epoch, in the order of that epoch, are one long sequence. Every rank takes an equal stretch of it, and
every worker of a rank a stretch of whole batches. So all ranks have the same number of batches.
"""

import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from luna_vision.data.images import StreamDataset
from luna_vision.data.sampling import sample_seed
from luna_vision.data.shards import CONVERT, MAX_BYTES, ShardDataModule, listing, need
from luna_vision.images.decode import SampleError, decode_image, to_channels
from luna_vision.images.find import image_suffixes, listed
from luna_vision.utils.checks import check_at_least
from luna_vision.utils.errors import one_line

INFO = "_info.json"  # the list of shards, as in timm's own, for instance timm/imagenet-1k-wds
LABEL = "cls"
META = re.compile("__[^/]*__($|/)")  # names that WebDataset leaves out
IMAGE_KEYS = tuple(suffix.lstrip(".") for suffix in image_suffixes())


class TarShards(IterableDataset):
    """The shards of one split, as root/_info.json lists them: ``{"splits": {split: {"filenames", "shard_lengths"}}}``.

    Raises:
        ValueError: The list is broken, does not fit the shards or names a file outside of the folder.
        FileNotFoundError: A shard is missing.
    """

    def __init__(self, root: Path, info: dict) -> None:
        need("webdataset")
        with listing(root / INFO):
            names = [Path(name) for name in info["filenames"]]
            self.paths = [os.path.abspath(root / name) for name in names]
            self.lengths = np.array([int(length) for length in info["shard_lengths"]], dtype=np.int64)
        if not len(self.paths) == len(self.lengths) > 0:
            raise ValueError(f"{root / INFO}: {len(self.paths)} filenames, but {len(self.lengths)} shard_lengths")
        if outside := [str(name) for name in names if name.is_absolute() or ".." in name.parts]:
            raise ValueError(f"{root / INFO} names a shard that is not in its folder: {outside[0]}")
        if missing := [path for path in self.paths if not os.path.isfile(path)]:
            raise FileNotFoundError(
                f"{root / INFO} names shards that are missing: {missing[0]} ({len(missing)} in all)"
            )
        sizes = map(os.path.getsize, self.paths)
        for path, length, size in zip(self.paths, self.lengths, sizes, strict=True):
            if not 0 <= length <= size // tarfile.BLOCKSIZE:
                raise ValueError(f"{root / INFO}: {path} does not have {length} samples")
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])  # a sample's index: its shard's start, and so on

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __iter__(self) -> Iterator[tuple[int, dict]]:
        return self.stretch(np.arange(len(self.paths)), 0, len(self))

    def stretch(self, order: np.ndarray, first: int, last: int) -> Iterator[tuple[int, dict]]:
        """(index, raw sample) of positions [first, last) in the sequence of the shards in this order."""
        position = 0
        for shard in order:
            length = self.lengths[shard]
            start, stop = max(first - position, 0), min(last - position, length)
            if start < stop:
                yield from self._read(shard, int(start), int(stop))
            position += length

    def sample(self, index: int) -> dict:
        """The raw sample of an index: its shard is read up to there."""
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        offset = index - int(self.starts[shard])
        return next(self._read(shard, offset, offset + 1))[1]

    def _read(self, shard: int, start: int, stop: int) -> Iterator[tuple[int, dict]]:
        path, position = self.paths[shard], start
        samples = need("webdataset").tariterators.group_by_keys(tar_files(path))
        try:
            for position, sample in enumerate(islice(samples, start, stop), start + 1):
                yield int(self.starts[shard]) + position - 1, sample
        except Exception as error:  # tarfile.ReadError, OSError, ...; WebDataset adds objects to its arguments
            raise SampleError(f"cannot read shard {path}: {one_line(Exception(*error.args[:1]))}") from error
        if position < stop:
            raise SampleError(f"shard {path} ends after {position} samples, {INFO} says {self.lengths[shard]}")


def tar_files(path: str) -> Iterator[dict]:
    """The files in a tar in the form of WebDataset: the content of images and labels, None for that of all others.

    Never reads more than the size of the tar: compressed tars are refused, and sparse files and files too large for an
    image are not read.
    """
    split = need("webdataset").tariterators.base_plus_ext
    with tarfile.open(path, "r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # else it keeps them all
            if member.isreg() and not META.match(member.name):
                suffix = str(split(member.name)[1]).lower()
                wanted = suffix in (*IMAGE_KEYS, LABEL) and not member.issparse() and member.size <= MAX_BYTES
                content = tar.extractfile(member).read() if wanted else None
                yield {"fname": member.name, "data": content, "__url__": path}


class ShardDataset(StreamDataset):
    """(image tensor, label) from tar shards, each sample augmented by its own seed.

    Args:
        *args, **kwargs: As in :class:`~luna_vision.data.images.TensorDataset`; the source is :class:`TarShards`.
        shuffle_buffer: Samples to choose from at random, in each worker; the shards are in a new order each epoch. 0
            keeps everything in order.
        labelled: Whether samples have a label; those without are given 0.
    """

    def __init__(self, *args: Any, shuffle_buffer: int = 0, labelled: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shuffle_buffer, self.labelled = shuffle_buffer, labelled
        self.share(0, 1)

    def share(self, num_workers: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size

    def __len__(self) -> int:
        """Samples of this rank. Where they cannot be shared out evenly, some come twice, as with DistributedSampler."""
        return -(-len(self.source) // self.world_size)

    def set_epoch(self, epoch: int) -> None:
        self.epoch.value = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        epoch = self.epoch.value
        for index, sample in self._raw(epoch):
            yield self.prepare(*self._decode(index, sample), epoch, index, f"sample {index}")

    def _raw(self, epoch: int) -> Iterator[tuple[int, dict]]:
        """The samples of this worker, in order."""
        order = np.arange(len(self.source.paths))
        if self.shuffle_buffer:
            order = np.random.default_rng((self.seed, epoch)).permutation(order)
        worker = get_worker_info()
        part, parts = (worker.id, worker.num_workers) if worker else (0, 1)
        batches = -(-len(self) // self.batch_size)
        first, last = (min(batches * p // parts * self.batch_size, len(self)) for p in (part, part + 1))
        first, last = first + self.rank * len(self), last + self.rank * len(self)
        samples = self._wrapped(order, first, last)
        if not self.shuffle_buffer:
            return samples
        shuffle = need("webdataset").shuffle
        return shuffle(self.shuffle_buffer, initial=self.shuffle_buffer, seed=sample_seed(self.seed, epoch, first))(
            samples
        )

    def _wrapped(self, order: np.ndarray, first: int, last: int) -> Iterator[tuple[int, dict]]:
        while first < last:  # the first samples follow the last ones
            start = first % len(self.source)
            stop = min(start + last - first, len(self.source))
            yield from self.source.stretch(order, start, stop)
            first += stop - start

    def _decode(self, index: int, sample: dict) -> tuple[Image.Image, int]:
        def read(at: int) -> tuple[Image.Image, int]:
            try:
                image, label = decode_sample(sample if at == index else self.source.sample(at), self.labelled)
                return to_channels(image, self.in_chans, self.transform.values), label
            except Exception as error:  # of a tar that is damaged, and of decoders
                raise SampleError(f"{self.name} sample {at}: {one_line(error)}") from error

        return read(index) if self.faults is None else self.faults.read(read, index)


def decode_sample(sample: dict, labelled: bool = True) -> tuple[Image.Image, int]:
    """(image, label) of a raw sample of WebDataset, with an image file and, if labelled, "cls", a number in digits.

    Raises:
        SampleError: It has no such files, or they cannot be read.
    """
    where = f"{sample['__url__']}/{sample['__key__']}"
    kind = next((key for key in IMAGE_KEYS if key in sample), None)
    if not labelled:
        sample = sample | {LABEL: b"0"}
    if kind is None or LABEL not in sample:
        files = ", ".join(key for key in sample if not key.startswith("__"))
        raise SampleError(f"{where} has no image file ({listed(IMAGE_KEYS)}) or no label file (cls): it has {files}")
    if sample[kind] is None or sample[LABEL] is None:
        raise SampleError(f"{where} has a file of more than {MAX_BYTES} bytes, or a sparse one")
    try:
        label = int(sample["cls"])
    except ValueError as error:
        raise SampleError(f"the label {where}.cls is not a number: {sample['cls'][:20]!r}") from error
    return decode_image(io.BytesIO(sample[kind]), f"{where}.{kind}"), label


class WebDatasetDataModule(ShardDataModule):
    """Images in WebDataset's tar shards, as :mod:`luna_vision.data.convert` and timm write them.

    root/_info.json lists the shards of the splits "train", "val" (or "validation") and perhaps "test". A sample is an
    image file and a ``.cls`` file with its label. Nothing can be held out of a stream: without a validation split,
    give ``val_fraction`` 0. Without "test", testing uses the validation split. Prediction needs ``predict_path``.

    Each epoch reads the shards in a new order and shuffles within ``shuffle_buffer``. The order depends on seed, epoch
    and the number of ranks and workers; the augmentation of a sample on seed and epoch only.

    Args:
        shuffle_buffer: Samples of the training split that each worker holds in memory, encoded, to choose from.
        **kwargs: The arguments of :class:`ImageDataModule`.
    """

    def __init__(self, root: str = "data/imagenet_webdataset", shuffle_buffer: int = 1000, **kwargs) -> None:
        super().__init__(root=root, **kwargs)
        check_at_least(1, shuffle_buffer=shuffle_buffer)
        self.shuffle_buffer = shuffle_buffer

    def make_source(self, split: str) -> TarShards | None:
        path = Path(self.root, INFO)
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}, the list of the shards: {CONVERT}")
        with listing(path):
            splits = dict(json.loads(path.read_text())["splits"])
        if "train" not in splits:
            raise ValueError(f"{path} has no split 'train', only {', '.join(splits)}")
        names = {"train": ["train"], "val": ["val", "validation"], "test": ["test", "val", "validation"]}[split]
        found = next((name for name in names if name in splits), None)
        if found is None and split == "val" and self.val_fraction > 0:
            raise ValueError(f"{path} has no split 'val', and nothing can be held out of a stream: give val_fraction=0")
        return None if found is None else TarShards(Path(self.root), splits[found])

    def _loader(self, dataset: Dataset, batch_size: int, **kwargs) -> DataLoader:
        if isinstance(dataset, ShardDataset):  # there is no batch to drop from a rank that has but one
            dataset.share(self.num_workers, batch_size, *self._rank())
            kwargs["drop_last"] = kwargs.get("drop_last", False) and len(dataset) >= batch_size
        return super()._loader(dataset, batch_size, **kwargs)

    def _tensors(self, source: TarShards, split: str) -> ShardDataset:
        buffer = self.shuffle_buffer if split == "train" else 0
        return ShardDataset(source, *self._arguments(split), self.max_error_share, shuffle_buffer=buffer)
