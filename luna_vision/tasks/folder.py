"""What is in a checkpoint that is a folder, of ``torch.distributed.checkpoint``, and loading it.

PyTorch pickles the index of a folder, ``.metadata``, and reads it without any limit. Here a few lines interpret the
pickle, which know no more than such an index needs: nothing that it names is imported or called, nothing is changed
but what it has begun itself, and everything is checked before PyTorch is handed the index, in place of the file.
"""

from __future__ import annotations

import io
import math
import pathlib
import pickle
import pickletools
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from luna_vision.models.checkpoints import not_plain

MAX_INDEX_BYTES = 2**25  # of 100 to 200 bytes for each part of a weight that a process holds
_UNUSED = object()  # where the checkpoint was written, layout and memory format: older versions need them
_RECORDS = (
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    _StorageInfo,
)
# what an index is made of, by the names that pickles use
_NAMES: dict[tuple[str, str], Any] = {
    **{(record.__module__, record.__name__): record for record in _RECORDS},
    **{("torch", str(x).removeprefix("torch.")): x for x in vars(torch).values() if isinstance(x, torch.dtype)},
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _UNUSED,
    (_MEM_FORMAT_ENCODING.__module__, _MEM_FORMAT_ENCODING.__name__): _UNUSED,
    **{
        (module, name): _UNUSED
        for module in ("pathlib", "pathlib._local")
        for name in vars(pathlib)
        if name.endswith("Path")
    },
}


def read_index(path: str | Path) -> Metadata:
    """What is where in a folder.

    Raises:
        ValueError: There is more in the index than such an index holds, which could run code, or it is none; or what
            it says cannot be so: a file elsewhere, more numbers than bytes, parts outside a tensor.
        OSError: It is missing, or cannot be read.
    """
    file = Path(path, ".metadata")
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    with file.open("rb") as opened:
        content = opened.read(MAX_INDEX_BYTES + 1)
    try:
        if len(content) > MAX_INDEX_BYTES:
            raise ValueError(f"an index has at most {MAX_INDEX_BYTES} bytes")
        index = _interpret(content)
        _check(index, len(content))
    except Exception as error:  # interpreting a file that is no pickle raises nearly anything
        raise ValueError(not_plain(file, error)) from error
    return index


def _interpret(content: bytes) -> Any:
    """What a pickle of an index holds; `pickle.UnpicklingError` where it does what no index has to."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    begun: dict[int, Any] = {}  # records without their content, by id

    def take(count: int) -> list[Any]:
        if count > len(stack):
            raise pickle.UnpicklingError("the stack is empty")
        taken = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return taken

    def marked() -> list[Any]:
        return take(len(stack) - marks.pop())

    for opcode, value, _ in pickletools.genops(content):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                marks.append(len(stack))
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[value] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "SHORT_BINUNICODE" | "BINUNICODE":
                stack.append(value)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(take(int(opcode.name[-1]))))
            case "TUPLE":
                stack.append(tuple(marked()))
            case "APPEND" | "APPENDS":
                items = take(1) if opcode.name == "APPEND" else marked()
                _only(stack[-1], list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = take(2) if opcode.name == "SETITEM" else marked()
                for key, item in zip(items[::2], items[1::2], strict=True):
                    if type(key) is MetadataIndex:
                        _only(key.fqn, str)
                    _only(stack[-1], dict)[_only(key, str, MetadataIndex)] = item
            case "GLOBAL" | "STACK_GLOBAL":
                module, name = value.split(" ", 1) if opcode.name == "GLOBAL" else take(2)
                if (module, name) not in _NAMES:
                    raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
                stack.append(_NAMES[module, name])
            case "NEWOBJ":
                record, arguments = take(2)
                if record not in _RECORDS or arguments != ():
                    raise pickle.UnpicklingError("a new object that is no record")
                stack.append(record.__new__(record))
                if record is not BytesStorageMetadata:  # which has no content
                    begun[id(stack[-1])] = stack[-1]
            case "BUILD":
                (state,) = take(1)
                record = begun.pop(id(stack[-1]), None)
                if isinstance(record, TensorProperties):
                    record.__init__(dtype=_only(state, tuple)[0])
                elif record is not None:
                    record.__init__(**_only(state, dict))
                else:
                    raise pickle.UnpicklingError("attributes of what is no new record")
            case "REDUCE":
                what, arguments = take(2)
                if what is torch.Size:
                    ((sizes,),) = (_only(arguments, tuple),)
                    stack.append(torch.Size([_only(size, int) for size in _only(sizes, tuple)]))
                elif what is _UNUSED:
                    stack.append(None)
                else:
                    raise pickle.UnpicklingError("a call")
            case "STOP":
                if begun:
                    raise pickle.UnpicklingError("a record without content")
            case _:
                raise pickle.UnpicklingError(f"the opcode {opcode.name}")
    return stack.pop()


def _only(value: Any, *kinds: type) -> Any:
    if type(value) not in kinds:
        raise pickle.UnpicklingError(f"a {type(value).__name__} where a {kinds[0].__name__} belongs")
    return value


def _check(index: Any, length: int) -> None:
    """Raise where the records of an index, a pickle of ``length`` bytes, are not what PyTorch writes."""
    for place, stored in _only(_only(index, Metadata).storage_data, dict).items():
        _only(place, MetadataIndex)
        name = _only(_only(stored, _StorageInfo).relative_path, str)
        if name in ("", ".", "..") or Path(name).name != name or "\0" in name:
            raise ValueError(f"it names a file outside the folder, {name!r}")
        if stored.transform_descriptors:
            raise ValueError(f"{name!r} is encoded")
        if _only(stored.offset, int) < 0 or _only(stored.length, int) < 0:
            raise ValueError(f"there is no such part of {name!r}")
    parts = 0
    for name, kind in _only(index.state_dict_metadata, dict).items():
        _only(name, str)
        if type(kind) is BytesStorageMetadata:
            _find(index, MetadataIndex(name))
            continue
        size = _only(_only(kind, TensorStorageMetadata).size, torch.Size)
        width = _only(_only(kind.properties, TensorProperties).dtype, torch.dtype).itemsize
        parts += len(_only(kind.chunks, list))
        if parts > length:  # one list, named again and again
            raise ValueError("it has more parts than bytes")
        numbers = 0
        for chunk in kind.chunks:
            offsets, sizes = _only(_only(chunk, ChunkStorageMetadata).offsets, torch.Size), chunk.sizes
            inside = zip(size, offsets, _only(sizes, torch.Size), strict=True)
            if not all(0 <= first <= first + count <= whole for whole, first, count in inside):
                raise ValueError(f"a part of {name!r} is outside it")
            if _find(index, MetadataIndex(name, offsets)).length < math.prod(sizes) * width:
                raise ValueError(f"a part of {name!r} has more numbers than bytes")
            numbers += math.prod(sizes)
        if numbers < math.prod(size):
            raise ValueError(f"parts of {name!r} are missing")


def _find(index: Metadata, place: MetadataIndex) -> _StorageInfo:
    if place not in index.storage_data:
        raise ValueError(f"{place.fqn!r} is nowhere in it")
    return index.storage_data[place]


def check_whole(path: str | Path, index: Metadata) -> None:
    """
    Raises:
        OSError: A file of the folder is missing, or shorter than all that is noted to be in it.
    """
    ends: dict[str, int] = {}
    totals: dict[str, int] = {}
    for stored in index.storage_data.values():
        name = stored.relative_path
        ends[name] = max(ends.get(name, 0), stored.offset + stored.length)
        totals[name] = totals.get(name, 0) + stored.length  # no two parts share their bytes
    for name, end in ends.items():
        file = Path(path, name)
        if not file.is_file() or file.stat().st_size < max(end, totals[name]):
            raise OSError(f"{file} is missing or cut off")


class _Reader(FileSystemReader):
    """PyTorch's, with an index that has been checked in place of the one that it would unpickle."""

    def __init__(self, path: str | Path, index: Metadata) -> None:
        super().__init__(path)
        self._index = index

    def read_metadata(self) -> Metadata:  # PyTorch asks one that takes arguments for the index of a single process, too
        return self._index


class _Planner(DefaultLoadPlanner):
    """PyTorch's, but for what is no tensor, such as the settings of an optimizer: it must be plain data."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)  # as PyTorch's unpickles what it is given
        plain.seek(0)
        super().load_bytes(read_item, plain)


def load_folder(path: str | Path, index: Metadata, state: dict[str, Any], no_dist: bool = False) -> None:
    """Load into ``state``, in place, what a folder has under the same names.

    Args:
        path: The folder.
        index: Of `read_index`.
        state: Tensors are filled, everything else is replaced.
        no_dist: Whether this process loads it by itself. Otherwise all do, each its part.

    Raises:
        ValueError: There is something else in it than tensors and plain data, or not what ``state`` has.
        OSError: A file cannot be read, or is cut off.
    """
    check_whole(path, index)
    try:
        dcp.load(state, storage_reader=_Reader(path, index), planner=_Planner(), no_dist=no_dist)
    except CheckpointException as failure:  # of any process; reading what is no tensor raises nearly anything
        error, _ = next(iter(failure.failures.values()))
        if isinstance(error, OSError) or not isinstance(error, Exception):
            raise error from failure
        raise ValueError(not_plain(path, error)) from failure
