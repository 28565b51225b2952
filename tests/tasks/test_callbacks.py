import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy

from luna_vision.tasks import EMA, EpochLines, ImagesPerSecond

from .conftest import tiny_task, tiny_trainer


class RecordWeights(Callback):
    """The head's weights after each optimizer step and during each validation."""

    def __init__(self):
        self.trained, self.validated = [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.trained.append(pl_module.model.head.weight.detach().clone())

    def on_validation_batch_start(self, trainer, pl_module, *args):
        self.validated.append(pl_module.model.head.weight.detach().clone())


def average(weights: list[torch.Tensor], ema: EMA) -> torch.Tensor:
    result = weights[ema.start_step]
    for step in range(ema.start_step + 1, len(weights)):
        decay = ema.decay_at(step)
        result = decay * result + (1 - decay) * weights[step]
    return result


@pytest.mark.parametrize(
    "options", [{"decay": 0.7, "warmup": False}, {"decay": 0.999}, {"decay": 0.7, "start_step": 6}]
)
def test_ema_is_evaluated_saved_and_tested(tmp_path, data, options):
    ema, record = EMA(**options), RecordWeights()
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    trainer = tiny_trainer(tmp_path, callbacks=[ema, record, checkpoint], enable_checkpointing=True)
    task = tiny_task(lr=1e-2)
    trainer.fit(task, data)  # 2 epochs of 4 steps, validation batches of 8 and 5
    expected = average(record.trained, ema)
    early = record.trained[3] if ema.start_step > 3 else average(record.trained[:4], ema)
    torch.testing.assert_close(record.validated[0], early)
    torch.testing.assert_close(record.validated[-1], expected)
    torch.testing.assert_close(task.model.head.weight.detach(), expected)
    saved = torch.load(checkpoint.last_model_path, weights_only=True)
    torch.testing.assert_close(saved["state_dict"]["model.head.weight"], expected)
    torch.testing.assert_close(saved["current_model_state"]["model.head.weight"], record.trained[-1])
    trainer.test(task, data, ckpt_path=checkpoint.last_model_path, weights_only=True, verbose=False)
    torch.testing.assert_close(task.model.head.weight.detach(), expected)


def test_ema_decay_warms_up():
    ema = EMA(decay=0.99)
    assert [ema.decay_at(step) for step in (0, 1, 10_000)] == [0.0, pytest.approx(2 / 11), 0.99]
    assert EMA(decay=0.99, start_step=5, warmup=False).decay_at(5) == 0.0
    assert EMA(decay=0.99, warmup=False).decay_at(1) == 0.99


def test_the_average_is_made_where_the_task_is_going_to_be(tmp_path):
    """Lightning copies the task before it is on its device, and would send all weights to the copy in every step."""
    ema = EMA()
    ema.setup(tiny_trainer(tmp_path, strategy=SingleDeviceStrategy("meta")), tiny_task(), "fit")
    assert {value.device.type for value in ema._average_model.state_dict().values()} == {"meta"}


def test_ema_refuses_what_it_cannot_do(tmp_path, data):
    with pytest.raises(ValueError, match="decay"):
        EMA(decay=1.0)
    callbacks = [EMA(), ModelCheckpoint(tmp_path, save_weights_only=True)]
    with pytest.raises(ValueError, match="save_weights_only"):
        tiny_trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True).fit(tiny_task(), data)


@pytest.mark.parametrize("with_ema", [False, True])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, data, with_ema):
    def fit(epochs, resume=None, **saving):
        callbacks = [EMA(decay=0.9)] if with_ema else []
        if saving:
            callbacks.append(ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1))
        task = tiny_task(lr=1e-2, mixup=0.8, cutmix=1.0, warmup_epochs=1.0, mix_seed=3)
        trainer = tiny_trainer(tmp_path, max_epochs=epochs, callbacks=callbacks, enable_checkpointing=bool(saving))
        trainer.fit(task, data, ckpt_path=resume, weights_only=True)
        return task.state_dict()

    whole = fit(3, save=True)
    resumed = fit(3, resume=tmp_path / "epoch=1.ckpt")
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


def test_throughput_and_epoch_lines(tmp_path, data, capsys):
    trainer = tiny_trainer(tmp_path, callbacks=[EpochLines(), ImagesPerSecond()], val_check_interval=2)
    trainer.fit(tiny_task(), data)
    assert trainer.callback_metrics["images_per_s"] > 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 2
    assert lines[0].startswith("epoch 1/2  train_loss ") and "val_acc1" in lines[0]
