"""Batches with a number of slots that is drawn for each."""

import copy

import pytest
import timm
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from luna_vision.tasks import NestedMemory

from .conftest import SyntheticData, tiny_task, tiny_trainer


class Seen(Callback):
    """Notes how many slots each batch of training and validation runs with."""

    def __init__(self) -> None:
        self.train, self.val, self.logged = [], [], []

    def on_before_backward(self, trainer, pl_module, loss):
        self.train.append((trainer.global_step, pl_module.model.memory_len))

    def on_validation_batch_end(self, trainer, pl_module, *args):
        self.val.append(pl_module.model.memory_len)

    def on_train_batch_end(self, trainer, *args):
        self.logged.append(float(trainer.callback_metrics["memory_len"]))


def fit(path, *callbacks, task=None, ckpt_path=None, **arguments):
    torch.manual_seed(0)
    task = task or tiny_task()
    seen = Seen()
    checkpointing = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    arguments = {"max_epochs": 3, **arguments, "enable_checkpointing": checkpointing}
    trainer = tiny_trainer(path, callbacks=[*callbacks, seen], **arguments)
    trainer.fit(task, SyntheticData(), ckpt_path=ckpt_path, weights_only=True)
    return task, seen


@pytest.mark.filterwarnings("ignore")
def test_training_draws_and_evaluation_has_them_all(tmp_path):
    task, seen = fit(tmp_path, NestedMemory([1, 4, 8]), max_epochs=5)
    lengths = [length for _, length in seen.train]
    assert set(lengths) == {1, 4, 8} and seen.logged == lengths
    assert set(seen.val) == {8} and task.model.memory_len == 8
    alike = NestedMemory([1, 4, 8])
    assert lengths == [alike.draw([1, 4, 8], step, step % 4) for step, _ in seen.train]
    assert lengths != [NestedMemory([1, 4, 8], seed=1).draw([1, 4, 8], step, step % 4) for step, _ in seen.train]


@pytest.mark.filterwarnings("ignore")
def test_by_default_the_powers_of_two_and_the_full_length(tmp_path):
    task = tiny_task(model_kwargs={"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "memory_len": 6})
    _, seen = fit(tmp_path, NestedMemory(), task=task, max_epochs=10)
    assert {length for _, length in seen.train} == {1, 2, 4, 6}


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_ends_as_one_that_was_not_stopped(tmp_path):
    """The rest of a run has the lengths, and so the weights, that it would have had."""
    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_epochs=1)
    whole, seen = fit(tmp_path, NestedMemory(), keep)
    again, rest = fit(tmp_path, NestedMemory(), ckpt_path=tmp_path / "step=4.ckpt")
    assert [step for step, _ in rest.train] == list(range(4, 12))
    assert rest.train == seen.train[4:]
    torch.testing.assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)
    other, _ = fit(tmp_path, NestedMemory(seed=1), ckpt_path=tmp_path / "step=4.ckpt")
    assert not torch.equal(other.model.memory, whole.model.memory)


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_is_broken_off_leaves_the_whole_memory(tmp_path):
    class Stop(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            raise RuntimeError("stop")

    task = tiny_task()
    for seed in range(3):
        with pytest.raises(RuntimeError):
            fit(tmp_path, NestedMemory([1, 2, 8], seed), Stop(), task=task)
        assert task.model.memory_len == 8


def test_processes_agree_without_talking():
    callback = NestedMemory([1, 2, 4, 8], seed=3)
    other = copy.deepcopy(callback)
    torch.manual_seed(5)  # nothing is drawn from a generator that processes seed in their own way
    assert [callback.draw([1, 2, 4, 8], s, 0) for s in range(50)] == [other.draw([1, 2, 4, 8], s, 0) for s in range(50)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lens", [[1, 2, 4], [1, 16]])
def test_lengths_that_do_not_fit_are_said(tmp_path, lens):
    with pytest.raises(ValueError, match="lens must have the model's memory_len, 8, as its largest, got"):
        fit(tmp_path, NestedMemory(lens))


@pytest.mark.filterwarnings("ignore")
def test_models_without_a_memory_are_said(tmp_path):
    model = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "mixer": "softmax"}
    with pytest.raises(ValueError, match="trains Luna ViTs with memories of one length, and the task has none"):
        fit(tmp_path, NestedMemory(), task=tiny_task(model_kwargs=model))


@pytest.mark.filterwarnings("ignore")
def test_memories_of_several_lengths_are_said(tmp_path):
    task = tiny_task()
    task.teacher = timm.create_model("test_luna_vit", memory_len=4)
    with pytest.raises(ValueError, match="the lengths 4, 8"):
        fit(tmp_path, NestedMemory(), task=task)


@pytest.mark.parametrize("arguments", [{"lens": []}, {"lens": [0, 2]}, {"seed": -1}])
def test_wrong_arguments_are_said(arguments):
    with pytest.raises(ValueError, match="must"):
        NestedMemory(**arguments)
