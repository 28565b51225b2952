"""Whole slides through OpenSlide: Aperio, Hamamatsu, Leica, MIRAX, Philips, Ventana and others.

Shapes: n x m pixels of a part of a level.
"""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..utils.errors import one_line
from .regions import Source, positive

__all__ = ["open_slide", "vendor_of"]

GENERIC = "generic-tiff"  # what OpenSlide calls a plain TIFF in tiles
ROWS = 256  # read together, where the slide does not say how high its tiles are


def vendor_of(path: Path) -> str:
    """The scanner's vendor as OpenSlide names it; empty if it is not installed, or does not know the file."""
    try:
        import openslide
    except ImportError:
        return ""
    vendor = openslide.OpenSlide.detect_format(path)
    return "" if vendor in (None, GENERIC) else vendor


def open_slide(path: Path) -> Source:
    """Open a slide.

    Raises:
        ValueError: It is none that OpenSlide reads.
    """
    import openslide

    try:
        slide = openslide.OpenSlide(path)
    except openslide.OpenSlideError as error:
        raise ValueError(f"cannot read {path}: {one_line(error)}") from error
    properties = slide.properties
    mpp = [positive(properties.get(f"openslide.mpp-{axis}")) for axis in "xy"]
    return Source(
        [(height, width) for width, height in slide.level_dimensions],
        lambda level: SlideImage(slide, level, path),
        str(path),
        None if None in mpp else sum(mpp) / 2,
        positive(properties.get("openslide.objective-power")),
    )


class SlideImage:
    """A level of a slide as an image (H, W, 3) of 8 bits. What is transparent has the slide's background colour."""

    def __init__(self, slide: Any, level: int, path: Path) -> None:
        """
        Args:
            slide: Of OpenSlide.
            level: Of its pyramid.
            path: Its file.
        """
        self.path = path
        self.slide, self.level, self.scale = slide, level, slide.level_downsamples[level]
        width, height = slide.level_dimensions[level]
        self.shape, self.dtype = (height, width, 3), np.dtype(np.uint8)
        sides = (slide.properties.get(f"openslide.level[{level}].tile-{side}") for side in ("height", "width"))
        self.chunks = tuple(min(int(positive(side) or ROWS), 1024) for side in sides)
        self.held_bytes = 3 * 4 * self.chunks[0] * width  # as OpenSlide has it, on its background, and in colour
        self.background = f"#{slide.properties.get('openslide.background-color', 'FFFFFF')}"

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.window(rows, slice(None))

    def window(self, rows: slice, columns: slice) -> np.ndarray:
        """Pixels (n, m, 3); only the tiles that they are in are read."""
        import openslide

        (top, bottom, _), (left, right, _) = rows.indices(self.shape[0]), columns.indices(self.shape[1])
        corner = round(left * self.scale), round(top * self.scale)  # of level 0
        try:
            part = self.slide.read_region(corner, self.level, (right - left, bottom - top))
        except openslide.OpenSlideError:
            self.slide = openslide.OpenSlide(self.path)  # OpenSlide reads nothing more of a slide after an error
            raise
        return np.asarray(Image.alpha_composite(Image.new("RGBA", part.size, self.background), part).convert("RGB"))
