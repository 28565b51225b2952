"""Georeferenced TIFF (GeoTIFF, COG) and JPEG 2000 through rasterio, in windows.

Shapes: n x m pixels of a part, c bands.
"""

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..utils.errors import UserError, one_line
from .regions import Georeference, Source

__all__ = ["has_rasterio", "open_raster"]

# Only the file itself is opened, and what is named here: beside it GDAL would open anything, and follow it anywhere.
ENVIRONMENT = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_PAM_ENABLED": "NO", "GDAL_CACHEMAX": 64}


def has_rasterio() -> bool:
    """Whether rasterio is installed."""
    return importlib.util.find_spec("rasterio") is not None


def open_raster(path: Path, driver: str = "GTiff") -> Source | None:
    """Open a file that has a georeference; None if it has none, or holds what is no plain raster.

    Args:
        path: The file.
        driver: Of GDAL: "GTiff" or "JP2OpenJPEG".

    Raises:
        ValueError: A TIFF cannot be read; of JPEG 2000, for which GDAL may have no driver, None is returned.
    """
    import rasterio
    from rasterio.enums import ColorInterp, MaskFlags
    from rasterio.errors import NotGeoreferencedWarning, RasterioError

    try:
        with rasterio.Env(**ENVIRONMENT), warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            data = rasterio.open(path, driver=driver)
            levels = _overviews(data, path, driver)
            beside = Path(f"{path}.ovr")
            if not levels and driver == "GTiff" and beside.is_file():
                coarser = rasterio.open(beside, driver=driver)
                levels = [coarser, *_overviews(coarser, beside, driver)] if _fits(coarser, data) else []
            sizes = [(level.height, level.width) for level in (data, *levels)]
    except RasterioError as error:
        if driver != "GTiff":
            return None
        raise ValueError(f"cannot read {path}: {one_line(error)}") from error
    kept = [i for i, kind in zip(data.indexes, data.colorinterp, strict=True) if kind != ColorInterp.alpha]
    odd = {ColorInterp.palette, ColorInterp.cyan, ColorInterp.hue, ColorInterp.Y} & set(data.colorinterp)
    plain = len(set(data.dtypes)) == 1 and np.dtype(data.dtypes[0]).kind in "iuf" and not odd
    if data.crs is None or data.transform.is_identity or not plain or not kept:
        return None
    bits, structure = data.tags(1, ns="IMAGE_STRUCTURE").get("NBITS"), data.tags(ns="IMAGE_STRUCTURE")
    alpha = [data.tags(i, ns="IMAGE_STRUCTURE").get("ALPHA") for i in data.indexes]
    if (bits and int(bits) < 8) or structure.get("MINISWHITE") == "YES" or "PREMULTIPLIED" in alpha:
        return None
    if len(set(data.nodatavals)) > 1 and not np.isnan(np.array(data.nodatavals, float)).all():
        raise UserError(f"{path} has other numbers for no data in each band: {data.nodatavals}")
    names = [data.descriptions[i - 1] or "" for i in kept]

    def open_level(level: int) -> RasterImage:
        return RasterImage(data if level == 0 else levels[level - 1], kept, bits, data.nodata)

    def open_valid(level: int) -> ValidPixels:
        return ValidPixels(data if level == 0 else levels[level - 1])

    says = any(flags != [MaskFlags.all_valid] for flags in data.mask_flag_enums)
    where = Georeference(data.crs.to_wkt(), tuple(data.transform)[:6])
    lossy = "JPEG" in structure.get("COMPRESSION", "")
    return Source(
        sizes,
        open_level,
        str(path),
        bands=names,
        georeference=where,
        lossy=lossy,
        valid=open_valid if says else None,
    )


def _overviews(data: Any, path: Path, driver: str) -> list[Any]:
    """The overviews in a file, if all bands have the same."""
    import rasterio

    factors = [data.overviews(i) for i in data.indexes]
    count = len(factors[0]) if all(factor == factors[0] for factor in factors) else 0
    return [rasterio.open(path, driver=driver, overview_level=i) for i in range(count)]


def _fits(coarser: Any, data: Any) -> bool:
    """Whether a file has overviews of this one, and not of what it was, and says what holds data where this does."""
    factor = round(data.width / coarser.width)
    size = -(-data.height // factor), -(-data.width // factor)
    names = "dtypes", "nodata", "colorinterp", "mask_flag_enums"
    return coarser.shape == size and all(getattr(coarser, name) == getattr(data, name) for name in names)


class RasterImage:
    """A level of a raster as an image (H, W) or (H, W, c)."""

    def __init__(self, data: Any, bands: list[int], bits: str | None, nodata: float | None) -> None:
        """
        Args:
            data: Of rasterio.
            bands: That are read, from 1.
            bits: Of a number, where they are fewer than those of its type.
            nodata: The number that stands for no data.
        """
        self.data, self.bands, self.bits, self.nodata = data, bands, bits, nodata
        self.dtype = np.dtype(data.dtypes[0])
        self.shape = (data.height, data.width, len(bands)) if len(bands) > 1 else (data.height, data.width)
        self.top = float(2 ** int(bits) - 1) if bits and self.dtype.kind == "u" else None
        height, width = data.block_shapes[0]
        self.chunks = (height, width)
        self.held_bytes = 2**26 + height * data.width * len(bands) * self.dtype.itemsize  # GDAL's cache, and a copy

    def of_bands(self, bands: list[int]) -> "RasterImage":
        """The image with these bands; others are not read."""
        return RasterImage(self.data, [self.bands[band] for band in bands], self.bits, self.nodata)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.window(rows, slice(None))

    def window(self, rows: slice, columns: slice) -> np.ndarray:
        """Pixels (n, m[, c]); only the tiles that they are in are read."""
        found = _read(self.data, rows, columns, lambda window: self.data.read(self.bands, window=window))
        return found.transpose(1, 2, 0).reshape(*found.shape[1:], *self.shape[2:])


class ValidPixels:
    """Whether pixels of a level hold data (H, W): by alpha, a mask in the file, or a number for no data."""

    dtype = np.dtype(bool)

    def __init__(self, data: Any) -> None:
        self.data, self.shape, self.chunks = data, (data.height, data.width), data.block_shapes[0]

    def window(self, rows: slice, columns: slice) -> np.ndarray:
        return _read(self.data, rows, columns, lambda window: self.data.dataset_mask(window=window)) != 0


def _read(data: Any, rows: slice, columns: slice, read: Callable[[Any], np.ndarray]) -> np.ndarray:
    import rasterio
    from rasterio.windows import Window

    (top, bottom, _), (left, right, _) = rows.indices(data.height), columns.indices(data.width)
    with rasterio.Env(**ENVIRONMENT):
        return read(Window(left, top, right - left, bottom - top))
