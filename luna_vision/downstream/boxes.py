"""Objects in an image of any size, without tiles that are merged: a detector in the streaming engine.

The heads of a detector look a few cells of each map far. They run on squares with as many cells around them, so that
the scores and boxes of all anchors are those of the whole image. Non-maximum suppression takes all of them together. A
Faster R-CNN takes the patches twice: for its proposals, and for the boxes that it makes of those that are left.

Shapes: H, W pixels, A anchors of a cell, K classes, n boxes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes, roi_align
from torchvision.ops.poolers import LevelMapper

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

__all__ = ["BoxSink", "box_sink", "detect"]

NAMES = ("boxes", "scores", "labels")
PROPOSAL_SCORE = 0.05  # least objectness of a proposal: an image of any size has no first thousand
LARGEST = 2048  # pixels, the longest side of a proposal, which bounds the rows that are in memory
ROI_BATCH = 512
Found = dict[str, Tensor]


class BoxSink(SquareSink):
    """Runs a detector on the patches of its backbone, and keeps what its score threshold leaves, by rows of squares."""

    def __init__(
        self, model: nn.Module, size: tuple[int, int], partial: Path, take: Callable[[Found], None], cells: int
    ) -> None:
        """
        Args:
            model: In eval mode.
            size: H, W.
            partial: A folder for the boxes of each row of squares until all are done.
            take: Gets all objects, as of torchvision: boxes (n, 4), labels (n,) and scores (n,), the most certain
                first. The folder is removed after it.
            cells: Of a map, that its head looks at around a square.
        """
        self.model, self.size, self.partial, self.take = model, size, partial, take
        self.backbone = model.backbone.pyramid_backbone
        side = self.backbone.stride
        self.halos = [_aligned(cells * stride, side, stride) for stride in self.backbone.strides]
        # torchvision pads images to whole cells of the coarsest map
        align = max(max(self.backbone.strides) // side, 1)
        super().__init__(side, max(self.halos), align, pads=True)
        self.found: list[Found] = []

    def described(self) -> Any:
        return {"detector": describe(self.model), "partial": os.path.abspath(self.partial)}

    def planned_bytes(self, grid_size: tuple[int, int], model: nn.Module) -> int:
        work = 0
        for stride, halo in zip(self.backbone.strides, self.halos, strict=True):
            side = self.patches + 2 * halo
            cells = math.prod(min(side, n) * self.side / stride for n in self._grid(grid_size))
            # maps of the pyramid and of the head, with what a norm or a convolution copies; scores, boxes and anchors
            work = max(work, cells * (6 * self.backbone.out_channels + self.cell_numbers()))
        return super().planned_bytes(grid_size, model) + int(itemsize(model) * work)

    def cell_numbers(self) -> int:
        """How many numbers a cell has of its anchors."""
        raise NotImplementedError

    def classes(self) -> int:
        """How many classes there are, without the background."""
        raise NotImplementedError

    def open(self, layout: Layout, embed_dim: int, like: dict[str, Any], band: int, resume: bool) -> None:
        super().open(layout, embed_dim, like, band, resume)
        if not resume:
            remove_own(self.partial, r"(p?\d+|proposals)\.npz")
            self.partial.mkdir(parents=True)
        elif not self.partial.is_dir():
            raise FileNotFoundError(f"{self.partial} is gone, with the boxes that were found: remove the store, too")

    def candidates(
        self,
        level: int,
        place: tuple[int, int, int, int],
        valid: Tensor | None,
        head: Callable[[Tensor], tuple[Tensor, Tensor]],
        chosen: Callable[[Tensor], Tensor],
        decode: Callable[[Tensor, Tensor], Tensor],
        anchors: list[Tensor],
    ) -> Found | None:
        """The boxes of the anchors of a square on one map, where their scores are high enough; None if none are.

        Args:
            level: Of the pyramid.
            place, valid: As of `square`.
            head: From a map to scores (1, cells A, K) and deltas (1, cells A, 4).
            chosen: Which scores are high enough.
            decode: From deltas and anchors to boxes.
            anchors: Of a cell, by level.
        """
        top, bottom, left, right = place
        stride = self.backbone.strides[level]
        patches, first_row, first_column = self.around(*place, self.halos[level])
        cells = self.backbone.pyramid.levels[level](patches)
        y, x, up, across = (n * self.side // stride for n in (top, left, first_row, first_column))
        height, width = (bottom - top) * self.side // stride, (right - left) * self.side // stride
        inside = slice(y - up, y - up + height), slice(x - across, x - across + width)
        # of the cells of the square: (height, width, A, numbers)
        scores, deltas = (_wide(part[0].view(*cells.shape[2:], -1, part.shape[-1])[inside]) for part in head(cells))
        scores = scores.sigmoid()
        keep = chosen(scores)
        if valid is not None:
            keep &= _of_cells(valid, self.side, stride).to(keep.device)[:, :, None, None]
        row, column, anchor, label = keep.nonzero().T
        if not len(row):
            return None
        shift = torch.stack([column + x, row + y, column + x, row + y], dim=1) * stride
        boxes = decode(deltas[row, column, anchor], shift + anchors[level].to(deltas)[anchor])
        boxes = clip_boxes_to_image(boxes, self.size)
        return {"boxes": boxes, "scores": scores[row, column, anchor, label], "labels": label}

    def end_row(self) -> None:
        self._save(self._file(self.row), self.found)
        self.found = []

    def _file(self, row: int) -> Path:
        return self.partial / f"{row}.npz"

    def _save(self, path: Path, found: list[Found]) -> None:
        arrays = {name: np.concatenate([one[name].cpu().numpy() for one in found]) for name in NAMES if found}
        with new_file(path) as file:
            np.savez(file, **arrays)

    def _load(self, pattern: str) -> Found:
        """What the files hold, from top to bottom."""
        paths = sorted(self.partial.glob(pattern), key=lambda path: (len(path.name), path.name))
        loaded = []
        for path in paths:
            with np.load(path) as file:
                loaded += [dict(file)] if file.files else []
        if not loaded:
            return {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
        return {name: torch.from_numpy(np.concatenate([one[name] for one in loaded])) for name in NAMES}

    def is_finished(self) -> bool:
        return not self.partial.exists()

    def discard(self) -> None:
        remove(self.partial)

    def finish(self) -> None:
        self.take(_suppressed(self._load("[0-9]*.npz"), self.threshold()))
        remove(self.partial)

    def threshold(self) -> float:
        """Of non-maximum suppression."""
        raise NotImplementedError


class _RetinaSink(BoxSink):
    """Six cells: five convolutions of the head, and one of the pyramid."""

    def __init__(self, model: RetinaNet, size: tuple[int, int], partial: Path, take: Callable[[Found], None]) -> None:
        super().__init__(model, size, partial, take, cells=6)

    def cell_numbers(self) -> int:
        head = self.model.head.classification_head
        return head.num_anchors * (3 * head.num_classes + 12)

    def classes(self) -> int:
        return self.model.head.classification_head.num_classes - 1

    def threshold(self) -> float:
        return self.model.nms_thresh

    def square(self, top: int, bottom: int, left: int, right: int, valid: Tensor | None) -> None:
        model = self.model
        for level in range(len(self.backbone.strides)):
            found = self.candidates(
                level,
                (top, bottom, left, right),
                valid,
                lambda x: (model.head.classification_head([x]), model.head.regression_head([x])),
                lambda scores: scores > model.score_thresh,
                model.box_coder.decode_single,
                model.anchor_generator.cell_anchors,
            )
            if found is not None:
                self.found.append(found)


class _FasterSink(BoxSink):
    """Two cells: a convolution of the head that proposes, and one of the pyramid."""

    passes = 2

    def __init__(self, model: FasterRCNN, size: tuple[int, int], partial: Path, take: Callable[[Found], None]) -> None:
        super().__init__(model, size, partial, take, cells=2)
        self.score = max(model.rpn.score_thresh, PROPOSAL_SCORE)
        self.turn, self.proposals = 0, torch.zeros(0, 4)
        pool, strides = model.roi_heads.box_roi_pool, self.backbone.strides
        first, last = (round(math.log2(stride)) for stride in (strides[0], strides[-1]))
        self.mapper = LevelMapper(first, last, pool.canonical_scale, pool.canonical_level)

    def cell_numbers(self) -> int:
        return 15 * self.model.rpn.head.cls_logits.out_channels

    def classes(self) -> int:
        return self.model.roi_heads.box_predictor.cls_score.out_features - 1

    def planned_bytes(self, grid_size: tuple[int, int], model: nn.Module) -> int:
        height, columns = self._grid(grid_size)
        rows = min(self.patches + 2 * self._halo_of(LARGEST), height)
        pool = self.model.roi_heads.box_roi_pool
        rois = ROI_BATCH * (self.backbone.out_channels * 2 * math.prod(pool.output_size) + 4096)
        more = rows * columns * model.embed_dim + rois
        return super().planned_bytes(grid_size, model) + more * itemsize(model)

    def threshold(self) -> float:
        return self.model.roi_heads.nms_thresh

    def _halo_of(self, length: float) -> int:
        """Patches around a square within which are what a proposal that lies on its edge is pooled from."""
        return _aligned(length / 2 + 5 * max(self.backbone.strides), self.side, self.align * self.side)

    def _file(self, row: int) -> Path:
        return self.partial / f"{'p' if self.turn == 0 else ''}{row}.npz"

    def rewind(self, row: int, turn: int) -> int:
        if turn:
            self.next_pass()
        return super().rewind(row, turn)

    def next_pass(self) -> None:
        path = self.partial / "proposals.npz"
        if not path.exists():
            self._save(path, [_suppressed(self._load("p[0-9]*.npz"), self.model.rpn.nms_thresh)])
        self.turn, self.proposals = 1, self._load("proposals.npz")["boxes"].to(self.window.device)
        longest = (self.proposals[:, 2:] - self.proposals[:, :2]).max() if len(self.proposals) else 0.0
        self.begin(self._halo_of(float(longest)))
        self.everywhere = True  # a proposal may have its centre beside what was looked at
        # the patches in which proposals have their centres
        self.centres = ((self.proposals[:, :2] + self.proposals[:, 2:]) / 2 // self.side).long()
        self.near: tuple[int, Tensor] | None = None

    def square(self, top: int, bottom: int, left: int, right: int, valid: Tensor | None) -> None:
        if self.turn == 0:
            self._propose(top, bottom, left, right, valid)
            return
        if self.near is None or self.near[0] != top:  # the proposals of a row of squares
            self.near = top, ((self.centres[:, 1] >= top) & (self.centres[:, 1] < bottom)).nonzero()[:, 0]
        x = self.centres[self.near[1], 0]
        own = self.proposals[self.near[1][(x >= left) & (x < right)]]
        levels = self.mapper([own]) if len(self.backbone.strides) > 1 else own.new_zeros(len(own)).long()
        for level in levels.unique().tolist():
            for boxes in own[levels == level].split(ROI_BATCH):
                self._classify(level, boxes)

    def _propose(self, top: int, bottom: int, left: int, right: int, valid: Tensor | None) -> None:
        rpn = self.model.rpn

        def head(x: Tensor) -> tuple[Tensor, Tensor]:
            scores, deltas = (part[0] for part in rpn.head([x]))
            size = x.shape[2] * x.shape[3]
            return tuple(
                part[0].view(-1, n, size).permute(2, 0, 1).reshape(1, -1, n) for part, n in ((scores, 1), (deltas, 4))
            )

        for level in range(len(self.backbone.strides)):
            found = self.candidates(
                level,
                (top, bottom, left, right),
                valid,
                head,
                lambda scores: scores >= self.score,
                rpn.box_coder.decode_single,
                rpn.anchor_generator.cell_anchors,
            )
            if found is not None:
                keep = remove_small_boxes(found["boxes"], rpn.min_size)
                sides = (found["boxes"][:, 2:] - found["boxes"][:, :2]).amax(dim=1)
                keep = keep[sides[keep] <= LARGEST]
                found["labels"].fill_(level)  # suppression is by level
                self.found.append({name: found[name][keep] for name in NAMES})

    def _classify(self, level: int, boxes: Tensor) -> None:
        """What becomes of proposals (n, 4) that are pooled from this level, all near one square."""
        heads, stride = self.model.roi_heads, self.backbone.strides[level]
        align = max(stride // self.side, 1)
        low, high = boxes[:, :2].amin(dim=0), boxes[:, 2:].amax(dim=0)
        # with three cells more: two for pooling, one for the pyramid
        first = [max(int(n // stride - 3) * stride // self.side // align * align, 0) for n in low.tolist()]
        last = [-(-(int(n // stride) + 4) * stride // (self.side * align)) * align for n in high.tolist()]
        (left, top), (right, bottom) = first, (min(last[0], self.columns), min(last[1], self.height))
        cells = _wide(self.backbone.pyramid.levels[level](self.crop(top, bottom, left, right)))
        boxes = boxes.to(cells.dtype)
        corner = boxes.new_tensor([left, top, left, top]) * self.side
        pool = heads.box_roi_pool
        pooled = roi_align(cells, [boxes - corner], pool.output_size, 1 / stride, pool.sampling_ratio)
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
        scores, decoded = _wide(logits).softmax(-1), heads.box_coder.decode(_wide(deltas), [boxes])
        decoded = clip_boxes_to_image(decoded, self.size)
        row, label = (scores[:, 1:] > heads.score_thresh).nonzero().T
        label = label + 1  # 0 is the background
        found = {"boxes": decoded[row, label], "scores": scores[row, label], "labels": label}
        keep = remove_small_boxes(found["boxes"], 1e-2)
        self.found.append({name: found[name][keep] for name in NAMES})

    def open(self, layout: Layout, embed_dim: int, like: dict[str, Any], band: int, resume: bool) -> None:
        self.turn = 0
        super().open(layout, embed_dim, like, band, resume)


_SINKS = {RetinaNet: _RetinaSink, FasterRCNN: _FasterSink}


def box_sink(model: nn.Module, size: tuple[int, int], partial: Path, take: Callable[[Found], None]) -> BoxSink:
    """A `BoxSink` for a detector of `build_detector`; arguments as there."""
    if type(model) not in _SINKS:
        raise UserError(f"{type(model).__name__} is no detector of an image of any size: RetinaNet and FasterRCNN are")
    return _SINKS[type(model)](model, size, partial, take)


def _suppressed(found: Found, threshold: float) -> Found:
    """What non-maximum suppression leaves of each label, the most certain first."""
    # in float64: far from the origin, float32 has few digits for small boxes
    kept = batched_nms(found["boxes"].double(), found["scores"].double(), found["labels"], threshold)
    return {name: found[name][kept] for name in NAMES}


def _aligned(pixels: float, side: int, stride: int) -> int:
    """Patches that cover so many pixels: whole cells of a map of this stride, if these are larger than a patch."""
    align = max(stride // side, 1)
    return math.ceil(pixels / (side * align)) * align


def _wide(x: Tensor) -> Tensor:
    """At least float32: places in a large image are no numbers of half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _of_cells(valid: Tensor, side: int, stride: int) -> Tensor:
    """The cells of a map in which any patch of a square is valid."""
    if stride <= side:
        return valid.repeat_interleave(side // stride, 0).repeat_interleave(side // stride, 1)
    return valid.unfold(0, stride // side, stride // side).unfold(1, stride // side, stride // side).any(-1).any(-1)


def _write(found: Found, image: Any, geojson: Path, coco: Path | None, names: Sequence[str], ids: Sequence[int]) -> int:
    """Write objects as GeoJSON and COCO JSON; returns how many."""
    frame, size = Frame.of(image), image.shape[:2]
    scale = np.array([frame.box[2] / size[1], frame.box[3] / size[0]] * 2)
    objects = found["labels"] > 0  # 0 is the background, which training never shows
    boxes, scores, labels = (found[name][objects].numpy() for name in NAMES)
    if coco is not None:
        on_file = (boxes * scale + np.array(frame.box[:2] * 2)).tolist()
        about = {"file_name": utf8(str(getattr(image, "file", ""))), "size": frame.size}
        record = about | {"boxes": on_file, "scores": scores.tolist(), "labels": labels.tolist()}
        with new_file(coco) as file:
            file.write(json.dumps(coco_content([record], names, ids)).encode())

    def feature(box: np.ndarray, score: float, label: int) -> tuple[list[np.ndarray], dict[str, Any]]:
        """The outline of a box, and properties as QuPath writes those of a detection."""
        left, top, right, bottom = box.tolist()
        ring = np.array([(left, top), (right, top), (right, bottom), (left, bottom), (left, top)])
        kind = {"name": names[label - 1], "color": voc_palette()[label % 256].tolist()}
        score = round(float(score), 6)
        return [ring], {"objectType": "detection", "classification": kind, "measurements": {"score": score}}

    return write_geojson(geojson, frame, size, map(feature, boxes, scores, labels))


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
    of objects or candidates in an image: all that the score threshold and non-maximum suppression leave. The proposals
    of a Faster R-CNN are all of a score of at least 0.05 and no side above 2,048 pixels.

    Args:
        model: A detector of `build_detector` whose backbone is a Luna ViT; it is put in eval mode.
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
    model.eval()
    geojson, coco, count = Path(geojson), None if coco is None else Path(coco), 0

    def take(found: Found) -> None:
        nonlocal count
        numbers = range(1, sink.classes() + 1)
        names, ids = class_names or list(map(str, numbers)), category_ids or numbers
        count = _write(found, image, geojson, coco, names, ids)

    sink = box_sink(model, tuple(image.shape[:2]), geojson.with_name(f"{geojson.name}.partial"), take)
    check_geojson(geojson)
    for path in (geojson, *([] if coco is None else [coco])):
        check_apart(path, "the output", getattr(image, "file", None))
    statistics = {"mean": model.transform.image_mean, "std": model.transform.image_std}
    values = pixel_arguments(sink.backbone.body, image, value_range, nodata, fill)
    result = encode(sink.backbone.body, image, **statistics, **values, grid=sink, **how)
    return count, result
