"""Checkpoints from strangers: tensors and plain data are read of them, and nothing is unpickled that is more."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from luna_vision.models.checkpoints import not_plain


def load_plain(path: str | Path, **options: Any) -> dict[str, Any]:
    """``torch.load`` of a checkpoint that holds tensors and plain data only.

    Raises:
        ValueError: There are other objects in it, which could run code if they were unpickled, or it is no checkpoint.
    """
    try:
        checkpoint = torch.load(path, weights_only=True, **options)
    except OSError:
        raise
    except Exception as error:  # reading a file that is no checkpoint raises nearly anything
        raise ValueError(not_plain(path, error)) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{str(path)!r} is not a checkpoint: it holds a {type(checkpoint).__name__}")
    return checkpoint


# ---- a folder of torch.distributed.checkpoint

_DCP = "torch.distributed.checkpoint"
# what the index of a folder is made of, as pickles name it
_PLAIN = {
    *((f"{_DCP}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((f"{_DCP}.metadata", f"{kind}StorageMetadata") for kind in ("Bytes", "Chunk", "Tensor")),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *(("pathlib", name) for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
}


class _IndexUnpickler(pickle.Unpickler):
    """PyTorch pickles the index of a folder. This lets nothing through but what such an index is made of."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


def read_index(path: str | Path) -> Metadata:
    """What is where in a folder. To be called before anything of PyTorch's reads the folder, and its pickle, itself.

    Raises:
        ValueError: There is more in it than such an index, which could run code, or it is none; or there is an index of
            one process alone beside it.
        OSError: It cannot be read.
    """
    file = Path(path, ".metadata")
    if single := sorted(Path(path).glob("__*.metadata")):  # PyTorch unpickles it if anything goes wrong with the other
        raise ValueError(f"{str(path)!r} is not a checkpoint that is read here: it has an index {single[0].name}")
    try:
        with file.open("rb") as opened:
            index = _IndexUnpickler(opened).load()
    except OSError:
        raise
    except Exception as error:  # reading a file that is no pickle raises nearly anything
        raise ValueError(not_plain(file, error)) from error
    if not isinstance(index, Metadata):
        raise ValueError(f"{str(file)!r} is not the index of a checkpoint: it holds a {type(index).__name__}")
    return index


def check_entries(path: str | Path) -> None:
    """To be called before PyTorch reads more than tensors of a folder: all else in it, such as the settings of the
    optimizer, it unpickles whatever it holds.

    Raises:
        ValueError: An entry holds more than plain data.
        OSError: One cannot be read.
    """
    index = read_index(path)
    for name, kind in index.state_dict_metadata.items():
        if isinstance(kind, TensorStorageMetadata):
            continue
        stored = index.storage_data.get(MetadataIndex(name))
        if stored is None or stored.transform_descriptors:  # the bytes that are unpickled would not be those checked
            raise ValueError(f"{str(path)!r} is not a checkpoint: {name!r} is nowhere in it, or encoded")
        file = Path(path, stored.relative_path)
        with file.open("rb") as opened:
            opened.seek(stored.offset)
            content = io.BytesIO(opened.read(stored.length))
        try:
            torch.load(content, weights_only=True)
        except Exception as error:  # as in `load_plain`
            raise ValueError(not_plain(file, error)) from error
