"""Classification of whole slides, which are read by rows."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from luna_vision.data.images import Unread
from luna_vision.data.slides import Slide
from luna_vision.execution.streamed import check_streamed, streamed_logits
from luna_vision.utils.checks import check_at_least
from luna_vision.utils.errors import is_check, one_line

from .classification import ClassificationTask


class SlideTask(ClassificationTask):
    """Train, evaluate and apply a Luna ViT on images of any size with one label each, as a whole and end to end.

    Batches are those of :class:`~luna_vision.data.SlideDataModule`: (list of B slides, targets (B,) int64). Pixels are
    read a few rows at a time, once in the forward pass and once in the backward pass; blocks run in bands. Gradients
    are those of the ordinary step, see `luna_vision.execution.streamed`.

    Args:
        store_dtype: type in which the inputs of the blocks are kept for the backward pass. ``bfloat16`` halves them,
            and computes gradients at inputs that are rounded to 8 bits.
        store: folder on a disk for all that has the size of the image; None keeps it in memory.
        band_rows: rows of patches in a band; 0 for about 4,096 patches.
        **kwargs: the arguments of `ClassificationTask`, but for ``mixup``, ``cutmix``, ``compile``,
            ``grad_checkpointing`` and ``channels_last``.

    Raises:
        ValueError: an argument out of its range, a model that is no Luna ViT with a memory, or one that drops
            activations.
        FileNotFoundError: when a run starts: ``store`` is no folder.
    """

    outcome = None  # a slide is no picture to draw
    group: ProcessGroup | None = None  # of `SequenceParallelStrategy`: the processes that share a slide
    not_sharded = "slides"

    def __init__(
        self,
        *args: Any,
        store_dtype: Literal["float32", "bfloat16"] = "bfloat16",
        store: str | None = None,
        band_rows: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        hp = self.hparams
        hp.band_rows = band_rows
        check_at_least(0, band_rows=band_rows)
        for name in ("mixup", "cutmix", "compile", "grad_checkpointing", "channels_last"):
            if hp[name]:
                raise ValueError(f"slides are read by rows, which {name} does not know: leave it out")
        check_streamed(self.model)

    def check_start(self, optimizer: bool = True) -> None:
        super().check_start(optimizer)
        if self.hparams.store is not None and not Path(self.hparams.store).is_dir():
            raise FileNotFoundError(f"store {self.hparams.store!r} is no folder: make it, on a disk with room")

    def check_batch(self, images: list[Slide], targets: Tensor) -> None:
        if not isinstance(images, list) or not all(isinstance(image, Slide) for image in images):
            raise ValueError("SlideTask trains on the slides of SlideDataModule, and the data gives something else")

    def predict_step(self, batch: tuple[list[Slide], list[str]], batch_idx: int) -> dict[str, Any] | None:
        """As `ClassificationTask`, of one slide; None if it cannot be read and the data lists what cannot."""
        unread = getattr(self.trainer.datamodule, "unread", None)
        try:
            return super().predict_step(batch, batch_idx)
        except (ValueError, OSError) as error:
            full = getattr(error, "errno", None) == errno.ENOSPC  # of the store
            if unread is None or full or not (isinstance(error, OSError) or is_check(error)):
                raise
            unread.append(Unread(batch[1][0], one_line(error)))
            return None

    def forward(self, images: list[Slide]) -> Tensor:
        """Logits (B, K) of slides."""
        hp = self.hparams
        store = None if hp.store is None else Path(hp.store)
        dtype = torch.bfloat16 if hp.store_dtype == "bfloat16" else None
        found = [
            streamed_logits(self.model, image.patches(self.model, self.group), hp.band_rows or None, dtype, store)
            for image in images
        ]
        return torch.cat(found)
