"""Answers for every pixel of an image of any size, without tiles that are blended: a segmenter in the streaming engine.

The backbone runs as `luna_vision.execution.encode` runs it. In its last sweep, patches after the final norm come row by
row; the head reads them in squares, with as many patches around each as it looks far, so that the logits are those of
the whole image.

Shapes: H, W pixels, H', W' patch grid, D width of the backbone, K classes.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from luna_vision.execution.encode import Encoded, encode
from luna_vision.execution.grid import check_apart
from luna_vision.execution.layout import Layout
from luna_vision.images.maps import MapFile
from luna_vision.images.polygons import check_geojson, outlines, write_geojson
from luna_vision.images.regions import Frame
from luna_vision.utils.errors import UserError
from luna_vision.utils.fingerprint import describe

from .segmentation import FCN, mask_numbers
from .squares import SquareSink, itemsize, pixel_arguments

__all__ = ["PixelSink", "segment"]

HALO = 3  # cells of the head's map, from which a pixel is computed


class PixelSink(SquareSink):
    """Runs the head of a segmenter on the patches of its backbone. A subclass takes the logits."""

    def __init__(self, model: FCN, size: tuple[int, int]) -> None:
        """
        Args:
            model: In eval mode.
            size: H, W.
        """
        self.model, self.size, self.stride = model, size, model.backbone.strides[0]
        side = model.backbone.stride
        align = max(1, self.stride // side)  # a cell may have several patches
        super().__init__(side, -(-HALO * self.stride // (side * align)) * align, align)

    def take(self, top: int, left: int, logits: Tensor, valid: Tensor | None) -> None:
        """Take the logits (K, n, m) of a square whose upper left pixel is at (top, left).

        Args:
            valid: (n, m) bool, the pixels in patches that were looked at; None for all.
        """
        raise NotImplementedError

    def described(self) -> Any:
        """The weights of the head, too: the engine knows those of the backbone."""
        return {"head": describe(self.model)}

    def planned_bytes(self, grid_size: tuple[int, int], model: nn.Module) -> int:
        side = self.patches + 2 * self.halo
        cells = math.prod(min(side, n) * self.side / self.stride for n in grid_size)
        classes = self.model.classifier[-1].out_channels
        # maps of the pyramid with what a norm or a convolution copies, and the logits of cells and of pixels
        work = cells * (6 * self.model.backbone.out_channels + classes * (1 + 4 * self.stride**2))
        return super().planned_bytes(grid_size, model) + int(itemsize(model) * work)

    def square(self, top: int, bottom: int, left: int, right: int, valid: Tensor | None) -> None:
        patches, first_row, first_column = self.around(top, bottom, left, right, self.halo)
        logits = self.model.read(patches)
        # only the cells around the square are upsampled
        spans = []
        for start, stop, first, count in (
            (top, bottom, first_row, logits.shape[2]),
            (left, right, first_column, logits.shape[3]),
        ):
            first = first * self.side // self.stride
            low = max(start * self.side // self.stride - 1, first)
            spans.append((low, min(-(-stop * self.side // self.stride) + 1, first + count), first))
        (low, high, down), (near, far, across) = spans
        pixels = self.model.upsample(logits[:, :, low - down : high - down, near - across : far - across])[0]
        y, x = top * self.side, left * self.side
        height, width = min(bottom * self.side, self.size[0]) - y, min(right * self.side, self.size[1]) - x
        y0, x0 = y - low * self.stride, x - near * self.stride
        pixels = pixels[:, y0 : y0 + height, x0 : x0 + width]
        if valid is not None:
            valid = valid.repeat_interleave(self.side, 0).repeat_interleave(self.side, 1)[:height, :width]
            valid = valid.to(pixels.device)
        self.take(y, x, pixels, valid)


class _Maps(PixelSink):
    """Writes the most probable class of each pixel, and probabilities."""

    def __init__(
        self,
        model: FCN,
        image: Any,
        classes: MapFile,
        numbers: np.ndarray,
        probabilities: MapFile | None,
        polygons: Path | None,
        outlined: list[int],
    ) -> None:
        """
        Args:
            classes, probabilities, polygons: The files.
            numbers: Of the classes.
            outlined: The numbers that get polygons.
        """
        super().__init__(model, tuple(image.shape[:2]))
        self.image, self.classes, self.numbers, self.probabilities = image, classes, numbers, probabilities
        self.polygons, self.outlined = polygons, outlined
        self.maps = [one for one in (classes, probabilities) if one is not None]

    def described(self) -> Any:
        paths = [os.path.abspath(path) for path in (*(one.path for one in self.maps), self.polygons) if path]
        numbers = hashlib.sha256(self.numbers.tobytes()).hexdigest()
        return super().described() | {"maps": paths, "numbers": numbers}

    def open(self, layout: Layout, embed_dim: int, like: dict[str, Any], band: int, resume: bool) -> None:
        super().open(layout, embed_dim, like, band, resume)
        with ExitStack() as opened:
            for one in self.maps:
                if not (resume and one.is_finished()):  # a run may have been killed between two maps
                    dtype = self.numbers.dtype.name if one is self.classes else "uint8"
                    one.open(self.image, dtype, self.tile, resume)
                    if not resume:
                        opened.callback(one.discard)
            opened.pop_all()
        if self.polygons is not None and not resume:
            self.polygons.unlink(missing_ok=True)  # one that exists is of this run

    def take(self, top: int, left: int, logits: Tensor, valid: Tensor | None) -> None:
        numbers = self.numbers[logits.argmax(0).cpu().numpy()]
        if valid is not None:
            numbers[~valid.cpu().numpy()] = self.classes.nodata
        self.classes.write(top, left, numbers)
        if self.probabilities is not None:
            shares = (logits.float().softmax(0) * 255).round()
            if valid is not None:
                shares *= valid
            self.probabilities.write(top, left, shares.to(torch.uint8).cpu().numpy())

    def is_finished(self) -> bool:
        return all(one.is_finished() for one in self.maps) and (self.polygons is None or self.polygons.exists())

    def discard(self) -> None:
        for one in self.maps:
            one.discard()

    def finish(self) -> None:
        for one in self.maps:
            if not one.is_finished():
                one.finish()
        if self.polygons is not None:
            found = outlines(self.classes.path, self.outlined)
            features = ((rings, self._properties(number)) for number, rings in found)
            write_geojson(self.polygons, Frame.of(self.image), self.size, features)

    def _properties(self, number: int) -> dict[str, Any]:
        """Of a polygon, as QuPath writes those of an annotation."""
        name, color = self.classes.classes[number], self.classes.palette[number % 256].tolist()
        return {"objectType": "annotation", "classification": {"name": name, "color": color}, "number": number}


@torch.no_grad()
def segment(
    model: FCN,
    image: Any,
    classes: str | os.PathLike,
    probabilities: str | os.PathLike | None = None,
    polygons: str | os.PathLike | None = None,
    *,
    values: Sequence[int] | Sequence[tuple[int, int, int]] | None = None,
    class_names: Sequence[str] | None = None,
    value_range: str | Sequence[float] | None = None,
    nodata: float | None = None,
    fill: float | str | None = None,
    **how: Any,
) -> Encoded:
    """Write the class of each pixel of an image that need not fit into memory.

    The classes are those of `model(image)`, up to rounding; there are no tiles to blend. Memory is bounded as by
    `encode`. With a `store`, a call that was stopped is resumed by the same call.

    Args:
        model: A segmenter whose backbone is a Luna ViT; it is put in eval mode.
        image: As in `encode`.
        classes: File of the classes; its suffix is one of `luna_vision.images.maps.MAP_SUFFIXES`. What is there is
            replaced at the end.
        probabilities: File of the probability of each class, a channel each, uint8: 255 is 1.
        polygons: File of the outlines of all connected areas of a class, GeoJSON, but of a class "background"; takes
            `classes` in TIFF. In pixels of level 0 or, of an image with a georeference, in longitude and latitude.
        values: The number, or the colour, of each class in training masks, which become the numbers and the colours of
            the file; by default 0 to K - 1.
        class_names: Their names.
        value_range, nodata, fill: As in `encode`.
        **how: on_error, mask, store, store_dtype, memory_budget, band_rows, progress of `encode`. Where a mask leaves
            patches out, the file has its number for no data: the largest that is no class's.

    Returns:
        The memory, the patch grid's size and the mask; there is no embedding.

    Raises:
        ValueError: As in `encode`, or a suffix that is none of a map.
        OSError: As in `encode`.
    """
    model.eval()
    body, count = model.backbone.body, model.classifier[-1].out_channels
    names = list(class_names or map(str, range(count)))
    numbers, palette = mask_numbers(count, values)
    numbers = numbers.astype(np.uint16) if count > 255 else numbers  # one is left for no data
    free = next(n for n in range(np.iinfo(numbers.dtype).max, -1, -1) if n not in numbers)
    named = {int(number): name for number, name in zip(numbers, names, strict=True)}
    maps = [MapFile(Path(classes), classes=named, palette=palette, nodata=free)]
    if probabilities is not None:
        maps.append(MapFile(Path(probabilities), channels=names))
    polygons = None if polygons is None else Path(polygons)
    if polygons is not None:
        check_geojson(polygons)
        if maps[0].is_zarr:
            raise UserError(f"polygons are drawn from classes in TIFF, got {classes}")
    for path in (*(one.path for one in maps), *([] if polygons is None else [polygons])):
        check_apart(path, "the map", getattr(image, "file", None))
    outlined = [number for number, name in named.items() if name != "background"]
    sink = _Maps(model, image, maps[0], numbers, maps[1] if len(maps) > 1 else None, polygons, outlined)
    statistics = {"mean": model.image_mean.flatten().tolist(), "std": model.image_std.flatten().tolist()}
    values = pixel_arguments(body, image, value_range, nodata, fill)
    return encode(body, image, **statistics, **values, grid=sink, **how)
