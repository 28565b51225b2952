"""Training augmentation by a choice of libraries.

An augmentation backend is a function from :class:`Augmentation` to a callable ``(PIL image, seed) -> image``, an
:data:`~luna_vision.images.transforms.ImageTransform`; :data:`AUGMENTATIONS` lists them. The rest is the same for all:
conversion to float, normalisation, random erasing.
"""

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else the import below asks a server for its latest version

import albumentations as A
import cv2
import numpy as np
import timm.data
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import AugmentOp, AugMixAugment, AutoAugment, RandAugment, posterize
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.tv_tensors import Mask

from luna_vision.data.sampling import seeded_rng
from luna_vision.images.decode import MODES, to_picture
from luna_vision.images.transforms import ImageTransform, SeededTransform, resize
from luna_vision.images.values import Values
from luna_vision.utils.checks import check_option, check_share

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of training images, for any backend. An amount of 0 switches a part off.

    Attributes:
        size: Height and width of the result in pixels.
        crop: "resized" (a random part of the image, resized to ``size``), "pad" (the image resized to ``size``, zero
            padding around it, a random crop of ``size``) or "none" (the image resized to ``size``).
        crop_scale: Smallest and largest share of the image's area that "resized" keeps.
        crop_ratio: Smallest and largest aspect ratio (width / height) of that part.
        crop_padding: Padding of "pad" on each side, in pixels.
        hflip: Probability of a horizontal flip.
        rotate: Largest rotation in degrees, either way.
        color_jitter: Largest relative change of brightness, contrast and (of colour images) saturation. Neither this
            nor auto_augment nor timm takes images that are not grey or colour.
        auto_augment: A policy by name: timm's strings such as "rand-m9-mstd0.5-inc1" with the timm backend,
            a key of :data:`TORCHVISION_POLICIES` with the torchvision backend. It takes the place of ``color_jitter``.
        mean: Mean of the pixels in [0, 1] by channel, the fill colour of timm's policies.
    """

    size: tuple[int, int]
    crop: str = "resized"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    crop_padding: int = 4
    hflip: float = 0.5
    rotate: float = 0.0
    color_jitter: float = 0.3
    auto_augment: str | None = None
    mean: tuple[float, ...] = (0.5,)

    def __post_init__(self) -> None:
        check_option("crop", self.crop, ("resized", "pad", "none"))
        for name, most in (("crop_scale", 1), ("crop_ratio", math.inf)):
            found = getattr(self, name)
            if len(found) != 2 or not 0 < found[0] <= found[1] <= most:
                bound = " <= 1" if most == 1 else ""
                raise ValueError(f"{name} must be 0 < smallest <= largest{bound}, got {found}")
        check_share(hflip=self.hflip)
        for name in ("crop_padding", "rotate", "color_jitter"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")


class _Albumentations:
    """Seeds the pipeline's own generators for each image.

    NOTE Without this, albumentations 2.0.8 draws the same augmentations in all workers and all epochs, also after
    seed_everything(workers=True).
    """

    def __init__(self, steps: list[A.BasicTransform], size: tuple[int, int] | None, padding: int) -> None:
        self.compose = A.Compose(steps)
        self.size, self.padding = size, padding

    def __call__(self, image: Image.Image | np.ndarray, seed: int, missing: np.ndarray | None = None) -> Any:
        # Steps that are not random stay outside of the pipeline, whose steps cost more than the work on a small image.
        if self.size is not None and (image.shape[:2] if _deep(image) else image.size[::-1]) != self.size:
            resized = resize(image, seed, self.size, missing=missing)
            image, missing = resized if missing is not None else (resized, None)
        if pad := self.padding:
            image = np.pad(image, ((pad, pad), (pad, pad), (0, 0))) if _deep(image) else ImageOps.expand(image, pad)
            missing = None if missing is None else np.pad(missing, pad)
        self.compose.set_random_seed(seed)
        array = np.asarray(image)
        mask = {} if missing is None else {"mask": missing.astype(np.uint8)}
        done = self.compose(image=array[:, :, None] if array.ndim == 2 else array, **mask)
        image = done["image"].clip(0, 1) if _deep(image) else done["image"]  # where it was resized, it overshoots
        return image if missing is None else (image, done["mask"] > 0)


def albumentations_backend(aug: Augmentation) -> ImageTransform:
    """Augment with albumentations, its generator seeded for each sample."""
    padding = aug.crop_padding if aug.crop == "pad" else 0
    steps = []
    if aug.crop == "resized":
        # "image" takes cv2.INTER_AREA when downscaling, where OpenCV's cubic interpolation would alias
        resize = {"interpolation": cv2.INTER_CUBIC, "area_for_downscale": "image"}
        steps.append(A.RandomResizedCrop(aug.size, scale=aug.crop_scale, ratio=aug.crop_ratio, **resize))
    if aug.rotate:
        steps.append(A.Rotate(aug.rotate, p=1.0))
    if padding:
        steps.append(A.RandomCrop(*aug.size))
    if aug.hflip:
        steps.append(A.HorizontalFlip(p=aug.hflip))
    if aug.color_jitter:
        jitter = aug.color_jitter
        steps.append(A.ColorJitter(jitter, jitter, jitter if len(aug.mean) == 3 else 0, hue=0, p=1.0))
    return _Albumentations(steps, None if aug.crop == "resized" else aug.size, padding)


def _deep(image: Image.Image | np.ndarray) -> bool:
    """Whether an image has more than 8 bits: float32 (H, W, C) in [0, 1]."""
    return isinstance(image, np.ndarray)


class _GlobalRNG:
    """For libraries that draw from the global generators: seeds them for one image, then restores them.

    Args:
        transform: Of images of Pillow; of tensors (C, H, W) in [0, 1], too, unless `eight_bits`.
        eight_bits: Bring deep images to 8 bits before.
        told: What to say, once, when there is a deep image.
    """

    def __init__(self, transform: Callable[..., Any], eight_bits: bool = False, told: str = "") -> None:
        self.transform, self.eight_bits, self.told = transform, eight_bits, told

    def __call__(self, image: Image.Image | np.ndarray, seed: int, missing: np.ndarray | None = None) -> Any:
        if deep := _deep(image):
            if self.told:
                _logger.warning(self.told)
                self.told = ""
            image = to_picture(image) if self.eight_bits else torch.from_numpy(image).permute(2, 0, 1).contiguous()
        mask = () if missing is None else (Mask(torch.from_numpy(missing)),)
        with seeded_rng(seed):
            image = self.transform(image, *mask)
        image, *mask = image if mask else (image,)
        # interpolation swings beyond black and white
        image = image.clamp(0, 1) if deep and not self.eight_bits else image
        return (image, mask[0].numpy()) if mask else image


TORCHVISION_POLICIES: dict[str, type[torch.nn.Module]] = {
    "randaugment": v2.RandAugment,
    "trivialaugment": v2.TrivialAugmentWide,
    "autoaugment": v2.AutoAugment,
    "augmix": v2.AugMix,
}


def _torchvision_crop(aug: Augmentation) -> list[torch.nn.Module]:
    """Crop and rotation, shared by the torchvision and timm backends."""
    bicubic = InterpolationMode.BICUBIC
    if aug.crop == "resized":
        steps = [v2.RandomResizedCrop(aug.size, aug.crop_scale, aug.crop_ratio, interpolation=bicubic)]
    else:
        steps = [v2.Resize(aug.size, interpolation=bicubic)]
    if aug.crop == "pad":
        steps.append(v2.Pad(aug.crop_padding))
    if aug.rotate:
        steps.append(v2.RandomRotation(aug.rotate, interpolation=InterpolationMode.BILINEAR))
    if aug.crop == "pad":
        steps.append(v2.RandomCrop(aug.size))
    return steps


def torchvision_backend(aug: Augmentation) -> ImageTransform:
    """Augment with torchvision.transforms.v2; ``auto_augment`` names one of its policies."""
    steps = _torchvision_crop(aug) + [v2.RandomHorizontalFlip(aug.hflip)]
    if aug.auto_augment:
        check_option("auto_augment of torchvision", aug.auto_augment, TORCHVISION_POLICIES)
        steps.append(TORCHVISION_POLICIES[aug.auto_augment]())
    elif aug.color_jitter:
        steps.append(v2.ColorJitter(aug.color_jitter, aug.color_jitter, aug.color_jitter))
    told = "auto_augment of torchvision equalizes in 8 bits: images of more bits lose levels where it does"
    return _GlobalRNG(v2.Compose(steps), told=told if aug.auto_augment else "")


def timm_backend(aug: Augmentation) -> ImageTransform:
    """Augment with timm.data.create_transform; ``auto_augment`` is one of its policy strings."""
    try:
        transform = timm.data.create_transform(
            aug.size,
            is_training=True,
            scale=aug.crop_scale,
            ratio=aug.crop_ratio,
            hflip=aug.hflip,
            color_jitter=aug.color_jitter or None,
            auto_augment=aug.auto_augment,
            interpolation="bicubic",
            mean=aug.mean,
            normalize=False,
        )
    except (AssertionError, KeyError, ValueError) as error:  # timm parses the policy string with assertions
        raise ValueError(f"timm does not know auto_augment {aug.auto_augment!r} ({error})") from error
    for operation in chain.from_iterable(map(_operations, transform.transforms)):
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize  # of this transform alone; timm itself stays as it is
    # Without a resized crop, the first transform is replaced, as DeiT's build_transform does for small images.
    first = [] if aug.crop == "resized" and not aug.rotate else _torchvision_crop(aug)
    told = "augmentation 'timm' works in 8 bits: images of more bits lose levels in training; albumentations keeps them"
    return _GlobalRNG(v2.Compose(first + transform.transforms[bool(first) :]), eight_bits=True, told=told)


def _operations(step: object) -> list[AugmentOp]:
    """The operations of a policy of timm; none if the step is no policy."""
    if isinstance(step, AutoAugment):
        return list(chain.from_iterable(step.policy))
    return step.ops if isinstance(step, (RandAugment, AugMixAugment)) else []


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """timm's posterize, whose policies ask for 0 bits at their strongest: black.

    NOTE Pillow up to 12 makes an image of 0 bits black; Pillow 13 refuses them. See docs/data.md.
    """
    return posterize(image, bits_to_keep) if bits_to_keep > 0 else Image.new(image.mode, image.size)


def no_augmentation(aug: Augmentation) -> ImageTransform:
    """Resize to the wanted size, and nothing else."""
    return partial(resize, size=aug.size)


class AugmentationError(RuntimeError):
    """An augmentation failed on a sound image: a bug of the augmentation, not a broken image.

    Not a ValueError, since commands report those as mistakes of the user.
    """


def _augment(image: Image.Image | np.ndarray, seed: int, transform: ImageTransform, **missing: np.ndarray) -> Any:
    try:
        return transform(image, seed, **missing)
    except (ValueError, OSError) as error:
        mode, size = ("floating-point", image.shape[1::-1]) if _deep(image) else (image.mode, image.size)
        what = f"a {mode} image of {size[0]} x {size[1]} pixels with seed {seed}"
        raise AugmentationError(f"augmentation of {what} failed: {type(error).__name__}: {error}") from error


def check_masks(backend: str, auto_augment: str | None) -> None:
    """
    Raises:
        ValueError: The augmentation cannot take along which pixels are missing.
    """
    if backend == "timm" or auto_augment:
        raise ValueError(
            "fill 'mask' takes augmentation 'albumentations', 'torchvision' or 'none', without auto_augment: others "
            "would not move the mask with the image"
        )


AUGMENTATIONS: dict[str, Callable[[Augmentation], ImageTransform]] = {
    "albumentations": albumentations_backend,
    "torchvision": torchvision_backend,
    "timm": timm_backend,
    "none": no_augmentation,
}


def train_transform(
    backend: str,
    aug: Augmentation,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    random_erasing: float = 0.0,
    values: Values | None = None,
) -> SeededTransform:
    """The training transform of a backend; an unknown one is a ValueError that lists :data:`AUGMENTATIONS`.

    ``random_erasing`` is the probability of replacing a random rectangle by noise after normalisation (Zhong et al.
    2017, arXiv 1708.04896). ``values`` are those of :class:`~luna_vision.images.transforms.SeededTransform`.

    Images of more than 8 bits keep their levels with albumentations, torchvision (but where a policy equalizes) and
    "none"; timm brings them to 8 bits, which is said once.

    When called, it raises an :class:`AugmentationError` where the backend raises a ValueError or an OSError.
    """
    check_option("augmentation", backend, AUGMENTATIONS)
    if len(mean) not in MODES and (aug.color_jitter or aug.auto_augment or backend == "timm"):
        raise ValueError(
            f"images of {len(mean)} channels are neither grey nor colour: they take color_jitter 0, no auto_augment, "
            "and augmentation 'albumentations', 'torchvision' or 'none'"
        )
    if aug.auto_augment and backend not in ("timm", "torchvision"):
        raise ValueError(f"auto_augment needs augmentation 'timm' or 'torchvision': {backend!r} has no such policies")
    augment = partial(_augment, transform=AUGMENTATIONS[backend](aug))
    erase = (
        partial(_erase, erasing=RandomErasing(random_erasing, mode="pixel", device="cpu")) if random_erasing else None
    )
    return SeededTransform(augment, mean, std, erase, values)


def _erase(image: Tensor, seed: int, erasing: RandomErasing) -> Tensor:
    with seeded_rng(seed ^ 0xE7A5E):  # not the seed of the transform, whose draws would be repeated
        return erasing(image)
