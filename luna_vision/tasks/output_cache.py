"""A teacher's outputs on the disk, so that each image goes through it once.

Shapes: B batch, C channels, H x W pixels.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from luna_vision.utils.files import write_json

Outputs = tuple[Tensor, ...]
KEY, HALF = 16, 2  # bytes of a key, and of a number
ABOUT = "about.json"


class OutputCache:
    """Outputs in float16, found by the pixels of their image: augmentation, order and epochs need not be known.

    Each process appends to two files of its own, and reads those of all that were before it. What a stopped run has
    not written completely is not read.

    Args:
        folder: made if it does not exist.
        about: all that the outputs depend on but for the images, as plain data.

    Raises:
        ValueError: The folder has outputs of something else.
    """

    def __init__(self, folder: str | Path, about: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        about, file = json.loads(json.dumps(about)), self.folder / ABOUT
        if not file.exists():
            write_json(file, about)
        elif json.loads(file.read_text(encoding="utf-8")) != about:
            raise ValueError(f"{self.folder} has outputs of another teacher or image size: give a new folder")
        self.shapes: list[tuple[int, ...]] = []
        self.places: dict[bytes, tuple[BinaryIO, int]] = {}
        self._known: list[Path] | None = sorted(self.folder.glob("*.keys"))
        self._keys: BinaryIO | None = None
        self._rows: BinaryIO | None = None

    def __call__(self, images: Tensor, compute: Callable[[Tensor], Outputs]) -> Outputs:
        """The outputs of images (B, C, H, W): from the disk, or else by `compute`, which is given those not found."""
        keys = [hashlib.blake2b(image.numpy().tobytes(), digest_size=KEY).digest() for image in images.float().cpu()]
        if self._known:
            shapes = [tuple(x.shape[1:]) for x in compute(images[:1])]
            self._open(shapes)
        missing = [i for i, key in enumerate(keys) if key not in self.places]
        if missing:
            self._add([keys[i] for i in missing], compute(images[missing]))
        return self._read(keys, images.device)

    @property
    def _row(self) -> int:
        """Bytes of the outputs of an image."""
        return HALF * sum(map(prod, self.shapes))

    def _open(self, shapes: list[tuple[int, ...]]) -> None:
        self.shapes = shapes
        for path in self._known:
            keys, rows = path.read_bytes(), path.with_suffix(".rows").open("rb")
            complete = min(len(keys) // KEY, rows.seek(0, 2) // self._row)
            self.places |= {keys[KEY * i : KEY * (i + 1)]: (rows, i) for i in range(complete)}
        self._known = None

    def _add(self, keys: list[bytes], outputs: Outputs) -> None:
        self.shapes = [tuple(x.shape[1:]) for x in outputs]
        if self._rows is None:
            name = secrets.token_hex(8)
            self._rows = (self.folder / f"{name}.rows").open("w+b", buffering=0)
            self._keys = (self.folder / f"{name}.keys").open("wb", buffering=0)
        start = self._rows.seek(0, 2) // self._row
        largest = torch.finfo(torch.float16).max
        flat = torch.cat([x.float().clamp(-largest, largest).half().flatten(1).cpu() for x in outputs], dim=1)
        self._rows.write(flat.numpy().tobytes())
        self._keys.write(b"".join(keys))  # after the rows that they name
        self.places |= {key: (self._rows, start + i) for i, key in enumerate(keys)}

    def _read(self, keys: list[bytes], device: torch.device) -> Outputs:
        rows = []
        for key in keys:
            file, row = self.places[key]
            file.seek(row * self._row)
            rows.append(np.frombuffer(file.read(self._row), np.float16))
        found = torch.from_numpy(np.stack(rows)).to(device).split([prod(shape) for shape in self.shapes], dim=1)
        return tuple(x.unflatten(1, shape) for x, shape in zip(found, self.shapes, strict=True))
