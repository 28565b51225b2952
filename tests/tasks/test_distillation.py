"""A student learns from a teacher that never changes, and comes out as a plain classifier."""

import copy
import csv
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.task import LogitDistillationTask
from torchvision.transforms import v2

from luna_vision.cli.train import main
from luna_vision.data import DigitsDataModule
from luna_vision.tasks import EMA, ClassificationTask, DistillationTask, ExportBest
from luna_vision.tasks.distillation import feature_loss, logit_loss
from luna_vision.tasks.resume import ExactResume
from luna_vision.tasks.teacher import Teacher, logits_and_layers

from .conftest import SyntheticData, tiny_trainer
from .test_resume import EveryMoment

LUNA = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2}
TEACHER = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2}
STATS = {"teacher_mean": [0.5], "teacher_std": [0.25]}


@pytest.fixture
def teacher_file(tmp_path) -> Path:
    """Weights of a softmax ViT shell, another one than the student in every way."""
    model = timm.create_model("test_luna_vit", num_classes=6, in_chans=1, mixer="softmax", **TEACHER)
    path = tmp_path / "teacher.safetensors"
    save_file(model.state_dict(), path)
    return path


def distill(path: Path | None, **arguments) -> DistillationTask:
    defaults = {
        "model_name": "test_luna_vit",
        "num_classes": 6,
        "in_chans": 1,
        "model_kwargs": LUNA,
        "teacher_model": "test_luna_vit",
        "teacher_checkpoint": path and str(path),
        "teacher_kwargs": {"mixer": "softmax", **TEACHER},
        **STATS,
    }
    return DistillationTask(**{**defaults, **arguments})


def batch_norm_teacher(path: Path) -> dict:
    """The arguments of a teacher with running statistics."""
    model = timm.create_model("test_resnet", num_classes=6, in_chans=1)
    torch.save(model.state_dict(), path)
    return {"teacher_model": "test_resnet", "teacher_checkpoint": str(path), "teacher_kwargs": None}


# ---- losses


def test_logit_loss_is_the_formula_and_that_of_timm():
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64).unbind(0)
    T = 3.0
    p, q = (student / T).softmax(1), (teacher / T).softmax(1)
    expected = T**2 * (q * (q.log() - p.log())).sum(1).mean()
    torch.testing.assert_close(logit_loss(student, teacher, T), expected, rtol=1e-12, atol=0)

    class Given(torch.nn.Module):
        num_classes, in_chans, pretrained_cfg = 7, 1, {"mean": (0.5,), "std": (0.5,)}

        def __init__(self, logits):
            super().__init__()
            self.logits = logits

        def forward(self, images):
            return self.logits

    task = LogitDistillationTask(Given(student), Given(teacher), torch.nn.CrossEntropyLoss(), temperature=T)
    theirs = task(torch.zeros(5, 1, 2, 2), torch.zeros(5, dtype=torch.long))["kd_loss"]
    torch.testing.assert_close(logit_loss(student, teacher, T), theirs, rtol=0, atol=0)


def test_feature_loss_is_the_formula():
    student, teacher = torch.randn(2, 3, 8, 4, 5, dtype=torch.float64).unbind(0)
    deviation = teacher.var(1, unbiased=False, keepdim=True)
    normal = (teacher - teacher.mean(1, keepdim=True)) / (deviation + 1e-5).sqrt()
    torch.testing.assert_close(feature_loss(student, teacher), (student - normal).square().mean(), rtol=1e-12, atol=0)
    # of twice the resolution, and of the same content
    large = teacher.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert feature_loss(student, large).isfinite() and feature_loss(normal, large) < feature_loss(-normal, large)


def test_training_loss_is_the_weighted_sum(teacher_file):
    layers = [[0, 1], [-1, 2]]
    task = distill(teacher_file, feature_layers=layers, task_weight=0.5, logit_weight=2.0, feature_weight=3.0)
    task.log_dict = lambda values: None
    task = task.double()
    task.teacher.double()
    images, targets = torch.rand(4, 1, 16, 16, dtype=torch.float64), torch.tensor([0, 5, 2, 2])
    task.teacher.set_source([0.5], [0.25])
    loss, logits = task.training_loss(images, targets)
    torch.testing.assert_close(logits, task(images))
    with torch.no_grad():
        features, outputs = task.teacher.model.forward_intermediates(images)
        theirs = task.teacher.model.forward_head(features)
    _, ours = task.model.forward_intermediates(images)
    parts = [feature_loss(p(ours[i]), outputs[j]) for p, (i, j) in zip(task.projections, [(0, 1), (1, 2)], strict=True)]
    expected = 0.5 * F.cross_entropy(logits, targets) + 2 * logit_loss(logits, theirs, 1.0) + 3 * sum(parts) / 2
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0, check_dtype=False)


# ---- the teacher


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("features", [False, True])
def test_only_the_student_learns(tmp_path, data, monkeypatch, features, compile):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(function) or function)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, *args, **kwargs: compiled.append(module))
    arguments = batch_norm_teacher(tmp_path / "teacher.pth")
    layers = [[0, 2], [1, -1]] if features else None
    task = distill(None, **arguments, teacher_img_size=32, feature_layers=layers, mixup=0.8, cutmix=1.0, lr=1e-2)
    teacher, student = task.teacher, copy.deepcopy(task.state_dict())
    before = copy.deepcopy(teacher.model.state_dict())
    trainer = tiny_trainer(tmp_path, callbacks=[EMA(decay=0.5)], gradient_clip_val=1.0)
    trainer.fit(task, data)
    assert trainer.callback_metrics["train_logit_loss"] > 0
    assert ("train_feature_loss" in trainer.callback_metrics) == features
    torch.testing.assert_close(teacher.model.state_dict(), before, rtol=0, atol=0)  # running statistics among them
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimized == {id(p) for p in task.parameters()}
    assert not optimized & {id(p) for p in teacher.parameters()}
    assert not any("teacher" in name for name in task.state_dict())
    moved = [name for name, value in task.state_dict().items() if not torch.equal(value, student.get(name, value))]
    assert any(name.startswith("projections.") for name in moved) == features
    assert "model.head.weight" in moved
    if compile:  # the student in place, the teacher with what its layers put out
        task = distill(None, **arguments, teacher_img_size=32, feature_layers=layers, compile=True)
        tiny_trainer(tmp_path / "compiled", fast_dev_run=1).fit(task, data)
        assert task.model in compiled and compiled.count(logits_and_layers) == 2
        task = distill(None, **arguments, teacher_img_size=32, feature_layers=layers, compile=True)
        tiny_trainer(tmp_path / "anomaly", fast_dev_run=1, detect_anomaly=True).fit(task, data)
        assert task.model not in compiled and compiled.count(logits_and_layers) == 3  # the teacher has no gradients


def test_every_weight_that_features_reach_gets_a_gradient(teacher_file):
    task = distill(teacher_file, feature_layers=[[1, 2]])
    task.log_dict = lambda values: None
    loss, _ = task.training_loss(torch.rand(4, 1, 16, 16), torch.tensor([0, 5, 2, 2]))
    loss.backward()
    assert [name for name, p in task.named_parameters() if p.grad is None] == []


def test_decay_groups_with_features_are_those_without(teacher_file):
    """Weight decay and layer decay reach the student's layers as they do without projections beside them."""

    def groups(task):
        names = {id(p): name for name, p in task.named_parameters()}
        built = task._build_optimizer().param_groups
        return {names[id(p)]: (group["weight_decay"], group["lr_scale"]) for group in built for p in group["params"]}

    options = {"layer_decay": 0.5, "weight_decay": 0.1}
    plain, with_features = (groups(distill(teacher_file, **options, feature_layers=f)) for f in (None, [[0, 0]]))
    assert {name: value for name, value in with_features.items() if not name.startswith("projections")} == plain
    assert with_features["projections.0.weight"] == (0.1, 1.0) and with_features["projections.0.bias"] == (0.0, 1.0)


def test_teacher_leaves_the_students_randomness_alone(tmp_path, data, teacher_file):
    """With a weight of zero for all that the teacher says, the run is that of the plain task."""
    arguments = {"model_kwargs": {**LUNA, "drop_path_rate": 0.3}, "lr": 1e-2}
    tasks = [
        lambda: ClassificationTask("test_luna_vit", num_classes=6, in_chans=1, **arguments),
        lambda: distill(teacher_file, **arguments, logit_weight=0, feature_layers=[[0, 0]], feature_weight=1e-30),
    ]
    ends = []
    for make in tasks:
        seed_everything(3, verbose=False)
        task = make()
        seed_everything(4, verbose=False)
        tiny_trainer(tmp_path).fit(task, data)
        ends.append(task.model.state_dict())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-6)


# ---- what the teacher sees


class Seen(torch.nn.Module):
    """Gives back what it is shown."""

    def __init__(self):
        super().__init__()
        self.pretrained_cfg = {}

    def forward(self, images):
        return images


def test_same_images_reach_the_teacher_untouched():
    teacher = Teacher(Seen(), None, [0.3], [0.2])
    images = torch.randn(2, 1, 5, 6)
    assert torch.equal(teacher(images)[0], images)  # where nothing is known of the data
    teacher.set_source([0.3], [0.2])
    assert torch.equal(teacher(images)[0], images)


def test_normalisation_channels_and_size_are_the_teachers():
    pixels = torch.rand(2, 1, 12, 10)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    teacher = Teacher(Seen(), (24, 30), mean, std)
    teacher.set_source([0.2860], [0.3530])
    seen = teacher((pixels - 0.2860) / 0.3530)[0]
    expected = v2.functional.resize(pixels.expand(-1, 3, -1, -1), [24, 30], v2.InterpolationMode.BICUBIC)
    torch.testing.assert_close(seen, v2.functional.normalize(expected, mean, std), rtol=0, atol=2e-5)
    small = Teacher(Seen(), (6, 5), [0.0], [1.0])
    small.set_source([0.0], [1.0])
    expected = v2.functional.resize(pixels, [6, 5], v2.InterpolationMode.BICUBIC, antialias=True)
    torch.testing.assert_close(small(pixels)[0], expected, rtol=0, atol=1e-5)


def test_the_teacher_itself_as_student_has_no_loss(tmp_path):
    """Weights, normalisation and preprocessing of a Lightning checkpoint arrive as they were."""
    data = DigitsDataModule(img_size=16, batch_size=32, num_workers=0, mean=[0.25], std=[0.5])
    source = ClassificationTask("test_luna_vit", num_classes=10, in_chans=1, model_kwargs=LUNA)
    trainer = tiny_trainer(tmp_path, max_epochs=1, limit_train_batches=2, limit_val_batches=1)
    trainer.fit(source, data)
    trainer.save_checkpoint(tmp_path / "teacher.ckpt")
    task = DistillationTask(
        model_name="test_luna_vit",
        num_classes=10,
        in_chans=1,
        model_kwargs=LUNA,
        checkpoint=str(tmp_path / "teacher.ckpt"),
        teacher_model="test_luna_vit",
        teacher_checkpoint=str(tmp_path / "teacher.ckpt"),
        teacher_kwargs=LUNA,
        task_weight=0.0,
    )
    other = DigitsDataModule(img_size=16, batch_size=32, num_workers=0)  # normalised in another way
    images = next(iter(other.val_dataloader()))[0]
    task.check_data(other, "fit")
    with torch.no_grad():
        ours = source.eval()(next(iter(data.val_dataloader()))[0])
    torch.testing.assert_close(task.teacher(images)[0], ours, rtol=1e-4, atol=1e-5)
    trainer = tiny_trainer(tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(task, DigitsDataModule(img_size=16, batch_size=32, num_workers=0, mean=[0.25], std=[0.5]))
    assert trainer.callback_metrics["train_loss"] == 0


def test_mixed_images_are_what_the_teacher_sees(tmp_path, data, teacher_file):
    task = distill(teacher_file, cutmix=1.0)
    seen = {"student": [], "teacher": []}
    task.model.register_forward_pre_hook(lambda module, inputs: seen["student"].append(inputs[0].clone()))
    task.teacher.model.register_forward_pre_hook(lambda module, inputs: seen["teacher"].append(inputs[0].clone()))
    tiny_trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(task, data)
    assert len(seen["student"]) == len(seen["teacher"]) == 4
    assert all(torch.equal(a, b) for a, b in zip(seen["student"], seen["teacher"], strict=True))
    first = next(iter(data.train_dataloader()))[0]
    assert not torch.equal(seen["teacher"][0], first)


# ---- runs


def fit(folder: Path, teacher: Path, resume: Path | None = None, keep: Path | None = None):
    """As in test_resume, with a teacher, its features and dropped paths."""
    seed_everything(1, verbose=False)
    data = DigitsDataModule(img_size=16, batch_size=32, num_workers=0, seed=4)
    arguments = {"num_classes": 10, "mixup": 0.5, "lr": 1e-2, "model_kwargs": {**LUNA, "drop_path_rate": 0.3}}
    task = distill(teacher, **arguments, feature_layers=[[1, 2]], temperature=2.0)
    trainer = Trainer(
        logger=CSVLogger(folder, name=""),
        callbacks=[ExactResume(), EMA(decay=0.9), *([EveryMoment(keep)] if keep else [])],
        accelerator="cpu",
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=keep is not None,
        max_epochs=2,
        limit_train_batches=4,
        limit_val_batches=1,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
    )
    trainer.fit(task, data, ckpt_path=resume, weights_only=True)
    with (folder / "version_0" / "metrics.csv").open(newline="") as file:
        return task.state_dict(), list(csv.DictReader(file))


@pytest.mark.filterwarnings("ignore")
def test_resume_is_exact(tmp_path):
    model = timm.create_model("test_luna_vit", num_classes=10, in_chans=1, mixer="softmax", **TEACHER)
    save_file(model.state_dict(), tmp_path / "teacher.safetensors")
    weights, rows = fit(tmp_path / "whole", tmp_path / "teacher.safetensors", keep=tmp_path / "kept")
    assert {"train_task_loss", "train_logit_loss", "train_feature_loss"} <= set(rows[0])
    for name in ("02-step2-batch.ckpt", "*-step4-epoch.ckpt"):
        (path,) = (tmp_path / "kept").glob(name.replace("02-", "*-"))
        ours, _ = fit(tmp_path / path.stem, tmp_path / "teacher.safetensors", resume=path)
        torch.testing.assert_close(ours, weights, rtol=0, atol=0)


def test_exported_weights_are_a_plain_timm_model(tmp_path, data, teacher_file, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint = ModelCheckpoint(tmp_path / "run", monitor="val_acc1", mode="max", filename="best")
    callbacks = [EMA(decay=0.5), checkpoint, ExportBest()]
    task = distill(teacher_file, feature_layers=[[0, 0]], lr=1e-2)
    tiny_trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True).fit(task, data)
    callbacks[-1].announce()
    statement = re.search(r"load it with: *(.*)", capsys.readouterr().out)[1]
    namespace = {}
    exec(statement, namespace)
    exported = load_file(tmp_path / "run" / "best.safetensors")
    assert exported.keys() == namespace["model"].state_dict().keys()
    teacher_file.unlink()  # evaluation does without the teacher
    again = distill(teacher_file, feature_layers=[[0, 0]])
    tiny_trainer(tmp_path).test(again, data, ckpt_path=tmp_path / "run" / "best.ckpt", weights_only=True, verbose=False)
    images = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(namespace["model"].eval()(images), again.eval()(images))


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher_model": "test_luna_vitt"}, "unknown model name 'test_luna_vitt'; did you mean test_luna_vit"),
        ({"teacher_checkpoint": None}, "test_luna_vit has no pretrained weights, and random ones teach nothing"),
        (
            {"teacher_model": "resnet18", "teacher_checkpoint": None, "teacher_kwargs": None},
            "the teacher resnet18 has 1000 classes, the student num_classes=6",
        ),
        ({"teacher_kwargs": {"num_classes": 6}}, "teacher_kwargs cannot have num_classes"),
        ({"feature_layers": [[2, 0]]}, r"the student test_luna_vit has layers 0 to 1, got 2"),
        ({"feature_layers": [[0, -4]]}, r"the teacher test_luna_vit has layers 0 to 2, got -4"),
        ({"feature_layers": [[0]]}, "pairs"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"logit_weight": -1.0}, "logit_weight must be at least 0"),
        ({"logit_weight": 0.0}, "nothing to distill"),
        ({"teacher_img_size": 0}, "teacher_img_size must be a positive side"),
    ],
)
def test_bad_arguments(teacher_file, arguments, message):
    with pytest.raises(ValueError, match=message):
        distill(teacher_file, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 5}, r"teacher.safetensors' has a head for 6 classes, the model one for 5"),
        ({"teacher_kwargs": {**TEACHER, "mixer": "softmax", "embed_dim": 32}}, "does not fit LunaVit"),
        (
            {"teacher_mean": None, "teacher_std": None},
            "the teacher has 1 channels, but its mean is .*: give teacher_mean",
        ),
    ],
)
def test_bad_files(teacher_file, arguments, message):
    with pytest.raises(ValueError, match=message):
        distill(teacher_file, **arguments).check_start()


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="teacher_checkpoint .*none.pth' does not exist"):
        distill(tmp_path / "none.pth").check_start()
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match="text.pth' is not a checkpoint"):
        distill(tmp_path / "text.pth").check_start()


def test_checkpoint_of_another_model_or_arguments(tmp_path, data):
    source = ClassificationTask("test_luna_vit", num_classes=6, in_chans=1, model_kwargs={**LUNA, "query_gain": 1.0})
    trainer = tiny_trainer(tmp_path, max_epochs=1)
    trainer.fit(source, data)
    trainer.save_checkpoint(tmp_path / "teacher.ckpt")
    with pytest.raises(ValueError, match=r"holds test_luna_vit with teacher_kwargs .*'query_gain': 1.0"):
        distill(tmp_path / "teacher.ckpt", teacher_kwargs=LUNA).check_start()


def test_images_that_the_teacher_does_not_take(tmp_path):
    model = timm.create_model("test_vit", num_classes=10, in_chans=1)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    arguments = {"teacher_model": "test_vit", "teacher_checkpoint": str(tmp_path / "vit.pth")}
    arguments["teacher_kwargs"] = {"dynamic_img_size": False}
    task = distill(None, **arguments, num_classes=10)
    data = DigitsDataModule(img_size=16, num_workers=0)
    sizes = DigitsDataModule(img_size=160, num_workers=0, train_sizes=[160, 96], patch_size=4)
    with pytest.raises(ValueError, match="does not take images of 96 x 96 pixels"):
        task.check_data(sizes, "fit")
    with pytest.raises(ValueError, match=r"teacher_img_size is None\) does not take images of 16 x 16 pixels"):
        tiny_trainer(tmp_path).fit(task, data)
    rgb = distill(None, **arguments, num_classes=10, in_chans=3, teacher_in_chans=1)
    with pytest.raises(ValueError, match="images of 3 channels cannot be shown to a teacher of 1"):
        tiny_trainer(tmp_path).fit(rgb, SyntheticData(num_classes=10, in_chans=3))


class OneSize(LightningDataModule):
    """Of another package: it says what its images are like, and knows nothing of other sizes to train at."""

    def timm_cfg(self) -> dict:
        return {"input_size": (1, 16, 16), "mean": (0.5,), "std": (0.5,)}


def test_data_that_knows_no_sizes_to_train_at(teacher_file):
    distill(teacher_file).check_data(OneSize(), "fit")
    with pytest.raises(ValueError, match="the model does not take images of 16 x 16 pixels"):
        fixed = {"model_kwargs": {"dynamic_img_size": False}}
        ClassificationTask("test_vit", num_classes=5, in_chans=1, **fixed).check_data(OneSize(), "fit")


def call(monkeypatch, *args: str) -> int:
    """Run the command line in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["train.py", *args])
    try:
        main()
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def test_command(tmp_path, monkeypatch, capsys):
    """Through train.py: a mistake is one line before anything is written, and a run ends with a test."""
    monkeypatch.chdir(tmp_path)
    root = Path(__file__).parents[2] / "configs"
    config = yaml.safe_load((root / "debug.yaml").read_text())
    model = {**config["model"], "teacher_model": "test_luna_vit", "teacher_kwargs": TEACHER, **STATS}
    model |= {"teacher_checkpoint": "teacher.pth", "feature_layers": [[-1, -1]], "temperature": 2.0}
    config["model"] = {"class_path": "luna_vision.tasks.DistillationTask", "init_args": model}
    Path("distill.yaml").write_text(yaml.safe_dump(config))
    assert call(monkeypatch, "fit", "--config", "distill.yaml") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line == "error: teacher_checkpoint 'teacher.pth' does not exist"
    assert [path.name for path in tmp_path.iterdir()] == ["distill.yaml"]
    torch.save(timm.create_model("test_luna_vit", num_classes=10, in_chans=1, **TEACHER).state_dict(), "teacher.pth")
    assert call(monkeypatch, "fit", "--config", "distill.yaml") == 0
    assert "load it with:" in capsys.readouterr().out
    best = Path("runs/debug/version_0/checkpoints/best.ckpt")
    assert call(monkeypatch, "test", "--config", "distill.yaml", "--ckpt_path", str(best)) == 0
    Image.new("L", (20, 30)).save(tmp_path / "0.png")
    arguments = ["--ckpt_path", str(best), "--data.predict_path=0.png"]
    assert call(monkeypatch, "predict", "--config", "distill.yaml", *arguments) == 0


def test_layers_are_refused_with_fsdp2(teacher_file, monkeypatch):
    """Which gathers the weights for forward() alone, and would leave the projections of each process to themselves."""
    task = distill(teacher_file, feature_layers=[[0, 1]])
    monkeypatch.setattr(task, "_is_sharded", lambda: True)
    with pytest.raises(ValueError, match="feature_layers do not work with fsdp2"):
        task.configure_model()
