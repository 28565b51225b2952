"""The base of all data modules: common arguments, loaders, and the order of events."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate

from luna_vision.data.faults import check_fault_policy
from luna_vision.data.images import (
    PredictDataset,
    ReadableDataset,
    ReadableLoader,
    Source,
    StreamDataset,
    TransformedDataset,
    Unread,
    collate_readable,
    describe_split,
    known_labels,
)
from luna_vision.data.sampling import EpochLoader, EpochSampler, EvalSampler, next_batch
from luna_vision.data.sizes import BatchDataset, SizeSampler, height_width, parse_sizes, patches_of
from luna_vision.data.transforms import Augmentation, check_masks, train_transform
from luna_vision.data.workers import init_worker
from luna_vision.images.decode import MODES, sample_rasters
from luna_vision.images.find import find_images, listed
from luna_vision.images.transforms import SeededTransform, eval_transform, per_channel
from luna_vision.images.values import (
    DATA,
    MASK,
    PERCENTILE,
    SAMPLE_IMAGES,
    Values,
    channel_statistics,
    model_values,
    parse_fill,
    parse_value_range,
    percentile_range,
)
from luna_vision.utils.checks import check_at_least, check_share
from luna_vision.utils.errors import UserError

SPLIT_SEED = 0  # not the run's seed, see `hold_out`
STAGE_SPLITS = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("test",),
    None: ("train", "val", "test"),
}


class ImageDataModule(LightningDataModule):
    """Image classification data: seeded augmentation, loaders, prediction on files.

    Training, validation and test batches are ``(images, targets)``: float32 (B, C, H, W) and int64 (B,). Prediction
    batches are ``(images, ids)`` with B strings: file paths if ``predict_path`` is given, else test set positions.

    A subclass defines :meth:`make_source` and the class attributes, and passes its own defaults on to this constructor.
    Augmentation depends on (seed, epoch, sample index) alone, see :mod:`luna_vision.data.sampling`.

    Attributes:
        num_classes: Number of classes; labels are in [0, num_classes).
        class_names: A name for each class.
        in_chans: Channels C of the images.
        img_size: (H, W) of the images, in pixels; training images may have others.
        train_sizes: (H, W) of the images of training batches; empty where all have img_size.
        MEAN, STD: Default normalisation, of pixels in [0, 1], for one channel or three.

    Args:
        root: Folder of the data.
        img_size: Side of the images in pixels, or [height, width].
        in_chans: 1 (grey) or 3 (RGB), to which images are converted; or any other number of bands, that of the files.
        batch_size: Images in a batch on each device. An optimizer step sees this number times the number of devices and
            ``accumulate_grad_batches``.
        eval_batch_size: The same for validation, test and prediction; ``batch_size`` if None.
        num_workers: Processes that load images; 0 loads in the main process. The batches do not depend on it.
        seed: Seed of the shuffle and of all augmentation.
        val_fraction: Share of the training set to hold out for validation where the dataset has no validation split.
            Stratified by class, and the same images for any ``seed``. 0 trains on everything and validates on nothing.
        mean: Mean of each channel, of pixels in [0, 1], to subtract; one number counts for all channels. By default
            MEAN, averaged where there are not as many channels. "data" measures mean and standard deviation of the
            training images, unless the checkpoint that is validated, tested, predicted with or resumed has them.
        std: Standard deviation to divide by, likewise; "data" is said by ``mean``.
        value_range: [LOW, HIGH] of the numbers in files, which become 0 and 1; "dtype", what their type can hold, and
            [0, 1] of floating point; or "percentile", the 2nd and 98th percentile of the training images. By default
            that of the checkpoint that is validated, tested, predicted with or resumed, else "dtype". See
            docs/pixels.md.
        nodata: A number that stands for no data, besides the one that a file itself names; likewise.
        fill: What takes the place of missing numbers: "mean", "error" or a number; or "mask", which leaves out patches
            that have no others, and takes a Luna ViT; likewise.
        crop_pct: How evaluation keeps the aspect ratio, see :func:`luna_vision.images.transforms.eval_transform`.
        augmentation: Library of the augmentation, a key of :data:`luna_vision.data.transforms.AUGMENTATIONS`.
        crop: Random crop, see :class:`luna_vision.data.transforms.Augmentation`; likewise down to auto_augment.
        crop_scale: [smallest, largest] share of the area that a "resized" crop keeps.
        crop_padding: Padding of a "pad" crop in pixels.
        hflip: Probability of a horizontal flip.
        rotate: Largest rotation in degrees.
        color_jitter: Largest relative change of brightness, contrast, saturation; by default 0.3 of grey and colour. Of
            other bands there is none.
        auto_augment: Policy of the timm or torchvision backend, for instance "rand-m9-mstd0.5-inc1".
        random_erasing: Probability of random erasing.
        drop_last: Skip the last training batch if it is incomplete and not the only one (timm's Mixup needs even ones).
        pin_memory: Page-lock batches; by default where there is a GPU.
        persistent_workers: Keep the workers from one epoch to the next.
        on_error: For an image that cannot be read: "raise" stops and names it, "skip" logs it once and puts the next
            readable one in its place, see :class:`~luna_vision.data.faults.SkipFaults`. Prediction leaves it out.
        max_error_share: Largest share of a split that "skip" replaces; it stops beyond.
        train_sizes: Sides in pixels, or [height, width], to train at. Each batch has one of them, in an order drawn for
            each epoch, and as many patches as ``batch_size`` images of ``img_size``. Evaluation is at ``img_size``. The
            loss is the mean of a batch, so an image counts for less in a batch with more images.
        patch_size: Side of the model's patches in pixels. ``train_sizes`` must be multiples of it; it has no other use.
        predict_path: Images to predict: a file, a folder (searched recursively) or a list of files; the test set if
            None.

    Raises:
        ValueError: An argument is out of range.
        FileNotFoundError: On setup: the data is not under ``root``.
    """

    num_classes: int
    class_names: list[str]
    MEAN: tuple[float, ...] = (0.5,)
    STD: tuple[float, ...] = (0.5,)
    dataset_type = TransformedDataset
    predicts_files = False  # whether predictions name the files of test images, in place of their positions
    collate_fn: Callable | None = None  # None for that of torch
    large = False  # whether images to predict may be those of `luna_vision.images.open_image` alone, as in `walk`

    def __init__(
        self,
        root: str = "data",
        img_size: int | list[int] = 224,
        in_chans: int = 3,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int = 2,
        seed: int = 0,
        val_fraction: float = 0.1,
        mean: str | list[float] | None = None,
        std: list[float] | None = None,
        value_range: str | list[float] | None = None,
        nodata: float | None = None,
        fill: float | str | None = None,
        crop_pct: float | None = None,
        augmentation: str = "albumentations",
        crop: str = "resized",
        crop_scale: list[float] | None = None,
        crop_padding: int = 4,
        hflip: float = 0.5,
        rotate: float = 0.0,
        color_jitter: float | None = None,
        auto_augment: str | None = None,
        random_erasing: float = 0.0,
        drop_last: bool = True,
        pin_memory: bool | None = None,
        persistent_workers: bool = True,
        on_error: str = "raise",
        max_error_share: float = 0.01,
        train_sizes: list[int | list[int]] | None = None,
        patch_size: int = 16,
        predict_path: str | list[str] | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction must be in [0, 1), got {val_fraction}")
        check_share(random_erasing=random_erasing)
        check_at_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size or batch_size, in_chans=in_chans)
        check_at_least(0, num_workers=num_workers, seed=seed)
        check_fault_policy(on_error, max_error_share)
        self.max_error_share = max_error_share if on_error == "skip" else None
        self.root = os.path.expanduser(root)
        self.img_size = height_width("img_size", img_size)
        self.in_chans, self.seed, self.val_fraction = in_chans, seed, val_fraction
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.num_workers, self.drop_last = num_workers, drop_last
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.persistent_workers = persistent_workers and num_workers > 0
        self.predict_path = predict_path
        self._to_predict: list[str] | None = None
        self.finished: set[str] = set()
        self.unread: list[Unread] | None = None  # a list takes the images that prediction cannot use; None stops it
        self.crop_pct = crop_pct
        self._measure = self._measured = mean == DATA  # whether to measure it still, and at all
        if isinstance(mean, str) and (not self._measure or std is not None):
            raise ValueError(f"mean must be numbers, or {DATA!r} without std, got {mean!r} and std {std}")
        self.mean = per_channel("mean", self.MEAN if self._measure else mean or self.MEAN, in_chans)
        self.std = per_channel("std", std or self.STD, in_chans)
        self._given = {"value_range": parse_value_range(value_range), "nodata": nodata, "fill": parse_fill(fill)}
        self._percentile = self._given["value_range"] == PERCENTILE
        if self._percentile:
            self._given["value_range"] = None
        self.values = model_values({}, self.mean, **self._given)
        self._backend, self._erasing = augmentation, random_erasing
        self._augment = Augmentation(
            size=self.img_size,
            crop=crop,
            crop_scale=tuple(crop_scale or (0.08, 1.0)),
            crop_padding=crop_padding,
            hflip=hflip,
            rotate=rotate,
            color_jitter=(0.3 if in_chans in MODES else 0.0) if color_jitter is None else color_jitter,
            auto_augment=auto_augment,
            mean=self.mean,
        )
        self.train_transform: SeededTransform = self.augmented()
        self.patch_size = patch_size
        self.train_sizes = [] if train_sizes is None else parse_sizes(train_sizes, patch_size)
        self.sized_transforms = {size: self.augmented(size=size) for size in self.train_sizes}
        self.eval_transform: SeededTransform = eval_transform(
            self.img_size, self.mean, self.std, crop_pct, values=self.values
        )
        self._datasets: dict[str, TransformedDataset | StreamDataset | None] = {}
        self._said: set[str] = set()

    def augmented(self, **changes: Any) -> SeededTransform:
        """The transform of training images, with other values of an :class:`Augmentation`."""
        augment = replace(self._augment, **changes)
        return train_transform(self._backend, augment, self.mean, self.std, self._erasing, self.values)

    def make_source(self, split: str) -> Source | IterableDataset | None:
        """The images and labels of "train", "val" or "test"; None where there is no such split."""
        raise NotImplementedError

    def split_source(
        self, split: str, find: Callable[[str], Any], open_: Callable[[Any], Source] = lambda found: found
    ) -> Source | None:
        """The images of a split of data that may lack "val" and "test".

        Then "val" is a share of "train", and "test" is "val": a run without test images has a report, too.

        Args:
            split: "train", "val" or "test".
            find: Gives what there is of a split; None if there is nothing.
            open_: Makes a source of it.
        """
        val = find("val")
        if split == "test" and (test := find("test")) is not None:
            return open_(test)
        if split != "train" and val is not None:
            return open_(val)
        train = open_(find("train"))
        return train if val is not None else train_or_val(train, split, self.val_fraction)

    def timm_cfg(self) -> dict[str, Any]:
        """The input that a model trained on this data expects, in the words of timm's `pretrained_cfg`."""
        return {
            "input_size": (self.in_chans, *self.img_size),
            "mean": self.mean,
            "std": self.std,
            **self.values.described(),
            "interpolation": "bicubic",
            "crop_pct": self.crop_pct or 1.0,
            "crop_mode": "center" if self.crop_pct else "squash",
            "num_classes": self.num_classes,
            "label_names": list(self.class_names),
        }

    def setup(self, stage: str | None = None) -> None:
        if stage == "predict" and self.predict_path is not None:
            # an error comes before a run has a folder
            self._to_predict = find_images(self.predict_path, say=self._say, large=self.large)
            self._say(f"predict: {len(self._to_predict)} images")
            return
        for split in STAGE_SPLITS[stage]:
            dataset = self.dataset(split)
            self._say(describe_split(split, dataset, self.num_classes))
        if unused := self.unused():
            self._say(f"not used of {self.root}: {listed(unused)}")
        if stage == "fit":
            self._check_masks()
            self.find_values()

    def set_values(self, values: Values, std: Sequence[float] | None = None) -> None:
        """Have all transforms take the numbers of files as `values` say, and normalise by its mean (and `std`)."""
        self.values, self.mean, self.std = values, values.mean, self.std if std is None else tuple(std)
        for transform in (self.train_transform, self.eval_transform, *self.sized_transforms.values()):
            transform.set_values(values, self.std)

    def adopt_values(self, cfg: dict[str, Any]) -> None:
        """Take over what a checkpoint says of the numbers in files, where no option says otherwise.

        Args:
            cfg: What `timm_cfg` has given when it was written.
        """
        if known := self._measured and "mean" in cfg:  # also where it has been measured anew
            self.mean, self._measure = tuple(cfg["mean"]), False
        self.set_values(model_values(cfg, self.mean, **self._given), cfg["std"] if known else None)
        self._percentile = self._percentile and "value_range" not in cfg

    def find_values(self) -> None:
        """Find out percentiles, mean and standard deviation of the training images, if they are asked for and not known
        yet.

        Raises:
            ValueError: There are none, or they are a stream.
        """
        if not (self._percentile or self._measure):
            return
        source = self.make_source("train")
        if source is None or isinstance(source, IterableDataset):
            asked = f"value_range {PERCENTILE!r}" if self._percentile else f"mean {DATA!r}"
            raise ValueError(f"{asked} needs training images by index: give numbers")
        count = min(len(source), SAMPLE_IMAGES)
        if self._percentile:
            found = percentile_range(sample_rasters(len(source), lambda index: source[index][0]), self.values.nodata)
            self.set_values(replace(self.values, value_range=found))
            self._percentile = False
            self._say(f"value_range: {found[0]:g} to {found[1]:g}, the percentiles of {count} training images")
        if self._measure:
            rasters = sample_rasters(len(source), lambda index: source[index][0])
            mean, std = channel_statistics(rasters, self.in_chans, self.values)
            self.set_values(replace(self.values, mean=mean), std)
            self._measure = False
            shown = [" ".join(f"{number:.4g}" for number in numbers) for numbers in (mean, std)]
            self._say(f"mean: {shown[0]}; std: {shown[1]}, of {count} training images")

    def unused(self) -> list[str]:
        """Names of the folders in ``root`` that are not used, where splits are folders."""
        return []

    def _say(self, line: str) -> None:
        """Log a line once, by the first process. A run sets up several times."""
        if line not in self._said:
            self._said.add(line)
            rank_zero_info(line)

    def dataset(self, split: str) -> TransformedDataset | StreamDataset | None:
        """The dataset behind the loader of "train", "val" or "test"; made once, then kept."""
        if split not in self._datasets:
            source = self.make_source(split)
            self._datasets[split] = None if source is None else self._tensors(source, split)
            if split == "train" and self.train_sizes and isinstance(self._datasets[split], StreamDataset):
                raise ValueError("train_sizes need samples with indices, which a stream does not have")
        return self._datasets[split]

    def _tensors(self, source: Source | IterableDataset, split: str) -> TransformedDataset | StreamDataset:
        if not isinstance(source, IterableDataset):
            sized = self.sized_transforms if split == "train" else None
            return self.dataset_type(source, *self._arguments(split), self.max_error_share, sized=sized)
        if self.max_error_share is not None:
            raise ValueError("on_error='skip' needs samples with indices, which a stream of timm has not: give 'raise'")
        return StreamDataset(source, *self._arguments(split))

    def _check_masks(self) -> None:
        if self.values.fill == MASK:
            check_masks(self._backend, self._augment.auto_augment)

    def _arguments(self, split: str) -> tuple:
        """Arguments of a `TensorDataset` after the source, down to its name."""
        transform = self.train_transform if split == "train" else self.eval_transform
        return transform, self.in_chans, self.num_classes, self.seed, f"{type(self).__name__} {split}"

    def state_dict(self) -> dict[str, Any]:
        """The known broken samples, for a resumed run. All processes call this at once."""
        found = {split: getattr(dataset, "faults", None) for split, dataset in self._datasets.items()}
        broken = {split: faults.known() for split, faults in found.items() if faults is not None}
        return {"root": self.root, "broken": broken} if broken else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for split, known in state_dict["broken"].items():
            faults = getattr(self._datasets.get(split), "faults", None)
            if faults is not None and self.root == state_dict["root"]:  # a run may resume with other data
                faults.broken[[index for index in known if index < faults.length]] = True

    def train_dataloader(self) -> DataLoader:
        self._check_masks()
        self.find_values()
        dataset = self.dataset("train")
        if isinstance(dataset, StreamDataset):
            return self._loader(dataset, self.batch_size, train=True, drop_last=self.drop_last)
        rank, world_size = self._rank()
        if self.train_sizes:
            patches = self.batch_size * patches_of(self.img_size, self.patch_size)
            sizes = (self.train_sizes, self.patch_size, patches, self.drop_last)
            sampler = SizeSampler(dataset, *sizes, self.seed, world_size, rank)
            return self._loader(BatchDataset(dataset), None, train=True, sampler=sampler)
        drop_last = self.drop_last and len(dataset) >= self.batch_size * world_size
        sampler = EpochSampler(dataset, self.seed, world_size, rank, drop_last=drop_last)
        return self._loader(dataset, self.batch_size, train=True, sampler=sampler, drop_last=drop_last)

    def val_dataloader(self) -> DataLoader | list:
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader | list:
        return self._eval_loader("test")

    def files_to_predict(self) -> list[str] | None:
        """The image files to predict, also those that are `finished`; None where the images are no files."""
        if self.predict_path is not None:
            return find_images(self.predict_path, large=self.large) if self._to_predict is None else self._to_predict
        if not self.predicts_files:
            return None
        if (source := self.make_source("test")) is None:
            raise ValueError("there are no test images to predict: give predict_path, a folder or files of images")
        return [source.sample_file(index) for index in range(len(source))]

    def reading(self) -> dict[str, Any]:
        """The options that the pixels of evaluation depend on, as plain data."""
        shape = {"img_size": list(self.img_size), "crop_pct": self.crop_pct, "in_chans": self.in_chans}
        return shape | {"mean": list(self.mean), "std": list(self.std)} | self._given

    def predict_dataloader(self) -> DataLoader:
        self.find_values()
        if (files := self.files_to_predict()) is not None:
            images = [file for file in files if file not in self.finished]
        elif (images := self.make_source("test")) is None or isinstance(images, IterableDataset):
            raise ValueError("there is no indexed test set to predict: give predict_path, a folder or files of images")
        dataset = PredictDataset(images, self.eval_transform, self.in_chans)
        if self.unread is not None:
            dataset = ReadableDataset(dataset, self.unread)
        return self._loader(dataset, self.eval_batch_size)

    def _eval_loader(self, split: str) -> DataLoader | list:
        self.find_values()
        dataset = self.dataset(split)
        if dataset is None:
            return []  # which Lightning skips
        if isinstance(dataset, StreamDataset):
            return self._loader(dataset, self.eval_batch_size)
        rank, world_size = self._rank()
        sampler = EvalSampler(dataset, self.eval_batch_size, world_size, rank)
        return self._loader(dataset, sampler.batch_size, sampler=sampler)

    def _loader(
        self,
        dataset: Dataset,
        batch_size: int | None,
        train: bool = False,
        sampler: EpochSampler | EvalSampler | None = None,
        drop_last: bool = False,
    ) -> DataLoader:
        arguments = {
            "dataset": dataset,
            "batch_size": batch_size,
            "collate_fn": self.collate_fn,
            "drop_last": drop_last,
            "num_workers": self.num_workers,
            "worker_init_fn": init_worker,
            "pin_memory": self.pin_memory,
            "persistent_workers": self.persistent_workers,
        }
        if isinstance(dataset, StreamDataset):
            dataset.share(self.num_workers, batch_size, *self._rank())
        if sampler is not None:
            arguments["sampler"] = sampler
        if isinstance(dataset, ReadableDataset):
            arguments["collate_fn"] = partial(collate_readable, self.collate_fn or default_collate)
            return ReadableLoader(generator=torch.Generator(), **arguments)
        if not train:
            return DataLoader(generator=torch.Generator(), **arguments)
        return EpochLoader(next_batch=self._next_batch, **arguments)

    def _rank(self) -> tuple[int, int]:
        """Number of this process's part of the data, and of all parts. Processes that share an image share a part."""
        shares = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return (0, 1) if shares is None else (shares["rank"], shares["num_replicas"])

    def _next_batch(self) -> tuple[int, int] | None:
        return next_batch(self.trainer)


def hold_out(labels: Sequence[int] | np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Split positions into (kept, held out), stratified by label, both sorted.

    The split does not depend on the run's seed: a second stage of training with another seed would otherwise validate
    on training images of the first.

    Raises:
        UserError: One of the two would lack a class, or be empty.
    """
    indices = np.arange(len(labels))
    if fraction == 0:
        return indices, indices[:0]
    try:
        kept, held = train_test_split(indices, test_size=fraction, stratify=labels, random_state=SPLIT_SEED)
    except ValueError as error:  # in the words of scikit-learn
        smallest, classes = np.unique(labels, return_counts=True)[1].min(initial=len(indices)), len(np.unique(labels))
        few = f"too few for {classes} classes on both sides" if smallest > 1 else "a class has one alone"
        raise UserError(
            f"cannot hold out {fraction:g} of {len(indices)} samples: {few if classes > 1 else 'too few'}; give more, "
            "another val_fraction (--data.val_fraction), or validation data of their own (val beside train)"
        ) from error
    return np.sort(kept), np.sort(held)


def train_or_val(source: Source, split: str, val_fraction: float) -> Subset | None:
    """The part of a training set without a validation split that trains ("train"), or is held out.

    Stratified where the labels are known without reading the images.
    """
    labels = known_labels(source)
    kept, held = hold_out(np.zeros(len(source)) if labels is None else labels, val_fraction)
    indices = kept if split == "train" else held
    return Subset(source, indices.tolist()) if len(indices) else None
