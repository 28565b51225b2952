"""Objects in an image of any size, without tiles that are merged: a detector in the streaming engine.

The head of a RetinaNet looks six cells of each map far. It runs on squares with as many cells around them, so that the
scores and boxes of all anchors are those of the whole image, and non-maximum suppression takes all of them together.

Shapes: H, W pixels, A anchors of a cell, K classes, n boxes.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.ops import clip_boxes_to_image, nms

from luna_vision.execution.encode import Encoded, encode
from luna_vision.execution.grid import check_apart
from luna_vision.execution.layout import Layout
from luna_vision.images.polygons import check_geojson, write_geojson
from luna_vision.images.regions import Frame
from luna_vision.utils.errors import UserError
from luna_vision.utils.files import new_file, remove, remove_own
from luna_vision.utils.fingerprint import describe
from luna_vision.utils.text import utf8

from .detection import coco_content
from .segmentation import voc_palette
from .squares import SquareSink, itemsize, pixel_arguments

__all__ = ["BoxSink", "detect"]

HALO = 6  # cells of a map that the head looks at: five convolutions, and one of the pyramid
NAMES = ("boxes", "scores", "labels")


class BoxSink(SquareSink):
    """Runs a RetinaNet on the patches of its backbone, and keeps what its score threshold leaves."""

    def __init__(self, model: RetinaNet, size: tuple[int, int], partial: Path) -> None:
        """
        Args:
            model: In eval mode.
            size: H, W.
            partial: A folder for the boxes of each row of squares until all are done.
        """
        self.model, self.size, self.partial = model, size, partial
        self.backbone = model.backbone.pyramid_backbone
        side = self.backbone.stride
        # torchvision pads images to whole cells of the coarsest map
        align = max(max(self.backbone.strides) // side, 1)
        self.halos = [_halo(stride, side) for stride in self.backbone.strides]
        super().__init__(side, max(self.halos), align, pads=True)
        self.found: list[dict[str, Tensor]] = []

    def described(self) -> Any:
        return {"detector": describe(self.model), "threshold": self.model.score_thresh}

    def planned_bytes(self, grid_size: tuple[int, int], model: nn.Module) -> int:
        work = 0
        for stride, halo in zip(self.backbone.strides, self.halos, strict=True):
            side = self.patches + 2 * halo
            cells = math.prod(min(side, n) * self.side / stride for n in self._grid(grid_size))
            head = self.model.head.classification_head
            # maps of the pyramid and of the head, with what a norm or a convolution copies; scores, boxes and anchors
            work = max(work, cells * (6 * self.backbone.out_channels + head.num_anchors * (3 * head.num_classes + 12)))
        return super().planned_bytes(grid_size, model) + int(itemsize(model) * work)

    def open(self, layout: Layout, embed_dim: int, like: dict[str, Any], band: int, resume: bool) -> None:
        super().open(layout, embed_dim, like, band, resume)
        self.model.anchor_generator.set_cell_anchors(like["dtype"], like["device"])
        if not resume:
            remove_own(self.partial, r"\d+\.npz")
            self.partial.mkdir(parents=True)
        elif not self.partial.is_dir():
            raise FileNotFoundError(f"{self.partial} is gone, with the boxes that were found: remove the store, too")

    def square(self, top: int, bottom: int, left: int, right: int, valid: Tensor | None) -> None:
        model = self.model
        for i, stride in enumerate(self.backbone.strides):
            patches, first_row, first_column = self.around(top, bottom, left, right, self.halos[i])
            cells = self.backbone.pyramid.levels[i](patches)
            y, x, up, across = (n * self.side // stride for n in (top, left, first_row, first_column))
            height, width = (bottom - top) * self.side // stride, (right - left) * self.side // stride
            inside = slice(y - up, y - up + height), slice(x - across, x - across + width)
            scores = self._own(model.head.classification_head([cells]), cells.shape[2:], inside).sigmoid()
            if valid is not None:
                seen = _of_cells(valid, self.side, stride).to(scores.device)
                scores = scores.masked_fill(~seen[:, :, None, None], -1.0)
            chosen = (scores > model.score_thresh).nonzero()  # row, column, anchor, class
            if not len(chosen):
                continue
            shifts = torch.arange(width, device=scores.device) + x, torch.arange(height, device=scores.device) + y
            shift_y, shift_x = torch.meshgrid(shifts[1] * stride, shifts[0] * stride, indexing="ij")
            corners = torch.stack([shift_x, shift_y, shift_x, shift_y], dim=-1)
            anchors = corners[:, :, None] + model.anchor_generator.cell_anchors[i]
            boxes = self._own(model.head.regression_head([cells]), cells.shape[2:], inside)
            at = chosen[:, 0], chosen[:, 1], chosen[:, 2]
            boxes = clip_boxes_to_image(model.box_coder.decode_single(boxes[at], anchors[at]), self.size)
            one = {"boxes": _wide(boxes), "scores": _wide(scores[(*at, chosen[:, 3])]), "labels": chosen[:, 3]}
            self.found.append(one)

    @staticmethod
    def _own(x: Tensor, size: Sequence[int], inside: tuple[slice, slice]) -> Tensor:
        """What a head says of the cells of the square, (height, width, A, numbers), of (1, cells A, numbers)."""
        return x[0].view(*size, -1, x.shape[-1])[inside]

    def end_row(self) -> None:
        found = {name: [one[name].cpu().numpy() for one in self.found] for name in NAMES if self.found}
        self.found = []
        with new_file(self.partial / f"{self.row}.npz") as file:
            np.savez(file, **{name: np.concatenate(parts) for name, parts in found.items()})

    def result(self) -> dict[str, Tensor]:
        """All objects, the most certain first: boxes (n, 4), labels (n,) and scores (n,), as of torchvision."""
        rows = sorted((int(path.stem), path) for path in self.partial.glob("*.npz") if re.fullmatch(r"\d+", path.stem))
        loaded = [np.load(path) for _, path in rows]
        parts = [[torch.from_numpy(one[name]) for one in loaded if name in one] for name in NAMES]
        if not parts[0]:
            return {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
        boxes, scores, labels = map(torch.cat, parts)
        kept = []
        for label in labels.unique():
            own = (labels == label).nonzero()[:, 0]
            # in float64: far from the origin, float32 has few digits for small boxes
            kept.append(own[nms(boxes[own].double(), scores[own].double(), self.model.nms_thresh)])
        kept = torch.cat(kept)
        kept = kept[scores[kept].argsort(descending=True, stable=True)]
        return {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}

    def sync(self) -> None:
        pass  # `end_row` waits for the disk

    def close(self) -> None:
        pass

    def is_finished(self) -> bool:
        return not self.partial.exists()

    def discard(self) -> None:
        remove(self.partial)


def _halo(stride: int, side: int) -> int:
    """Patches that the head looks at around a square, on the map of a stride: whole cells of it."""
    align = max(stride // side, 1)
    return -(-HALO * stride // (side * align)) * align


def _wide(x: Tensor) -> Tensor:
    """Numbers that numpy has, too."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _of_cells(valid: Tensor, side: int, stride: int) -> Tensor:
    """The cells of a map in which any patch of a square is valid."""
    if stride <= side:
        return valid.repeat_interleave(side // stride, 0).repeat_interleave(side // stride, 1)
    return valid.unfold(0, stride // side, stride // side).unfold(1, stride // side, stride // side).any(-1).any(-1)


class _Files(BoxSink):
    """Writes the objects as GeoJSON and COCO JSON."""

    def __init__(
        self, model: RetinaNet, image: Any, geojson: Path, coco: Path | None, names: list[str], ids: list[int]
    ) -> None:
        """
        Args:
            geojson, coco: The files.
            names, ids: Of the classes.
        """
        super().__init__(model, tuple(image.shape[:2]), geojson.with_name(f"{geojson.name}.partial"))
        self.image, self.geojson, self.coco, self.names, self.ids = image, geojson, coco, names, ids
        self.count = 0

    def described(self) -> Any:
        return super().described() | {"files": [os.path.abspath(path) for path in (self.geojson, self.coco) if path]}

    def finish(self) -> None:
        found, frame = self.result(), Frame.of(self.image)
        scale = np.array([frame.box[2] / self.size[1], frame.box[3] / self.size[0]] * 2)
        objects = found["labels"] > 0  # 0 is the background, which training never shows
        boxes, scores, labels = (found[name][objects].numpy() for name in NAMES)
        if self.coco is not None:
            on_file = (boxes * scale + np.array(frame.box[:2] * 2)).tolist()
            about = {"file_name": utf8(str(getattr(self.image, "file", ""))), "size": frame.size}
            record = about | {"boxes": on_file, "scores": scores.tolist(), "labels": labels.tolist()}
            with new_file(self.coco) as file:
                file.write(json.dumps(coco_content([record], self.names, self.ids)).encode())
        self.count = write_geojson(self.geojson, frame, self.size, map(self._feature, boxes, scores, labels))
        remove(self.partial)

    def _feature(self, box: np.ndarray, score: float, label: int) -> tuple[list[np.ndarray], dict[str, Any]]:
        """The outline of a box, and properties as QuPath writes those of a detection."""
        left, top, right, bottom = box.tolist()
        ring = np.array([(left, top), (right, top), (right, bottom), (left, bottom), (left, top)])
        kind = {"name": self.names[label - 1], "color": voc_palette()[label % 256].tolist()}
        score = round(float(score), 6)
        return [ring], {"objectType": "detection", "classification": kind, "measurements": {"score": score}}


@torch.no_grad()
def detect(
    model: nn.Module,
    image: Any,
    geojson: str | os.PathLike,
    coco: str | os.PathLike | None = None,
    *,
    class_names: Sequence[str] | None = None,
    category_ids: Sequence[int] | None = None,
    value_range: str | Sequence[float] | None = None,
    nodata: float | None = None,
    fill: float | str | None = None,
    **how: Any,
) -> tuple[int, Encoded]:
    """Write the objects in an image that need not fit into memory.

    The image keeps its size, and its objects are those of `model([image])` up to rounding, without limits of the number
    of objects or candidates in an image: all that the score threshold and non-maximum suppression leave.

    Args:
        model: A RetinaNet of `build_detector` whose backbone is a Luna ViT; it is put in eval mode.
        image: As in `encode`.
        geojson: File of the boxes, as polygons with a class and a score, in pixels of level 0 of the image's file or,
            of an image with a georeference, in longitude and latitude. What is there is replaced at the end.
        coco: File of the boxes in COCO's form, in pixels of level 0.
        class_names: Without the background.
        category_ids: The numbers of the classes in COCO's form; by default from 1.
        value_range, nodata, fill: As in `encode`.
        **how: on_error, mask, store, store_dtype, memory_budget, band_rows, progress of `encode`. Patches that a mask
            leaves out have no objects.

    Returns:
        How many objects there are, and what `encode` returns.

    Raises:
        ValueError: As in `encode`, or another detector.
        OSError: As in `encode`.
    """
    if not isinstance(model, RetinaNet):
        raise UserError(
            f"a {type(model).__name__} ranks proposals over the whole image, of which a large one has too many: train "
            "with detector=retinanet"
        )
    model.eval()
    count = model.head.classification_head.num_classes - 1  # class 0 is the background, which nothing has
    names = list(class_names or map(str, range(1, count + 1)))
    ids = list(category_ids or range(1, count + 1))
    geojson, coco = Path(geojson), None if coco is None else Path(coco)
    check_geojson(geojson)
    for path in (geojson, *([] if coco is None else [coco])):
        check_apart(path, "the output", getattr(image, "file", None))
    sink = _Files(model, image, geojson, coco, names, ids)
    statistics = {"mean": model.transform.image_mean, "std": model.transform.image_std}
    values = pixel_arguments(sink.backbone.body, image, value_range, nodata, fill)
    result = encode(sink.backbone.body, image, **statistics, **values, grid=sink, **how)
    return sink.count, result
