"""The patches in which there is something: tissue found on a low level, a mask file, or polygons drawn in a viewer.

Shapes: H, W pixels of an image, H', W' its patch grid, h x w cells of a mask that lies over it.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..utils.errors import UserError, one_line
from .find import MASK_WORDS
from .formats import open_image
from .pixels import chunk_side, chunk_spans
from .regions import Frame, Georeference
from .values import missing

__all__ = ["OTSU", "VALID", "otsu_threshold", "patch_mask"]

OTSU, VALID = MASK_WORDS
POLYGONS = (".geojson", ".json")
CELLS = 2  # a side of a patch, in which polygons are drawn
BINS = 256
ROWS = 256  # that are read together of what has no chunks


def patch_mask(
    mask: np.ndarray | str | os.PathLike,
    image: Any,
    grid_size: tuple[int, int],
    patch_size: tuple[int, int],
    nodata: float | None = None,
) -> np.ndarray:
    """The patches (H', W') bool that a mask covers, if only in part.

    Args:
        mask: "otsu", what is colourful or bright by Otsu's threshold; "valid", what holds data by alpha, a mask or a
            number for no data in a raster; an image file that lies over level 0 of the image's file, or GeoJSON with
            polygons in pixels of level 0 or, of an image with a georeference, in the coordinates that the GeoJSON
            names, else in longitude and latitude; or an array (h, w) that lies over the image, or (H', W'). What is
            not 0, and no missing number, counts.
        image: From `open_image`, or an array.
        grid_size: H', W'.
        patch_size: Its height and width in pixels.
        nodata: A number of the image that stands for no data, besides the one that its file names.

    Raises:
        UserError: The mask covers nothing, lies over an image of another shape, or cannot be read.
        OSError: There is no such file.
    """
    height, width = image.shape[:2]
    frame = Frame.of(image)
    place, name = (0.0, 0.0, 1.0, 1.0), "the mask"
    if not isinstance(mask, str | os.PathLike):
        cells = np.asarray(mask)
        if cells.shape == tuple(grid_size):  # one for each patch, of which the last may be cut
            return _checked((cells != 0) & np.isfinite(cells), name)
        if cells.ndim != 2 or not _same_shape(cells.shape, (height, width)):
            raise UserError(f"the mask of shape {cells.shape} does not lie over the image of {height} x {width} pixels")
    elif mask == VALID:
        return _checked(_with_data(image, grid_size, patch_size), "what holds data")
    elif mask == OTSU:
        cells, place, name = *_found(image, patch_size, nodata), "what Otsu's threshold finds"
    elif (path := Path(mask)).suffix.lower() in POLYGONS:
        name = str(path)
        cells = _drawn(path, frame, (height, width), grid_size, patch_size)
        patches = cells.reshape(grid_size[0], CELLS, grid_size[1], CELLS).any(axis=(1, 3))
        return _checked(patches, name)
    else:
        name, cells = str(path), open_image(path)
        if not _same_shape(cells.shape[:2], frame.size):
            whole = f"{frame.size[1]} x {frame.size[0]}"
            raise UserError(f"{path} of {cells.shape[1]} x {cells.shape[0]} pixels does not lie over {whole} pixels")
        (left, top, w, h), (down, across) = frame.box, frame.size
        place = left / across, top / down, w / across, h / down
    return _checked(_covered(cells, place, (height, width), grid_size, patch_size), name)


def otsu_threshold(numbers: np.ndarray) -> float:
    """The threshold that divides numbers into two classes of the largest variance between them.

    Source: Otsu, "A threshold selection method from gray-level histograms", IEEE Trans. SMC 9(1), 1979.
    """
    counts, edges = np.histogram(numbers, BINS)
    centres = (edges[:-1] + edges[1:]) / 2
    below, total = np.cumsum(counts)[:-1], counts.sum()
    sums = np.cumsum(counts * centres)
    above = total - below
    between = below * above * (sums[:-1] / np.maximum(below, 1) - (sums[-1] - sums[:-1]) / np.maximum(above, 1)) ** 2
    return float(edges[1 + int(between.argmax())])


def _checked(patches: np.ndarray, name: str) -> np.ndarray:
    if not patches.any():
        raise UserError(f"{name} leaves no patch of the image")
    return patches


def _same_shape(cells: tuple[int, ...], pixels: tuple[int, int]) -> bool:
    """Whether a mask has the shape of an image at another size, to a cell."""
    (h, w), (height, width) = cells, pixels
    return abs(h - w * height / width) <= 1 or abs(w - h * width / height) <= 1


def _covered(
    mask: Any,
    place: tuple[float, float, float, float],
    size: tuple[int, int],
    grid_size: tuple[int, int],
    patch_size: tuple[int, int],
) -> np.ndarray:
    """The patches (H', W') over which anything of a mask (h, w[, c]) counts: is not 0, and not missing.

    Args:
        mask: An array or an image, of which a few rows are read at a time.
        place: Left, top, width and height of the image in the mask, as shares of the mask's.
        size: H, W.
        grid_size, patch_size: As in `patch_mask`.
    """
    spans = []
    for axis, (first, share) in enumerate(((place[1], place[3]), (place[0], place[2]))):
        edges = np.minimum(np.arange(grid_size[axis] + 1) * patch_size[axis], size[axis]) / size[axis]
        edges = (first + edges * share) * mask.shape[axis]
        low = np.clip(np.floor(edges[:-1] + 1e-6), 0, mask.shape[axis] - 1).astype(int)
        spans.append((low, np.clip(np.ceil(edges[1:] - 1e-6), low + 1, mask.shape[axis]).astype(int)))
    (tops, bottoms), (lefts, rights) = spans
    patches = np.zeros(grid_size, bool)
    for start, part in _chunks(mask):
        rows = range(np.searchsorted(bottoms, start, "right"), np.searchsorted(tops, start + len(part), "left"))
        if not rows:
            continue
        counts = ((part != 0) & _there(part, {getattr(mask, "nodata", None)} - {None})).any(axis=2)
        counts = np.pad(counts, ((0, 0), (0, 1)))  # as the end of a span is an index, too
        across = np.logical_or.reduceat(counts, np.stack([lefts, rights], axis=1).ravel(), axis=1)[:, ::2]
        for row in rows:
            patches[row] |= across[max(tops[row] - start, 0) : bottoms[row] - start].any(axis=0)
    return patches


def _found(
    image: Any, patch_size: tuple[int, int], nodata: float | None
) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """The squares (h, w), a patch each or less, that are no background, and the place of the image in them.

    In colour of 8 bits these are the colourful ones, as stained tissue is on white glass, else the bright ones, as in
    fluorescence. Otsu's threshold divides them. Squares in which all is missing are background.
    """
    coarser = getattr(image, "overview", lambda side: None)(min(patch_size))
    source, (left, top, w, h), side = coarser or (image, (0.0, 0.0, 1.0, 1.0), min(patch_size))
    scores = _scores(source, side, {getattr(image, "nodata", None), nodata} - {None})
    (height, width), (rows, columns) = source.shape[:2], scores.shape
    across, down = width / (columns * side), height / (rows * side)  # the last squares may be cut
    there = np.isfinite(scores)
    good = scores[there]
    if good.size and np.ptp(good):
        there &= scores > otsu_threshold(good)
    return there, (left * across, top * down, w * across, h * down)


def _scores(image: Any, side: int, numbers: set[float]) -> np.ndarray:
    """How much there is in each square of an image (h, w): of the mean of its pixels the largest minus the least colour
    or, if it is no colour of 8 bits, the mean of all bands. NaN where all pixels are missing.

    Args:
        image: Rows of it are read once, a few at a time.
        side: Of a square, in pixels.
        numbers: Those that stand for no data.
    """
    height, width = image.shape[:2]
    colour = np.dtype(image.dtype) == np.uint8 and image.shape[2:] == (3,)
    starts = np.arange(0, width, side)
    rows, found = None, []
    for first, more in _chunks(image):
        rows = more if rows is None else np.concatenate([rows, more])
        end = first + len(more) == height
        while len(rows) >= side or (end and len(rows)):
            part, rows = rows[:side], rows[side:]
            there = _there(part, numbers)
            counts = np.add.reduceat(there.sum(axis=0), starts, axis=0)
            sums = np.add.reduceat(np.where(there, part, 0).sum(axis=0, dtype=np.float64), starts, axis=0)
            means = _divided(sums, counts)
            if np.dtype(image.dtype) == np.uint8:
                means = np.round(means)
            own = np.isfinite(means)  # a band may have no pixel where others have
            found.append(np.ptp(means, axis=1) if colour else _divided(np.where(own, means, 0).sum(1), own.sum(1)))
    return np.stack(found)


def _divided(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Means; NaN of nothing."""
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)


def _chunks(image: Any) -> Iterator[tuple[int, np.ndarray]]:
    """The rows of an image (n, w, c), each row of chunks once, and the first of them.

    Raises:
        OSError: They cannot be read.
    """
    height, step = image.shape[0], chunk_side(image, 0, ROWS)
    for first, last in chunk_spans(0, height, step, getattr(image, "chunk_shift", 0), height):
        try:
            rows = np.asarray(image[first:last])
        except (MemoryError, OSError):
            raise
        except Exception as error:  # decoders raise nearly anything
            name = getattr(image, "file", "the image")
            raise OSError(f"cannot read the pixel rows {first} to {last - 1} of {name}: {one_line(error)}") from error
        yield first, rows if rows.ndim == 3 else rows[:, :, None]


def _there(array: np.ndarray, numbers: set[float]) -> np.ndarray:
    """Which numbers (n, w, c) are finite, and none of those that stand for no data."""
    there = np.isfinite(array)
    for number in numbers:
        if (gone := missing(array, number)) is not None:
            there &= ~gone
    return there


def _with_data(image: Any, grid_size: tuple[int, int], patch_size: tuple[int, int]) -> np.ndarray:
    """The patches (H', W') that have a pixel with data."""
    pixels = getattr(image, "valid", None)
    if pixels is None:
        raise UserError(
            "the image does not say which pixels hold data: it has no georeference, or neither alpha, mask nor a "
            "number for no data"
        )
    step = -(-pixels.chunks[0] // patch_size[0])  # rows of patches that are read at once
    patches = np.zeros(grid_size, bool)
    for row in range(0, grid_size[0], step):
        part = pixels[row * patch_size[0] : (row + step) * patch_size[0]]
        for axis, side in enumerate(patch_size):
            part = np.logical_or.reduceat(part, np.arange(0, part.shape[axis], side), axis=axis)
        patches[row : row + step] = part
    return patches


def _drawn(
    path: Path, frame: Frame, size: tuple[int, int], grid_size: tuple[int, int], patch_size: tuple[int, int]
) -> np.ndarray:
    """(CELLS * H', CELLS * W') bool, True where the polygons of a GeoJSON file are."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        polygons = list(_polygons(content))
        if not polygons:
            raise ValueError("there are no polygons in it")
        if frame.georeference is not None:
            polygons = _on_image(polygons, content, frame.georeference)
        polygons = [[np.asarray([point[:2] for point in ring], float) for ring in rings] for rings in polygons]
        if not all(len(ring) > 2 and np.isfinite(ring).all() for rings in polygons for ring in rings):
            raise ValueError("a ring has fewer than three points, or places that are no numbers")
    except OSError:
        raise
    except Exception as error:  # a text of any kind
        raise UserError(f"cannot read {path} as polygons of GeoJSON: {one_line(error)}") from error
    cells = np.zeros((grid_size[0] * CELLS, grid_size[1] * CELLS), bool)
    # from pixels of level 0 to cells
    scale = [size[1 - axis] / frame.box[2 + axis] * CELLS / patch_size[1 - axis] for axis in (0, 1)]
    for rings in polygons:
        rings = [(ring - frame.box[:2]) * scale - 0.5 for ring in rings]
        low = np.maximum(np.floor(rings[0].min(axis=0)), 0).astype(int)
        high = np.minimum(np.ceil(rings[0].max(axis=0)) + 1, cells.shape[::-1]).astype(int)
        if (high <= low).any():
            continue
        part = Image.new("1", tuple((high - low).tolist()))
        draw = ImageDraw.Draw(part)
        for i, ring in enumerate(rings):
            draw.polygon([tuple(point) for point in (ring - low).tolist()], fill=int(i == 0))
        cells[low[1] : high[1], low[0] : high[0]] |= np.asarray(part)
    return cells


def _polygons(content: Any) -> Iterator[list]:
    """The rings of each polygon, the outer one first; some programs write polygons without any."""
    kind = content["type"]
    if kind == "FeatureCollection":
        for feature in content["features"]:
            yield from _polygons(feature)
    elif kind == "Feature":
        if content["geometry"] is not None:
            yield from _polygons(content["geometry"])
    elif kind == "GeometryCollection":
        for geometry in content["geometries"]:
            yield from _polygons(geometry)
    elif kind in ("Polygon", "MultiPolygon"):
        found = content["coordinates"]
        yield from filter(None, [found] if kind == "Polygon" else found)


def _on_image(polygons: list, content: Any, where: Georeference) -> list:
    """Polygons on the map in pixels of level 0."""
    from rasterio.warp import transform_geom

    crs = ((content.get("crs") or {}).get("properties") or {}).get("name", "OGC:CRS84")
    shapes = transform_geom(crs, where.crs, [{"type": "Polygon", "coordinates": rings} for rings in polygons])
    found = [[[where.pixels(*point[:2]) for point in ring] for ring in shape["coordinates"]] for shape in shapes]
    if not all(math.isfinite(number) for rings in found for ring in rings for point in ring for number in point):
        raise ValueError("its coordinates are not on the map of the image")
    return found
