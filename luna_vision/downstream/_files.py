"""Features as parquet or npz."""

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np

__all__ = ["write_npz", "write_parquet"]

# The columns of some images at a time, as `_parts.columns` makes them. Read anew for each pass, so that no more than
# one part is held in memory.
Parts = Callable[[], Iterator[dict[str, np.ndarray]]]


def write_parquet(file: BinaryIO, parts: Parts, about: dict[str, Any]) -> None:
    """Write a row for each image, a row group for each part; `about` goes into the schema's metadata as JSON."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    try:
        for arrays in parts():
            columns = {"path": pa.array(arrays["path"].tolist(), pa.string())}
            for name in ("embedding", "memory"):
                if name in arrays:
                    columns[name] = _fixed(pa, arrays[name])
            if "grid" in arrays:
                ends = arrays["grid_shape"].astype(np.int64).prod(axis=1).cumsum()
                offsets = pa.array(np.concatenate([[0], ends]), pa.int64())
                columns["grid"] = pa.LargeListArray.from_arrays(offsets, pa.array(arrays["grid"].reshape(-1)))
                columns["grid_shape"] = _fixed(pa, arrays["grid_shape"])
            table = pa.table(columns).replace_schema_metadata({"luna_vision": json.dumps(about)})
            # nothing repeats in any column, so a dictionary would only be thrown away again
            writer = writer or pq.ParquetWriter(file, table.schema, use_dictionary=False)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


def _fixed(pa: Any, array: np.ndarray) -> Any:
    """(n, ...) to n lists of fixed size, nested as deep as the array."""
    values = pa.array(array.reshape(-1))
    for size in reversed(array.shape[1:]):
        values = pa.FixedSizeListArray.from_arrays(values, size)
    return values


def write_npz(file: BinaryIO, parts: Parts, about: dict[str, Any]) -> None:
    """Write an array for each column, joined over the parts, as `np.savez` does; `about` is a JSON string.

    Grids of all images stand one after the other, (patches, C): that of image i is
    `grid[grid_offset[i]:grid_offset[i + 1]].reshape(grid_shape[i])`.
    """
    shapes: dict[str, list[tuple[int, ...]]] = {}
    types: dict[str, np.dtype] = {}
    patches = [np.zeros(1, np.int64)]
    for arrays in parts():
        for name, array in arrays.items():
            shapes.setdefault(name, []).append(array.shape)
            types[name] = np.promote_types(types.get(name, array.dtype), array.dtype)  # strings differ in length
        if "grid" in arrays:
            patches.append(arrays["grid_shape"][:, :2].astype(np.int64).prod(axis=1))
    with zipfile.ZipFile(file, "w") as archive:
        for name, (first, *_) in shapes.items():
            shape = sum(shape[0] for shape in shapes[name]), *first[1:]
            _write_array(archive, name, shape, types[name], (arrays[name] for arrays in parts()))
        if len(patches) > 1:
            offsets = np.concatenate(patches).cumsum()
            _write_array(archive, "grid_offset", offsets.shape, offsets.dtype, [offsets])
        text = np.array(json.dumps(about))
        _write_array(archive, "about", (), text.dtype, [text])


def _write_array(
    archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype, pieces: Iterable[np.ndarray]
) -> None:
    """Write an array that is never held as a whole."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    # a ZipInfo made of the name alone has no date, so equal arrays give equal files
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, header)
        for piece in pieces:
            member.write(np.ascontiguousarray(piece, dtype).reshape(-1).view(np.uint8))
