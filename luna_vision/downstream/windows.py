"""Features of image files, a window at a time: images of similar size share a batch, and few are in memory at once."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from PIL import Image
from timm.data import resolve_data_config
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from luna_vision.images.decode import SampleError, read_image, sample_rasters, to_channels
from luna_vision.images.masks import no_masks
from luna_vision.images.transforms import SeededTransform, eval_transform, per_channel, shrink
from luna_vision.images.values import (
    MASK,
    PERCENTILE,
    Values,
    model_values,
    parse_fill,
    parse_value_range,
    percentile_range,
)
from luna_vision.utils.errors import one_line

from .features import Extractor, Features

__all__ = [
    "Settings",
    "Window",
    "data_config",
    "extract",
    "group",
    "image_transform",
    "pixel_values",
    "read_windows",
]

# a window is a run of consecutive images that are then grouped by size; it is full when it has this many of either
WINDOW_IMAGES, WINDOW_PIXELS = 1024, 2**24
BATCH_PIXELS = 2**22  # of a batch, with padding; a larger image is a batch of its own
MAX_PADDING = 1.25  # pixels of a padded batch, divided by those of its images


@dataclass(frozen=True)
class Settings:
    """How images are read, and which features are wanted.

    Attributes:
        max_size: Images with a longer side are shrunk to it, in pixels; their aspect ratio stays.
        img_size: All images become squares of this side by the evaluation transform, with the model's own `crop_pct`
            and `crop_mode`.
        mean: Mean by channel for pixels in [0, 1], or one number for all; by default that of the model's
            `pretrained_cfg`.
        std: Standard deviation by channel, likewise.
        value_range: What numbers in files become 0 and 1: (LOW, HIGH), "dtype", or "percentile" of the files; the
            model's own, from its training, by default. See docs/pixels.md.
        nodata: A number that stands for no data, besides the one that a file itself names; likewise.
        fill: What takes the place of missing numbers: "mean", "error" or a number; or "mask", which leaves out patches
            that have no others, and takes a Luna ViT; likewise.
        memory: Return the memory slots, too. Needs a Luna ViT.
        grid: Return the patch grid, too.
        batch_size: Images in a batch, at most.
        max_pixels: Images with more pixels are not decoded; the default is Pillow's limit, 179 megapixels.
        workers: Processes that decode images; with 0 this process does.

    Raises:
        ValueError: A number out of its range, or both sizes.
    """

    max_size: int | None = None
    img_size: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    value_range: str | Sequence[float] | None = None
    nodata: float | None = None
    fill: float | str | None = None
    memory: bool = False
    grid: bool = False
    batch_size: int = 32
    max_pixels: int = 2 * (Image.MAX_IMAGE_PIXELS or 2**62)
    workers: int = 0

    def __post_init__(self) -> None:
        if self.max_size is not None and self.img_size is not None:
            raise ValueError("max_size keeps the aspect ratio and img_size does not: give one of them")
        for name, least in (("max_size", 1), ("img_size", 1), ("batch_size", 1), ("max_pixels", 1), ("workers", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        parse_value_range(self.value_range)
        parse_fill(self.fill)


@dataclass
class Window:
    """The features of the images [start, stop) of the input.

    Attributes:
        start, stop: Positions in the input.
        features: By position, of each image that could be used.
        failures: By position, why an image could not be used.
    """

    start: int
    stop: int
    features: dict[int, Features] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)


def data_config(extractor: Extractor, settings: Settings) -> dict[str, Any]:
    """How images are normalised and cropped: "mean", "std" (by channel), "crop_pct" and "crop_mode" (timm's words).

    Mean and standard deviation are those of the settings, if given; all else is from the model's `pretrained_cfg`, with
    timm's defaults for missing entries.
    """
    # not given the model itself, for which timm would warn about statistics of three channels for a grey model
    config = resolve_data_config(pretrained_cfg=getattr(extractor.model, "pretrained_cfg", {}))
    return {
        "mean": per_channel("mean", config["mean"] if settings.mean is None else settings.mean, extractor.in_chans),
        "std": per_channel("std", config["std"] if settings.std is None else settings.std, extractor.in_chans),
        "crop_pct": config["crop_pct"],
        "crop_mode": config["crop_mode"],
    }


def pixel_values(extractor: Extractor, settings: Settings, paths: Sequence[str] = ()) -> Values:
    """What the numbers of these files mean: what the settings say, else the model.

    Raises:
        ValueError: Percentiles are wanted of files that have no numbers, or a mask of a model that takes none.
    """
    mean = data_config(extractor, settings)["mean"]
    cfg = getattr(extractor.model, "pretrained_cfg", {})
    value_range = parse_value_range(settings.value_range)
    if value_range == PERCENTILE:
        nodata = cfg.get("nodata") if settings.nodata is None else settings.nodata
        found = sample_rasters(len(paths), lambda index: read_image(paths[index], settings.max_pixels))
        value_range = percentile_range(found, nodata)
    values = model_values(cfg, mean, value_range, settings.nodata, settings.fill)
    if values.fill == MASK and extractor.patch_size is None:
        raise ValueError(no_masks(extractor.name))
    return values


def read_windows(
    extractor: Extractor,
    paths: Sequence[str],
    settings: Settings,
    start: int = 0,
    advance: Callable[[int], object] = lambda count: None,
    values: Values | None = None,
    stop: int | None = None,
) -> Iterator[Window]:
    """The features of image files, one window after the other.

    The end of a window depends only on the files and on its start. So a run that starts where a window ended gets the
    same windows as a run that was not stopped.

    Args:
        extractor: The model.
        paths: Image files.
        settings: How they are read.
        start, stop: The positions in `paths` to read; to the end by default.
        advance: Called with the number of images that are finished since the last call.
        values: Meaning of their numbers, from `pixel_values`; by default of these paths.

    Raises:
        ValueError: The model fails on all images of the first window of all that has any.
    """
    values = values or pixel_values(extractor, settings, paths)
    dataset = FileTensors(paths, image_transform(extractor, settings, values), extractor.in_chans, settings.max_pixels)
    order = range(start, len(paths) if stop is None else stop)
    loader = DataLoader(dataset, batch_size=None, sampler=order, num_workers=settings.workers)
    window, images, pixels, worked = Window(start, start), {}, 0, start > 0
    for index, image in zip(order, loader, strict=True):
        if isinstance(image, str):
            window.failures[index] = image
            advance(1)
        else:
            # a worker's tensor is shared memory and keeps a file open; the number of open files is limited
            images[index] = image.clone() if settings.workers else image
            pixels += image.shape[1] * image.shape[2]
        window.stop = index + 1
        if pixels >= WINDOW_PIXELS or window.stop - window.start >= WINDOW_IMAGES or window.stop == order.stop:
            extract(extractor, images, settings.batch_size, window, advance)
            worked = worked or bool(window.features)
            if images and not worked:
                reason = window.failures[next(iter(images))].rstrip(".")
                raise ValueError(f"{reason}; img_size (--img-size) brings all images to one size")
            yield window
            window, images, pixels = Window(window.stop, window.stop), {}, 0


def group(
    sizes: Sequence[tuple[int, int]], batch_size: int, max_padding: float = 1.0, max_pixels: int = BATCH_PIXELS
) -> list[list[int]]:
    """Divide images into batches, each to be padded to the largest height and width in it.

    Args:
        sizes: (height, width) of each image.
        batch_size: Images in a batch, at most.
        max_padding: Pixels of a padded batch, divided by those of its images, at most; with 1 all have one size.
        max_pixels: Pixels of a padded batch of more than one image, at most.

    Returns:
        Positions in `sizes`, by batch.
    """
    batches: list[list[int]] = []
    height = width = own = 0
    for i in sorted(range(len(sizes)), key=lambda i: sizes[i]):
        joint = max(height, sizes[i][0]), max(width, sizes[i][1])
        area = sizes[i][0] * sizes[i][1]
        if batches and len(batches[-1]) < batch_size:
            padded = joint[0] * joint[1] * (len(batches[-1]) + 1)
            if padded <= max_pixels and padded <= max_padding * (own + area):
                batches[-1].append(i)
                (height, width), own = joint, own + area
                continue
        batches.append([i])
        (height, width), own = sizes[i], area
    return batches


def extract(
    extractor: Extractor,
    images: dict[int, Tensor],
    batch_size: int,
    window: Window,
    advance: Callable[[int], object] = lambda count: None,
) -> None:
    """Add the features of images to their window, and to its failures the images of a size that the model refuses."""
    indices, patch = list(images), extractor.patch_size
    sizes = [(image.shape[1], image.shape[2]) for image in images.values()]
    if patch:
        sizes = [(-(-height // patch[0]) * patch[0], -(-width // patch[1]) * patch[1]) for height, width in sizes]
    found: dict[int, Features] = {}
    running: deque[tuple[list[int], Callable[[], list[Features]]]] = deque()

    def finish() -> None:
        batch, features = running.popleft()
        found.update(zip(batch, features(), strict=True))
        advance(len(batch))

    for positions in group(sizes, batch_size, MAX_PADDING if patch else 1.0):
        batch = [indices[i] for i in positions]
        try:
            running.append((batch, extractor.submit([images[index] for index in batch])))
        except SampleError as error:  # only models that need one size raise it, so it concerns all of the batch
            window.failures |= dict.fromkeys(batch, str(error))
            advance(len(batch))
        if len(running) > 1:  # a GPU has a batch to work on while the next one is put together
            finish()
    while running:
        finish()
    window.features, window.failures = dict(sorted(found.items())), dict(sorted(window.failures.items()))


class FileTensors(Dataset):
    """The normalised image (channels, height, width) of each file, or a string: the reason why there is none."""

    def __init__(self, paths: Sequence[str], transform: SeededTransform, in_chans: int, max_pixels: int) -> None:
        self.paths, self.transform, self.in_chans, self.max_pixels = paths, transform, in_chans, max_pixels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            image = read_image(self.paths[index], self.max_pixels)
            return self.transform(to_channels(image, self.in_chans, self.transform.values), 0)
        except (SampleError, OSError, MemoryError) as error:
            return one_line(error)


def image_transform(extractor: Extractor, settings: Settings, values: Values) -> SeededTransform:
    """What makes an image of `to_channels` the tensor that the model reads."""
    config = data_config(extractor, settings)
    mean, std = config["mean"], config["std"]
    if settings.img_size:
        crop_pct = None if config["crop_mode"] == "squash" else config["crop_pct"]
        return eval_transform((settings.img_size, settings.img_size), mean, std, crop_pct, values=values)
    return SeededTransform(partial(shrink, max_size=settings.max_size), mean, std, values=values)
