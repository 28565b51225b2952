"""Images in the chunks of LitData, read by index."""

import io
import json
import os
import re
from pathlib import Path
from typing import Any

from PIL import Image

from luna_vision.data.folders import SplitFolders
from luna_vision.data.images import Source
from luna_vision.data.shards import CONVERT, ShardDataModule, listing, need
from luna_vision.images.decode import SampleError, decode_image

INDEX = "index.json"
CHUNK = re.compile(r"chunk-\d+-\d+\.bin")
# The index of the items that `convert` writes. LitData unpickles other items, and imports the names in their index.
LEAF = {"type": None, "context": None, "children_spec": []}
TREE = {"type": "builtins.dict", "context": '["image", "label", "name"]', "children_spec": [LEAF] * 3}
ITEMS = {"data_format": ["bytes", "int", "str"], "item_loader": "PyTreeLoader"}
FREE = ("chunk_bytes", "chunk_size", "data_spec", "types")  # the first two of the chunks wanted, and a note


class LitDataSource:
    """(image, label) by index from a folder of LitData's, of items ``{"image": bytes, "label": int, "name": str}``.

    Raises:
        FileNotFoundError: There is no index, or a chunk is missing (LitData would wait for its download).
        ValueError: The index is not one that `convert` could have written for this folder. It is refused before
            anything is imported or unpickled.
    """

    def __init__(self, folder: Path) -> None:
        need("litdata")
        path = folder / INDEX
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}, LitData's index of its chunks: {CONVERT}")
        with listing(path):
            index = json.loads(path.read_text())
            chunks = [(c["filename"], c["chunk_size"], c["chunk_bytes"], c.get("dim")) for c in index["chunks"]]
            config = {name: value for name, value in index["config"].items() if name not in FREE and value is not None}
            tree = json.loads(index["config"]["data_spec"])
        if config != ITEMS or tree != [1, TREE] or set(index) - {"chunks", "config", "updated_at"}:
            raise ValueError(
                f"{path} is of other items than convert writes, image: bytes, label: int, name: str: refused, as "
                "loading them could run any code"
            )
        for name, size, length, dim in chunks:
            if not (CHUNK.fullmatch(str(name)) and type(size) is type(length) is int and dim is None):
                raise ValueError(f"{path} has a chunk {name!r} of {size!r} items, which convert does not write")
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{path} names a chunk that is missing: {name}")
            if (folder / name).stat().st_size != length or not 0 < 4 * size < length:  # which LitData would wait for
                raise ValueError(f"{path}: {name} does not have {size} items in {length} bytes")
        self.folder, self.length = folder, sum(size for _, size, *_ in chunks)
        self._opened: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return self.length

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        item = self._item(index)
        return decode_image(io.BytesIO(item["image"]), self._name(item, index)), int(item["label"])

    def sample_file(self, index: int) -> str:
        return self._name(self._item(index), index)

    def _name(self, item: dict[str, Any], index: int) -> str:
        return f"{self.folder}: {item.get('name', index)}"

    def _item(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        if self._opened is None or self._opened[0] != os.getpid():  # a file that is open is no worker's to inherit
            self._opened = os.getpid(), need("litdata").StreamingDataset(str(self.folder))
        item = self._opened[1][index]
        if not isinstance(item, dict) or not isinstance(item.get("image"), bytes) or "label" not in item:
            raise SampleError(f"an item in {self.folder} is no dict with 'image' (an encoded image, bytes) and 'label'")
        return item


class LitDataDataModule(SplitFolders, ShardDataModule):
    """Images in chunks of LitData, as :mod:`luna_vision.data.convert` writes them: root/train, root/val, root/test.

    Chunks are read by index, so order, ranks, workers and resuming are as with
    :class:`~luna_vision.data.ImageFolderDataModule`. Without root/val (or validation, valid), ``val_fraction`` of the
    training images is held out (not stratified: labels are known by reading only). Without root/test, testing and
    prediction use root/val.

    Arguments not listed here are those of :class:`ImageDataModule`.
    """

    def make_source(self, split: str) -> Source | None:
        return self.split_source(split, self.folder, LitDataSource)
