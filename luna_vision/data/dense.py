"""Images with boxes or masks: what a sample is, how it is augmented, and the base of the data modules that read files.

Shapes: C channels, H x W pixels, n objects of an image.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import albumentations as A
import cv2
import numpy as np
from PIL import Image
from torch import Tensor

from luna_vision.data.base import ImageDataModule
from luna_vision.data.faults import LabelFaults
from luna_vision.data.images import Source, TransformedDataset
from luna_vision.data.label_files import Format, LabelSet, Place, label_file_of, recognise
from luna_vision.data.sampling import repeated, sample_seed
from luna_vision.images.decode import MODES, SampleError
from luna_vision.images.find import contents, listed
from luna_vision.images.transforms import SeededTransform, to_tensor
from luna_vision.images.values import Raster, Values
from luna_vision.utils.checks import check_at_least, check_option, check_share
from luna_vision.utils.errors import UserError

IGNORE = 255  # in the masks of a batch: neither trained on nor scored
TRAIN_ON = ("whole", "crops", "bands")
MIN_VISIBLE = 0.1  # of its area: the least that a crop must keep of a box


class Truth(NamedTuple):
    """What is known about an image: objects, or a class for each pixel."""

    boxes: np.ndarray = np.empty((0, 4), np.float32)  # (n, 4): left, top, right, bottom in pixels
    labels: np.ndarray = np.empty(0, np.int64)  # (n,), from 0
    crowd: np.ndarray = np.empty(0, bool)  # (n,): neither trained on nor counted as missed
    mask: np.ndarray | None = None  # uint8 (H, W), the class of each pixel or `IGNORE`; None where there are boxes


class DenseSource(Source, Protocol):
    """(image, `Truth`) by index."""

    def presence(self) -> np.ndarray:
        """bool (n, K), whether an image has a class. Needed with ``repeat_rare`` alone."""


class CropOnObject(A.CropNonEmptyMaskIfExists):
    """A crop around a random pixel of an object, if there is one; for albumentations' own, class 0 never is."""

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        is_object = ~np.isin(data["mask"], self.ignore_values)
        return super().get_params_dependent_on_data(params, data | {"mask": is_object})


@dataclass(frozen=True)
class DenseAugmentation:
    """The augmentation of images with boxes or masks, by the arguments of `DenseDataModule`.

    Without `crop_size`, images stay whole. Those smaller than a crop are padded. Grey images have no saturation.
    """

    crop_size: tuple[int, int] | None = None
    object_share: float = 0.5
    scale: tuple[float, float] = (1.0, 1.0)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.3

    def __post_init__(self) -> None:
        check_share(object_share=self.object_share, hflip=self.hflip, vflip=self.vflip)
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be 0 < smallest <= largest, got {list(self.scale)}")
        check_at_least(0, color_jitter=self.color_jitter)

    def steps(self, in_chans: int, masks: bool, background: bool) -> list[A.BasicTransform]:
        """albumentations' transforms.

        Args:
            in_chans: C.
            masks: For masks, else for boxes.
            background: Whether class 0 of masks is no object.
        """
        steps: list[A.BasicTransform] = []
        if self.scale != (1.0, 1.0):
            limits = (self.scale[0] - 1, self.scale[1] - 1)
            steps.append(A.RandomScale(limits, cv2.INTER_LINEAR, area_for_downscale="image", p=1.0))
        if self.crop_size is not None:
            height, width = self.crop_size
            steps.append(A.PadIfNeeded(height, width, position="top_left", fill=0, fill_mask=IGNORE))
            if masks:
                nothing = [0, IGNORE] if background else [IGNORE]
                on_object = CropOnObject(height, width, ignore_values=nothing, p=self.object_share)
            else:
                on_object = A.AtLeastOneBBoxRandomCrop(height, width, p=self.object_share)
            # where an object was cut out, there is nothing left to crop
            steps += [on_object, A.RandomCrop(height, width)]
        steps += [A.HorizontalFlip(p=self.hflip)] * bool(self.hflip) + [A.VerticalFlip(p=self.vflip)] * bool(self.vflip)
        if jitter := self.color_jitter:
            steps.append(A.ColorJitter(jitter, jitter, jitter if in_chans == 3 else 0, hue=0, p=1.0))
        return steps


class DenseTransform:
    """An image, and what is known about it, to float32 (C, H, W) with pixels in [0, 1] and a target.

    Args:
        values: What the numbers of files mean, see `luna_vision.images.values`.
        target: Makes the target of a `Truth`.
        steps: albumentations' transforms, drawn anew for each seed, after which crowds are left out; None leaves image
            and truth as they are.
    """

    def __init__(
        self, values: Values, target: Callable[[Truth], Any], steps: Sequence[A.BasicTransform] | None = None
    ) -> None:
        self.values, self.target = values, target
        boxes = A.BboxParams(
            "pascal_voc", label_fields=["labels"], min_width=1, min_height=1, min_visibility=MIN_VISIBLE, clip=True
        )
        # without a step that takes boxes, such as this one, albumentations warns
        self.compose = None if steps is None else A.Compose([*steps, A.NoOp()], bbox_params=boxes)

    def set_values(self, values: Values, std: Sequence[float]) -> None:
        """Change what the numbers of files mean; models of boxes and masks normalise by themselves."""
        self.values = values

    def __call__(self, image: Image.Image | np.ndarray, seed: int = 0, truth: Truth | None = None) -> Any:
        """The tensor; with ``truth`` also the target."""
        if truth is None:
            return to_tensor(image)
        if self.compose is not None:
            image, truth = self._augment(image, seed, truth)
        return to_tensor(image), self.target(truth)

    def _augment(self, image: Image.Image | np.ndarray, seed: int, truth: Truth) -> tuple[np.ndarray, Truth]:
        array = np.asarray(image)
        array = array[:, :, None] if array.ndim == 2 else array
        boxes = truth.boxes[~truth.crowd], truth.labels[~truth.crowd]
        masks = {} if truth.mask is None else {"mask": truth.mask}
        self.compose.set_random_seed(seed)
        out = self.compose(image=array, bboxes=boxes[0], labels=boxes[1], **masks)
        labels = np.asarray(out["labels"], np.int64)
        found = np.asarray(out["bboxes"], np.float32).reshape(-1, 4)
        return out["image"], Truth(found, labels, np.zeros(len(labels), bool), out.get("mask"))


class DenseDataset(TransformedDataset):
    """(image (C, H, W), target) of a source of (image, `Truth`)."""

    def prepare(
        self,
        image: Any,
        label: Truth,
        epoch: int,
        index: int,
        what: str,
        transform: SeededTransform | DenseTransform | None = None,
    ) -> tuple[Tensor, Any]:
        return (transform or self.transform)(image, sample_seed(self.seed, epoch, index), label)


class DenseDataModule(ImageDataModule):
    """Base of the data modules of files with boxes or masks.

    Batches are ``(images, targets)``, two lists: images (C, H, W) of their own sizes with pixels in [0, 1], which the
    models normalise. Prediction batches are ``(images, paths)``. Evaluation is always on whole images.

    A subclass defines :meth:`open_labels` and :meth:`target`, the class attributes, and ``class_names``.

    Args:
        root: Folder of the data.
        format: Of the labels; by default the one that ``root`` has.
        in_chans: 1 (grey) or 3 (RGB), to which images are converted; or any other number of bands, that of the files.
        batch_size: Images in a batch on each device.
        eval_batch_size: The same for validation, test and prediction; 1 by default, as whole images may be large.
        num_workers: Processes that load images; 0 loads in the main process.
        seed: Seed of the shuffle and of all augmentation.
        val_fraction: Share of the training images to hold out for validation where there are no others.
        train_on: "whole" images; random "crops" of them; or "bands", whole images that the model recomputes by bands of
            rows, for images that would not fit into memory otherwise.
        crop_size: Side of the crops in pixels, or [height, width].
        object_share: Share of the crops that are put where an object is; the others lie anywhere, and may be empty.
        scale: [smallest, largest] factor of a random resizing of training images.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        color_jitter: Largest relative change of brightness, contrast, saturation; by default 0.3 of grey and colour. Of
            other bands there is none.
        repeat_rare: Training images of classes that fewer than this share of the images have come more often, see
            :func:`luna_vision.data.sampling.repeat_rare`; 0 is off. With masks, all of them are read once for it.
        value_range, nodata, fill: As in :class:`ImageDataModule`.
        on_error: For a faulty label, and for an image that cannot be read or has another size than its labels say:
            "raise" stops with all of them counted and named; "skip" leaves labels out, and puts another image in the
            place of one that cannot be read.
        max_error_share: Largest share of labels, and of images, that "skip" leaves out; it stops beyond.
        predict_path: Images to predict: a file, a folder or a list of files; the test images if None.

    Attributes:
        train_on: As above.

    Raises:
        ValueError: An argument is out of range, or (on setup) labels are faulty.
        FileNotFoundError: On setup: the data is not under ``root``.
    """

    dataset_type = DenseDataset
    predicts_files = True
    formats: Mapping[str, Format]  # of labels, by name
    masks = False  # whether targets are masks
    background = False  # whether class 0 of the masks is no object

    def __init__(
        self,
        root: str = "data",
        format: str | None = None,
        in_chans: int = 3,
        batch_size: int = 4,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        seed: int = 0,
        val_fraction: float = 0.1,
        train_on: str = "whole",
        crop_size: int | list[int] = 512,
        object_share: float = 0.5,
        scale: list[float] | None = None,
        hflip: float = 0.5,
        vflip: float = 0.0,
        color_jitter: float | None = None,
        repeat_rare: float = 0.0,
        value_range: str | list[float] | None = None,
        nodata: float | None = None,
        fill: float | str | None = None,
        on_error: str = "raise",
        max_error_share: float = 0.01,
        predict_path: str | list[str] | None = None,
    ) -> None:
        check_option("train_on", train_on, TRAIN_ON)
        if format is not None:
            check_option("format", format, self.formats)
        check_share(repeat_rare=repeat_rare)
        if color_jitter and in_chans not in MODES:
            raise ValueError(f"images of {in_chans} channels take color_jitter 0, got {color_jitter}")
        super().__init__(
            root=root,
            img_size=crop_size,
            in_chans=in_chans,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            val_fraction=val_fraction,
            value_range=value_range,
            nodata=nodata,
            fill=fill,
            augmentation="none",
            crop="none",
            on_error=on_error,
            max_error_share=max_error_share,
            predict_path=predict_path,
        )
        self._format, self.train_on, self.repeat_rare = format, train_on, repeat_rare
        self._names: list[str] | None = None  # of the classes, if they are given
        self.augmentation = DenseAugmentation(
            self.img_size if train_on == "crops" else None,
            object_share,
            tuple(scale or (1.0, 1.0)),
            hflip,
            vflip,
            self._augment.color_jitter if color_jitter is None else color_jitter,  # the default of all images
        )
        self.train_transform = self.eval_transform = DenseTransform(self.values, self.target)
        self._sources: dict[str, Source | None] = {}

    @property
    def format(self) -> str:
        """A key of ``formats``."""
        if self._format is None:
            self._format = recognise(self.root, self.formats)
        return self._format

    def place(self, split: str) -> Place | None:
        """Where the labels of "train", "val" or "test" are; None where ``root`` has no such split.

        Raises:
            FileNotFoundError: It has none for training.
        """
        form = self.formats[self.format]
        place = form.place(Path(self.root), split)
        if place is None and split == "train":
            where = f"{self.root}, which {contents(self.root)}"
            raise FileNotFoundError(f"no training labels as {self.format} in {where}: it must have {form.layout}")
        return place

    def open_labels(self, place: Place, split: str) -> DenseSource:
        """The images and labels of a split."""
        raise NotImplementedError

    def label_faults(self, split: str) -> LabelFaults:
        """To collect the faults of the labels of a split."""
        return LabelFaults(f"{type(self).__name__} {split}", self.max_error_share)

    def read_labels(self, place: Place, split: str) -> LabelSet:
        """The labels of a split in a file of objects.

        Raises:
            UserError: The file is broken, has no images, no classes, or other classes than those given; or no training
                image has an object.
            SampleError: It has faults, more than may be left out.
        """
        known = self._names if split == "train" else self.class_names
        faults = self.label_faults(split)
        labels = self.formats[self.format].read(place, known, faults)
        faults.settle(len(labels.images) + int(labels.counts.sum()))
        if not labels.images or not labels.names:
            raise UserError(f"{place.labels} has no {'images' if labels.names else 'classes'}")
        if split == "train" and not labels.counts.any():
            where = label_file_of(labels.images[0].file).parent if self.format == "yolo" else place.labels
            raise UserError(f"not one of {len(labels.images)} training images has an object, by the labels in {where}")
        if known is not None and labels.names != known:
            raise UserError(f"classes must be those of {place.labels}, {listed(labels.names)}, got {listed(known)}")
        return labels

    def target(self, truth: Truth) -> Any:
        """What a batch has of an image."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def source(self, split: str) -> Source | None:
        """The images and labels of a split as ``root`` has them, read once; None where it has no such split."""
        if split not in self._sources:
            place = self.place(split)
            self._sources[split] = None if place is None else self.open_labels(place, split)
        return self._sources[split]

    def make_source(self, split: str) -> Source | None:
        source = self.split_source(split, self.source)
        if split == "train" and self.repeat_rare:
            return repeated(source, self.source("train").presence(), self.repeat_rare)
        return source

    def timm_cfg(self) -> dict[str, Any]:
        """The classes, and what the numbers of files mean: the models prepare images themselves."""
        names = list(self.class_names)
        return {"num_classes": len(names), "label_names": names, **self.values.described()}

    def _tensors(self, source: Source, split: str) -> DenseDataset:
        if split == "train":  # whose steps depend on the classes
            steps = self.augmentation.steps(self.in_chans, self.masks, self.background)
            self.train_transform = DenseTransform(self.values, self.target, steps)
        return super()._tensors(source, split)

    @staticmethod
    def collate_fn(samples: list[tuple[Tensor, Any]]) -> tuple[list, list]:
        images, targets = zip(*samples, strict=True)
        return list(images), list(targets)


def check_image_size(size: tuple[int, int], stated: tuple[int, int], said: str) -> None:
    """Raise a SampleError unless an image has the height and width that its labels are for."""
    if tuple(size) != tuple(stated):
        (height, width), turned = size, ", as EXIF turns it" if tuple(size) == tuple(stated)[::-1] else ""
        raise SampleError(
            f"the image has {width} x {height} pixels{turned}, but {said} is of {stated[1]} x {stated[0]}"
        )


def size_of(image: Image.Image | Raster) -> tuple[int, int]:
    """Height and width of an image in pixels."""
    return image.size[::-1]
