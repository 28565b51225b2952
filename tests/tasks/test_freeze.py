"""Layers that are not trained, and classes that count more than others."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule

from luna_vision.data import DigitsDataModule
from luna_vision.tasks import EMA, SegmentationTask

from .conftest import tiny_task, tiny_trainer

FROZEN = ("model.patch_embed.", "model.memory", "model.pos_embed", "model.blocks.0.")


class Modes(Callback):
    """Which parts are in training mode in a step."""

    def on_before_backward(self, trainer, task, loss):
        self.training = {name for name, module in task.model.named_modules() if module.training}


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_the_stem_and_the_first_blocks_stay_as_they_are(tmp_path, data, layer_decay):
    """Nothing is added to their weights, no dropout acts in them, and the rates of the others are as ever."""
    torch.manual_seed(0)
    kwargs = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "drop_path_rate": 0.5}
    settings = {"model_kwargs": kwargs, "layer_decay": layer_decay, "weight_decay": 1.0, "lr": 1e-2}
    task, modes = tiny_task(freeze=1, **settings), Modes()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    trainer = tiny_trainer(tmp_path, callbacks=[modes, EMA(decay=0.5)])
    trainer.fit(task, data)
    moved = {name for name, value in task.state_dict().items() if not torch.equal(value, before[name])}
    assert not [name for name in moved if name.startswith(FROZEN)]
    assert {"model.blocks.1.mlp.fc1.weight", "model.head.weight"} <= moved
    assert "blocks.1.drop_path1" in modes.training and "" in modes.training
    assert not [name for name in modes.training if name.startswith(("blocks.0", "patch_embed"))]
    rates = {}
    for built in (trainer.optimizers[0], tiny_task(**settings)._build_optimizer()):
        names = {id(p): name for owner in (task,) for name, p in owner.named_parameters()}
        rates[len(rates)] = {g.get("lr_scale", 1.0) for g in built.param_groups}
        trained = [names.get(id(p), "") for g in built.param_groups for p in g["params"]]
        assert not [name for name in trained if name.startswith(FROZEN)]
    assert rates[0] < rates[1] if layer_decay else rates[0] == rates[1]


@pytest.mark.parametrize("freeze, message", [(3, "freeze must be 0 to 2"), (-1, "freeze must be 0 to 2, .* got -1")])
def test_more_blocks_than_there_are(freeze, message):
    with pytest.raises(ValueError, match=message):
        tiny_task(freeze=freeze).check_start()


def test_linear_probing_trains_the_head_alone(tmp_path, data):
    task = tiny_task(freeze=2)
    trainer = tiny_trainer(tmp_path, max_epochs=1)
    trainer.fit(task, data)
    assert {name for name, p in task.named_parameters() if p.requires_grad} == {"model.head.weight", "model.head.bias"}


def test_the_backbone_of_a_pyramid():
    task = SegmentationTask("test_luna_vit", pyramid_channels=8, freeze=0)
    task.check_start()
    assert task.timm_model is task.model.backbone.body


# ---- class weights


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_class_weights_are_those_of_the_loss(loss):
    weights = torch.tensor([0.0, 1.0, 2.0, 0.5, 1.0, 3.0])
    task = tiny_task(class_weights=weights.tolist(), loss=loss)
    logits, labels = torch.randn(5, 6), torch.tensor([0, 1, 2, 5, 5])
    soft = F.one_hot(labels, 6) * 0.7 + 0.05
    for targets in (labels, soft):
        dense = F.one_hot(labels, 6).float() if targets.ndim == 1 else soft
        expected = F.binary_cross_entropy_with_logits(logits, dense, weights)
        expected = F.cross_entropy(logits, targets, weights) if loss == "ce" else expected
        torch.testing.assert_close(task.compute_loss(logits, targets), expected)
    assert task.state_dict().keys() == tiny_task(loss=loss).state_dict().keys()


def test_balanced_weights_are_counted_in_the_training_images(tmp_path):
    data = DigitsDataModule(img_size=16, batch_size=64, num_workers=0)
    task = tiny_task(num_classes=10, class_weights="balanced")
    tiny_trainer(tmp_path, fast_dev_run=1).fit(task, data)
    source = data.dataset("train").source
    labels = torch.tensor([source[index][1] for index in range(len(source))])
    counts = labels.bincount()
    torch.testing.assert_close(task.class_weight, len(labels) / (10 * counts))
    assert task.class_weight[labels].mean() == pytest.approx(1.0)


class Unlabelled(LightningDataModule):
    num_classes, in_chans = 6, 1


@pytest.mark.parametrize(
    "weights, message",
    [([1.0], "must be 6 finite numbers"), ([1.0] * 5 + [-1.0], "at least 0"), ("balanced", "known without reading it")],
)
def test_bad_class_weights(weights, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path).fit(tiny_task(class_weights=weights), Unlabelled())
