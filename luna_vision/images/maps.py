"""Maps of an image as files that viewers open: tiled pyramids in TIFF, GeoTIFF or OME-Zarr.

A map is written tile by tile into a folder NAME.partial, which is OME-Zarr already, so that a run that is stopped keeps
all tiles. At the end the coarser levels are made, and the folder gets its name or becomes a TIFF.

Shapes: H, W pixels, K channels.
"""

import importlib.util
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..utils.errors import UserError
from ..utils.files import new_file, remove, remove_own
from .regions import Frame

__all__ = ["MAP_SUFFIXES", "MapFile", "check_map"]

MAP_SUFFIXES = (".tif", ".tiff", ".zarr")
SIDE = 512  # of a tile in TIFF, and of the coarsest level at most
OWN_FILES = r"(\.zgroup|\.zattrs|\d+/(\.zarray|\.zattrs|\d+(/\d+)*))(\.[0-9a-f]+\.partial)?"


def check_map(path: Path) -> None:
    """Raise a ValueError unless a map can be written to a file of this name."""
    if path.suffix.lower() not in MAP_SUFFIXES:
        raise UserError(f"a map must end in {', '.join(MAP_SUFFIXES)}, got {path}")
    for name in ("zarr", "tifffile"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"maps need {name} (pip install 'luna-vision[streaming]')")


class MapFile:
    """A map that is being written: a number for each pixel, or for each pixel and channel."""

    def __init__(
        self,
        path: Path,
        channels: list[str] | None = None,
        classes: dict[int, str] | None = None,
        palette: np.ndarray | None = None,
        nodata: int = 0,
    ) -> None:
        """
        Args:
            path: A file that ends as `MAP_SUFFIXES` say; what is there is replaced at the end. TIFF has a georeference
                if the image has one.
            channels: Their names; None for a map without channels.
            classes: What the numbers of a map without channels mean.
            palette: uint8 (256, 3), the colours of the numbers.
            nodata: The number of pixels that are never written.

        Raises:
            UserError: Another suffix, or a package is missing.
        """
        check_map(path)
        self.path, self.partial = path, path.with_name(f"{path.name}.partial")
        self.channels, self.classes, self.palette, self.nodata = channels, classes or {}, palette, nodata
        self.array: Any = None
        self.top = 0  # the largest number so far

    @property
    def is_zarr(self) -> bool:
        return self.path.suffix.lower() == ".zarr"

    def open(self, image: Any, dtype: str, tile: int, resume: bool) -> None:
        """Begin.

        Args:
            image: Under the map; `Frame.of` it says where it lies.
            dtype: uint8, uint16 or float32.
            tile: Side of the tiles that will be written, pixels.
            resume: Continue with the tiles of an earlier run.

        Raises:
            OSError: It cannot be written, the path is a folder that is not of zarr, or nothing is left to resume.
        """
        import numcodecs
        import zarr

        self.frame, self.size, self.tile = Frame.of(image), tuple(image.shape[:2]), tile
        self.dtype = np.dtype(dtype)
        if self.path.is_dir() and not (self.is_zarr and (self.path / ".zgroup").is_file()):
            raise OSError(f"{self.path} is a folder, and not a map in zarr: it is not replaced")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        front = () if self.channels is None else (len(self.channels),)
        self.kind = {
            "chunks": (*(1,) * len(front), tile, tile),
            "dtype": self.dtype.name,
            "fill_value": self.nodata,
            "compressors": numcodecs.Blosc("zstd", 3),
            "chunk_key_encoding": {"name": "v2", "separator": "/"},
        }
        if resume:
            if not (self.partial / "0").is_dir() or self.partial.is_symlink():
                raise self._gone()
            self.group = zarr.open_group(self.partial, mode="r+", zarr_format=2)
            self.array = self.group["0"]
            return
        remove_own(self.partial, OWN_FILES)
        try:
            self.group = zarr.open_group(self.partial, mode="w", zarr_format=2)
            self.array = self.group.create_array("0", shape=(*front, *self.size), **self.kind)
        except OSError as error:
            raise OSError(f"cannot write {self.partial}: {error.strerror or error}") from error

    def write(self, top: int, left: int, numbers: np.ndarray) -> None:
        """Write a tile ([K,] n, m) whose upper left pixel is at (top, left), a multiple of `tile` both.

        Raises:
            OSError: There is no room.
        """
        if self.array is None:  # it was finished before, by another run than the one that is resumed
            raise self._gone()
        height, width = numbers.shape[-2:]
        self.top = max(self.top, numbers.max())
        try:
            self.array[..., top : top + height, left : left + width] = numbers
        except OSError as error:
            raise OSError(f"cannot write {self.partial}: {error.strerror or error}") from error

    def _gone(self) -> OSError:
        return FileNotFoundError(f"{self.partial} is gone, with the tiles that were done: remove the store, too")

    def discard(self) -> None:
        """Leave nothing of a map that nobody goes on with."""
        remove(self.partial)

    def is_finished(self) -> bool:
        """Whether the map is complete."""
        return self.path.exists() and not self.partial.exists()

    def finish(self) -> None:
        """Make the coarser levels, and the file.

        Raises:
            OSError: There is no room; the tiles stay.
        """
        try:
            if self.is_zarr:
                self._finish_zarr()
            elif self.frame.georeference is not None:
                self._write_geotiff()
            else:
                self._write_tiff()
        except OSError as error:
            if error.filename is None and error.errno is not None:
                raise OSError(f"cannot write {self.path}: {error.strerror or error}") from error
            raise
        remove(self.partial)

    # ---- levels

    def _levels(self) -> list[Any]:
        """The arrays of all levels. Of each square of four numbers the upper left one is kept, since classes have no
        mean."""
        levels = [self.array]
        while max(levels[-1].shape[-2:]) > SIDE:
            finer = levels[-1]
            front, (height, width) = finer.shape[:-2], (-(-n // 2) for n in finer.shape[-2:])
            name = str(len(levels))
            if name in self.group:  # of an earlier try
                del self.group[name]
            level = self.group.create_array(name, shape=(*front, height, width), **self.kind)
            for top in range(0, height, self.tile):
                for left in range(0, width, self.tile):
                    rows = slice(2 * top, min(2 * (top + self.tile), finer.shape[-2]))
                    columns = slice(2 * left, min(2 * (left + self.tile), finer.shape[-1]))
                    part = finer[..., rows, columns][..., ::2, ::2]
                    level[..., top : top + part.shape[-2], left : left + part.shape[-1]] = part
            levels.append(level)
        return levels

    def _pixel(self) -> tuple[float, float]:
        """Width and height of a pixel of the map, in pixels of level 0 of the image's file."""
        return self.frame.box[2] / self.size[1], self.frame.box[3] / self.size[0]

    # ---- OME-Zarr

    def _finish_zarr(self) -> None:
        """Source of the attributes: OME-NGFF 0.4, which more viewers read than 0.5."""
        levels, mpp = self._levels(), self.frame.mpp
        across, down = (side * (mpp or 1.0) for side in self._pixel())
        left, top = (side * (mpp or 1.0) for side in self.frame.box[:2])
        space = {"type": "space"} | ({"unit": "micrometer"} if mpp else {})
        front = [] if self.channels is None else [1.0]
        axes = [{"name": "c", "type": "channel"}] * len(front) + [{"name": n, **space} for n in "yx"]
        datasets = []
        for i in range(len(levels)):
            scale = {"type": "scale", "scale": [*front, down * 2**i, across * 2**i]}
            shift = {"type": "translation", "translation": [*(0.0 for _ in front), top, left]}
            datasets.append({"path": str(i), "coordinateTransformations": [scale, shift]})
        scales = {"version": "0.4", "name": self.path.stem, "axes": axes, "datasets": datasets, "type": "nearest"}
        self.group.attrs["multiscales"] = [scales]
        if self.channels is not None:
            top = 255 if self.dtype == np.uint8 else float(self.top)
            window = {"start": 0, "end": top, "min": 0, "max": top}
            self.group.attrs["omero"] = {
                "channels": [{"label": name, "color": "FFFFFF", "window": window} for name in self.channels]
            }
        elif self.classes:
            label = {"version": "0.4", "properties": [{"label-value": n, "class": c} for n, c in self.classes.items()]}
            if self.palette is not None:
                colors = {number: [*self.palette[number].tolist(), 255] for number in self.classes}
                label["colors"] = [{"label-value": number, "rgba": color} for number, color in colors.items()]
            self.group.attrs["image-label"] = label
        remove(self.path)
        os.replace(self.partial, self.path)

    # ---- TIFF

    def _tiles(self, level: Any) -> Iterator[np.ndarray]:
        """Tiles in the order of TIFF, those at the lower and right edge padded."""
        height, width = level.shape[-2:]
        planes = [()] if self.channels is None else [(k,) for k in range(len(self.channels))]
        for plane in planes:
            for top in range(0, height, SIDE):
                for left in range(0, width, SIDE):
                    out = np.full((SIDE, SIDE), self.nodata, self.dtype)
                    part = level[(*plane, slice(top, top + SIDE), slice(left, left + SIDE))]
                    out[: part.shape[0], : part.shape[1]] = part
                    yield out

    def _about(self) -> dict[str, Any]:
        """What numbers mean, in plain data."""
        if self.channels is not None:
            return {"channels": self.channels}
        return {"classes": {str(n): c for n, c in self.classes.items()}, "nodata": self.nodata}

    def _write_tiff(self) -> None:
        import tifffile

        levels = self._levels()
        kind: dict[str, Any] = {"photometric": "minisblack", "tile": (SIDE, SIDE), "compression": "zlib"}
        if self.channels is not None:
            kind |= {"planarconfig": "separate"} if len(self.channels) > 1 else {}
        elif self.palette is not None and self.dtype == np.uint8:
            kind |= {"photometric": "palette", "colormap": self.palette.T.astype(np.uint16) * 257}
        first: dict[str, Any] = {"subifds": len(levels) - 1, "description": json.dumps(self._about())}
        if self.frame.mpp:
            pixels = [1e4 / (self.frame.mpp * side) for side in self._pixel()]  # a centimetre
            first |= {"resolution": tuple(pixels), "resolutionunit": "CENTIMETER"}
        big = 2 * math.prod(self.array.shape) * self.dtype.itemsize > 2**31
        with new_file(self.path) as file, tifffile.TiffWriter(file, bigtiff=big) as tiff:
            for i, level in enumerate(levels):
                options = kind | (first if i == 0 else {"subfiletype": 1})
                shape, dtype = level.shape, self.dtype
                tiff.write(self._tiles(level), shape=shape, dtype=dtype, metadata=None, **options)

    def _write_geotiff(self) -> None:
        import rasterio
        from rasterio.enums import Resampling
        from rasterio.windows import Window

        a, b, c, d, e, f = self.frame.georeference.transform
        (left, top), (across, down) = self.frame.box[:2], self._pixel()
        transform = (a * across, b * down, c + a * left + b * top, d * across, e * down, f + d * left + e * top)
        height, width = self.size
        kind = {"driver": "GTiff", "height": height, "width": width, "dtype": self.dtype.name}
        kind |= {"count": 1 if self.channels is None else len(self.channels), "crs": self.frame.georeference.crs}
        kind |= {"tiled": True, "blockxsize": SIDE, "blockysize": SIDE, "compress": "deflate", "interleave": "band"}
        kind |= {"bigtiff": "IF_SAFER", "transform": rasterio.Affine(*transform)}
        if self.channels is None:
            kind["nodata"] = self.nodata
        with new_file(self.path) as file, rasterio.Env(GDAL_CACHEMAX=64, GDAL_PAM_ENABLED="NO"):
            with rasterio.open(file.name, "w", **kind) as raster:
                for top in range(0, height, SIDE):
                    for left in range(0, width, SIDE):
                        part = self.array[..., top : top + SIDE, left : left + SIDE]
                        window = Window(left, top, part.shape[-1], part.shape[-2])
                        raster.write(part.reshape(-1, *part.shape[-2:]), window=window)
                if self.palette is not None and self.channels is None and self.dtype == np.uint8:
                    raster.write_colormap(1, {i: (*color, 255) for i, color in enumerate(self.palette.tolist())})
                for i, name in enumerate(self.channels or (), 1):
                    raster.set_band_description(i, name)
                raster.update_tags(LUNA_VISION=json.dumps(self._about()))
            factors = [2**i for i in range(1, 32) if max(height, width) > SIDE * 2 ** (i - 1)]
            if factors:
                with rasterio.open(file.name, "r+") as raster:
                    raster.build_overviews(factors, Resampling.nearest)
