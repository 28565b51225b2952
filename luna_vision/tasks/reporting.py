"""Callbacks that hand results over: predictions as CSV, the best weights as a timm checkpoint, a line per epoch."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from safetensors.torch import save_file

from luna_vision._record import share_as_usual
from luna_vision.data.images import printable
from luna_vision.models import unwrap_state_dict

from .base import TimmTask
from .checkpoints import best_checkpoint, last_checkpoint, model_checkpoint, read_checkpoint


class PredictionWriter(BasePredictionWriter):
    """Write predictions to a CSV file: ``image`` (path or index), ``label1`` to ``label5``, ``probability1`` to 5.

    Labels are class names where the data module has ``class_names``, else indices. Rows go to a temporary file that
    takes its name when the last is written, so a file of this name is always complete. With several processes each
    writes its own share, to a name that ends in its rank.

    Args:
        output: the file; None is ``predictions.csv`` in the run's log directory.
    """

    def __init__(self, output: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.output = output
        self._file: Any = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = Path(self.output or Path(trainer.log_dir or trainer.default_root_dir) / "predictions.csv")
        if trainer.world_size > 1:
            path = path.with_stem(f"{path.stem}.rank{trainer.global_rank}")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial")
        self._file = self._partial.open("w", newline="", encoding="utf-8")
        self._rows = csv.writer(self._file)
        self._header_written = False

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: dict[str, Any],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        count = prediction["labels"].shape[1]
        if not self._header_written:
            self._rows.writerow(["image", *(f"{c}{i + 1}" for c in ("label", "probability") for i in range(count))])
            self._header_written = True
        names = self._class_names(trainer)
        columns = (prediction["ids"], prediction["labels"].tolist(), prediction["probabilities"].tolist())
        for image, labels, probabilities in zip(*columns, strict=True):
            shown = [names[label] for label in labels] if names else labels
            self._rows.writerow([printable(image), *shown, *(f"{p:.6f}" for p in probabilities)])

    @staticmethod
    def _class_names(trainer: Trainer) -> list[str] | None:
        try:
            return getattr(trainer.datamodule, "class_names", None)
        except FileNotFoundError:  # a data module that reads the names off a training folder which is not here
            return None

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._file.close()
        os.replace(self._partial, self._path)
        print(f"predictions: {self._path}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._file is not None:
            self._file.close()
            self._partial.unlink(missing_ok=True)


def export_weights(checkpoint: str | Path, output: str | Path) -> None:
    """Write the model's weights (with EMA, the averaged ones) from a Lightning checkpoint as timm loads them.

    What the checkpoint says of its training (which model, how images were normalised, classes, epochs) goes into the
    file's header as JSON, under "training"; `training_checkpoint` of the commands reads it.

    Args:
        checkpoint: a checkpoint of a task; of FSDP2, the folder.
        output: the ``.safetensors`` file to write, in one move.
    """
    content = read_checkpoint(checkpoint)
    state_dict = unwrap_state_dict(content)
    training = {name: content[name] for name in ("hyper_parameters", "data", "epoch", "global_step") if name in content}
    partial = Path(f"{output}.partial")
    tensors = {name: value.contiguous() for name, value in state_dict.items()}
    save_file(tensors, partial, {"training": json.dumps(training, default=str)})
    share_as_usual(partial)
    os.replace(partial, output)


class ExportBest(Callback):
    """When training ends, write the best checkpoint's weights for timm; `announce` prints how to load them.

    The file is ``best.safetensors`` beside the checkpoints. "Best" is what the run's ModelCheckpoint monitors.
    Training that Ctrl-C stops ends with the place of the last checkpoint instead.
    """

    def __init__(self) -> None:
        self._closing: list[str] = []

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: TimmTask) -> None:
        path = best_checkpoint(trainer)
        if not path:
            return
        weights = Path(path).with_name("best.safetensors")
        export_weights(path, weights)
        callback = model_checkpoint(trainer)
        if callback is None or not callback.monitor:
            score = ""
        elif path == callback.best_model_path:
            score = f" ({callback.monitor} {float(callback.best_model_score):.4f})"
        else:
            score = f" (the last one: {callback.monitor} was never measured, so none is best)"
        self._closing = [
            f"best checkpoint: {relative(path)}{score}",
            f"load it with:    {pl_module.load_line(relative(path), relative(weights))}",
        ]

    def announce(self) -> None:
        """Print where the best checkpoint is and the line that loads it; nothing if there is none."""
        for line in self._closing:
            print(line)

    @rank_zero_only
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # in validation, too
        if isinstance(exception, (KeyboardInterrupt, SIGTERMException)) and trainer.state.fn == TrainerFn.FITTING:
            checkpoint = last_checkpoint(trainer)
            resume = (
                f"the same command, or --ckpt_path {relative(checkpoint)}, resumes it"
                if checkpoint
                else "no checkpoint was written yet"
            )
            print(f"stopped at step {trainer.global_step}: {resume}", file=sys.stderr)


def relative(path: str | Path) -> str:
    """The path as seen from the working directory where that is shorter to read, else as it is."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


class EpochLines(Callback):
    """Print a line of metrics per epoch where the output is a file or a pipe, in which a progress bar shows nothing."""

    @rank_zero_only
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if sys.stdout.isatty():
            return
        shown = ("train_loss_epoch", "train_acc1_epoch", "val_loss", "val_acc1", "val_map", "val_map_50", "val_miou")
        shown += ("lr", "images_per_s")
        metrics = trainer.callback_metrics
        values = "  ".join(
            f"{name.removesuffix('_epoch')} {float(metrics[name]):.4g}" for name in shown if name in metrics
        )
        print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {values}", flush=True)
