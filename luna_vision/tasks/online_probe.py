"""Probes of frozen features while a model trains."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from luna_vision.downstream.probe import K, ProbeData, extract_features, knn_accuracy, linear_probe_accuracy, open_data
from luna_vision.utils.checks import check_at_least


class OnlineProbe(Callback):
    """Measure the embeddings on labelled images after validations: by nearest neighbours and a linear classifier.

    As ``luna-vision probe`` does, with the size and the normalisation of the training images. Logged: ``val_knn_acc1``,
    ``val_linear_acc1``, in [0, 1]. Nothing is learned from the labels.

    Args:
        root: folder with ``train/<class>/<images>``, and ``val`` or ``test`` likewise, or of other ``data``.
        data: a key of ``luna_vision.downstream.probe.DATA``.
        every_n_epochs: epochs between two probes; the last epoch always has one.
        num_train, num_test: images at most, with the share of each class kept.

    Raises:
        ValueError: a number below 1, or (when training starts) data that cannot be probed.
    """

    def __init__(
        self,
        root: str | None = None,
        data: str = "imagefolder",
        every_n_epochs: int = 1,
        num_train: int = 5000,
        num_test: int = 2000,
    ) -> None:
        check_at_least(1, every_n_epochs=every_n_epochs, num_train=num_train, num_test=num_test)
        self.root, self.name, self.every_n_epochs = root, data, every_n_epochs
        self.limits = num_train, num_test
        self.data: ProbeData | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or not trainer.is_global_zero:
            return
        cfg = trainer.datamodule.timm_cfg()
        arguments: dict[str, Any] = {"num_workers": 0, "in_chans": pl_module.hparams.in_chans}
        arguments |= {"img_size": list(cfg["input_size"][1:]), "mean": list(cfg["mean"]), "std": list(cfg["std"])}
        arguments |= {name: cfg[name] for name in ("value_range", "nodata", "fill") if name in cfg}
        arguments |= {} if self.root is None else {"root": self.root}
        self.data = open_data(self.name, arguments, *self.limits)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        due = epoch % self.every_n_epochs == 0 or epoch == trainer.max_epochs
        if self.data is None or trainer.sanity_checking or not due:
            return
        found = [extract_features(pl_module.model, part, progress=False) for part in (self.data.train, self.data.test)]
        features = [*found[0], *found[1]]
        scores = {
            "val_knn_acc1": knn_accuracy(*features, k=min(K, len(found[0][0]))),
            "val_linear_acc1": linear_probe_accuracy(*features, progress=False).accuracy,
        }
        pl_module.log_dict(scores, rank_zero_only=True)
