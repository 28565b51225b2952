"""Callbacks for results: predictions as files, the best weights as a timm checkpoint, a line per epoch."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from safetensors.torch import save_file
from torch import Tensor

from luna_vision.data.images import Unread
from luna_vision.models import unwrap_state_dict
from luna_vision.utils.errors import UserError, one_line
from luna_vision.utils.files import check_new, new_file
from luna_vision.utils.fingerprint import describe
from luna_vision.utils.progress import progress_bar
from luna_vision.utils.text import printable

from .base import TimmTask
from .checkpoints import averages_at_end, best_checkpoint, last_checkpoint, model_checkpoint, read_checkpoint
from .pictures import draw, to_pixels
from .prediction_files import Journal


class PredictionWriter(BasePredictionWriter):
    """Write predictions to files, in the form that the task's ``predictions`` names: `prediction_files` has them.

    A file appears when the last image is predicted; masks appear one by one. Until then ``OUT.partial`` beside it has
    what is finished: the same prediction to the same `output` continues from there after a stop, with any number of
    processes. Several processes share the images, and the first one writes the file. Files of others are not replaced.
    Images that cannot be used are left out, and listed at the end.

    Args:
        output: The file or folder; None is one in the run's log directory, such as ``predictions.csv``.
        overlays: A folder for pictures of the images with the boxes or masks that were found; None draws none.
        overwrite: Whether to replace files that exist, all the same.

    Attributes:
        unread: At the end of a prediction, the images that could not be used, and why.

    Raises:
        FileExistsError: When a prediction starts: a file that it would write exists.
        ValueError: When a prediction starts: overlays of a task without boxes and masks, or ``OUT.partial`` was left by
            a prediction with other weights or options.
    """

    def __init__(self, output: str | None = None, overlays: str | None = None, overwrite: bool = False) -> None:
        super().__init__(write_interval="batch")
        self.overwrite = overwrite
        self.unread: list[Unread] = []
        self.output, self.overlays = output, None if overlays is None else Path(overlays)
        self._journal: Journal | None = None

    def setup(self, trainer: Trainer, pl_module: TimmTask, stage: str) -> None:
        if stage != "predict":
            return
        form, data = pl_module.predictions, trainer.datamodule
        if self.overlays is not None and not form.drawn:
            raise ValueError(f"overlays are of boxes and masks, which {type(pl_module).__name__} does not find")
        path = Path(self.output or Path(trainer.log_dir or trainer.default_root_dir) / form.default)
        self._files = (data.files_to_predict() if hasattr(data, "files_to_predict") else None) or []
        folders = [Path(folder).resolve() for folder in (None if form.suffix else path, self.overlays) if folder]
        if within := [file for file in self._files if set(Path(file).resolve().parents) & {*folders}]:
            raise UserError(f"predictions could replace images such as {within[0]}: give another folder")
        if 0 < len(self._files) < trainer.world_size:
            raise UserError(f"{trainer.world_size} processes cannot share {len(self._files)} images: start fewer")
        form.check(path, self.overwrite)
        if hasattr(data, "unread"):
            data.unread = []
        # the folder of a run is a new one each time
        self._resumes = self.output is not None and bool(self._files)
        self._file, self._named = form(path, None, pl_module, self._files), False
        self._journal = Journal(path, self._about(trainer, pl_module), self._resumes, trainer.global_rank)
        done = self._done()
        trainer.strategy.barrier("journal")  # all have looked before one writes
        if done:
            if trainer.is_global_zero:
                print(f"{path}: {len(done)} of {len(self._files)} images are finished already", file=sys.stderr)
            # each loader must have an image: if only the file of all of them is missing, some are predicted again
            data.finished = set(done[: len(self._files) - trainer.world_size])

    def _own_files(self, image: str) -> list[Path]:
        """The files that belong to an image alone."""
        overlay = None if self.overlays is None else self.overlays / self._file.file_names(image, ".jpg")
        return [path for path in (self._file.own_file(image), overlay) if path is not None]

    def _done(self) -> list[str]:
        """The images that are finished. The files of an image that is not listed belong to somebody else.

        An image is listed before its files are written: if they are not there, it is not finished.

        Raises:
            FileExistsError: There is such a file, and it is not to be replaced.
        """
        done = []
        for image in self._files:
            own = self._own_files(image)
            if "unread" in self._journal.records.get(image, {"unread": ""}):
                for path in own:
                    check_new(path, self.overwrite)
            elif all(path.exists() for path in own):
                done.append(image)
        return done

    def _about(self, trainer: Trainer, task: TimmTask) -> dict[str, Any]:
        """What the predictions depend on, but for the images."""
        path, data = trainer.ckpt_path or task.hparams.checkpoint, trainer.datamodule
        weights = describe(task.model)["weights"]
        if path:  # they are read later
            with open(path, "rb") as file:
                weights = hashlib.file_digest(file, "sha256").hexdigest()
        plain = {name: str(value) for name, value in task.hparams.items()}
        reading = data.reading() if hasattr(data, "reading") else {}
        return {"weights": weights, "model": plain, "reading": reading, "overlays": str(self.overlays)}

    def on_predict_start(self, trainer: Trainer, pl_module: TimmTask) -> None:
        done = len(getattr(trainer.datamodule, "finished", ()))
        bar = {"total": len(self._files) or None, "initial": done, "desc": "predicting", "unit": "image"}
        # on a terminal there is Lightning's own
        self._bar = progress_bar(show=trainer.is_global_zero and not sys.stderr.isatty(), **bar)

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: TimmTask,
        prediction: dict[str, Any],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        if prediction is None:  # of an image that cannot be used
            return
        self._name_classes(trainer, pl_module)
        with self._kept():
            records = self._file.records(prediction)
            self._journal.add(records)
            self._file.write(prediction)
            if self.overlays is not None:
                self._draw(pl_module, batch[0], prediction)
        self._bar.update(len(records))

    def _name_classes(self, trainer: Trainer, task: TimmTask) -> None:
        """Make the file anew, once the task has read its weights, which know the names, and the numbers of masks."""
        if not self._named:
            names, self._named = task.label_names or self._class_names(trainer), True
            self._file = task.predictions(self._journal.output, names, task, self._files)

    def _draw(self, task: TimmTask, images: Any, prediction: dict[str, Any]) -> None:
        transform = getattr(task.trainer.datamodule, "eval_transform", None)
        names, background = self._file.names or task.class_labels(), bool(task.hparams.get("background"))
        for name, image, target in zip(prediction["ids"], images, self._file.targets(prediction), strict=True):
            with new_file(self.overlays / self._file.file_names(name, ".jpg")) as file:
                draw(to_pixels(image, transform), target, names, background).save(file, "JPEG", quality=90)

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """A block that writes; an error of the system, such as a full disk, also says what is kept."""
        try:
            yield
        except OSError as error:
            journal, reason = self._journal, one_line(error) if error.errno is None else error.strerror
            reason = reason if reason.startswith("cannot write") else f"cannot write {journal.output}: {reason}"
            if self._resumes and journal.records:
                reason += "; the same command continues after the images that are finished"
            raise OSError(reason) from error

    @staticmethod
    def _class_names(trainer: Trainer) -> list[str] | None:
        try:
            return getattr(trainer.datamodule, "class_names", None)
        except FileNotFoundError:  # the training folder, whose subfolders are the names, is missing
            return None

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._bar.close()
        if unread := getattr(trainer.datamodule, "unread", None):
            with self._kept():
                self._journal.add([{"image": name, "unread": reason} for name, reason in unread])
        trainer.strategy.barrier("predicted")
        if not trainer.is_global_zero:
            self._journal.close()
            return
        if trainer.world_size > 1:
            self._journal.read()
        # positions in a test set, which processes take in turn
        images = self._files or sorted(self._journal.records, key=lambda name: (len(name), name))
        records = [self._journal.records[image] for image in images if image in self._journal.records]
        found = [record for record in records if "unread" not in record]
        self.unread = [Unread(record["image"], record["unread"]) for record in records if "unread" in record]
        with self._kept():
            if found:
                self._name_classes(trainer, pl_module)  # also where no other image than those of before can be used
                self._file.finish(found)
            self._journal.remove()
        out = self._journal.output
        print(f"predictions: {out}" if found else f"{out} is not written: it would be empty")
        if self.unread:
            print(f"{len(self.unread)} of {len(records)} images could not be used:", file=sys.stderr)
        for name, reason in self.unread:
            name = printable(name)
            print(f"  {reason if name in reason else f'{name}: {reason}'}", file=sys.stderr)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._journal is None or trainer.state.fn != TrainerFn.PREDICTING:
            return
        self._journal.close()
        if not self._resumes:
            self._journal.path.unlink(missing_ok=True)
        elif isinstance(exception, (KeyboardInterrupt, SIGTERMException)) and trainer.is_global_zero:
            print("stopped; the same command continues from here", file=sys.stderr)


def export_weights(checkpoint: str | Path, output: str | Path) -> None:
    """Write the model's weights (with EMA, the averaged ones) from a Lightning checkpoint as timm loads them.

    The file's header has task, model, normalisation, classes and epochs as JSON, under "training", for
    `training_checkpoint`.

    Args:
        checkpoint: a checkpoint of a task.
        output: the ``.safetensors`` file to write.
    """
    content = read_checkpoint(checkpoint)
    recorded = ("task", "hyper_parameters", "data", "epoch", "global_step")
    training = {name: content[name] for name in recorded if name in content}
    _write_weights(unwrap_state_dict(content), training, output)


def save_weights(task: TimmTask, data: Any, output: str | Path) -> None:
    """Write the weights of a task's model as `export_weights` does, before any training.

    Args:
        task: its model.
        data: the data module, whose preprocessing is recorded.
        output: the ``.safetensors`` file to write.
    """
    training = {"task": task.task_name(), "hyper_parameters": dict(task.hparams), "data": task.data_record(data)}
    _write_weights(task.model.state_dict(), training, output)


def _write_weights(state_dict: dict[str, Tensor], training: dict[str, Any], output: str | Path) -> None:
    tensors = {name: value.contiguous() for name, value in state_dict.items()}
    with new_file(output) as file:
        save_file(tensors, file.name, {"training": json.dumps(training, default=str)})


class ExportBest(Callback):
    """Write ``best.safetensors``, the weights of the best checkpoint for timm, when training ends.

    The run's ModelCheckpoint says which is best. `announce` prints how to load the file. Where Ctrl-C stops training,
    a line says how to resume it.
    """

    def __init__(self) -> None:
        self._closing: list[str] = []

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: TimmTask) -> None:
        path = best_checkpoint(trainer)
        if not path:
            return
        callback = model_checkpoint(trainer)
        # in this run's folder, although the best checkpoint may be in that of the run that this one began from
        weights = Path(callback.dirpath if callback else Path(path).parent, "best.safetensors")
        weights.parent.mkdir(parents=True, exist_ok=True)
        export_weights(path, weights)
        if callback is None or not callback.monitor:
            score = ""
        elif path == callback.best_model_path:  # has no score if it is another run's
            score = callback.best_model_score
            score = "" if score is None else f" ({callback.monitor} {float(score):.4f})"
        else:
            reason = "it has the average" if averages_at_end(trainer) else f"{callback.monitor} was never measured"
            score = f" (the last one: {reason})"
        self._closing = [
            f"best checkpoint: {relative(path)}{score}",
            "load it with:    import luna_vision; model, transform, class_names = "
            f"luna_vision.load({relative(weights)!r})",
        ]

    def announce(self) -> None:
        """Print the path of the best checkpoint and the line that loads it, if there is one."""
        for line in self._closing:
            print(printable(line))

    @rank_zero_only
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, (KeyboardInterrupt, SIGTERMException)) and trainer.state.fn == TrainerFn.FITTING:
            checkpoint = last_checkpoint(trainer)
            start = f"its last checkpoint, {relative(checkpoint)}" if checkpoint else "step 0: it has no checkpoint yet"
            print(
                f"stopped at step {trainer.global_step}; the same command with --resume continues from {start}",
                file=sys.stderr,
            )


def relative(path: str | Path) -> str:
    """The path, relative to the working directory if it is below it."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


class ModelSize(Callback):
    """Print the number of the model's parameters when a fit begins. In Lightning's table, the FLOPs would be wrong."""

    @rank_zero_only
    def on_fit_start(self, trainer: Trainer, pl_module: TimmTask) -> None:
        counts = [(parameter.numel(), parameter.requires_grad) for parameter in pl_module.model.parameters()]
        total, trained = sum(count for count, _ in counts), sum(count for count, trains in counts if trains)
        frozen = f", {trained:,} of them trained" if trained < total else ""
        print(f"{type(pl_module.model).__name__}: {total:,} parameters{frozen}")


class EpochLines(Callback):
    """Print a line of metrics per epoch where the output is a file or a pipe, in which there is no progress bar."""

    @rank_zero_only
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if sys.stdout.isatty():
            return
        shown = ("train_loss_epoch", "train_acc1_epoch", "val_loss", "val_acc1", "val_map", "val_map_50", "val_miou")
        shown += ("val_f1", "val_knn_acc1", "val_linear_acc1", "val_rank", "val_rank_slots", "lr", "images_per_s")
        metrics = trainer.callback_metrics
        values = "  ".join(
            f"{name.removesuffix('_epoch')} {float(metrics[name]):.4g}" for name in shown if name in metrics
        )
        print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {values}", flush=True)
