"""A student learns the features of any teacher from images alone, and comes out as a plain backbone."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from luna_vision.models.factory import load_model
from luna_vision.tasks import (
    ClassificationTask,
    FeatureDistillationTask,
    NestedMemory,
    OnlineProbe,
    export_weights,
    online_probe,
)
from luna_vision.tasks.feature_distillation import feature_losses, mix, to_grid
from luna_vision.tasks.unlabelled import EffectiveRank, slot_ranks

from .conftest import tiny_trainer

STUDENT = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "memory_len": 4}
VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2}


class Images(Dataset):
    """Views of random images as tuples."""

    def __init__(self, count: int, shapes: list[tuple[int, ...]]) -> None:
        generator = torch.Generator().manual_seed(count)
        self.views = [torch.rand(count, *shape, generator=generator) for shape in shapes]

    def __len__(self) -> int:
        return len(self.views[0])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return tuple(views[index] for views in self.views)


class Photos(LightningDataModule):
    """Images without labels, of pixels in [0, 1]."""

    num_classes = None

    def __init__(self, side: int = 32, in_chans: int = 3, count: int = 16, batch_size: int = 4, views=None) -> None:
        super().__init__()
        self.side, self.in_chans, self.count, self.batch_size = side, in_chans, count, batch_size
        self.shapes = views or [(in_chans, side, side)]

    def timm_cfg(self) -> dict:
        shape = (self.in_chans, self.side, self.side)
        return {"input_size": shape, "mean": (0.0,) * self.in_chans, "std": (1.0,) * self.in_chans}

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Images(self.count, self.shapes), batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Images(7, self.shapes), batch_size=self.batch_size)


def weights(path: Path, name: str, **arguments) -> str:
    torch.save(timm.create_model(name, **arguments).state_dict(), path)
    return str(path)


@pytest.fixture
def vit_file(tmp_path) -> str:
    return weights(tmp_path / "vit.pth", "test_vit", num_classes=5, **VIT)


def distill(checkpoint: str | None, **arguments) -> FeatureDistillationTask:
    defaults = {
        "model_name": "test_luna_vit",
        "model_kwargs": STUDENT,
        "img_size": 32,
        "teacher_model": "test_vit",
        "teacher_kwargs": VIT,
        "lr": 1e-2,
    }
    return FeatureDistillationTask(teacher_checkpoint=checkpoint, **{**defaults, **arguments})


# ---- the loss


def test_loss_is_the_formula():
    slot, g = torch.randn(2, 5, 6, dtype=torch.float64).unbind(0)
    patches, t = torch.randn(2, 5, 9, 6, dtype=torch.float64).unbind(0)
    parts = feature_losses(slot, patches, g, t)

    def cosine(a, b):
        return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))

    torch.testing.assert_close(parts["global_loss"], (1 - cosine(slot, g)).mean(), check_dtype=False)
    torch.testing.assert_close(parts["patch_cosine_loss"], (1 - cosine(patches, t)).mean(), check_dtype=False)
    torch.testing.assert_close(parts["patch_mse_loss"], (patches - t).square().mean(), check_dtype=False)
    assert sum(feature_losses(g, t, g, t).values()) < 1e-6


def test_teachers_patches_are_brought_to_the_students_grid():
    t = torch.randn(2, 3, 4, 5)
    assert torch.equal(to_grid(t, (4, 5)), t.flatten(2).transpose(1, 2))
    large = t.repeat_interleave(2, 2).repeat_interleave(2, 3)
    small = to_grid(large, (4, 5))
    assert small.shape == (2, 20, 3)
    assert F.cosine_similarity(small.flatten(), to_grid(t, (4, 5)).flatten(), dim=0) > 0.9


def test_mixing_depends_on_the_step_alone():
    images = torch.rand(6, 3, 4, 4)
    assert torch.equal(mix(images, (0, 1, 2, 0)), mix(images, (0, 1, 2, 0)))
    assert not torch.equal(mix(images, (0, 1, 2, 0)), mix(images, (0, 2, 2, 0)))
    assert images.min() <= mix(images, (0, 1, 2, 0)).min() and mix(images, (0, 1, 2, 0)).max() <= images.max()


def test_every_weight_gets_a_gradient(vit_file, tmp_path):
    task = distill(vit_file)
    tiny_trainer(tmp_path, max_epochs=0).fit(task, Photos())
    images = torch.rand(2, 3, 32, 32)
    parts, memory, patches = task._losses(images, *task.targets(images))
    assert memory.shape == (2, 4, 16) and patches.shape == (2, 16, 16)
    sum(parts.values()).backward()
    assert [name for name, p in task.named_parameters() if p.grad is None] == []


# ---- teachers


@pytest.mark.parametrize(
    "name, arguments, side, seen",
    [
        ("test_vit", VIT, 32, 32),
        ("test_vit", VIT | {"patch_size": 12}, 32, 36),  # the nearest whole patches
        ("test_vit", VIT | {"num_classes": 0, "class_token": False, "global_pool": "avg"}, 32, 32),
        ("test_vit", VIT | {"reg_tokens": 3}, 32, 32),
        ("test_resnet", {}, 64, 64),
        ("test_luna_vit", STUDENT | {"mixer": "softmax"}, 32, 32),
    ],
)
def test_any_teacher(tmp_path, name, arguments, side, seen):
    arguments = dict(arguments)
    classes = arguments.pop("num_classes", 5)
    file = weights(tmp_path / "teacher.pth", name, num_classes=classes, **arguments)
    task = distill(file, teacher_model=name, teacher_kwargs=arguments, img_size=side)
    trainer = tiny_trainer(tmp_path, max_epochs=1, callbacks=[NestedMemory()])
    before, student = copy.deepcopy(task.teacher.model.state_dict()), copy.deepcopy(task.model.state_dict())
    shapes = []
    prepare = task.teacher.prepare
    task.teacher.prepare = lambda images: shapes.append(prepare(images).shape) or prepare(images)
    trainer.fit(task, Photos(side))
    assert {shape[-2:] for shape in shapes} == {(seen, seen)}
    metrics = trainer.callback_metrics
    assert all(metrics[key].isfinite() for key in ("train_loss", "val_loss", "val_rank", "val_rank_slots"))
    after = task.teacher.model.state_dict()
    changed = [key for key, value in before.items() if "pos_embed" not in key and not torch.equal(value, after[key])]
    assert changed == [] and not any(module.training for module in task.teacher.modules())
    assert not any("teacher" in key for key in task.state_dict())
    assert any(not torch.equal(value, student[key]) for key, value in task.model.state_dict().items())


def test_features_are_standardised(vit_file, tmp_path):
    task = distill(vit_file)
    tiny_trainer(tmp_path, max_epochs=0).fit(task, Photos())
    images = torch.cat([batch for (batch,) in Photos().train_dataloader()])
    g, t = task.targets(images)
    for values in (task.statistics[0](g), task.statistics[1](to_grid(t, (2, 2))).flatten(0, 1)):
        torch.testing.assert_close(values.mean(0), torch.zeros_like(values[0]), atol=1e-4, rtol=0)
        torch.testing.assert_close(values.std(0, unbiased=False), torch.ones_like(values[0]), atol=1e-3, rtol=0)


def test_a_checkpoint_keeps_the_statistics_and_says_what_the_teacher_was(tmp_path):
    source = ClassificationTask("test_luna_vit", num_classes=5, model_kwargs=STUDENT | {"mixer": "softmax"})
    trainer = tiny_trainer(tmp_path, max_epochs=0)
    trainer.fit(source, DataLoader([(torch.rand(3, 32, 32), 0)] * 2))
    trainer.save_checkpoint(tmp_path / "teacher.ckpt")
    task = distill(str(tmp_path / "teacher.ckpt"), teacher_model="test_luna_vit", teacher_kwargs=None)
    trainer = tiny_trainer(tmp_path, max_epochs=1)
    trainer.fit(task, Photos())
    trainer.save_checkpoint(tmp_path / "student.ckpt")
    known = copy.deepcopy(task.statistics.state_dict())
    again = distill(str(tmp_path / "teacher.ckpt"), teacher_model="test_luna_vit", teacher_kwargs=None)
    tiny_trainer(tmp_path, max_epochs=1).fit(again, Photos(count=8), ckpt_path=tmp_path / "student.ckpt")
    torch.testing.assert_close(again.statistics.state_dict(), known, rtol=0, atol=0)


# ---- the cache


def test_a_view_goes_through_the_teacher_once(vit_file, tmp_path):
    def shown(task, folder, **arguments) -> int:
        counts = []
        forward = task.teacher.model.forward_intermediates
        task.teacher.model.forward_intermediates = lambda x, **kw: counts.append(len(x)) or forward(x, **kw)
        tiny_trainer(tmp_path, **arguments).fit(task, Photos())
        return sum(counts)

    options = {"mixup": False, "cache": str(tmp_path / "cache")}
    first, plain, again = (distill(vit_file, **o) for o in (options, {"mixup": False}, options))
    for task in (first, plain, again):
        task.model.load_state_dict(first.model.state_dict())
        task.heads.load_state_dict(first.heads.state_dict())
    assert shown(first, tmp_path, max_epochs=2) == 16 + 7
    assert shown(plain, tmp_path, max_epochs=2) == 16 + 2 * (16 + 7)
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():  # up to the rounding of float16
        torch.testing.assert_close(first(images), plain(images), rtol=0, atol=0.1)
    # the last run was stopped while it wrote
    rows = next((tmp_path / "cache").glob("*.rows"))
    rows.write_bytes(rows.read_bytes()[:-1])
    assert shown(again, tmp_path, max_epochs=2) == 1 + 1  # the shapes, and the image that was lost
    torch.testing.assert_close(again.model.state_dict(), first.model.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="outputs of another teacher"):
        other = distill(vit_file, teacher_img_size=48, **options)
        tiny_trainer(tmp_path, max_epochs=1).fit(other, Photos())
    with pytest.raises(ValueError, match="mixup=false"):
        distill(vit_file, cache="x")


# ---- what comes out


def test_result_is_a_backbone_for_later_training(vit_file, tmp_path, capsys):
    task = distill(vit_file)
    trainer = tiny_trainer(tmp_path, max_epochs=1)
    trainer.fit(task, Photos())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    export_weights(tmp_path / "last.ckpt", tmp_path / "best.safetensors")
    for file in ("last.ckpt", "best.safetensors"):
        model = load_model(checkpoint=tmp_path / file, device="cpu")
        torch.testing.assert_close(model.state_dict(), task.model.state_dict(), rtol=0, atol=0)
        assert model(torch.rand(1, 3, 40, 56)).shape == (1, 16)
    for pool in ("avg", "both", "token"):
        arguments = STUDENT | {"global_pool": pool}
        later = ClassificationTask("test_luna_vit", 3, 3, arguments, checkpoint=str(tmp_path / "best.safetensors"))
        tiny_trainer(tmp_path, max_epochs=0).fit(later, DataLoader([(torch.rand(3, 32, 32), 0)] * 2))
        later._load_starting_weights()
        assert torch.equal(later.model.memory, task.model.memory)


def test_labelled_images_are_probed(vit_file, tmp_path):
    callback = OnlineProbe(data="digits", num_train=60, num_test=40)
    task = distill(vit_file, in_chans=1)
    trainer = tiny_trainer(tmp_path, max_epochs=1, callbacks=[callback])
    trainer.fit(task, Photos(in_chans=1))
    assert 0 <= trainer.callback_metrics["val_knn_acc1"] <= 1 and trainer.callback_metrics["val_linear_acc1"] > 0.2


def test_numbers_of_labelled_images_mean_what_they_mean_in_training(monkeypatch):
    cfg, given = Photos(in_chans=1).timm_cfg() | {"value_range": (0, 4000), "nodata": -1, "fill": "mean"}, {}
    monkeypatch.setattr(online_probe, "open_data", lambda name, arguments, *limits: given.update(arguments))
    trainer = SimpleNamespace(is_global_zero=True, datamodule=SimpleNamespace(timm_cfg=lambda: cfg))
    OnlineProbe("imagefolder").setup(trainer, SimpleNamespace(hparams=SimpleNamespace(in_chans=1)), "fit")
    assert {name: given[name] for name in ("value_range", "nodata", "fill")} == {
        "value_range": (0, 4000),
        "nodata": -1,
        "fill": "mean",
    }


# ---- ranks


def test_effective_rank_of_noise_and_of_a_line():
    rank = EffectiveRank(8)
    for _ in range(4):
        rank.update(torch.randn(2000, 8) + 3)
    assert 7.9 < rank.compute() <= 8
    rank.reset()
    rank.update(torch.randn(100, 1) * torch.randn(8) + 5)
    assert 1 <= rank.compute() < 1.01
    slots = torch.randn(3, 5, 8)
    values = torch.linalg.svdvals(slots - slots.mean(1, keepdim=True)).double()
    p = values / values.sum(-1, keepdim=True)
    torch.testing.assert_close(slot_ranks(slots).double(), (-(p * p.log()).sum(-1)).exp(), rtol=1e-3, atol=0)


# ---- mistakes


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"teacher_model": "vit_base_patch14_dino2"}, "did you mean"),
        (
            {"teacher_checkpoint": None, "teacher_model": "test_luna_vit", "teacher_kwargs": None},
            "give its weights as teacher_checkpoint",
        ),
        ({"teacher_img_size": 0}, "teacher_img_size"),
        ({"model_kwargs": STUDENT | {"global_pool": "avg"}}, "global_pool=both"),
        ({"model_name": "test_vit", "model_kwargs": None}, "trains Luna ViTs"),
        ({"teacher_kwargs": VIT | {"num_classes": 3}}, "cannot have num_classes"),
    ],
)
def test_mistakes_in_arguments(arguments, message):
    file = arguments.pop("teacher_checkpoint", "nowhere.pth")
    with pytest.raises(ValueError, match=message):
        distill(file, **arguments)


def test_mistakes_when_a_run_starts(vit_file, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        distill("nowhere.pth").check_start()
    other = weights(tmp_path / "other.pth", "test_vit", num_classes=5)
    with pytest.raises(ValueError, match="does not fit"):
        distill(other).check_start()
    with pytest.raises(ValueError, match="images of 3 channels cannot be shown to a teacher of 1"):
        file = weights(tmp_path / "grey.pth", "test_vit", num_classes=5, in_chans=1, **VIT)
        distill(file, teacher_kwargs=VIT | {"in_chans": 1}).check_data(Photos(), "fit")
    with pytest.raises(ValueError, match="luna-vision embed"):
        distill(vit_file).check_data(Photos(), "predict")
