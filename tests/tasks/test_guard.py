"""Steps with a loss or a gradient that is not finite are as if they had never been, and are named."""

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from PIL import Image

from luna_vision.data import ImageFolderDataModule
from luna_vision.tasks import EMA, ClassificationTask, NonFiniteGuard, NonFiniteLossError

from .conftest import SyntheticData, tiny_task, tiny_trainer
from .ranks import run, said

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2}


class Faulty(ClassificationTask):
    """Its loss, or its gradient only, is not finite at given batches; or their steps are never done.

    Args:
        batches: (step, number of the batch in the epoch).
        how: "nan" and "inf" spoil loss and gradient, "loss" and "gradient" only one, "one of two" the loss of the
            second process; "never" leaves the optimizer out.
    """

    def __init__(self, batches=(), how="nan", **arguments):
        defaults = {"model_name": "test_luna_vit", "num_classes": 6, "in_chans": 1, "model_kwargs": TINY}
        super().__init__(**defaults | arguments)
        self.batches, self.how = set(batches), how

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if (self.global_step, batch_idx) not in self.batches or self.how == "never":
            return loss
        if self.how == "gradient":
            loss.register_hook(lambda gradient: gradient * math.nan)
            return loss
        if self.how == "one of two":
            return loss + (math.nan if self.global_rank == 1 else 0.0)
        return loss + math.nan if self.how == "loss" else loss * float(self.how)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        if self.how == "never" and self.global_step in {step for step, _ in self.batches}:
            optimizer_closure()
        else:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


def fit(path, task, callbacks=(), data=None, **arguments):
    torch.manual_seed(0)
    trainer = tiny_trainer(path, callbacks=[NonFiniteGuard(), *callbacks], **arguments)
    trainer.fit(task, data or SyntheticData())
    return trainer


class Spoil(Callback):
    """Make the model return NaN from optimizer step ``step`` on, in training or from validation on."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, *args):
        if trainer.global_step >= self.step:
            pl_module.model.head.weight.data.fill_(math.nan)


def test_guard_stops_at_the_step_and_keeps_the_last_checkpoint(tmp_path, data):
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    callbacks = [Spoil(6), NonFiniteGuard(max_skipped=0), checkpoint]
    trainer = tiny_trainer(tmp_path, max_epochs=4, callbacks=callbacks, enable_checkpointing=True)
    with pytest.raises(NonFiniteLossError, match=r"training loss is nan at step 6 \(epoch 1\).*last\.ckpt"):
        trainer.fit(tiny_task(), data)
    saved = torch.load(checkpoint.last_model_path, weights_only=True)
    assert saved["global_step"] == 4
    assert all(torch.isfinite(value).all() for value in saved["state_dict"].values())


class SpoilAtEpochEnd(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.is_last_batch and trainer.current_epoch == 1:
            pl_module.model.head.weight.data.fill_(math.nan)


def test_guard_looks_before_a_checkpoint_is_written(tmp_path, data):
    """Weights that break in the epoch's last step meet no further training loss before the checkpoint."""
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    callbacks = [checkpoint, SpoilAtEpochEnd(), NonFiniteGuard()]
    trainer = tiny_trainer(tmp_path, max_epochs=4, callbacks=callbacks, enable_checkpointing=True)
    with pytest.raises(NonFiniteLossError, match="validation loss is nan at step 8"):
        trainer.fit(tiny_task(), data)
    assert torch.load(checkpoint.last_model_path, weights_only=True)["global_step"] == 4


def test_guard_before_the_first_checkpoint(tmp_path, data):
    with pytest.raises(NonFiniteLossError, match="at step 0 .*no checkpoint had been written yet"):
        tiny_trainer(tmp_path, callbacks=[Spoil(0), NonFiniteGuard(max_skipped=0)]).fit(tiny_task(), data)


STEPS = {  # accumulation: (step, batch) of the batch that is spoiled
    1: [(0, 0), (5, 1)],
    2: [(1, 2), (3, 3)],  # in the first batch of a step, and in the last
}


@pytest.mark.parametrize("accumulate", STEPS)
@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "lookahead_adamw"])
def test_a_skipped_step_is_as_if_it_had_never_been_done(tmp_path, optimizer, accumulate):
    """Weights, moments and the counters of the optimizer, to the last bit; the schedule goes on."""
    arguments = {"optimizer": optimizer, "lr": 1e-2, "weight_decay": 0.1, "warmup_epochs": 0.5}
    settings = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5}
    ends = []
    for how in ("nan", "never"):
        torch.manual_seed(0)
        task = Faulty(STEPS[accumulate], how, **arguments)
        trainer = fit(tmp_path, task, **settings)
        ends.append((task.state_dict(), trainer.optimizers[0].state_dict(), trainer.global_step))
        if how == "nan":
            assert trainer.callback_metrics["skipped_steps"] == 2
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


@pytest.mark.parametrize("how", ["inf", "loss", "gradient"])
def test_whatever_is_not_finite_is_skipped(tmp_path, how, caplog):
    ends = []
    for kind in (how, "never"):
        torch.manual_seed(0)
        task = Faulty([(2, 2)], kind, lr=1e-2)
        fit(tmp_path, task)
        ends.append(task.state_dict())
    torch.testing.assert_close(*ends, rtol=0, atol=0)
    wrong = {"inf": "training loss is inf", "loss": "training loss is nan"}
    assert wrong.get(how, r"gradient is not finite, training loss is 1.") in caplog.text


def test_the_average_and_batch_norms_do_not_notice(tmp_path):
    class Watch(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, pl_module, *args):
            ema = next(c for c in trainer.callbacks if isinstance(c, EMA))
            self.seen.append([value.clone() for value in ema._average_model.state_dict().values()])
            self.seen[-1] += [pl_module.model[0].running_mean.clone(), pl_module.model[0].num_batches_tracked.clone()]

    watch, task = Watch(), Faulty([(2, 2)])
    task.model = torch.nn.Sequential(torch.nn.BatchNorm2d(1), task.model)
    task.model[0].register_forward_pre_hook(
        lambda module, args: (args[0] * math.nan,) if task.training and task.global_step == 2 else None
    )
    fit(tmp_path, task, [EMA(decay=0.5), watch])
    torch.testing.assert_close(watch.seen[2], watch.seen[1], rtol=0, atol=0)
    assert not torch.equal(watch.seen[3][0], watch.seen[2][0]) and task.model[0].running_mean.isfinite().all()


def test_means_of_the_epoch_leave_out_the_batch(tmp_path):
    class Losses(Callback):
        def __init__(self):
            self.values = []

        def on_train_batch_end(self, trainer, pl_module, outputs, *args):
            self.values.append((float(outputs["loss"]), float(trainer.callback_metrics["train_acc1"])))

    losses, task = Losses(), Faulty()
    # in the logits, so that what is logged is spoiled as well
    task.model.register_forward_hook(lambda module, args, out: out * math.nan if task.global_step == 1 else None)
    trainer = fit(tmp_path, task, [losses], max_epochs=1, limit_val_batches=0)
    assert math.isnan(losses.values.pop(1)[0])
    loss, accuracy = (sum(values) / 3 for values in zip(*losses.values, strict=True))
    assert float(trainer.callback_metrics["train_loss_epoch"]) == pytest.approx(loss)
    assert float(trainer.callback_metrics["train_acc1_epoch"]) == pytest.approx(accuracy)


@pytest.mark.parametrize("fused", [False, True])
def test_overflowing_gradients_are_the_scalers_business(tmp_path, fused):
    arguments = {"optimizer": "adamw", "optimizer_kwargs": {"fused": fused}, "lr": 1e-2}
    for how, skipped in (("gradient", 0), ("loss", 1), ("nan", 1)):
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))
        guard, weights = NonFiniteGuard(), []

        class Watch(Callback):
            def on_train_batch_end(self, trainer, pl_module, *args, weights=weights):
                weights.append(pl_module.model.head.weight.detach().clone())

        trainer = tiny_trainer(tmp_path, callbacks=[guard, Watch()], plugins=[plugin], max_epochs=1)
        trainer.fit(Faulty([(2, 2)], how, **arguments), SyntheticData())
        assert guard.skipped == skipped
        assert torch.equal(weights[2], weights[1]) and not torch.equal(weights[3], weights[2])


# ---- what it says


@pytest.fixture
def photos(tmp_path) -> Path:
    """Two classes of nine grey images each."""
    for i in range(18):
        path = tmp_path / "photos" / "train" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16), i * 10).save(path)
    return tmp_path / "photos"


def photo_data(root: Path, **arguments) -> ImageFolderDataModule:
    settings = {"img_size": 16, "in_chans": 1, "batch_size": 3, "num_workers": 0, "mean": [0.0], "std": [1.0]}
    settings |= {"augmentation": "none", "crop": "none", "hflip": 0.0, "color_jitter": 0.0, "val_fraction": 0}
    return ImageFolderDataModule(root=str(root), **settings | arguments)


class SeePhotos(Faulty):
    """Notes which photos each batch has had, by their grey."""

    def __init__(self, *args, **arguments):
        super().__init__(*args, num_classes=2, **arguments)
        self.seen = {}

    def training_step(self, batch, batch_idx):
        greys = (batch[0].mean((1, 2, 3)) * 25.5).round().int().tolist()
        self.seen[self.global_step, batch_idx] = [f"{'ab'[i % 2]}/{i}.png" for i in greys]
        return super().training_step(batch, batch_idx)


def skips(caplog) -> list[str]:
    """What the guard has logged."""
    return [record.getMessage() for record in caplog.records if record.name == "luna_vision.tasks.guard"]


def named(message: str) -> list[str]:
    """The last two parts of the paths that a message names."""
    listed = message.split("its samples: ")[1].split(";")[0]
    return ["/".join(Path(name).parts[-2:]) for name in listed.split(", ")]


@pytest.mark.parametrize("how, workers", [("nan", 1), ("gradient", 0)])
def test_the_samples_are_those_of_the_batch(tmp_path, photos, caplog, how, workers):
    """In a shuffled epoch that is not the first; of the one batch whose loss it is, or of all that went into a step."""
    task = SeePhotos([(4, 3)], how)
    settings = {"accumulate_grad_batches": 2, "limit_train_batches": 5, "limit_val_batches": 0}
    fit(tmp_path, task, data=photo_data(photos, num_workers=workers), **settings)
    (message,) = skips(caplog)
    assert " at step 4 (epoch 1): the step is skipped (1 of at most 10); its samples: " in message
    both = task.seen[4, 2] + task.seen[4, 3]
    assert named(message) == (both if how == "gradient" else task.seen[4, 3])
    assert "\n" not in message and str(photos) in message


def test_the_samples_of_a_batch_of_one_of_several_sizes(tmp_path, photos, caplog):
    task = SeePhotos([(3, 0), (5, 2)])
    data = photo_data(photos, train_sizes=[8, 16], patch_size=4, drop_last=False)
    fit(tmp_path, task, data=data, limit_val_batches=0)
    assert sorted(len(task.seen[step, step % 3]) for step in (3, 4, 5)) == [3, 3, 12]
    assert [named(message) for message in skips(caplog)] == [task.seen[3, 0], task.seen[5, 2]]


def test_a_broken_file_goes_by_the_name_of_what_takes_its_place(tmp_path, photos, caplog):
    (photos / "train" / "a" / "0.png").write_bytes(b"")
    data = photo_data(photos, on_error="skip", max_error_share=0.5, batch_size=18)
    fit(tmp_path, SeePhotos([(0, 0)]), data=data, max_epochs=1, limit_val_batches=0)
    names = named(skips(caplog)[0])
    assert "a/0.png" not in names and names.count("a/10.png") == 2


def test_at_the_limit_training_stops_and_says_all_there_is_to_say(tmp_path, photos, caplog):
    task = SeePhotos([(step, step % 6) for step in (7, 8, 10)])
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=2)
    trainer = tiny_trainer(
        tmp_path, max_epochs=9, callbacks=[NonFiniteGuard(max_skipped=2), checkpoint], enable_checkpointing=True
    )
    with pytest.raises(NonFiniteLossError) as error:
        trainer.fit(task, photo_data(photos))
    message = str(error.value)
    assert message.startswith(
        "training loss is nan at step 10 (epoch 1): training stopped after 2 skipped steps, the last good "
    )
    assert named(message) == task.seen[10, 4]
    assert f"the last good checkpoint is {tmp_path}/step=10.ckpt; its samples: " in message
    assert len(skips(caplog)) == 3
    assert all(value.isfinite().all() for value in task.state_dict().values())


def test_many_samples_are_all_logged_but_not_all_in_the_error(tmp_path, photos, caplog):
    with pytest.raises(NonFiniteLossError, match="no checkpoint had been written yet; its samples: .*png and 2 more$"):
        trainer = tiny_trainer(tmp_path, callbacks=[NonFiniteGuard(max_skipped=0)])
        trainer.fit(SeePhotos([(0, 0)]), photo_data(photos, batch_size=18))
    assert len(named(skips(caplog)[0])) == 18


def test_where_nothing_is_known_about_samples_the_batch_is_named(tmp_path, caplog):
    fit(tmp_path, Faulty([(5, 1)]))
    assert "its samples: batch 1 of epoch 1" in caplog.text


def test_the_count_is_resumed(tmp_path):
    def train(epochs, faults, resume=None):
        guard = NonFiniteGuard(max_skipped=2)
        callbacks = [guard, EMA(decay=0.5), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)]
        trainer = tiny_trainer(tmp_path, max_epochs=epochs, callbacks=callbacks, enable_checkpointing=True)
        trainer.fit(Faulty(faults), SyntheticData(), ckpt_path=resume, weights_only=True)
        return guard

    assert train(1, [(1, 1), (3, 3)]).skipped == 2
    again = train(2, [], tmp_path / "epoch=0.ckpt")
    assert (again.skipped, again.last_skipped) == (2, 3)
    with pytest.raises(NonFiniteLossError, match="after 2 skipped steps"):
        train(2, [(5, 1)], tmp_path / "epoch=0.ckpt")


def test_where_anomalies_are_looked_for_the_first_stops(tmp_path, photos, caplog):
    """Autograd says which operation it was; that of a NaN without a gradient, it does not see."""
    for how, error in (("nan", RuntimeError), ("loss", NonFiniteLossError)):
        caplog.clear()
        trainer = tiny_trainer(tmp_path, callbacks=[NonFiniteGuard()], detect_anomaly=True)
        task = SeePhotos([(1, 1)], how)
        with pytest.raises(error, match="MulBackward0|at step 1 .*training stopped, .*its samples"):
            trainer.fit(task, photo_data(photos))
        (line,) = skips(caplog)
        assert line.startswith("training loss is nan at step 1 (epoch 0)") and named(line) == task.seen[1, 1]


def test_a_limit_below_zero_is_refused():
    with pytest.raises(ValueError, match="max_skipped must be at least 0, got -1"):
        NonFiniteGuard(-1)


class Keep(Callback):
    def on_train_end(self, trainer, pl_module):
        seen = {"seen": pl_module.seen, "weights": pl_module.state_dict(), "skipped": trainer.callbacks[0].skipped}
        torch.save(seen, f"{trainer.global_rank}.pt")


def train_one_of_two(photos: Path) -> None:
    strategy = {"devices": 2, "strategy": "ddp", "limit_val_batches": 0, "max_epochs": 1}
    fit(Path.cwd(), SeePhotos([(1, 1)], "one of two"), [Keep()], photo_data(photos), **strategy)


@pytest.mark.slow
def test_two_processes_skip_alike(tmp_path, photos):
    """One loss of the two is not finite, and no gradient: both leave the step out, and its samples are named."""
    run(tmp_path, 2, train_one_of_two, photos)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["skipped"] == second["skipped"] == 1
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)
    (line,) = [line for line in said(tmp_path).splitlines() if "is skipped" in line]
    assert named(line) == second["seen"][1, 1] and not set(named(line)) & set(first["seen"][1, 1])
