"""What a checkpoint's classes are called must be what the data's are called, in the same order."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image

from luna_vision.data import ImageFolderDataModule, TimmDataModule
from luna_vision.tasks import ClassificationTask, DistillationTask, export_weights

from .conftest import tiny_trainer

CLASSES = ["10", "2", "eel"]  # timm counts 2 before 10
TASK = {
    "model_name": "test_luna_vit",
    "num_classes": 3,
    "model_kwargs": {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2},
}
DATA = {"img_size": 16, "batch_size": 8, "num_workers": 0}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """root/{train,val}/{10,2,eel} with four images each."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in CLASSES:
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(4):
                image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
                image.save(tmp_path / "photos" / split / name / f"{i}.png")
    return tmp_path / "photos"


def folder_data(root: Path, **arguments) -> ImageFolderDataModule:
    return ImageFolderDataModule(str(root), **DATA, **arguments)


def timm_data(root: Path, **arguments) -> TimmDataModule:
    return TimmDataModule("", 3, str(root), test_split="val", **DATA, **arguments)


@pytest.fixture
def checkpoint(root: Path, tmp_path: Path) -> str:
    trainer = tiny_trainer(tmp_path, max_epochs=1)
    trainer.fit(ClassificationTask(**TASK), folder_data(root))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    return str(tmp_path / "one.ckpt")


def rename(root: Path, old: str, new: str) -> None:
    for split in ("train", "val"):
        (root / split / old).rename(root / split / new)


def use(trainer: Trainer, stage: str, data, **arguments) -> None:
    getattr(trainer, stage)(ClassificationTask(**TASK), datamodule=data, **arguments)


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_other_names_are_refused_and_named(stage: str, root: Path, checkpoint: str, tmp_path: Path):
    trainer = tiny_trainer(tmp_path)
    use(trainer, stage, folder_data(root), ckpt_path=checkpoint)
    rename(root, "eel", "Eel")
    with pytest.raises(ValueError) as caught:
        use(trainer, stage, folder_data(root), ckpt_path=checkpoint)
    message = str(caught.value)
    assert "the data lacks eel" in message and "the data alone has Eel" in message
    assert "--model.checkpoint" in message and "\n" not in message


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_another_order_is_refused(stage: str, root: Path, checkpoint: str, tmp_path: Path):
    with pytest.raises(ValueError, match="another order, class 0 is '10' there and '2' in the data"):
        use(tiny_trainer(tmp_path), stage, timm_data(root), ckpt_path=checkpoint)


def test_numbers_are_no_names(root: Path, checkpoint: str, tmp_path: Path):
    numbers = {"dataset_args": {"class_map": {name: label for label, name in enumerate(CLASSES)}}}
    use(tiny_trainer(tmp_path), "test", timm_data(root, **numbers), ckpt_path=checkpoint)
    use(tiny_trainer(tmp_path), "test", timm_data(root, class_names=CLASSES, **numbers), ckpt_path=checkpoint)


def test_images_are_predicted_without_a_training_folder(root: Path, checkpoint: str, tmp_path: Path):
    data = folder_data(tmp_path / "nowhere", predict_path=str(root / "val"))
    use(tiny_trainer(tmp_path), "predict", data, ckpt_path=checkpoint)
    rename(root, "eel", "Eel")  # by whose name predictions would be called
    with pytest.raises(ValueError, match="the data lacks eel"):
        data = folder_data(root, predict_path=str(root / "val"))
        use(tiny_trainer(tmp_path), "predict", data, ckpt_path=checkpoint)


@pytest.mark.parametrize("kind", ["ckpt", "safetensors"])
def test_weights_alone_are_for_training_on_other_classes(kind: str, root: Path, checkpoint: str, tmp_path: Path):
    if kind == "safetensors":
        export_weights(checkpoint, tmp_path / "one.safetensors")
        checkpoint = str(tmp_path / "one.safetensors")
    rename(root, "eel", "Eel")
    task = ClassificationTask(**TASK, checkpoint=checkpoint, lr=0.0, warmup_lr=0.0, min_lr=0.0)
    tiny_trainer(tmp_path, max_epochs=1).fit(task, folder_data(root))
    weights = torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(task.state_dict()["model.head.weight"], weights["model.head.weight"])
    for stage in ("validate", "test", "predict"):
        with pytest.raises(ValueError, match="the data lacks eel"):
            getattr(tiny_trainer(tmp_path), stage)(ClassificationTask(**TASK, checkpoint=checkpoint), folder_data(root))


def test_a_teacher_of_other_classes_is_refused(root: Path, checkpoint: str, tmp_path: Path):
    teacher = {"teacher_model": "test_luna_vit", "teacher_kwargs": TASK["model_kwargs"]}
    task = DistillationTask(**TASK, **teacher, teacher_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="the teacher .*one.ckpt.* another order"):
        tiny_trainer(tmp_path, max_epochs=1).fit(task, timm_data(root))
    tiny_trainer(tmp_path, max_epochs=1).fit(task, folder_data(root))
