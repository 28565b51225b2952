"""A memory that is handed on from image to image."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint

from luna_vision.data import CanvasSequenceDataModule
from luna_vision.tasks import SequenceTask

from .conftest import tiny_trainer

SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "global_pool": "both"}


def tiny(**arguments) -> SequenceTask:
    model = {"model_name": "test_luna_vit", "num_classes": 4, "in_chans": 1, "model_kwargs": SMALL}
    return SequenceTask(**{**model, **arguments})


def images(*shape) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_the_memory_that_comes_out_goes_in():
    task, x = tiny().eval(), images(2, 3, 1, 16, 16)
    _, first = task.model.encode(x[:, 0])
    _, second = task.model.encode(x[:, 1], memory=first)
    logits = task(x)
    torch.testing.assert_close(logits[:, 2], task.model(x[:, 2], memory=second))
    torch.testing.assert_close(logits[:, 0], task.model(x[:, 0]))
    torch.testing.assert_close(task(x[:, 1:], memory=first), logits[:, 1:])


def test_without_carrying_it_is_the_mean_of_the_images_so_far():
    task, x = tiny(carry=False).eval(), images(2, 3, 1, 16, 16)
    alone = torch.stack([task.model(image) for image in x.unbind(1)], dim=1)
    torch.testing.assert_close(task(x)[:, 1], alone[:, :2].mean(1))
    torch.testing.assert_close(task(x)[:, 2], alone.mean(1))


@pytest.mark.parametrize(
    "bptt_steps, reached", [(0, [1, 1, 1, 1]), (1, [0, 0, 0, 1]), (2, [0, 0, 1, 1]), (3, [0, 0, 0, 1])]
)
def test_gradients_go_back_as_far_as_said(bptt_steps, reached):
    task, x = tiny(bptt_steps=bptt_steps), images(2, 4, 1, 16, 16).requires_grad_()
    task(x)[:, -1].square().sum().backward()
    assert [int(x.grad[:, t].any()) for t in range(4)] == reached
    whole = tiny(bptt_steps=0)
    whole.load_state_dict(task.state_dict())
    torch.testing.assert_close(whole(x), task(x))  # what is computed is the same


def test_the_loss_is_that_of_the_images_from_which_on_the_target_is_known(monkeypatch):
    task, x = tiny(), images(2, 3, 1, 16, 16)
    monkeypatch.setattr(task, "_log_training", lambda *args: None)
    logits = task(x)
    loss = task.training_step((x, torch.tensor([3, 1]), torch.tensor([2, 1])), 0)
    want = F.cross_entropy(torch.stack([logits[0, 2], logits[1, 1], logits[1, 2]]), torch.tensor([3, 1, 1]))
    torch.testing.assert_close(loss, want)


def test_it_learns_what_no_image_tells():
    """Whether two images are equally bright: alone, neither says anything, and no sum of their logits does."""
    task = tiny(num_classes=2)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(task.parameters(), 5e-3)
    correct = []
    for _ in range(120):
        bits = torch.randint(2, (32, 2))
        x = (2.0 * bits - 1)[:, :, None, None, None].expand(-1, -1, 1, 16, 16)
        logits, targets = task(x)[:, -1], bits[:, 0] ^ bits[:, 1]
        loss = F.cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        correct.append((logits.argmax(1) == targets).float().mean())
    assert torch.stack(correct[-10:]).mean() > 0.95


def fit(path, *callbacks, ckpt_path=None, **arguments):
    torch.manual_seed(0)
    model = {**SMALL, "img_size": 64, "patch_size": 32, "depth": 1}
    task = tiny(num_classes=10, in_chans=3, model_kwargs=model, **arguments)
    data = CanvasSequenceDataModule(num_train=12, num_val=4, num_test=4, batch_size=4, num_workers=0, steps=3)
    checkpointing = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    trainer = tiny_trainer(path, callbacks=list(callbacks), enable_checkpointing=checkpointing)
    trainer.fit(task, data, ckpt_path=ckpt_path, weights_only=True)
    return task, trainer, data


@pytest.mark.filterwarnings("ignore")
def test_a_run_and_a_resumed_one(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    whole, trainer, data = fit(tmp_path, keep, bptt_steps=2)
    assert {"train_loss", "val_loss", "val_acc1", "val_acc5", "lr"} <= trainer.callback_metrics.keys()
    assert set(trainer.test(whole, data, verbose=False)[0]) == {"test_loss", "test_acc1", "test_acc5"}
    for step in (2, 3):
        again, _, _ = fit(tmp_path, bptt_steps=2, ckpt_path=tmp_path / f"step={step}.ckpt")
        torch.testing.assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)
    loaded = SequenceTask.load_from_checkpoint(tmp_path / "step=6.ckpt", weights_only=True)
    assert loaded.hparams.bptt_steps == 2 and loaded.hparams.num_classes == 10


def test_prediction_is_after_the_last_image():
    task, x = tiny().eval(), images(2, 3, 1, 16, 16)
    found = task.predict_step((x, ["a", "b"]), 0)
    assert found["ids"] == ["a", "b"]
    assert torch.equal(found["labels"][:, 0], task(x)[:, -1].argmax(1))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"bptt_steps": -1}, "bptt_steps must be at least 0, got -1"),
        ({"mixup": 0.5}, "mixup and cutmix mix single images: they must be 0"),
        ({"compile": True}, "compile has no effect on model.encode, .* set it to false"),
        ({"model_name": "test_vit", "model_kwargs": {}}, "need a Luna ViT with a memory, and test_vit has none"),
        ({"model_kwargs": {**SMALL, "global_pool": "avg", "mixer": "softmax"}}, "need a Luna ViT with a memory"),
    ],
)
def test_wrong_arguments_are_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


@pytest.mark.parametrize(
    "shape, targets, known, message",
    [
        ((2, 1, 16, 16), [0, 1], [0, 0], r"sequences must be \(B, T, C, H, W\)"),
        ((2, 3, 1, 16, 16), [0, 4], [0, 0], r"targets must be in \[0, 4\)"),
        ((2, 3, 1, 16, 16), [0, 1], [0, 3], r"known must be \(2,\) with values in \[0, 3\)"),
        ((2, 3, 1, 16, 16), [0, 1], [0], r"known must be \(2,\) with values in \[0, 3\)"),
    ],
)
def test_wrong_batches_are_said(shape, targets, known, message):
    with pytest.raises(ValueError, match=message):
        tiny().check_batch(images(*shape), torch.tensor(targets), torch.tensor(known))


def test_fsdp2_is_refused(monkeypatch):
    """Which gathers the weights for forward() alone, and not for encode()."""
    task = tiny()
    monkeypatch.setattr(task, "_is_sharded", lambda: True)
    with pytest.raises(ValueError, match="sequences do not work with fsdp2"):
        task.configure_model()
