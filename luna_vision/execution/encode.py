"""`encode`: run a Luna ViT on an image of any size, with the result of the ordinary forward pass.

Shapes: H', W' patch grid, L memory slots, C width.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import luna_vision

from ..images.foreground import patch_mask
from ..images.pixels import Pixels, pixel_statistics
from ..images.values import model_values
from ..models import LunaVit
from ..models.luna_vit import initial_memory
from ..utils.device import product_dtype
from ..utils.fingerprint import describe
from ..utils.progress import progress_bar
from .attention import AttentionMap
from .check import check_model
from .checkpoint import Checkpoint
from .grid import Grid, Sink, check_apart
from .layout import Layout
from .out_of_core import Engine, State
from .plan import make_plan, parse_bytes
from .store import FileRows, RamRows, Ring

__all__ = ["Encoded", "encode"]

STORE_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Encoded:
    """The result of `encode`; tensors are on the CPU.

    Attributes:
        embedding: (C), the input of the model's classifier; None for `global_pool=""`.
        logits: (num_classes); None without classes or embedding.
        memory: (L, C), after the final norm: the first tokens of `forward_features`.
        raw_memory: (L, C), before the final norm: the `memory` for a next image.
        grid_size: (H', W').
        peak_bytes: Bytes to be allocated at most, by the plan.
        patch_valid: (H', W') bool, the patches that were looked at; None if all were. Others are 0 in the `grid`.
        broken_tiles: How many tiles could not be read, see `on_error` of `encode`.
    """

    embedding: Tensor | None
    logits: Tensor | None
    memory: Tensor
    raw_memory: Tensor
    grid_size: tuple[int, int]
    peak_bytes: int
    patch_valid: Tensor | None = None
    broken_tiles: int = 0


@torch.no_grad()  # not inference mode: the result may be used in training
def encode(
    model: nn.Module,
    image: Any,
    *,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    value_range: str | Sequence[float] | None = None,
    nodata: float | None = None,
    fill: float | str | None = None,
    on_error: str = "raise",
    mask: np.ndarray | str | os.PathLike | None = None,
    memory: Tensor | None = None,
    store: str | os.PathLike | None = None,
    store_dtype: torch.dtype | None = None,
    memory_budget: int | str | None = None,
    band_rows: int | None = None,
    grid: str | os.PathLike | Sink | None = None,
    attention: str | os.PathLike | None = None,
    attention_layer: int | None = None,
    progress: bool = True,
    save: Callable[[Encoded], None] | None = None,
) -> Encoded:
    """Encode an image that need not fit into memory. The result is that of `model(image)`, up to rounding.

    The image is read once, from top to bottom; twice with a fill of "mask". With a `store` on disk, a call that was
    stopped (by Ctrl-C, a kill, a full disk or a tile that could not be read) is continued by the same call, and gives
    the same bits.

    Args:
        model: A Luna ViT, on its device; it is put in eval mode.
        image: Anything with a `shape`, (H, W) or (H, W, channels), and pixel rows by `image[start:stop]`: a numpy array
            or memmap, a zarr array, the result of `open_image`. Integers or floating point. Grey and colour are
            converted to the channels of the model; other bands must be as many as its own.
        mean: Mean for pixels in [0, 1], one number or one for each channel; by default that of the model's
            `pretrained_cfg`, as in training. With mean 0 and std 1 pixels stay as they are.
        std: Standard deviation, likewise.
        value_range: What numbers become 0 and 1: (LOW, HIGH), or "dtype", what their type can hold, and [0, 1] of
            floating point. By default that of the model's training, else "dtype". See docs/pixels.md.
        nodata: A number that stands for no data, besides the one that a file itself names; likewise.
        fill: What takes the place of missing numbers: "mean", "error" or a number; or "mask", which leaves out patches
            that have no others; likewise.
        on_error: What becomes of tiles, strips or chunks of the file that cannot be read: "raise"; "fill", they have
            what missing numbers have; or "skip", patches without other pixels are left out, for which the image is read
            once more. What is decoded as a whole, such as PNG, raises.
        mask: The patches to look at, as `patch_valid` of the model: "otsu" for tissue, "valid" for what holds data, a
            mask file, polygons in GeoJSON or an array, see `luna_vision.images.foreground.patch_mask`. Others are
            neither read nor computed.
        memory: (L, C), replaces the learned initial memory (`Encoded.raw_memory` of an earlier image).
        store: A folder for the patches; None keeps them in memory. It is emptied at the end.
        store_dtype: Type in which patches are kept between two layers, the model's if None. `torch.bfloat16` halves
            the space and rounds to 8 bits once a layer.
        memory_budget: Bytes, or a text such as "8GB", that may be allocated beyond the model, Python and the libraries.
        band_rows: Rows of patches that go through a layer together; chosen from the budget if None. It changes the
            result by rounding only.
        grid: A .npy or .zarr file for the patches after the final norm, (H', W', C). An existing file or .zarr folder
            is replaced at the end. Or a `luna_vision.execution.grid.Sink`, which takes them as they come.
        attention: A .tif or .zarr file for what each slot of the memory looks at: a channel a slot, a pixel a patch,
            the weights of a pack in multiples of their mean, averaged over heads; 0 outside of a mask. It lies over the
            image: TIFF has a georeference if the image has one. A file that is there is replaced at the end.
        attention_layer: The block whose pack it is, from 0, or from the last if negative; by default the last pack,
            from which the final memory comes.
        progress: Show a progress bar on stderr or, if that is no terminal, a line from time to time.
        save: Called with the result before the store is emptied. If it fails, the same call continues from there.

    Raises:
        ValueError: A model that cannot stream, an image or an argument that does not fit, a budget that is too small
            (the message gives the smallest one), or a `store` with a run of another model, image or arguments.
        OSError: Pixels cannot be read or files cannot be written; the store is kept.
    """
    check_model(model, "streaming")
    model.eval()
    parameter = next(model.parameters())
    store_dtype = parameter.dtype if store_dtype is None else store_dtype
    _check_arguments(store_dtype, band_rows, attention, attention_layer)
    sink = None if grid is None else grid if isinstance(grid, Sink) else _grid_file(Path(grid), image)
    looks = None if attention is None else _attention(Path(attention), model, attention_layer, image)
    budget = None if memory_budget is None else parse_bytes(memory_budget)

    statistics = pixel_statistics(model, mean, std)
    wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    cfg = getattr(model, "pretrained_cfg", {})
    values = model_values(cfg, statistics[0], value_range, nodata, fill)
    like = {"dtype": wide, "device": parameter.device}
    pixels = Pixels(image, model.in_chans, *statistics, **like, values=values, on_error=on_error)
    (height, width), (p, q) = pixels.shape[:2], model.patch_embed.patch_size
    grid_size = -(-height // p), -(-width // q)
    masked = None if mask is None else patch_mask(mask, image, grid_size, (p, q), values.nodata)
    if masked is not None:
        pixels.restrict(masked, (p, q))
    memory = None if memory is None else memory.reshape(-1, *memory.shape[-2:]).to(parameter.device)
    state = State(0, 0, initial_memory(model.learned_memory(), memory, parameter.new_empty(1, 1, model.embed_dim)))

    checkpoint, band = None, band_rows
    if store is not None:
        about = _about(model, pixels, statistics, state.memory, store_dtype, band_rows, sink)
        about["attention"] = None if looks is None else looks.described()
        about["mask"] = None if masked is None else hashlib.sha256(np.packbits(masked).tobytes()).hexdigest()
        checkpoint = Checkpoint(Path(store), about)
        band = checkpoint.band or band
    out = drawn = None
    try:
        with ExitStack() as files:
            count = None if masked is None else int(masked.sum())
            others = 0 if sink is None else sink.planned_bytes(grid_size, model)
            more = 0
            if looks is not None:
                others, more = others + looks.planned_bytes(grid_size), looks.numbers(model)
            in_file = store is not None
            gpu = parameter.device if parameter.device.type == "cuda" else None
            free = None if gpu is None else torch.cuda.mem_get_info(gpu)[0]
            plan = make_plan(model, pixels, grid_size, store_dtype, in_file, budget, band, count, others, more, free)
            if checkpoint is not None:  # the first row of pixels is read only after the plan has found room for it
                first = pixels.raw(pixels.first, pixels.first + 1)
                checkpoint.expect({"image": hashlib.sha256(first.tobytes()).hexdigest()})
            resume = checkpoint is not None and checkpoint.band is not None
            if resume:
                state = checkpoint.load(parameter.device)
                pixels.broken = frozenset(map(tuple, state.broken))
                pixels.any_read = state.row > 0 or state.sweep > 0
            if (valid := pixels.valid((p, q), plan.band)) is not None:
                pixels.restrict(valid, (p, q))
            layout = Layout(grid_size, plan.band, valid)
            shape = layout.count + layout.margin, model.embed_dim, store_dtype
            if checkpoint is None:
                rows = RamRows(*shape, gpu, on_gpu=gpu is not None and plan.bytes <= free)
            else:
                rows = FileRows(checkpoint.patches, *shape, resume=resume)
            files.callback(rows.close)
            last_sweep = state.sweep == len(model.stages())
            # a run that was killed at its very end may have a complete result already
            finished = last_sweep and state.row == layout.bands[-1].stop and sink is not None and sink.is_finished()
            if sink is not None and not finished:
                like = {"device": parameter.device, "dtype": parameter.dtype}
                sink.open(layout, model.embed_dim, like, plan.band, resume)
                out = sink
                files.callback(out.close)
                if last_sweep and (first := out.rewind(state.row, state.turn)) < state.row:
                    # the last sweep only reads the store, so that it can begin again anywhere
                    assert not state.pool, "the pool would read rows twice"
                    state.row = max((band.start for band in layout.bands if band.start <= first), default=0)
            if looks is not None and not (resume and state.sweep >= looks.stage and looks.is_finished()):
                like = {"device": parameter.device, "dtype": parameter.dtype}
                looks.open(layout, image, (p, q), like, resume)
                drawn = looks
                files.callback(drawn.close)
            ring = Ring(rows, layout.count, layout.margin)
            engine = Engine(model, pixels, layout, plan.band, ring, state, out, drawn)
            embedding, memory = _run(engine, rows, checkpoint, progress)
            result = _finish(model, embedding, memory, grid_size, plan.bytes)
            result.patch_valid = None if valid is None else torch.from_numpy(valid)
            result.broken_tiles = len(pixels.broken)
            if save is not None:
                save(result)
            for one in (out, drawn):
                if one is not None:
                    one.finish()
    except BaseException:
        if checkpoint is None or not checkpoint.is_begun:  # there is nothing to resume
            for one in (out, drawn):
                if one is not None:
                    one.discard()
            if checkpoint is not None:
                checkpoint.remove()
        raise
    if checkpoint is not None:
        checkpoint.remove()
    return result


def _check_arguments(
    store_dtype: torch.dtype, band_rows: int | None, attention: Path | None, attention_layer: int | None
) -> None:
    if store_dtype not in STORE_TYPES:
        raise ValueError(f"store_dtype must be one of {', '.join(map(str, STORE_TYPES))}, got {store_dtype}")
    if band_rows is not None and band_rows < 1:
        raise ValueError(f"band_rows must be at least 1, got {band_rows}")
    if attention_layer is not None and attention is None:
        raise ValueError(f"attention_layer {attention_layer} chooses a block of attention, which is not given")


def _grid_file(path: Path, image: Any) -> Grid:
    check_apart(path, "the patch grid", getattr(image, "file", None))
    return Grid(path)


def _attention(path: Path, model: LunaVit, layer: int | None, image: Any) -> AttentionMap:
    check_apart(path, "the attention map", getattr(image, "file", None))
    return AttentionMap(path, model, layer)


def _run(
    engine: Engine, rows: RamRows | FileRows, checkpoint: Checkpoint | None, progress: bool
) -> tuple[Tensor | None, Tensor]:
    """Run the engine to its end, with a progress bar; keep its state after every band if there is a checkpoint."""
    bands, state = engine.layout.bands, engine.state
    each = sum(band.stop - band.start for band in bands)
    done = (state.sweep + state.turn) * each + sum(band.stop - band.start for band in bands if band.stop <= state.row)
    total = (engine.sweeps + (0 if engine.grid is None else engine.grid.passes - 1)) * each
    with progress_bar(show=progress, total=total, initial=done, desc="encoding", unit="row") as bar:

        def after_band(state: State, new: int) -> None:
            if checkpoint is not None:
                rows.sync()
                for one in (engine.grid, engine.attention):
                    if one is not None:
                        one.sync()
                checkpoint.save(state, engine.rows)
            bar.update(new)

        return engine.run(after_band)


def _finish(
    model: LunaVit, embedding: Tensor | None, memory: Tensor, grid_size: tuple[int, int], peak_bytes: int
) -> Encoded:
    logits = None
    if embedding is not None:
        embedding = model.head_drop(embedding)
        logits = model.head(embedding)[0].cpu() if model.num_classes else None
        embedding = embedding[0].cpu()
    return Encoded(embedding, logits, model.norm(memory)[0].cpu(), memory[0].cpu(), grid_size, peak_bytes)


def _about(
    model: LunaVit,
    pixels: Pixels,
    statistics: tuple[tuple[float, ...], tuple[float, ...]],
    memory: Tensor,
    store_dtype: torch.dtype,
    band_rows: int | None,
    sink: Sink | None,
) -> dict[str, Any]:
    """Everything that the result depends on. The image is known by its shape and its `identity`; `encode` adds its
    first row."""
    return {
        "luna_vision": luna_vision.__version__,
        **describe(model),
        "dtype": str(product_dtype(memory.device, memory.dtype)),
        "pooling": model.global_pool,
        "pack_by_row": model.stages()[0].pack_by_row,
        "image_shape": [*pixels.shape, str(pixels.dtype)],
        "image_name": str(getattr(pixels.image, "identity", "")),
        "mean": statistics[0],
        "std": statistics[1],
        **pixels.values.described(),
        "on_error": pixels.on_error,
        "memory": hashlib.sha256(memory.detach().double().cpu().numpy().tobytes()).hexdigest(),
        "store_dtype": str(store_dtype),
        "band_rows": band_rows,
        "grid": None if sink is None else sink.described(),
    }
