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
from .regions import Frame, Georeference
from .values import missing

__all__ = ["OTSU", "VALID", "foreground", "otsu_threshold", "patch_mask"]

OTSU, VALID = MASK_WORDS
POLYGONS = (".geojson", ".json")
CELLS = 2  # a side of a patch, in which polygons are drawn
BINS = 256


def patch_mask(
    mask: np.ndarray | str | os.PathLike, image: Any, grid_size: tuple[int, int], patch_size: tuple[int, int]
) -> np.ndarray:
    """The patches (H', W') bool that a mask covers, if only in part.

    Args:
        mask: "otsu", see `foreground`; "valid", what holds data by alpha, a mask or a number for no data in a raster;
            an image file that lies over level 0 of the image's file, or GeoJSON with polygons in pixels of level 0 or,
            of an image with a georeference, in the coordinates that the GeoJSON names, else in longitude and latitude;
            or an array (h, w) that lies over the image, or (H', W'). What is not 0 counts.
        image: From `open_image`, or an array.
        grid_size: H', W'.
        patch_size: Its height and width in pixels.

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
            return _checked(cells != 0, name)
        if cells.ndim != 2 or not _same_shape(cells.shape, (height, width)):
            raise UserError(f"the mask of shape {cells.shape} does not lie over the image of {height} x {width} pixels")
        cells = cells != 0
    elif mask == VALID:
        return _checked(_with_data(image, grid_size, patch_size), "what holds data")
    elif mask == OTSU:
        cells, place, name = *_found(image, patch_size), "what Otsu's threshold finds"
    elif (path := Path(mask)).suffix.lower() in POLYGONS:
        name = str(path)
        cells = _drawn(path, frame, (height, width), grid_size, patch_size)
        patches = cells.reshape(grid_size[0], CELLS, grid_size[1], CELLS).any(axis=(1, 3))
        return _checked(patches, name)
    else:
        name, opened = str(path), open_image(path)
        cells = opened[0 : opened.shape[0]] != 0
        cells = cells if cells.ndim == 2 else cells.any(axis=2)
        if not _same_shape(cells.shape, frame.size):
            whole = f"{frame.size[1]} x {frame.size[0]}"
            raise UserError(f"{path} of {cells.shape[1]} x {cells.shape[0]} pixels does not lie over {whole} pixels")
        (left, top, w, h), (down, across) = frame.box, frame.size
        place = left / across, top / down, w / across, h / down
    return _checked(_covered(cells, place, (height, width), grid_size, patch_size), name)


def foreground(array: np.ndarray, nodata: float | None = None) -> np.ndarray:
    """The pixels (h, w) of a picture (h, w[, c]) that are no background.

    In colour of 8 bits these are the colourful ones, as stained tissue is on white glass: the largest minus the least
    of the three. Else it is the bright ones, as in fluorescence: the mean of all bands. Otsu's threshold divides them.
    """
    bands = array if array.ndim == 3 else array[:, :, None]
    if bands.dtype == np.uint8 and bands.shape[2] == 3:
        score = (bands.max(axis=2) - bands.min(axis=2)).astype(np.float64)
    else:
        score = bands.mean(axis=2, dtype=np.float64)
    good = np.isfinite(score)
    if (gone := missing(bands, nodata)) is not None:
        good &= ~gone.all(axis=2)
    if not good.any() or np.ptp(score[good]) == 0:
        return good
    return good & (score > otsu_threshold(score[good]))


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
    cells: np.ndarray,
    place: tuple[float, float, float, float],
    size: tuple[int, int],
    grid_size: tuple[int, int],
    patch_size: tuple[int, int],
) -> np.ndarray:
    """The patches (H', W') over which any of the cells (h, w) is True.

    Args:
        cells: Of the mask.
        place: Left, top, width and height of the image in the mask, as shares of the mask's.
        size: H, W.
        grid_size, patch_size: As in `patch_mask`.
    """
    spans = []
    for axis, (first, share) in enumerate(((place[1], place[3]), (place[0], place[2]))):
        edges = np.minimum(np.arange(grid_size[axis] + 1) * patch_size[axis], size[axis]) / size[axis]
        edges = (first + edges * share) * cells.shape[axis]
        low = np.clip(np.floor(edges[:-1] + 1e-6), 0, cells.shape[axis] - 1).astype(int)
        spans.append((low, np.clip(np.ceil(edges[1:] - 1e-6), low + 1, cells.shape[axis]).astype(int)))
    rows, columns = (list(zip(*span, strict=True)) for span in spans)
    bands = np.stack([cells[top:bottom].any(axis=0) for top, bottom in rows])  # far fewer numbers than a mask may have
    return np.stack([bands[:, left:right].any(axis=1) for left, right in columns], axis=1)


def _found(image: Any, patch_size: tuple[int, int]) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """The foreground of an image at one pixel a patch or more, and the place of the image in it."""
    nodata, side = getattr(image, "nodata", None), min(patch_size)
    if (low := getattr(image, "overview", lambda side: None)(side)) is not None:
        array, place = low
        return foreground(array, nodata), place
    height, width = image.shape[:2]
    rows, columns = -(-height // side), -(-width // side)
    means = []
    for start in range(0, height, side):  # the mean of each square
        part = np.asarray(image[start : start + side])
        part = part if part.ndim == 3 else part[:, :, None]
        sums = np.add.reduceat(part.sum(axis=0, dtype=np.float64), np.arange(0, width, side), axis=0)
        counts = np.minimum(np.arange(1, columns + 1) * side, width) - np.arange(columns) * side
        means.append(sums / (counts[:, None] * len(part)))
    array = np.stack(means)
    if np.dtype(image.dtype) == np.uint8:
        array = np.round(array).astype(np.uint8)
    return foreground(array, nodata), (0.0, 0.0, width / (columns * side), height / (rows * side))


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
        polygons = [[np.asarray(ring, float)[:, :2] for ring in rings] for rings in polygons]
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
    """The rings of each polygon, the outer one first."""
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
    elif kind == "Polygon":
        yield content["coordinates"]
    elif kind == "MultiPolygon":
        yield from content["coordinates"]


def _on_image(polygons: list, content: Any, where: Georeference) -> list:
    """Polygons on the map in pixels of level 0."""
    from rasterio.warp import transform_geom

    crs = ((content.get("crs") or {}).get("properties") or {}).get("name", "OGC:CRS84")
    shapes = transform_geom(crs, where.crs, [{"type": "Polygon", "coordinates": rings} for rings in polygons])
    found = [[[where.pixels(*point[:2]) for point in ring] for ring in shape["coordinates"]] for shape in shapes]
    if not all(math.isfinite(number) for rings in found for ring in rings for point in ring for number in point):
        raise ValueError("its coordinates are not on the map of the image")
    return found
