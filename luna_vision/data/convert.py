"""Shards from an image folder, which ``luna-vision convert`` writes."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from luna_vision.data.folders import ClassFolder, numbered
from luna_vision.data.images import describe_split
from luna_vision.data.shards import CLASSES, need
from luna_vision.data.webdataset_module import INFO
from luna_vision.images.find import class_folders, listed, split_folder, unused_folders
from luna_vision.utils.files import new_folder, write_json, write_text
from luna_vision.utils.progress import progress_bar
from luna_vision.utils.text import printable

SPLITS = ("train", "val", "test")
ORDER_SEED = 0  # of the order of training images; the same folder gives the same shards
Samples = Iterator[tuple[str, str, int]]  # name within the folder, path, label


def write_webdataset(samples: Samples, split: str, out: Path, shard_bytes: int) -> tuple[int, dict[str, Any]]:
    """Write tars of a split; returns the number of shards and the split's entry in _info.json."""
    lengths: list[int] = []
    pattern = str(out.absolute()).replace("%", "%%") + f"/{split}-%06d.tar"
    with need("webdataset").ShardWriter(
        pattern, maxsize=shard_bytes, verbose=0, encoder=False, mtime=0, post=lambda _: lengths.append(writer.count)
    ) as writer:
        for index, (name, path, label) in enumerate(samples):
            # the suffix begins at the first dot for WebDataset, and a tar holds names of up to 100 characters
            key = re.sub(r"[^\w-]", "_", Path(name).stem, flags=re.ASCII)[:60]
            suffix = Path(path).suffix.lstrip(".").lower()
            writer.write({"__key__": f"{index:08d}_{key}", suffix: Path(path).read_bytes(), "cls": str(label).encode()})
    filenames = [f"{split}-{number:06d}.tar" for number in range(len(lengths))]
    info = {"name": split, "num_samples": sum(lengths), "filenames": filenames, "shard_lengths": lengths}
    return len(lengths), info


def write_litdata(samples: Samples, split: str, out: Path, shard_bytes: int) -> tuple[int, None]:
    """Write LitData's chunks and index of a split; returns the number of chunks."""
    need("litdata")
    from litdata.streaming.serializers import StringSerializer
    from litdata.streaming.writer import BinaryWriter  # litdata.optimize runs it in processes of its own

    class Text(StringSerializer):
        """Takes a text that is the name of a file for a text, not for the file."""

        def can_serialize(self, data: Any) -> bool:
            return isinstance(data, str)

    writer = BinaryWriter(str(out / split), chunk_bytes=shard_bytes, serializers={"str": Text()})
    for index, (name, path, label) in enumerate(samples):
        writer[index] = {"image": Path(path).read_bytes(), "label": label, "name": printable(name)}
    writer.done()
    writer.merge()
    return len(list((out / split).glob("*.bin"))), None


FORMATS = {"webdataset": write_webdataset, "litdata": write_litdata}


def convert(
    folder: Path,
    out: Path,
    form: str,
    shard_megabytes: float = 128,
    say: Callable[[str], object] = lambda line: None,
) -> dict[str, tuple[int, int]]:
    """Write an image folder as shards; image files are copied as they are, not decoded.

    Training images are written in a random but fixed order, since shards are read one after the other. The other splits
    keep the order of the folder. The output is written beside ``out`` and gets this name when it is complete.

    Args:
        folder: Images as folder/{train,val,test}/<class>/<image>. train must be there; val may be called validation or
            valid.
        out: Folder to write, which must not exist.
        form: A key of :data:`FORMATS`.
        shard_megabytes: Size at which a new shard begins.
        say: Gets lines about the images found and left out, at the start.

    Returns:
        Images and shards of each split.

    Raises:
        ValueError: ``out`` exists, or the folder is not as :class:`~luna_vision.data.ImageFolderDataModule` reads it.
        FileNotFoundError: There is no folder/train.
    """
    folders = {split: at for split in SPLITS if (at := split_folder(folder, split)) is not None}
    if "train" not in folders:
        raise FileNotFoundError(f"no folder {folder / 'train'}: FOLDER must contain train/<class>/<images>")
    if out.exists():
        raise ValueError(f"{out} exists already: give a folder to make")
    classes = class_folders(folders["train"])
    sources = {split: ClassFolder(at, numbered(classes)) for split, at in folders.items()}
    for split, source in sources.items():
        say(describe_split(split, source, len(classes)))
    if unused := unused_folders(folder, folders.values()):
        say(f"not used of {folder}: {listed(unused)}")
    counts, infos = {}, {}
    with new_folder(out) as new:
        with progress_bar(total=sum(map(len, sources.values())), unit="image", desc="converting") as bar:
            for split, source in sources.items():
                bar.set_description(split)
                samples = _samples(source, folder, split == "train", bar)
                shards, infos[split] = FORMATS[form](samples, split, new, round(shard_megabytes * 1e6))
                counts[split] = len(source), shards
        write_text(new / CLASSES, "".join(f"{name}\n" for name in classes))
        if form == "webdataset":
            write_json(new / INFO, {"splits": infos})
    return counts


def _samples(source: ClassFolder, folder: Path, shuffle: bool, bar: tqdm) -> Samples:
    order = np.random.default_rng(ORDER_SEED).permutation(len(source)) if shuffle else range(len(source))
    for index in order:
        path, label = source.samples[index]
        yield os.path.relpath(path, folder), path, label
        bar.update()
