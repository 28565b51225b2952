"""The outlines of classes in a map, and boxes, as GeoJSON that QuPath and QGIS open."""

import importlib.util
import json
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..utils.errors import UserError
from ..utils.files import new_file
from .regions import Frame, Georeference

__all__ = ["check_geojson", "outlines", "write_geojson"]

GEOJSON_CRS = "OGC:CRS84"  # longitude and latitude, RFC 7946 section 4
BATCH_POINTS = 10_000


def check_geojson(path: Path) -> None:
    """Raise a ValueError unless GeoJSON can be written to a file of this name."""
    if path.suffix.lower() != ".geojson":
        raise UserError(f"polygons must end in .geojson, got {path}")
    if importlib.util.find_spec("rasterio") is None:
        raise UserError("polygons need rasterio (pip install 'luna-vision[slides]')")


def outlines(path: Path, numbers: Iterable[int]) -> Iterator[tuple[int, list[np.ndarray]]]:
    """The connected areas of a map in TIFF that have one of these numbers, row by row.

    Pixels that only touch at a corner are apart. The file is read row by row; the memory is that of the outlines.

    Yields:
        The number, and the rings of the polygon, the outer one first: (n, 2), column and row of its corners.
    """
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning
    from rasterio.features import shapes

    wanted = set(numbers)
    with rasterio.Env(GDAL_CACHEMAX=64, GDAL_PAM_ENABLED="NO"), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # of a slide
        raster = rasterio.open(path)
    with raster:
        back = ~raster.transform
        for shape, number in shapes(rasterio.band(raster, 1), connectivity=4):
            if int(number) in wanted:
                yield int(number), [_corners(np.asarray(ring), back) for ring in shape["coordinates"]]


def _corners(ring: np.ndarray, back: Any) -> np.ndarray:
    """Points on the map as columns and rows, which are whole numbers: those of the corners of pixels."""
    x, y = ring.T
    return np.stack([back.a * x + back.b * y + back.c, back.d * x + back.e * y + back.f], axis=1).round()


def write_geojson(
    path: Path,
    frame: Frame,
    size: tuple[int, int],
    found: Iterable[tuple[list[np.ndarray], dict[str, Any]]],
) -> int:
    """Write polygons, one after the other: in pixels of level 0 of the image's file, as QuPath has them or, of an image
    with a georeference, in longitude and latitude.

    Args:
        path: The file; one that is there is replaced.
        frame: The place of the image in its file.
        size: (height, width) of the image.
        found: Rings (n, 2) in pixels of the image, and the properties of the feature.

    Returns:
        How many there are.

    Raises:
        OSError: It cannot be written.
    """
    scale = np.array([frame.box[2] / size[1], frame.box[3] / size[0]])
    count = 0
    with new_file(path) as file:
        file.write(b'{"type": "FeatureCollection", "features": [')
        for batch in _batches(found):
            rings = [np.asarray(ring) * scale + frame.box[:2] for own, _ in batch for ring in own]
            if frame.georeference is not None:
                rings = _on_earth(rings, frame.georeference)
            left = iter(rings)
            for own, properties in batch:
                geometry = {"type": "Polygon", "coordinates": [next(left).tolist() for _ in own]}
                feature = {"type": "Feature", "geometry": geometry, "properties": properties}
                file.write((",\n" if count else "\n").encode() + json.dumps(feature).encode())
                count += 1
        file.write(b"\n]}\n")
    return count


def _batches(found: Iterable[Any]) -> Iterator[list[Any]]:
    """Features in lists of some thousand points: each change of coordinates has a fixed cost."""
    batch, points = [], 0
    for feature in found:
        batch.append(feature)
        points += sum(map(len, feature[0]))
        if points >= BATCH_POINTS:
            yield batch
            batch, points = [], 0
    yield batch


def _on_earth(rings: list[np.ndarray], where: Georeference) -> list[np.ndarray]:
    """Points in pixels of level 0 as longitude and latitude, in degrees to about 0.1 mm."""
    from rasterio.warp import transform

    if not rings:
        return []
    a, b, c, d, e, f = where.transform
    x, y = np.concatenate(rings).T
    points = np.stack(transform(where.crs, GEOJSON_CRS, a * x + b * y + c, d * x + e * y + f), axis=1).round(9)
    return np.split(points, np.cumsum([len(ring) for ring in rings])[:-1])
