"""Pictures of images with their labels and with what a model finds in them, for previews, loggers and reports."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from luna_vision.data.dense import IGNORE
from luna_vision.downstream.segmentation import voc_palette
from luna_vision.utils.checks import check_at_least
from luna_vision.utils.text import printable

from .base import TimmTask

COLUMNS, SIDE = 4, 320  # of a sheet: pictures in a row, and the longer side of each, pixels


def to_pixels(image: Tensor, transform: Any = None) -> Tensor:
    """An image of a batch (C, H, W) as uint8 (3, H, W); of other than three channels, the first one.

    Args:
        image: Of the batch.
        transform: That made it, whose mean and standard deviation are taken back if it has them.
    """
    image = image.detach().float().cpu()
    image = image * getattr(transform, "std", torch.tensor(1.0)) + getattr(transform, "mean", torch.tensor(0.0))
    pixels = image.nan_to_num(0.0).clamp(0, 1)
    return (pixels if len(pixels) == 3 else pixels[:1].expand(3, -1, -1)).mul(255).to(torch.uint8)


def draw(pixels: Tensor, target: Any, names: list[str], background: bool) -> Image.Image:
    """An image uint8 (3, H, W) with its target in the form of batches.

    Args:
        pixels: The image.
        target: Boxes and labels from 1, and perhaps scores; a mask (H, W); labels (K,) of 0 and 1; or a label.
        names: Of the classes, without the background.
        background: Whether 0 in a mask is the background.
    """
    palette = voc_palette()
    if isinstance(target, dict):
        labels = target["labels"].tolist()
        colors = [tuple(palette[label].tolist()) for label in labels]
        scores = target["scores"].tolist() if "scores" in target else [None] * len(labels)
        words = [names[at - 1] + ("" if s is None else f" {s:.2f}") for at, s in zip(labels, scores, strict=True)]
        if labels:
            pixels = draw_bounding_boxes(pixels, target["boxes"].cpu(), words, colors, width=2)
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    if target.ndim == 2:  # a mask; what is ignored is white
        mask = target.cpu().numpy()
        colors = palette[(mask.astype(np.int64) + (not background)).clip(0, 255)]
        colors[mask == IGNORE] = 255
        return Image.blend(image, Image.fromarray(colors), 0.5)
    _write(image, ", ".join(_labels(target, names)) or "no label")
    return image


def pair(pixels: Tensor, target: Any, found: Any, names: list[str], background: bool, side: int = SIDE) -> Image.Image:
    """An image with its target, and beside it with what is found, in the form of targets; see `draw`.

    Neither is larger than `side` pixels. An image with a label, or several, is drawn once, with both.
    """
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    fitted = _fitted(image, side)
    if isinstance(target, dict):  # the names of boxes are drawn at the size in which they are read
        scale = torch.tensor([x / y for x, y in zip(fitted.size, image.size, strict=True)] * 2)
        pixels = torch.from_numpy(np.array(fitted)).permute(2, 0, 1)
        target, found = ({**one, "boxes": one["boxes"].cpu() * scale} for one in (target, found))
    elif target.ndim < 2:
        for top, said, labels in ((2, "label", target), (16, "found", found)):
            _write(fitted, f"{said}: {', '.join(_labels(labels, names)) or 'none'}", top)
        return fitted
    both = [_fitted(draw(pixels, labels, names, background), side) for labels in (target, found)]
    out = Image.new("RGB", (both[0].width * 2 + 4, both[0].height), "white")
    out.paste(both[0], (0, 0))
    out.paste(both[1], (both[0].width + 4, 0))
    return out


def _fitted(image: Image.Image, side: int) -> Image.Image:
    """An image whose longer side is at most `side` pixels, and at least half of that."""
    longer = max(image.size)
    scale = side / longer if longer > side else max(1, side // 2 // longer)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)


def _labels(labels: Tensor, names: list[str]) -> list[str]:
    return [names[i] for i in labels.nonzero().flatten().tolist()] if labels.ndim else [names[int(labels)]]


def _write(image: Image.Image, text: str, top: int = 2) -> None:
    ImageDraw.Draw(image).text((2, top), printable(text), fill="white", stroke_width=2, stroke_fill="black")


def sheet(images: list[Image.Image], columns: int = COLUMNS, side: int = SIDE) -> Image.Image:
    """Images in rows, none larger than `side` pixels."""
    for image in images:
        image.thumbnail((side, side))
    width, height = (max(image.size[axis] for image in images) + 4 for axis in (0, 1))
    rows = -(-len(images) // columns)
    out = Image.new("RGB", (min(columns, len(images)) * width, rows * height), "white")
    for at, image in enumerate(images):
        out.paste(image, (at % columns * width + 2, at // columns * height + 2))
    return out


class LogPictures(Callback):
    """Show the loggers the first validation images with their labels and, beside them, with what the model finds.

    TensorBoard and Weights & Biases get a picture; other loggers have no place for it.

    Args:
        count: Images.
        every_n_epochs: Epochs between two pictures; the last epoch of a run has one, too.

    Raises:
        ValueError: An argument below 1, or (when a run starts) a task whose images cannot be drawn.
    """

    def __init__(self, count: int = 4, every_n_epochs: int = 5) -> None:
        check_at_least(1, count=count, every_n_epochs=every_n_epochs)
        self.count, self.every_n_epochs = count, every_n_epochs
        self._drawn: list[Image.Image] = []

    def setup(self, trainer: Trainer, pl_module: TimmTask, stage: str) -> None:
        check_outcome(self, pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: TimmTask, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        epoch = trainer.current_epoch + 1
        due = epoch % self.every_n_epochs == 0 or epoch == trainer.max_epochs
        if not (due and trainer.is_global_zero) or trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        for image, target, found in zip(*batch[:2], outputs["found"], strict=True):
            if len(self._drawn) < self.count:
                self._drawn.append(draw_outcome(pl_module, image, target, found))

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        drawn, self._drawn = self._drawn, []
        if drawn:
            picture = sheet(drawn, columns=1, side=max(max(one.size) for one in drawn))
            for logger in trainer.loggers:
                _log(logger, picture, trainer.global_step)


def draw_outcome(task: TimmTask, image: Tensor, target: Any, found: Any, side: int = SIDE) -> Image.Image:
    """An image of a test or validation batch, with its target and with what `TimmTask.evaluate` gives for it."""
    data = task.trainer.datamodule
    pixels = to_pixels(image, getattr(data, "eval_transform", None))
    background = bool(task.hparams.get("background"))
    return pair(pixels, target, task.outcome.predicted(found), task.class_labels(), background, side)


def check_outcome(callback: Callback, task: TimmTask) -> None:
    """Raise a ValueError for a task that does not say what it finds in an image."""
    if task.outcome is None:
        raise ValueError(
            f"{type(callback).__name__} is for detection, segmentation and classification, not for "
            f"{type(task).__name__}: leave it out"
        )


def _log(logger: Logger, picture: Image.Image, step: int) -> None:
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image("val_pictures", np.asarray(picture), step, dataformats="HWC")
    elif hasattr(logger, "log_image"):  # Weights & Biases
        logger.log_image("val_pictures", [picture], step=step)
