"""Callbacks that hand results over: predictions as CSV, the best weights as a timm checkpoint, a line per epoch."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from safetensors.torch import save_file

from luna_vision.models import unwrap_state_dict
from luna_vision.utils.files import new_file
from luna_vision.utils.text import csv_cell, printable

from .base import TimmTask
from .checkpoints import best_checkpoint, last_checkpoint, model_checkpoint, read_checkpoint


class PredictionWriter(BasePredictionWriter):
    """Write predictions to a CSV file: ``image`` (path or index), ``label1`` to ``label5``, ``probability1`` to 5.

    Labels are class names where the checkpoint or the data module has them, else indices. Text that a spreadsheet would
    take for a formula has an apostrophe before it, see `luna_vision.utils.text.csv_cell`. The file appears when the
    last row is written. With several processes each writes its own share, to a name that ends in its rank.

    Args:
        output: the file; None is ``predictions.csv`` in the run's log directory.
    """

    def __init__(self, output: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.output = output
        self._closing = ExitStack()  # of the file, when there is one

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = Path(self.output or Path(trainer.log_dir or trainer.default_root_dir) / "predictions.csv")
        if trainer.world_size > 1:
            path = path.with_stem(f"{path.stem}.rank{trainer.global_rank}")
        self._path, self._closing = path, ExitStack()
        file = io.TextIOWrapper(self._closing.enter_context(new_file(path)), encoding="utf-8", newline="")
        self._closing.callback(file.detach)  # which writes what is left
        self._rows = csv.writer(file)
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
        names = pl_module.label_names or self._class_names(trainer)
        columns = (prediction["ids"], prediction["labels"].tolist(), prediction["probabilities"].tolist())
        for image, labels, probabilities in zip(*columns, strict=True):
            shown = [names[label] for label in labels] if names else labels
            cells = [csv_cell(cell) if isinstance(cell, str) else cell for cell in (image, *shown)]
            self._rows.writerow([*cells, *(f"{p:.6f}" for p in probabilities)])

    @staticmethod
    def _class_names(trainer: Trainer) -> list[str] | None:
        try:
            return getattr(trainer.datamodule, "class_names", None)
        except FileNotFoundError:  # a data module that reads the names off a training folder which is not here
            return None

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._closing.close()
        print(f"predictions: {self._path}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._closing.__exit__(type(exception), exception, exception.__traceback__)


def export_weights(checkpoint: str | Path, output: str | Path) -> None:
    """Write the model's weights (with EMA, the averaged ones) from a Lightning checkpoint as timm loads them.

    What the checkpoint says of its training (which model, how images were normalised, classes, epochs) goes into the
    file's header as JSON, under "training"; `training_checkpoint` of the commands reads it.

    Args:
        checkpoint: a checkpoint of a task.
        output: the ``.safetensors`` file to write, in one move.
    """
    content = read_checkpoint(checkpoint)
    state_dict = unwrap_state_dict(content)
    training = {name: content[name] for name in ("hyper_parameters", "data", "epoch", "global_step") if name in content}
    tensors = {name: value.contiguous() for name, value in state_dict.items()}
    with new_file(output) as file:
        save_file(tensors, file.name, {"training": json.dumps(training, default=str)})


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
        callback = model_checkpoint(trainer)
        # a run that was resumed from another one's checkpoint takes over where its best one is, and not to write there
        weights = Path(callback.dirpath if callback else Path(path).parent, "best.safetensors")
        weights.parent.mkdir(parents=True, exist_ok=True)
        export_weights(path, weights)
        if callback is None or not callback.monitor:
            score = ""
        elif path == callback.best_model_path:  # which may be that of another run, without its score
            score = callback.best_model_score
            score = "" if score is None else f" ({callback.monitor} {float(score):.4f})"
        else:
            score = f" (the last one: {callback.monitor} was never measured, so none is best)"
        self._closing = [
            f"best checkpoint: {relative(path)}{score}",
            "load it with:    import luna_vision; model, transform, class_names = "
            f"luna_vision.load({relative(weights)!r})",
        ]

    def announce(self) -> None:
        """Print where the best checkpoint is and the line that loads it; nothing if there is none."""
        for line in self._closing:
            print(printable(line))

    @rank_zero_only
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # in validation, too
        if isinstance(exception, (KeyboardInterrupt, SIGTERMException)) and trainer.state.fn == TrainerFn.FITTING:
            checkpoint = last_checkpoint(trainer)
            kept = f"from {relative(checkpoint)}" if checkpoint else "from its beginning: it has no checkpoint yet"
            step = f"stopped at step {trainer.global_step}"
            print(f"{step}: the same command with --resume goes on {kept}", file=sys.stderr)


def relative(path: str | Path) -> str:
    """The path as seen from the working directory where that is shorter to read, else as it is."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


class ModelSize(Callback):
    """Print the number of the model's parameters when a fit begins.

    In place of Lightning's table, whose FLOPs are 0 for a task without an example input, and leave fused attention out
    on a CPU for one that has it.
    """

    @rank_zero_only
    def on_fit_start(self, trainer: Trainer, pl_module: TimmTask) -> None:
        counts = [(parameter.numel(), parameter.requires_grad) for parameter in pl_module.model.parameters()]
        total, trained = sum(count for count, _ in counts), sum(count for count, trains in counts if trains)
        frozen = f", {trained:,} of them trained" if trained < total else ""
        print(f"{type(pl_module.model).__name__}: {total:,} parameters{frozen}")


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
