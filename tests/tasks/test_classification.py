import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from timm.data.mixup import mixup_target
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

from luna_vision.tasks import ClassificationTask

from .conftest import SyntheticData, tiny_task, tiny_trainer
from .test_resume import EveryMoment


class RecordRates(Callback):
    """The learning rate of each group that every optimizer step used."""

    def __init__(self):
        self.rates = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def timm_rates(task: ClassificationTask, epochs: int, updates_per_epoch: int, **schedule) -> list[list[float]]:
    """What timm's own training loop would use."""
    hp = task.hparams
    optimizer = create_optimizer_v2(
        task.model, opt=hp.optimizer, lr=hp.lr, weight_decay=hp.weight_decay, layer_decay=hp.layer_decay
    )
    by_epoch = hp.schedule_by == "epoch"
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=hp.scheduler,
        num_epochs=epochs,
        warmup_epochs=hp.warmup_epochs,
        warmup_lr=hp.warmup_lr,
        min_lr=hp.min_lr,
        step_on_epochs=by_epoch,
        updates_per_epoch=updates_per_epoch,
        **schedule,
    )
    rates, updates = [], 0
    for epoch in range(epochs):
        for _ in range(updates_per_epoch):
            rates.append([group["lr"] for group in optimizer.param_groups])
            updates += 1
            scheduler.step_update(num_updates=updates)
        scheduler.step(epoch + 1)
    return rates


@pytest.mark.parametrize(
    ("options", "accumulate"),
    [
        ({"warmup_epochs": 1.0}, 1),
        ({"warmup_epochs": 0.5, "layer_decay": 0.5}, 1),
        ({"warmup_epochs": 1.0}, 3),  # 4 batches: updates after 3 and, at the end of the epoch, after 1
        ({"warmup_epochs": 1.0, "schedule_by": "epoch"}, 1),
        ({"scheduler": "step", "scheduler_kwargs": {"decay_epochs": 1, "decay_rate": 0.1}}, 2),
        ({"scheduler": "constant", "layer_decay": 0.5}, 1),
    ],
)
def test_learning_rates_are_those_of_timm(tmp_path, data, options, accumulate):
    task = tiny_task(**options)
    record = RecordRates()
    tiny_trainer(tmp_path, max_epochs=3, callbacks=[record], accumulate_grad_batches=accumulate).fit(task, data)
    updates_per_epoch = math.ceil(4 / accumulate)
    expected = timm_rates(task, 3, updates_per_epoch, **(options.get("scheduler_kwargs") or {}))
    assert len(record.rates) == len(expected) == 3 * updates_per_epoch
    torch.testing.assert_close(torch.tensor(record.rates), torch.tensor(expected))


@pytest.mark.parametrize("max_epochs", [100, None, -1])
def test_schedule_ends_with_max_steps(tmp_path, data, max_epochs):
    task = tiny_task(min_lr=1e-5)
    trainer = tiny_trainer(tmp_path, max_epochs=max_epochs, max_steps=6)
    trainer.fit(task, data)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-5)


def test_layer_decay_and_weight_decay_groups(tmp_path, data):
    task = tiny_task(layer_decay=0.5, weight_decay=0.1)
    trainer = tiny_trainer(tmp_path, max_epochs=1)
    trainer.fit(task, data)
    names = {id(parameter): name for name, parameter in task.model.named_parameters()}
    groups = {names[id(p)]: group for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert set(groups) == set(names.values())
    assert groups["head.weight"]["lr_scale"] == 1
    first, last = (next(n for n in names.values() if n.startswith(f"blocks.{i}.")) for i in (0, 1))
    assert groups[first]["lr_scale"] < groups[last]["lr_scale"] < 1
    assert groups["patch_embed.proj.weight"]["lr_scale"] < groups[first]["lr_scale"]
    assert groups["head.bias"]["weight_decay"] == 0
    assert groups["head.weight"]["weight_decay"] == 0.1
    for name in task.model.no_weight_decay() & set(groups):
        assert groups[name]["weight_decay"] == 0


def test_losses():
    logits = torch.randn(4, 6)
    targets = torch.tensor([0, 5, 2, 2])
    soft = mixup_target(targets, 6, 1.0, 0.1)
    ce = tiny_task(label_smoothing=0.1)
    torch.testing.assert_close(ce.compute_loss(logits, targets), F.cross_entropy(logits, targets, label_smoothing=0.1))
    torch.testing.assert_close(ce.compute_loss(logits, soft), F.cross_entropy(logits, soft))
    bce = tiny_task(loss="bce", label_smoothing=0.0)
    one_hot = F.one_hot(targets, 6).float()
    expected = F.binary_cross_entropy_with_logits(logits, one_hot)
    torch.testing.assert_close(bce.compute_loss(logits, targets), expected)
    torch.testing.assert_close(bce.compute_loss(logits, one_hot), expected)


@pytest.mark.parametrize("mix", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0, "mix_mode": "elem"}])
@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_fit_with_mixing(tmp_path, data, mix, loss):
    trainer = tiny_trainer(tmp_path, max_epochs=1)
    trainer.fit(tiny_task(**mix, loss=loss, bce_threshold=0.2 if loss == "bce" else None), data)
    assert torch.isfinite(trainer.callback_metrics["train_loss"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{"warmup_epochs": 1.5}, {"schedule_by": "epoch"}], ids=str)
def test_a_longer_run_goes_on_with_its_own_schedule(tmp_path, data, options):
    """Whether the checkpoint is of a batch, a validation or the end of an epoch."""
    record = RecordRates()
    tiny_trainer(tmp_path, max_epochs=3, callbacks=[record]).fit(tiny_task(**options), data)
    keep = [EveryMoment(tmp_path / "kept")]
    tiny_trainer(tmp_path, callbacks=keep, enable_checkpointing=True).fit(tiny_task(lr=1.0, **options), data)
    kept = sorted((tmp_path / "kept").glob("*.ckpt"))
    assert len(kept) == 2 * (4 + 2)
    for path in kept[3:6]:  # the last batch of the first epoch, its validation, and its end
        rest = RecordRates()
        trainer = tiny_trainer(tmp_path, max_epochs=3, callbacks=[rest])
        trainer.fit(tiny_task(**options), data, ckpt_path=path, weights_only=True)
        step = int(re.search(r"step(\d+)", path.name)[1])
        assert len(rest.rates) == 3 * 4 - step
        assert rest.rates == record.rates[step:], path.name


def test_fit_learns_and_logs(tmp_path, data):
    trainer = tiny_trainer(tmp_path, max_epochs=12, gradient_clip_val=1.0)
    trainer.fit(tiny_task(lr=1e-2, grad_checkpointing=True, channels_last=True), data)
    metrics = trainer.callback_metrics
    assert metrics["train_acc1_epoch"] > 0.5
    assert {"train_loss", "train_loss_epoch", "train_acc1", "lr", "val_loss", "val_acc1", "val_acc5"} <= set(metrics)
    assert metrics["val_acc5"] >= metrics["val_acc1"]


def test_bands_train_as_whole_images(tmp_path, data):
    found = []
    for rows in (0, 3):
        torch.manual_seed(0)
        task = tiny_task(optimizer="sgd", lr=0.1, band_rows=rows)
        tiny_trainer(tmp_path, max_epochs=1).fit(task, data)
        found.append(task.state_dict())
        assert (task.model.block_runner is not None) == (rows > 0)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)


def test_top5_needs_more_than_five_classes(tmp_path):
    trainer = tiny_trainer(tmp_path, max_epochs=1)
    trainer.fit(tiny_task(num_classes=4), SyntheticData(num_classes=4))
    assert "val_acc5" not in trainer.callback_metrics


def test_validation_metrics_over_batches_of_unequal_size(tmp_path, data):
    task = tiny_task()
    result = tiny_trainer(tmp_path).validate(task, data, verbose=False)[0]
    samples = data.val_dataloader().dataset
    with torch.no_grad():
        logits = task.eval()(samples.images)
    assert result["val_acc1"] == pytest.approx((logits.argmax(1) == samples.targets).float().mean().item())
    assert result["val_loss"] == pytest.approx(F.cross_entropy(logits, samples.targets).item(), rel=1e-5)


def test_predict_step_ranks_classes():
    task = tiny_task().eval()
    images = torch.randn(3, 1, 16, 16)
    with torch.no_grad():
        out = task.predict_step((images, ["a", "b", "c"]), 0)
        probabilities = task(images).softmax(1)
    assert out["ids"] == ["a", "b", "c"] and out["labels"].shape == (3, 5)
    torch.testing.assert_close(out["probabilities"][:, 0], probabilities.amax(1))
    torch.testing.assert_close(probabilities.gather(1, out["labels"]), out["probabilities"])
    assert (out["probabilities"].diff(dim=1) <= 0).all()


@pytest.mark.parametrize("value", [True, "blocks"])
def test_compile_is_in_place_and_of_each_size_by_itself(tmp_path, data, monkeypatch, value):
    """Inductor fails on the backward pass of a grid of any size."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compiled.append((module, options)))
    task = tiny_task(compile=value)
    tiny_trainer(tmp_path, max_epochs=1).fit(task, data)
    assert [module for module, _ in compiled] == ([task.model] if value is True else list(task.model.blocks))
    assert all(options == {"dynamic": False} for _, options in compiled)
    assert all(name.startswith("model.") and "_orig_mod" not in name for name in task.state_dict())


@pytest.mark.parametrize("device, expected", [("cpu", False), ("cuda", True), ("mps", False)])
def test_compile_by_device(device, expected):
    """A CPU takes minutes to compile what a GPU has in seconds; whoever asks for it gets it all the same."""
    for value, result in (("auto", expected), (True, True), (False, False)):
        task = tiny_task(compile=value)
        task.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))
        assert task.compiles() is result


def test_automatic_compilation_leaves_a_run_on_a_cpu_alone(tmp_path, data, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, *args, **kwargs: compiled.append(module))
    tiny_trainer(tmp_path, fast_dev_run=1).fit(tiny_task(compile="auto"), data)
    assert compiled == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_name": "luna_vit_smal"}, "unknown model name 'luna_vit_smal'; did you mean"),
        ({"model_kwargs": {"widht": 3}}, "widht"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"num_classes": 1}, "num_classes"),
        ({"checkpoint": "a", "init_from_vit": "b"}, "give one"),
        ({"band_rows": 2, "grad_checkpointing": True}, "band_rows=2 and grad_checkpointing do not go together"),
        ({"band_rows": 2, "compile": True}, "band_rows=2 and compile do not go together"),
        ({"band_rows": 2, "model_name": "test_vit", "model_kwargs": {}}, "is for Luna ViTs, and test_vit is none"),
        ({"band_rows": -1}, "rows must be at least 0, got -1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_task(**arguments)


@pytest.mark.parametrize(
    ("task", "data", "message"),
    [
        ({}, {"num_classes": 4}, "the data has 4 classes, but the model is built for num_classes=6"),
        ({}, {"in_chans": 3}, "the data has 3 image channels"),
        ({"optimizer_kwargs": {"betta": 1}}, {}, "betta"),
        ({"scheduler": "none"}, {}, "constant"),
        ({"scheduler": "cosine", "scheduler_kwargs": {"k_dekay": 1}}, {}, "k_dekay"),
        ({"optimizer": "adamww"}, {}, "adamww"),
    ],
)
def test_bad_runs(tmp_path, task, data, message):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path).fit(tiny_task(**task), SyntheticData(**data))


def test_target_out_of_range(tmp_path):
    data = SyntheticData(num_classes=8)
    data.num_classes, real = 6, data.train_dataloader()
    with pytest.raises(ValueError, match=r"targets must be in \[0, 6\), got 0 to 7"):
        tiny_trainer(tmp_path).fit(tiny_task(), train_dataloaders=real)


def test_wrong_channels():
    with pytest.raises(ValueError, match=r"images must be \(B, 1, H, W\)"):
        tiny_task().check_batch(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.long))


class Counted(Callback):
    """The number of images in the mean of the loss, at the end."""

    def on_train_batch_end(self, trainer, task, *args):
        self.count = float(task.means["train_loss_epoch"].weight)


@pytest.mark.filterwarnings("ignore")
def test_means_are_summed_in_float32(tmp_path):
    """In bfloat16, 256 and 1 are 256."""
    counted = Counted()
    trainer = tiny_trainer(tmp_path, precision="bf16-true", callbacks=[counted], max_epochs=1, limit_val_batches=2)
    task = tiny_task()
    trainer.fit(task, SyntheticData(count=300, batch_size=1))
    assert counted.count == 300
    assert {mean.mean_value.dtype for mean in task.means.values()} == {torch.float32}
