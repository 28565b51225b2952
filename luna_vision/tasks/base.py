"""What all tasks have in common: starting weights, checks before a run, optimizer and schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from timm.layers import to_2tuple
from timm.models import get_arch_name
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from luna_vision.data.sampling import next_batch
from luna_vision.images.find import listed
from luna_vision.models import init_from_vit, load_weights  # with which the luna_vit models are registered, too
from luna_vision.models.factory import training_checkpoint

from .checkpoints import check_deletions
from .optimization import build_optimizer, build_scheduler, check_rates
from .sharding import check_same_weights, shapes, shard

OTHER_CLASSES = " (a new run trains its weights for others: fit --model.checkpoint FILE)"


class SkippedStep(Exception):
    """Raised between the gradients and the optimizer, leaves a step of a `TimmTask` out."""


class TimmTask(LightningModule):
    """A task that trains ``self.model``, which is or contains a timm model.

    Subclasses save hyperparameters of the names that are read here, in a constructor that builds ``self.model``.

    Attributes:
        model: what is trained.
        headline: name of the metric that sums up a test, and what to call it.
        label_names: names of the classes that the weights were trained on, once they are loaded from a file that says
            them.
    """

    headline: ClassVar[tuple[str, str]]
    model: nn.Module
    label_names: list[str] | None = None
    _has_weights = False

    def __init__(self) -> None:
        super().__init__()
        # means over the epoch so far; a checkpoint keeps them, which Lightning's own sums it does not
        self.epoch_means = nn.ModuleDict()
        self.evaluation_means = nn.ModuleDict()

    # ---- start of a run

    def setup(self, stage: str) -> None:
        self.check_data(self.trainer.datamodule, stage)

    def configure_model(self) -> None:
        """Under FSDP2, cut up the weights. Whole files are read before that, as they do not fit into parts."""
        if not self._is_sharded():
            return
        if self.trainer.ckpt_path:
            self._has_weights = True  # Lightning loads them, but only after on_fit_start
        self._load_starting_weights()
        shard(self.model, self.device_mesh["data_parallel"], self.trainer.strategy.root_device)

    def _is_sharded(self) -> bool:
        return self._trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy)

    def check_data(self, data: LightningDataModule | None, stage: str) -> None:
        """Raise ``ValueError`` where the data module's channels or, unless there is nothing to compare them with in
        ``predict``, its classes are not the model's."""
        checks = [("in_chans", "image channels")] + [("num_classes", "classes")] * (stage != "predict")
        for name, what in checks:
            found, expected = getattr(data, name, None), self.hparams[name]
            if found is not None and found != expected:
                raise ValueError(f"the data has {found} {what}, but the model is built for {name}={expected}")
        patch_embed = getattr(self.model, "patch_embed", None)
        if stage == "fit" and getattr(data, "train_sizes", None) and hasattr(patch_embed, "patch_size"):
            sides = to_2tuple(patch_embed.patch_size)
            if sides != to_2tuple(data.patch_size):
                raise ValueError(f"the data counts patches of patch_size={data.patch_size}, the model's are of {sides}")

    def check_classes(
        self, checkpoint: dict[str, Any], data: LightningDataModule | None, name: str, hint: str = OTHER_CLASSES
    ) -> None:
        """Raise ``ValueError`` where a checkpoint notes other names of classes than the data's, or another order.

        Data without names is not compared, nor is that whose names are in a training folder which is not there: images
        can be predicted without one.

        Args:
            checkpoint: what `on_save_checkpoint` has written, or what `training_checkpoint` finds in a file.
            data: the data module.
            name: what to call the checkpoint in the error.
            hint: what else to do than to give it the data that it was trained on.
        """
        known = _label_names(checkpoint)
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
        """Find mistakes in what is only used once the run has begun, and has made its folder.

        Args:
            optimizer: whether there will be one.

        Raises:
            ValueError: an unknown optimizer, a learning rate that is none, or ``init_from_vit`` is neither a file nor a
                timm model.
            FileNotFoundError: there is no such ``checkpoint``.
        """
        hp = self.hparams
        if hp.checkpoint and not Path(hp.checkpoint).is_file():
            raise FileNotFoundError(f"checkpoint {hp.checkpoint!r} does not exist")
        vit = hp.get("init_from_vit")
        if vit and not Path(vit).is_file() and not timm.is_model(get_arch_name(vit)):
            raise ValueError(f"init_from_vit {vit!r} is neither a file nor the name of a timm model")
        if optimizer:
            rates = {name: hp[name] for name in ("lr", "warmup_epochs", "warmup_lr", "min_lr")}
            check_rates(**rates, layer_decay=hp.get("layer_decay") or 0.0)
            self._build_optimizer()

    def load_starting_weights(self, load: Callable[[nn.Module], None]) -> None:
        """Apply ``load``, which puts weights into a timm model, to the part of ``self.model`` that is one."""
        load(self.model)

    def _load_starting_weights(self) -> None:
        """Once, and not if Lightning has loaded a checkpoint, which it does after ``setup`` and before these hooks."""
        if self._has_weights:
            return
        self._has_weights = True
        checkpoint, vit = self.hparams.checkpoint, self.hparams.get("init_from_vit")
        if checkpoint:
            if self._trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:  # which may be of others
                run = training_checkpoint(Path(checkpoint))
                self.check_classes(run, self.trainer.datamodule, checkpoint)
                adopt_values(run, self.trainer.datamodule)
                self.label_names = _label_names(run)
            self.load_starting_weights(lambda model: load_weights(model, checkpoint, say=rank_zero_info))
        elif vit:
            self.load_starting_weights(lambda model: init_from_vit(model, vit))

    on_fit_start = on_validation_start = on_test_start = on_predict_start = _load_starting_weights

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the weights expect of images, which no part of the model says."""
        data = self.trainer.datamodule
        if hasattr(data, "timm_cfg"):
            checkpoint["data"] = {"name": type(data).__name__, "cfg": data.timm_cfg()}
        _, done = next_batch(self.trainer)
        if done:  # else the next epoch begins with none
            checkpoint["epoch_means"] = {name: _sums(metric) for name, metric in self.epoch_means.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say in one line that a checkpoint is another model's, before PyTorch says it in a hundred; and leave its
        schedule, as the rates are those of this run (`on_train_start`)."""
        self._has_weights = True
        self.label_names = _label_names(checkpoint)
        if self._trainer is not None:
            check_deletions(self.trainer, checkpoint)
        if "lr_schedulers" in checkpoint:  # timm's know lengths and rates, which are the configuration's, and no more
            checkpoint["lr_schedulers"] = []
        if self._trainer is not None:
            self.check_classes(checkpoint, self.trainer.datamodule, "the checkpoint")
            adopt_values(checkpoint, self.trainer.datamodule)
        if self._trainer is not None and self.trainer.is_global_zero:  # the sums are those of all ranks
            for name, state in checkpoint.get("epoch_means", {}).items():
                metric = self._mean("epoch_means", name)
                metric.mean_value += state["sum"]
                metric.weight += state["weight"]
        if self._is_sharded():  # its weights have been compared and loaded by now
            return
        check_same_weights(shapes(self.state_dict()), shapes(checkpoint["state_dict"]))
        fits = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if fits and "optimizer_states" not in checkpoint:
            raise ValueError("the checkpoint is of a sharded run: go on with --trainer.strategy=fsdp2")

    # ---- batches

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Look at the values of a batch before it is on the device, for which a step would have to wait."""
        if not self.trainer.predicting:
            self.check_batch(*batch)
        return batch

    def check_batch(self, *batch: Any) -> None:
        """Raise ``ValueError`` where a batch of images and targets is not what the task trains on."""

    # ---- optimisation

    def _build_optimizer(self) -> Optimizer:
        hp = self.hparams
        rates = (hp.lr, hp.weight_decay, hp.get("layer_decay"))
        return build_optimizer(self.trained_module(), hp.optimizer, *rates, hp.optimizer_kwargs or {})

    def trained_module(self) -> nn.Module:
        """What the optimizer is given: `self.model`, or a module with it and what else is trained."""
        return self.model

    def configure_optimizers(self) -> dict[str, Any]:
        hp = self.hparams
        optimizer = self._build_optimizer()
        by_epoch = hp.schedule_by == "epoch"
        schedule = (by_epoch, hp.warmup_epochs, hp.warmup_lr, hp.min_lr, hp.scheduler_kwargs or {})
        scheduler = build_scheduler(optimizer, self.trainer, hp.scheduler, *schedule)
        interval = "epoch" if by_epoch else "step"
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        with suppress(SkippedStep):
            super().optimizer_step(*args, **kwargs)

    def lr_scheduler_step(self, scheduler: Scheduler, metric: Any) -> None:
        # Lightning calls this after the optimizer step that global_step counts, but within the epoch that it ends.
        if self.hparams.schedule_by == "update":
            scheduler.step_update(num_updates=self.global_step)
        else:
            scheduler.step(epoch=self.current_epoch + 1)

    def on_train_start(self) -> None:
        """Go on with the rates of this run's schedule: a checkpoint has those of the one that has written it."""
        scheduler, (epoch, _) = self.lr_schedulers(), next_batch(self.trainer)
        if self.hparams.schedule_by == "update" and self.global_step:
            scheduler.step_update(num_updates=self.global_step)
        elif self.hparams.schedule_by == "epoch" and epoch:
            scheduler.step(epoch=epoch)

    def log_learning_rate(self) -> None:
        """With layer decay the groups differ; the largest rate is that of the head, lr itself."""
        log_number(self, "lr", max(group["lr"] for group in self.optimizers().param_groups))

    def log_epoch_mean(self, name: str, value: Tensor, batch_size: int) -> None:
        """Log the mean of a value over the training images of an epoch, of which some may lie before a resume.

        Batches whose value is not finite are left out.
        """
        self._log_mean("epoch_means", name, value, batch_size)

    def log_evaluation_mean(self, name: str, value: Tensor, batch_size: int) -> None:
        """Log the mean of a value over the images of a validation or a test, however many each process has: Lightning's
        own ``sync_dist`` divides by the mean of the counts rounded to a whole number."""
        self._log_mean("evaluation_means", name, value, batch_size)

    def _log_mean(self, where: str, name: str, value: Tensor, batch_size: int) -> None:
        metric = self._mean(where, name)
        metric.update(value, batch_size)
        attribute = f"{where}.{name}"
        self.log(name, metric, on_step=False, on_epoch=True, batch_size=batch_size, metric_attribute=attribute)

    def _mean(self, where: str, name: str) -> MeanMetric:
        means = getattr(self, where)
        if name not in means:
            mean = _FiniteMean() if where == "epoch_means" else _Mean()
            # with bf16-true and 16-true the default is theirs, in which sums soon stop growing, or overflow
            means[name] = mean.set_dtype(torch.float32).to(self.device)
        return means[name]


def _label_names(checkpoint: dict[str, Any]) -> list[str] | None:
    """The names of the classes that a checkpoint notes."""
    return checkpoint.get("data", {}).get("cfg", {}).get("label_names")


def adopt_values(checkpoint: dict[str, Any], data: LightningDataModule | None) -> None:
    """Have the data take the numbers of files as a checkpoint's data did, unless its options say otherwise."""
    if hasattr(data, "adopt_values"):
        data.adopt_values(checkpoint.get("data", {}).get("cfg", {}))


def log_number(task: LightningModule, name: str, value: float, **options: Any) -> None:
    """Log what this process knows, from within a training step.

    ``log`` would send a number to the device, which waits for all that the device has to do, and so does the way back.
    """
    task.log(name, torch.tensor(float(value)), on_step=True, on_epoch=False, batch_size=1, **options)


def _differences(known: list[str], names: list[str]) -> str:
    """How the names of the data differ from those of a checkpoint, in one line."""
    there, here = set(known), set(names)
    parts = {
        "the data lacks": [name for name in known if name not in here],
        "the data alone has": [name for name in names if name not in there],
    }
    if any(parts.values()):
        return "; ".join(f"{what} {listed(which)}" for what, which in parts.items() if which)
    label, (there, here) = next(x for x in enumerate(zip_longest(known, names)) if x[1][0] != x[1][1])
    return f"they are in another order, class {label} is {there!r} there and {here!r} in the data"


def check_sizes(model: nn.Module, in_chans: int, sizes: Iterable[tuple[int, int]]) -> None:
    """Raise ``ValueError`` unless a model takes images of these (height, width): many of timm's are built for one."""
    modes = [(module, module.training) for module in model.modules()]
    own = next(model.parameters())
    try:
        for height, width in sizes:
            images = torch.zeros(1, in_chans, height, width, dtype=own.dtype, device=own.device)
            with torch.no_grad():
                model.eval().forward(images)  # not what a compiled model would do when it is called
    except (AssertionError, RuntimeError) as error:  # how timm's models say so
        raise ValueError(f"the model does not take images of {height} x {width} pixels: {error}") from error
    finally:
        for module, training in modes:
            module.training = training


class _Mean(MeanMetric):
    """The weighted mean, without waiting for the device to know whether values are finite.

    The base class either waits or, with ``nan_strategy="disable"``, leaves the weights out (torchmetrics 1.9).
    """

    def update(self, value: Tensor, weight: float) -> None:
        self.mean_value += value.to(self.mean_value.dtype) * weight
        self.weight += weight


class _FiniteMean(_Mean):
    """The weighted mean of the values that are finite."""

    def update(self, value: Tensor, weight: float) -> None:
        finite = value.isfinite()
        super().update(value.masked_fill(~finite, 0.0), finite * weight)


def _sums(metric: MeanMetric) -> dict[str, float]:
    """The state of a `MeanMetric`, over all processes."""
    with metric.sync_context():
        return {"sum": float(metric.mean_value), "weight": float(metric.weight)}
