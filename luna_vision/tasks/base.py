"""What all tasks share: starting weights, checks before a run, optimizer and schedule, means over an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from copy import copy
from inspect import signature
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar, Literal

import timm
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from timm.layers import to_2tuple
from timm.models import get_arch_name
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric, Metric

from luna_vision.data.gpu import Keys
from luna_vision.data.sampling import next_batch
from luna_vision.images.find import listed
from luna_vision.images.masks import no_masks
from luna_vision.images.values import MASK
from luna_vision.models import init_from_vit, load_weights  # registers the luna_vit models
from luna_vision.models.factory import training_checkpoint

from .checkpoints import check_deletions
from .optimization import build_optimizer, build_scheduler, check_rates, freeze_layers, frozen_layers
from .outcomes import Outcome
from .prediction_files import CsvPredictions, PredictionFile
from .sharding import check_same_weights, shard

TUNERS = (LearningRateFinder, BatchSizeFinder)


class SkippedStep(Exception):
    """Raised between the gradients and the optimizer of a `TimmTask`, skips the step."""


class TimmTask(LightningModule):
    """The base of all tasks. A subclass builds ``self.model``, which is or contains a timm model.

    Args:
        model_name: name for ``timm.create_model``; the ``luna_vit`` models are registered.
        num_classes: number of classes, without the background; by default that of the data.
        in_chans: number of image channels; by default that of the data.
        model_kwargs: further arguments of the model, such as ``patch_size`` or ``drop_path_rate``.
        checkpoint: file to start from (timm, Lightning or safetensors). Not read when a run is resumed.
        init_from_vit: start from a plain ViT: a timm model name or a file, see ``luna_vision.models.init_from_vit``.
        optimizer: name from ``timm.optim.list_optimizers()``.
        lr: peak learning rate of one optimizer step, whatever the batch size.
        weight_decay: not applied to biases, norms and parameters in the model's ``no_weight_decay()``.
        optimizer_kwargs: further arguments of the optimizer, such as ``betas``, ``eps`` or ``momentum``.
        scheduler: name of a timm schedule.
        schedule_by: move the learning rate after every optimizer step (``update``) or every epoch.
        warmup_epochs: length of the linear warm-up, part of ``max_epochs``.
        warmup_lr: learning rate at which the warm-up begins.
        min_lr: learning rate at the end.
        scheduler_kwargs: further arguments of ``timm.scheduler.create_scheduler_v2``; lengths in epochs.
        freeze: train neither the stem nor the first N blocks, and keep them in eval mode; 0 is the stem alone.

    Attributes:
        model: the module that is trained.
        headline: name of the metric that sums up a test, and its name in a sentence.
        predictions: the form of the files that predictions are written to.
        outcome: what a report of a test counts; None where there is no report.
        data_cfg: the record of the data that the loaded weights were trained on, see `on_save_checkpoint`.
        label_names: its class names, if it has them.
        takes_masks: whether images may lack pixels, see `luna_vision.images.masks`.
        not_sharded: in the plural, what FSDP2 does not do: it gathers weights for the ``forward`` of the model alone.

    Raises:
        ValueError: ``checkpoint`` and ``init_from_vit`` are both given.
    """

    headline: ClassVar[tuple[str, str]]
    predictions: ClassVar[type[PredictionFile]] = CsvPredictions
    outcome: ClassVar[type[Outcome] | None] = None
    model: nn.Module
    data_cfg: dict[str, Any] = {}  # replaced, never changed
    takes_masks = False
    not_sharded = ""
    _has_weights = False

    def __init__(
        self,
        model_name: str = "luna_vit_tiny",
        num_classes: int | None = None,
        in_chans: int | None = None,
        model_kwargs: dict[str, Any] | None = None,
        checkpoint: str | None = None,
        init_from_vit: str | None = None,
        optimizer: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        optimizer_kwargs: dict[str, Any] | None = None,
        scheduler: Literal["cosine", "constant", "step", "multistep", "poly", "tanh", "wsd", "rsqrt"] = "cosine",
        schedule_by: Literal["update", "epoch"] = "update",
        warmup_epochs: float = 0.0,
        warmup_lr: float = 1e-6,
        min_lr: float = 1e-6,
        scheduler_kwargs: dict[str, Any] | None = None,
        freeze: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()  # plain data, so that checkpoints load with weights_only=True
        # the command line hands img_size and background of the data to every task, and Lightning records them also of
        # one that has no such argument: `load_from_checkpoint` would give it to the task
        for name in {"img_size", "background"} - _arguments_of(type(self)):
            self.hparams.pop(name, None)
        if checkpoint and init_from_vit:
            raise ValueError("checkpoint and init_from_vit both name the starting weights: give one of them")
        self.means = nn.ModuleDict()  # Lightning's own sums over an epoch are not in its checkpoints
        self._frozen: list[nn.Module] = []

    # ---- start of a run

    def setup(self, stage: str) -> None:
        self.check_data(self.trainer.datamodule, stage)
        for module in self.modules():
            if isinstance(module, Metric):
                module.reset()  # a validation before leaves tensors of inference mode, to which training cannot add
        if stage == "fit" and self.hparams.freeze is not None:
            self._frozen = freeze_layers(self.timm_model, self.hparams.freeze)
            self.train()

    def configure_model(self) -> None:
        """Under FSDP2, load the starting weights, then shard the model: files hold whole weights."""
        if self._is_sharded():
            if self.not_sharded:
                raise ValueError(f"{self.not_sharded} do not work with fsdp2: use ddp")
            self._load_starting_weights()
            shard(self.model, self.device_mesh["data_parallel"], self.trainer.strategy.root_device)

    def compiles(self) -> bool:
        """Whether a task with the argument ``compile`` is to compile for the trainer's device."""
        if self.hparams.compile == "auto":
            return self.trainer.strategy.root_device.type == "cuda"
        return bool(self.hparams.compile)

    def train(self, mode: bool = True) -> TimmTask:
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def _is_sharded(self) -> bool:
        return self._trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy)

    def check_data(self, data: LightningDataModule | None, stage: str) -> None:
        """Raise ``ValueError`` unless channels, classes (not in ``predict``) and patch size of the data are the
        model's, or where they lack pixels that it cannot leave out."""
        checks = [("in_chans", "image channels")] + [("num_classes", "classes")] * (stage != "predict")
        for name, what in checks:
            found, expected = getattr(data, name, None), self.hparams[name]
            if found is not None and found != expected:
                raise ValueError(f"the data has {found} {what}, but the model is built for {name}={expected}")
        if leaves_missing(data) and not self.takes_masks:
            raise ValueError(f"{type(self).__name__}: {no_masks(self.hparams.model_name)}")
        patch_embed = getattr(self.model, "patch_embed", None)
        if stage == "fit" and getattr(data, "train_sizes", None) and hasattr(patch_embed, "patch_size"):
            sides = to_2tuple(patch_embed.patch_size)
            if sides != to_2tuple(data.patch_size):
                raise ValueError(f"the data counts patches of patch_size={data.patch_size}, the model's are of {sides}")

    def check_classes(
        self,
        checkpoint: dict[str, Any],
        data: LightningDataModule | None,
        name: str,
        hint: str = " (a new run trains its weights for others: fit --model.checkpoint FILE)",
    ) -> None:
        """Raise ``ValueError`` where a checkpoint has other class names than the data, or another order.

        Data without names passes, and so does data whose training folder is missing, as for prediction.

        Args:
            checkpoint: from `on_save_checkpoint` or `training_checkpoint`.
            data: the data module.
            name: of the checkpoint, for the error.
            hint: a way out, for the error.
        """
        known = _data_cfg(checkpoint).get("label_names")
        if known is None or not hasattr(data, "timm_cfg"):
            return
        try:
            names = data.timm_cfg().get("label_names")
        except FileNotFoundError:
            return
        if names is not None and names != known:
            raise ValueError(
                f"the classes of {name} are not those of the data: {_differences(known, names)}; it takes the classes "
                f"that it was trained on, in their order{hint}"
            )

    def check_start(self, optimizer: bool = True) -> None:
        """Find mistakes in the hyperparameters before the run makes its folder.

        Args:
            optimizer: whether the run has one.

        Raises:
            ValueError: an unknown optimizer, a negative rate, or ``init_from_vit`` is neither a file nor a timm model.
            FileNotFoundError: ``checkpoint`` is not a file.
        """
        hp = self.hparams
        if hp.checkpoint and not Path(hp.checkpoint).is_file():
            problem = "is a folder" if Path(hp.checkpoint).is_dir() else "does not exist"
            raise FileNotFoundError(f"checkpoint {hp.checkpoint!r} {problem}")
        vit = hp.init_from_vit
        if vit and not Path(vit).is_file() and not timm.is_model(get_arch_name(vit)):
            raise ValueError(f"init_from_vit {vit!r} is neither a file nor the name of a timm model")
        if optimizer:
            check_rates(hp)
            self._build_optimizer()
            if hp.freeze is not None:
                frozen_layers(self.timm_model, hp.freeze)

    @property
    def label_names(self) -> list[str] | None:
        return self.data_cfg.get("label_names")

    def class_labels(self) -> list[str]:
        """Names of the classes, those of the weights or of the data, else numbers from 0."""
        names = self.label_names or getattr(self.trainer.datamodule, "class_names", None)
        return list(names) if names else list(map(str, range(self.hparams.num_classes)))

    @property
    def timm_model(self) -> nn.Module:
        """The timm model in ``self.model``."""
        return self.model

    @property
    def backbone(self) -> nn.Module:
        """The timm model without its classifier, with the same parameters, for Lightning's BackboneFinetuning."""
        backbone = copy(self.timm_model)
        parts, head = backbone._modules, self.timm_model.get_classifier()
        backbone._modules = {name: module for name, module in parts.items() if module is not head}
        return backbone

    def load_starting_weights(self, load: Callable[[nn.Module], None]) -> None:
        """Apply ``load`` to the timm model, or to a whole one that it is a part of."""
        load(self.model)

    def load_trained_weights(self, checkpoint: str) -> None:
        """Load a file to evaluate it, or to predict with it."""
        self.load_starting_weights(lambda model: load_weights(model, checkpoint, say=rank_zero_info))

    def _load_starting_weights(self) -> None:
        """Load them once, and not if Lightning has loaded a checkpoint, which it does after ``setup``."""
        if self._has_weights:
            return
        self._has_weights = True
        checkpoint, vit = self.hparams.checkpoint, self.hparams.init_from_vit
        if checkpoint:
            if self._trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:  # fit may change the classes
                run = training_checkpoint(Path(checkpoint))
                self.check_classes(run, self.trainer.datamodule, checkpoint)
                adopt_values(run, self.trainer.datamodule)
                self.data_cfg = _data_cfg(run)
                self.load_trained_weights(checkpoint)
            else:
                self.load_starting_weights(lambda model: load_weights(model, checkpoint, say=rank_zero_info))
        elif vit:
            self.load_starting_weights(lambda model: init_from_vit(model, vit))

    on_validation_start = on_test_start = on_predict_start = _load_starting_weights

    @classmethod
    def task_name(cls) -> str:
        """What a checkpoint says of the task: the name of its class, of one outside of this package with its module."""
        return cls.__name__ if cls.__module__.startswith(f"{__package__}.") else f"{cls.__module__}.{cls.__name__}"

    def data_record(self, data: LightningDataModule) -> dict[str, Any]:
        """What a checkpoint says of the data: how images are preprocessed, and the class names."""
        return {"name": type(data).__name__, "cfg": data.timm_cfg()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the task, how images are preprocessed, the class names, and the sums of the epoch so far."""
        checkpoint["task"] = self.task_name()
        data = self.trainer.datamodule
        if hasattr(data, "timm_cfg"):
            checkpoint["data"] = self.data_record(data)
        _, done = next_batch(self.trainer)
        if done:  # else the next epoch begins with none
            training = {name: metric for name, metric in self.means.items() if name.startswith("train_")}
            checkpoint["epoch_means"] = {name: _sums(metric) for name, metric in training.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another model's checkpoint or other classes in one line; take the sums, but not the schedule."""
        self._has_weights = True
        self.data_cfg = _data_cfg(checkpoint)
        if not self._is_sharded():  # FSDP2Strategy has compared and loaded them
            check_same_weights(self.state_dict(), checkpoint["state_dict"])
        if self._trainer is None:
            return
        if self.trainer.state.fn == TrainerFn.FITTING and "optimizer_states" not in checkpoint:
            raise ValueError("the checkpoint has no state of the optimizer: give its weights as --model.checkpoint")
        check_deletions(self.trainer, checkpoint)
        self.check_classes(checkpoint, self.trainer.datamodule, "the checkpoint")
        adopt_values(checkpoint, self.trainer.datamodule)
        checkpoint["lr_schedulers"] = []  # lengths and rates are those of this configuration, see on_train_start
        if self.trainer.is_global_zero:  # the sums are those of all processes
            for name, state in checkpoint.get("epoch_means", {}).items():
                metric = self._mean(name)
                metric.mean_value += state["sum"]
                metric.weight += state["weight"]

    # ---- batches

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Check values on the CPU: on a GPU, a step would have to wait for them."""
        if not self.trainer.predicting and not isinstance(batch, Keys):  # labels of keys were checked when read
            self.check_batch(*batch)
        return batch

    def check_batch(self, *batch: Any) -> None:
        """Raise ``ValueError`` where images or targets do not fit the task."""

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any] | None:
        return self.evaluate("val", *batch)

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Any] | None:
        return self.evaluate("test", *batch)

    def evaluate(self, split: str, *batch: Any) -> dict[str, Any] | None:
        """Count a batch of a validation (``split`` "val") or a test ("test").

        Returns:
            Where the task has an `outcome`, ``found``: for each image what `Outcome.add` takes.
        """
        raise NotImplementedError

    # ---- optimisation

    def _build_optimizer(self) -> Optimizer:
        hp = self.hparams
        rates = (hp.lr, hp.weight_decay, hp.get("layer_decay"))
        return build_optimizer(self.trained_module(), hp.optimizer, *rates, hp.optimizer_kwargs or {})

    def trained_module(self) -> nn.Module:
        """The module whose parameters the optimizer gets: ``self.model``, or one that contains it."""
        return self.model

    def configure_optimizers(self) -> dict[str, Any]:
        self._load_starting_weights()  # on_fit_start would be after that of tuners, which train
        optimizer = self._build_optimizer()
        scheduler = build_scheduler(optimizer, self.trainer, self.hparams)
        interval = "epoch" if self.hparams.schedule_by == "epoch" else "step"
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        with suppress(SkippedStep):
            super().optimizer_step(*args, **kwargs)

    def lr_scheduler_step(self, scheduler: Scheduler | LRScheduler, metric: Any) -> None:
        # Lightning calls this after the optimizer step that global_step counts, but within the epoch that it ends.
        if not isinstance(scheduler, Scheduler):  # a callback has swapped timm's for torch's
            super().lr_scheduler_step(scheduler, metric)
        elif self.hparams.schedule_by == "update":
            scheduler.step_update(num_updates=self.global_step)
        else:
            scheduler.step(epoch=self.current_epoch + 1)

    def on_train_start(self) -> None:
        """Set the learning rate of this run's schedule, where the optimizer has that of a checkpoint or a tuner."""
        for optimizer in self.trainer.optimizers:  # BaseFinetuning freezes its weights again when a run is resumed
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                parameter.requires_grad_(True)
        config = next(iter(self.trainer.lr_scheduler_configs), None)
        if config is None or not isinstance(config.scheduler, Scheduler):
            return
        if any(isinstance(callback, TUNERS) for callback in self.trainer.callbacks):
            optimizer = config.scheduler.optimizer
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] = self.hparams.lr
            self.reschedule()
        else:
            self._set_rate(config.scheduler, next_batch(self.trainer)[0])

    def reschedule(self) -> None:
        """Build the schedule again, when the length of the run has changed, and set the rate of the next step."""
        config = next(iter(self.trainer.lr_scheduler_configs))
        config.scheduler = build_scheduler(config.scheduler.optimizer, self.trainer, self.hparams)
        self._set_rate(config.scheduler, next_batch(self.trainer)[0])

    def _set_rate(self, scheduler: Scheduler, epoch: int) -> None:
        if self.hparams.schedule_by == "update" and self.global_step:
            scheduler.step_update(num_updates=self.global_step)
        elif self.hparams.schedule_by == "epoch" and epoch:
            scheduler.step(epoch=epoch)

    # ---- logging

    def log_training(self, loss: Tensor, batch_size: int, parts: Mapping[str, Tensor] | None = None) -> None:
        """Log ``train_loss`` of a batch and its mean over the epoch, ``train_`` with the names of other values, and the
        learning rate. They are not in the progress bar, which would wait for the device in every step."""
        values = {"loss": loss, **(parts or {})}
        self.log_dict({f"train_{name}": value.detach() for name, value in values.items()}, batch_size=batch_size)
        self.log_epoch_mean("train_loss_epoch", loss.detach(), batch_size)
        self.log_learning_rate()

    def log_learning_rate(self) -> None:
        """Log the largest rate: with layer decay the groups differ, and the head has ``lr`` itself."""
        log_number(self, "lr", max(group["lr"] for group in self.optimizers().param_groups))

    def log_epoch_mean(self, name: str, value: Tensor, batch_size: int) -> None:
        """Log ``train_...``, the mean of a value over the training images of an epoch, also those before a resume.

        Batches whose value is not finite are left out.
        """
        finite = value.isfinite()
        self._log_mean(name, value.masked_fill(~finite, 0.0), finite * batch_size, batch_size)

    def log_evaluation_mean(self, name: str, value: Tensor, batch_size: int) -> None:
        """Log the mean of a value over the images of a validation or a test.

        Lightning's own ``sync_dist`` is not exact where processes have different numbers of images.
        """
        self._log_mean(name, value, batch_size, batch_size)

    def _log_mean(self, name: str, value: Tensor, weight: Tensor | int, batch_size: int) -> None:
        metric, options = self._mean(name), {"on_step": False, "on_epoch": True, "batch_size": batch_size}
        metric.update(value, weight)
        self.log(name, metric, metric_attribute=f"means.{name}", **options)

    def _mean(self, name: str) -> MeanMetric:
        if name not in self.means:
            # float32 also with bf16-true and 16-true, in which sums stop growing or overflow
            self.means[name] = _Mean().set_dtype(torch.float32).to(self.device)
        return self.means[name]


class _Mean(MeanMetric):
    """The weighted mean, without the base class's check for NaN, for which the device would have to be waited for."""

    def update(self, value: Tensor, weight: Tensor | int) -> None:
        self.mean_value += value.to(self.mean_value.dtype) * weight
        self.weight += weight


def _arguments_of(task: type) -> set[str]:
    """Names of all arguments of a class, also those that it hands on to its bases."""
    return {name for cls in task.__mro__ if "__init__" in vars(cls) for name in signature(cls.__init__).parameters}


def _sums(metric: MeanMetric) -> dict[str, float]:
    """The state of a `MeanMetric`, over all processes."""
    with metric.sync_context():
        return {"sum": float(metric.mean_value), "weight": float(metric.weight)}


def adopt_values(checkpoint: dict[str, Any], data: LightningDataModule | None) -> None:
    """Have the data take the numbers of files as a checkpoint's data did, unless its options say otherwise."""
    if hasattr(data, "adopt_values"):
        data.adopt_values(_data_cfg(checkpoint))


def leaves_missing(data: LightningDataModule | None) -> bool:
    """Whether images of the data may lack pixels, which are NaN."""
    return getattr(getattr(data, "values", None), "fill", None) == MASK


def log_number(task: LightningModule, name: str, value: float, **options: Any) -> None:
    """Log a Python number in a training step. ``task.log`` would send it to the device and back, and wait for it."""
    task.log(name, torch.tensor(float(value)), on_step=True, on_epoch=False, batch_size=1, **options)


def _data_cfg(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The record of the data in a checkpoint; empty if it has none."""
    return checkpoint.get("data", {}).get("cfg", {})


def _differences(known: list[str], names: list[str]) -> str:
    """How the class names of the data differ from those of a checkpoint, in one line."""
    lacking = [name for name in known if name not in set(names)]
    more = [name for name in names if name not in set(known)]
    parts = [f"the data lacks {listed(lacking)}"] * bool(lacking) + [f"the data alone has {listed(more)}"] * bool(more)
    if parts:
        return "; ".join(parts)
    label, (there, here) = next(x for x in enumerate(zip_longest(known, names)) if x[1][0] != x[1][1])
    return f"they are in another order, class {label} is {there!r} there and {here!r} in the data"


def check_sizes(model: nn.Module, in_chans: int, sizes: Iterable[tuple[int, int]], name: str = "the model") -> None:
    """Raise ``ValueError`` unless a model takes images of these (height, width): many of timm's are built for one."""
    modes = [(module, module.training) for module in model.modules()]
    own = next(model.parameters())
    try:
        for height, width in sizes:
            images = torch.zeros(1, in_chans, height, width, dtype=own.dtype, device=own.device)
            with torch.no_grad():
                model.eval().forward(images)  # __call__ would compile a model that is to be compiled
    except (AssertionError, RuntimeError) as error:  # timm's models raise these
        raise ValueError(f"{name} does not take images of {height} x {width} pixels: {error}") from error
    finally:
        for module, training in modes:
            module.training = training
