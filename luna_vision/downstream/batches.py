"""Models as callables on batches of columns, one an actor, as Ray Data's `map_batches` takes them.

    import ray
    from luna_vision.downstream.batches import Embedder, Encoder

    how = {"fn_constructor_kwargs": {"checkpoint": "best.ckpt"}, "concurrency": 8, "num_gpus": 1}
    photos = ray.data.read_images("photos", include_paths=True)
    photos.map_batches(Embedder, batch_size=32, **how).write_parquet("embeddings")
    slides = ray.data.read_csv("slides.csv")  # a column path and, if wanted, mask and region
    slides.map_batches(Encoder, batch_size=1, **how).write_parquet("encodings")

Rows have the columns of `luna-vision embed` and `luna-vision encode`, those of the batch, and `error`: why an image
could not be used, else empty. This file does not need Ray, which computes a batch again if its actor was killed.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from timm.data import resolve_data_config

from luna_vision.execution.check import check_model
from luna_vision.execution.encode import encode
from luna_vision.images.decode import SampleError, to_channels
from luna_vision.images.find import Listed, region_of
from luna_vision.images.regions import as_in_training
from luna_vision.models.factory import load_model
from luna_vision.utils.device import products_in, settle_dtype
from luna_vision.utils.errors import UserError, one_line

from .encode_files import concerns_image, encode_row, row_of
from .features import Extractor
from .parts import as_table, window_columns
from .windows import Settings, Window, extract, image_transform, pixel_values

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Embedder", "Encoder"]


class Embedder:
    """Embeddings of decoded images, the column "image": arrays (H, W) or (H, W, c), which may differ in size."""

    def __init__(
        self,
        checkpoint: str | None = None,
        model: str | None = None,
        arguments: dict[str, Any] | None = None,
        device: str = "auto",
        dtype: str = "auto",
        **settings: Any,
    ) -> None:
        """
        Args:
            checkpoint, model, arguments: As `checkpoint`, `name` and `arguments` of `load_model`.
            device: "cpu", "cuda" or "auto".
            dtype: Type of products, a name of `luna_vision.utils.device.DTYPES`.
            **settings: Of `luna_vision.downstream.embed.Settings`; `workers` and `max_pixels` mean nothing here.

        Raises:
            ValueError, OSError: As `load_model`, or settings that do not fit.
        """
        loaded = load_model(model, arguments, checkpoint, device, num_classes=0)
        self.dtype, self.settings = settle_dtype(loaded, dtype), Settings(**settings)
        self.extractor = Extractor(loaded, self.settings.memory, self.settings.grid)
        self.values = pixel_values(self.extractor, self.settings)
        self.transform = image_transform(self.extractor, self.settings, self.values)
        side = self.settings.img_size
        size = (side, side) if side else resolve_data_config(pretrained_cfg=loaded.pretrained_cfg)["input_size"][1:]
        image = _image(size, loaded.pretrained_cfg, self.extractor.in_chans, self.settings.nodata)
        window, table = self._window([image])
        if table is None:
            raise UserError(window.failures[0])
        self.none = table.slice(0, 0)

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> "pa.Table":
        """The columns of the batch but "image", with "embedding" and, where wanted, "memory", "grid", "grid_shape"."""
        window, table = self._window(batch["image"])
        others = {name: values for name, values in batch.items() if name != "image"}
        return _rows(others, list(window.features), table or self.none, window.failures)

    def _window(self, images: Sequence[Any]) -> tuple[Window, "pa.Table | None"]:
        """The features of images, and the columns of those that could be used."""
        window, tensors = Window(0, len(images)), {}
        for i, image in enumerate(images):
            try:
                tensors[i] = self.transform(to_channels(np.asarray(image), self.extractor.in_chans, self.values), 0)
            except (SampleError, MemoryError) as error:
                window.failures[i] = one_line(error)
        with products_in(self.extractor.model, self.dtype):
            extract(self.extractor, tensors, self.settings.batch_size, window)
        return window, as_table(window_columns(window)) if window.features else None


class Encoder:
    """Encodings of image files of any size, the column "path", with "mask" and "region" where a row has its own."""

    def __init__(
        self,
        checkpoint: str | None = None,
        model: str | None = None,
        arguments: dict[str, Any] | None = None,
        device: str = "auto",
        dtype: str = "auto",
        choice: dict[str, Any] | None = None,
        **how: Any,
    ) -> None:
        """
        Args:
            checkpoint, model, arguments, device, dtype: As of `Embedder`.
            choice: Arguments of `luna_vision.images.open_image`, such as {"mpp": 0.5}; by default as in the training
                of the checkpoint on slides.
            **how: Arguments of `luna_vision.execution.encode`, such as memory_budget="16GB", but no files: rows that
                are computed at the same time would share them. The mask is by default that of the training on slides;
                "none" looks at all patches.

        Raises:
            ValueError, OSError: As `load_model`, or a model that cannot stream.
        """
        if files := [name for name in ("store", "grid", "attention", "save") if name in how]:
            raise UserError(f"{' and '.join(files)} would be shared by all rows: leave out")
        self.model, self.choice, self.how = load_model(model, arguments, checkpoint, device), choice or {}, how
        check_model(self.model, "streaming")
        own = as_in_training(self.model.pretrained_cfg.get("slides") or {}, self.choice | how)
        mask = own.pop("mask", how.get("mask"))
        self.mask = None if mask == "none" else mask
        self.choice = self.choice | own
        self.dtype, size = settle_dtype(self.model, dtype), self.model.patch_embed.patch_size
        with products_in(self.model, self.dtype):
            one = encode(self.model, _image(size, self.model.pretrained_cfg, self.model.in_chans), progress=False)
        self.none = as_table(row_of(Listed(""), size, one)).slice(0, 0)

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> "pa.Table":
        """The columns of the batch, with those of the table of `luna_vision.downstream.encode_files`."""
        import pyarrow as pa

        rows, failures = {}, {}
        for i, path in enumerate(batch["path"]):
            try:
                mask, region = (_text(batch[name][i]) if name in batch else "" for name in ("mask", "region"))
                item = Listed(str(path), mask or self.mask, region_of(region, path) if region else None)
                with products_in(self.model, self.dtype):
                    rows[i] = as_table(encode_row(self.model, item, self.choice, **self.how))
            except (OSError, ValueError, MemoryError) as error:
                if not concerns_image(error):
                    raise
                failures[i] = one_line(error)
        own = {name: [_text(value) for value in batch[name]] for name in ("mask", "region") if name in batch}
        others = {name: values for name, values in batch.items() if name not in self.none.column_names} | own
        return _rows(others, list(rows), pa.concat_tables([self.none, *rows.values()]), failures)


def _image(size: tuple[int, int], cfg: Mapping[str, Any], in_chans: int, nodata: float | None = None) -> np.ndarray:
    """An image (H, W, C) of which no pixel is missing."""
    number = next(n for n in (0, 1, 2) if n not in (cfg.get("nodata"), nodata))
    return np.full((*size, in_chans), number, np.uint8)


def _text(value: Any) -> str:
    """A cell of text; what is missing is empty."""
    return "" if value is None or value != value else str(value)


def _rows(
    others: Mapping[str, Sequence[Any]], index: list[int], found: "pa.Table", failures: Mapping[int, str]
) -> "pa.Table":
    """All rows of a batch in their order, those of failures with nulls.

    Args:
        others: Columns of the batch; where `found` has one of the same name, for the failures.
        index: Which rows were found.
        found: Their columns.
        failures: By row, why it could not be used.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    place, count = {i: n for n, i in enumerate(index)}, len(index) + len(failures)
    found = found.take(pa.array([place.get(i) for i in range(count)], pa.int64()))
    columns = {name: pa.array(list(values)) for name, values in others.items()}
    own = {name: columns.pop(name) for name in found.column_names if name in columns}
    for name, column in zip(found.column_names, found.columns, strict=True):
        columns[name] = pc.coalesce(column, own[name]) if name in own else column
    return pa.table(columns | {"error": pa.array([failures.get(i, "") for i in range(count)], pa.string())})
