import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint

from luna_vision.tasks import TimeBudget

from .conftest import SyntheticData, tiny_task, tiny_trainer


class Clock(Callback):
    """Time passes in steps alone."""

    def __init__(self, seconds):
        self.seconds, self.now, self.rates = seconds, 0.0, []

    def on_train_batch_start(self, trainer, *args):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.now += self.seconds(len(self.rates))


def run(tmp_path, monkeypatch, clock, budget, max_epochs=50, callbacks=(), ckpt_path=None, **options):
    monkeypatch.setattr("luna_vision.tasks.budget.time.perf_counter", lambda: clock.now)
    trainer = tiny_trainer(tmp_path, callbacks=[clock, budget, *callbacks], max_epochs=max_epochs, **options)
    task = tiny_task(scheduler="cosine", warmup_epochs=1, min_lr=1e-5, lr=1e-3)
    trainer.fit(task, SyntheticData(), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("budget", [100.0, 3.0])
def test_the_run_ends_with_its_schedule_when_the_time_is_over(tmp_path, monkeypatch, budget):
    clock = Clock(lambda step: 20.0 if step == 1 else 1.0)  # the first compiles
    trainer = run(tmp_path, monkeypatch, clock, TimeBudget(budget))
    batches = trainer.num_training_batches
    if budget < 20:  # the second epoch is measured, and it ends after that
        assert trainer.current_epoch == 2
        return
    assert budget - batches < clock.now <= budget
    assert max(clock.rates) == pytest.approx(1e-3, rel=0.05)
    assert clock.rates[-1] < 3e-5


def test_it_plans_anew_when_steps_become_slower(tmp_path, monkeypatch):
    clock = Clock(lambda step: 1.0 if step < 60 else 3.0)
    trainer = run(tmp_path, monkeypatch, clock, TimeBudget(150.0))
    assert 150 - 3 * trainer.num_training_batches < clock.now <= 150 + 2 * trainer.num_training_batches


def test_max_epochs_is_the_largest_number(tmp_path, monkeypatch):
    trainer = run(tmp_path, monkeypatch, Clock(lambda step: 1e-6), TimeBudget(1e6), max_epochs=4)
    assert trainer.current_epoch == 4


def test_a_resumed_run_has_the_time_that_is_left(tmp_path, monkeypatch):
    kept = ModelCheckpoint(tmp_path, save_last=True)
    first = Clock(lambda step: 1.0)
    run(tmp_path, monkeypatch, first, TimeBudget(60.0), callbacks=[kept], enable_checkpointing=True)
    second, budget = Clock(lambda step: 1.0), TimeBudget(100.0)
    state = torch.load(kept.last_model_path, weights_only=True)["callbacks"]["TimeBudget"]
    assert state["used"] == pytest.approx(first.now, abs=1)
    trainer = run(tmp_path, monkeypatch, second, budget, ckpt_path=kept.last_model_path)
    assert second.now == pytest.approx(100 - first.now, abs=2 * trainer.num_training_batches)


def test_the_time_within_an_epoch_counts(tmp_path, monkeypatch):
    clock, budget, used = Clock(lambda step: 1.0), TimeBudget(60.0), []
    seen = LambdaCallback(on_train_batch_end=lambda *args: used.append(budget.state_dict()["used"] - clock.now))
    run(tmp_path, monkeypatch, clock, budget, callbacks=[seen])
    assert used == pytest.approx([0.0] * len(used))


def test_a_resumed_run_keeps_its_plan(tmp_path, monkeypatch):
    kept = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    first, second = Clock(lambda step: 1.0), Clock(lambda step: 1.0)
    run(tmp_path, monkeypatch, first, TimeBudget(60.0), callbacks=[kept], enable_checkpointing=True)
    at = tmp_path / "epoch=4.ckpt"
    trainer = run(tmp_path, monkeypatch, second, TimeBudget(60.0), ckpt_path=at)
    assert second.rates == pytest.approx(first.rates[5 * trainer.num_training_batches :], rel=0.02)


def test_wrong_arguments(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="0"):
        TimeBudget(0)
    with pytest.raises(ValueError, match="max_epochs"):
        run(tmp_path, monkeypatch, Clock(lambda step: 1.0), TimeBudget(10.0), max_epochs=-1, max_steps=5)
