"""Zarr arrays from strangers: of codecs that only decode numbers, and of chunks that are as large as they say.

A codec may unpickle, and a chunk of a megabyte may decode to gigabytes. So codecs are those of a list, and each gets
the room that a chunk takes by what the array says, and no more. What is read of a chunk encoded is bounded likewise.
"""

import asyncio
import math
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import imagecodecs
import numpy as np
import zarr
from numcodecs.abc import Codec
from numcodecs.compat import ensure_contiguous_ndarray
from zarr.abc.codec import BytesBytesCodec
from zarr.abc.store import RangeByteRequest
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, TransposeCodec, ZstdCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import StorePath, WrapperStore, ZipStore

__all__ = ["bounded", "zip_store"]

# by the names of format 2; `out` is the number of bytes at most
DECODERS = {
    "blosc": imagecodecs.blosc_decode,
    "gzip": imagecodecs.gzip_decode,
    "lz4": partial(imagecodecs.lz4_decode, header=True),
    "zlib": imagecodecs.zlib_decode,
    "zstd": imagecodecs.zstd_decode,
}
FILTERS = ("delta", "shuffle")
COMPRESSORS = {BloscCodec: "blosc", GzipCodec: "gzip", ZstdCodec: "zstd"}  # of format 3
PLAIN = (BytesCodec, Crc32cCodec, TransposeCodec)
CHECKSUM = 4  # bytes
ABOUT = ("zarr.json", ".zgroup", ".zarray", ".zattrs", ".zmetadata")  # files that describe
ABOUT_BYTES = 2**26  # of one, at most


def bounded(array: zarr.Array) -> zarr.Array:
    """The same array, whose chunks decode to no more than it says.

    Raises:
        ValueError: It has another codec than those that are known to be safe.
    """
    metadata, store = array.metadata, array.store_path
    chunk = math.prod(array.chunks) * array.dtype.itemsize
    if metadata.zarr_format == 2:
        compressor = metadata.compressor
        for codec, known in [(compressor, DECODERS), *((one, FILTERS) for one in metadata.filters or ())]:
            if codec is not None and codec.codec_id not in known:
                raise _refused(codec.codec_id)
        if compressor is not None:
            metadata = replace(metadata, compressor=_Compressor(compressor.codec_id, chunk))
    else:
        metadata = replace(metadata, codecs=_bounded(metadata.codecs, shards=True))
    most = chunk + chunk // 64 + 1024  # what cannot be compressed becomes larger
    shard = most * math.prod(array.shards or array.chunks) // math.prod(array.chunks)
    return zarr.Array(zarr.AsyncArray(metadata, StorePath(_Store(store.store, most, shard), store.path)))


def zip_store(path: Path) -> tuple[ZipStore, str]:
    """A store of zarr in a .zip, and the folder in it that is the image.

    Raises:
        ValueError: There is no zarr in it, or a description of unreasonable size.
    """
    with zipfile.ZipFile(path) as file:
        sizes = {entry.filename: entry.file_size for entry in file.infolist()}
    found = [name for name in sizes if name.rpartition("/")[2] in ABOUT]
    if not found:
        raise ValueError("there is no zarr in it")
    if large := [name for name in found if sizes[name] > ABOUT_BYTES]:
        raise ValueError(f"{large[0]} has {sizes[large[0]]} bytes, and {ABOUT_BYTES} are the most that are read")
    root = min(found, key=lambda name: name.count("/")).rpartition("/")[0]
    return _ZipStore(path, sizes), root


class _ZipStore(ZipStore):
    """Knows sizes without decoding."""

    def __init__(self, path: Path, sizes: dict[str, int]) -> None:
        super().__init__(path, mode="r")
        self.sizes = sizes

    async def getsize(self, key: str) -> int:
        return self.sizes[key]


def _bounded(codecs: Iterable, shards: bool = False) -> tuple:
    """Codecs of format 3. Chunks in shards are a single codec of their own, so that they are read one by one."""
    codecs = tuple(codecs)
    if shards and len(codecs) == 1 and isinstance(codecs[0], ShardingCodec):
        if not all(isinstance(codec, BytesCodec | Crc32cCodec) for codec in codecs[0].index_codecs):
            raise _refused("a shard's index with other codecs than bytes and crc32c")
        return (replace(codecs[0], codecs=_bounded(codecs[0].codecs)),)
    for codec in codecs:
        if not isinstance(codec, (*PLAIN, *COMPRESSORS)):
            raise _refused(codec.to_dict()["name"])
    if sum(isinstance(codec, tuple(COMPRESSORS)) for codec in codecs) > 1:
        raise _refused("more than one compressor")
    return tuple(_BytesCodec(COMPRESSORS[type(codec)]) if type(codec) in COMPRESSORS else codec for codec in codecs)


def _refused(name: str) -> ValueError:
    return ValueError(f"it has the codec {name}, which is not read: it could run code, or take any amount of memory")


def _decode(name: str, data: np.ndarray, size: int) -> bytes:
    try:
        return DECODERS[name](data, out=size)
    except Exception as error:  # each codec has its own kind
        raise ValueError(f"a chunk does not decode by {name} to {size} bytes at most: {error}") from error


class _Compressor(Codec):
    """Of format 2."""

    codec_id = "bounded"

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size

    def decode(self, buf, out=None):
        return _decode(self.name, ensure_contiguous_ndarray(buf), self.size)

    def encode(self, buf):
        raise NotImplementedError


@dataclass(frozen=True)
class _BytesCodec(BytesBytesCodec):
    """Of format 3."""

    name: str
    is_fixed_size = False

    async def _decode_single(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> Buffer:
        size = math.prod(chunk_spec.shape) * chunk_spec.dtype.to_native_dtype().itemsize + CHECKSUM
        decoded = await asyncio.to_thread(_decode, self.name, chunk_data.as_numpy_array(), size)
        return chunk_spec.prototype.buffer.from_bytes(decoded)

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        raise NotImplementedError


class _Store(WrapperStore):
    """Reads no more than so many bytes of a chunk, or of a file."""

    def __init__(self, store, chunk: int, file: int) -> None:
        super().__init__(store)
        self.chunk, self.file = chunk, file

    async def get(self, key: str, prototype: BufferPrototype, byte_range=None) -> Buffer | None:
        if not await self._store.exists(key):  # or it is a pipe or a device
            return None
        size, most = await self._store.getsize(key), self.file
        if isinstance(byte_range, RangeByteRequest):
            size, most = byte_range.end - byte_range.start, self.chunk
        if size > most:
            raise ValueError(f"{key} has {size} encoded bytes, and {most} are the most that its pixels can take")
        return await self._store.get(key, prototype, byte_range)
