"""Images in the chunks of LitData, read by index."""

import io
import json
import os
from pathlib import Path
from typing import Any

from PIL import Image

from luna_vision.data.folders import SplitFolders
from luna_vision.data.images import Source
from luna_vision.data.shards import CONVERT, ShardDataModule, listing, need
from luna_vision.images.decode import SampleError, decode_image

INDEX = "index.json"
PLAIN_FORMATS = ("bytes", "int", "str")  # of LitData's serializers; others, such as pickle and graph, unpickle


class LitDataSource:
    """(image, label) from a folder that LitData wrote, whose items are ``{"image": bytes, "label": int, "name": str}``.

    Reads items by index and not as a stream: what order they come in and who reads which is the sampler's business.

    Raises:
        FileNotFoundError: There is no index, or a chunk is missing (LitData would wait for its download).
        ValueError: Its items are, or hold, something else than bytes, numbers and strings: nothing is unpickled.
    """

    def __init__(self, folder: Path) -> None:
        need("litdata")
        if not (folder / INDEX).is_file():
            raise FileNotFoundError(f"no file {folder / INDEX}, LitData's index of its chunks: {CONVERT}")
        with listing(folder / INDEX):
            index = json.loads((folder / INDEX).read_text())
            formats = [str(name) for name in (index.get("config") or {}).get("data_format") or []]
            chunks = [(str(chunk["filename"]), int(chunk["chunk_size"])) for chunk in index["chunks"]]
        if unsafe := sorted({name for name in formats if name.partition(":")[0] not in PLAIN_FORMATS}):
            raise ValueError(
                f"{folder / INDEX}: items of the format {', '.join(unsafe)} are refused, as loading pickled "
                f"objects could run any code; only {', '.join(PLAIN_FORMATS)} are read"
            )
        for name, _ in chunks:
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / INDEX} names a chunk that is missing: {name}")
        self.folder, self.length = folder, sum(size for _, size in chunks)
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

    Chunks are read by index, so everything is as with :class:`~luna_vision.data.ImageFolderDataModule`: the order, the
    shares of ranks and workers, and resuming. Without root/val (or validation, valid), ``val_fraction`` of the training
    images is held out (not stratified, as labels are only known by reading); without root/test, testing and prediction
    use root/val.

    Arguments not listed here are those of :class:`ImageDataModule`.
    """

    def make_source(self, split: str) -> Source | None:
        return self.open_split(split, LitDataSource)
