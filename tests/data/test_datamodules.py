"""The data modules of small, well-known datasets, and what all data modules share."""

import os
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser
from torchvision.datasets import FashionMNIST

import luna_vision.data as lvd
from luna_vision.data import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    DigitsDataModule,
    FashionMNISTDataModule,
    ImageDataModule,
)
from luna_vision.data.base import hold_out

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
MODULES = [name for name in lvd.__all__ if name.endswith("DataModule")]
TARGETS = ("CanvasDetectionDataModule", "CanvasSegmentationDataModule", "CanvasSequenceDataModule")  # own arguments
SUBCLASSES = [name for name in MODULES if name not in ("ImageDataModule", *TARGETS)]


def check_batches(module: ImageDataModule, sizes: dict[str, int], size: tuple[int, int], in_chans: int) -> None:
    """Every loader of a module gives all of its images, in the promised shapes and types."""
    module.prepare_data()
    for stage in ("fit", "test", "predict"):
        module.setup(stage)
    assert module.img_size == size and module.in_chans == in_chans
    assert len(module.class_names) == module.num_classes
    for split, length in sizes.items():
        batches = list(getattr(module, f"{split}_dataloader")())
        assert sum(len(targets) for _, targets in batches) == length
        for images, targets in batches:
            assert images.dtype == torch.float32 and images.shape[1:] == (in_chans, *size) and images.isfinite().all()
            assert targets.dtype == torch.int64 and targets.shape == images.shape[:1]
            assert 0 <= targets.min() and targets.max() < module.num_classes
    ids = [name for images, names in module.predict_dataloader() for name in names]
    assert ids == [str(i) for i in range(sizes["test"])]


@pytest.mark.parametrize("in_chans, size", [(1, 32), (3, [20, 33])])
def test_digits(in_chans: int, size: int | list[int]):
    module = DigitsDataModule(img_size=size, in_chans=in_chans, drop_last=False)
    check_batches(module, {"train": 1149, "val": 288, "test": 360}, (32, 32) if size == 32 else (20, 33), in_chans)


def test_digits_are_normalised_and_right_side_up():
    module = DigitsDataModule(img_size=8, augmentation="none", seed=3)
    images = torch.cat([images for images, _ in module.test_dataloader()])
    assert abs(images.mean()) < 0.1 and images.std() == pytest.approx(1, abs=0.1)
    dataset = module.dataset("test")
    assert torch.allclose(
        dataset[5][0][0] * module.std[0] + module.mean[0], torch.tensor(dataset.source.images[5] / 255.0).float()
    )


def test_splits_are_disjoint_stratified_and_the_same_for_every_seed():
    modules = [DigitsDataModule(seed=seed) for seed in (0, 7)]
    images = {split: [m.dataset(split).source.images for m in modules] for split in ("train", "val", "test")}
    for first, second in images.values():
        assert np.array_equal(first, second)
    unique = [{image.tobytes() for image in first} for first, _ in images.values()]
    assert sum(map(len, unique)) == len(set.union(*unique)) == 1797  # no digit of scikit-learn occurs twice
    for split in images:
        counts = np.bincount(modules[0].dataset(split).source.targets)
        assert counts.max() <= 1.15 * counts.min()


def test_hold_out():
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    kept, held = hold_out(labels, 0.2)
    assert sorted([*kept, *held]) == list(range(100))
    assert np.bincount(labels[held]).tolist() == [12, 6, 2]
    assert [len(part) for part in hold_out(labels, 0)] == [100, 0]
    with pytest.raises(ValueError, match="cannot hold out 0.5 of 3 samples: "):
        hold_out([0, 1, 2], 0.5)


def test_fashion_mnist(fashion_root: str):
    module = FashionMNISTDataModule(fashion_root, batch_size=32, num_workers=0, drop_last=False)
    check_batches(module, {"train": 90, "val": 10, "test": 40}, (28, 28), 1)
    assert module.class_names[9] == "Ankle boot"
    brightness = {}
    for split in ("train", "val", "test"):
        source = module.dataset(split).source
        brightness[split] = {np.asarray(source[i][0]).max() for i in range(len(source))}
    assert brightness["train"] | brightness["val"] == set(range(50, 150))  # together the training file, never the test
    assert brightness["test"] == set(range(150, 190))
    assert not brightness["train"] & brightness["val"]


def test_cifar(cifar: tuple[int, str]):
    classes, root = cifar
    module_class = CIFAR10DataModule if classes == 10 else CIFAR100DataModule
    module = module_class(root, num_workers=0, val_fraction=0.5, drop_last=False)
    train = classes * 2 * (5 if classes == 10 else 1)
    check_batches(module, {"train": train // 2, "val": train // 2, "test": classes * 2}, (32, 32), 3)


def test_cifar_class_names_are_torchvisions_order(cifar: tuple[int, str]):
    for module_class in (CIFAR10DataModule, CIFAR100DataModule):
        names = module_class.class_names
        assert names == sorted(names) and len(set(names)) == module_class.num_classes


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("FashionMNISTDataModule", {"download": True}),
        ("CanvasDataModule", {"source": "fashion_mnist", "download": True}),
    ],
)
def test_a_download_that_fails_is_one_line(name, arguments, tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz:\nTried https://example.org, got:\nno network")

    monkeypatch.setattr(FashionMNIST, "download", fail)
    with pytest.raises(
        OSError, match="FashionMNIST is not in .* and could not be downloaded: Error .* no network$"
    ) as e:
        getattr(lvd, name)(root=str(tmp_path), **arguments).prepare_data()
    assert str(tmp_path) in str(e.value)


@pytest.mark.parametrize("module_class", [FashionMNISTDataModule, CIFAR10DataModule, CIFAR100DataModule])
def test_missing_data_says_where_and_what_to_do(module_class: type, tmp_path: Path):
    module = module_class(str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError) as caught:
        module.setup("fit")
    message = str(caught.value)
    assert str(tmp_path / "nothing" / module.folder) in message and "download=True" in message and "\n" not in message


def test_corrupted_cifar_is_not_read(cifar: tuple[int, str]):
    classes, root = cifar
    module = (CIFAR10DataModule if classes == 10 else CIFAR100DataModule)(root)
    path = Path(root, module.folder, module.dataset_class.train_list[0][0])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileNotFoundError, match="no complete CIFAR"):
        module.setup("fit")


@pytest.mark.filterwarnings("ignore")
def test_without_validation_images_there_is_no_validation(fashion_root: str):
    module = FashionMNISTDataModule(fashion_root, num_workers=0, val_fraction=0.0)
    assert len(module.dataset("train")) == 100
    assert module.val_dataloader() == []
    digits = DigitsDataModule(val_fraction=0.0, img_size=8, augmentation="none")
    assert len(digits.dataset("train")) == 1437
    L.Trainer(accelerator="cpu", max_epochs=1, limit_train_batches=2, logger=False, **QUIET).fit(Counter(), digits)


def test_predict_files(folder_root: Path):
    path = str(folder_root / "val")
    module = DigitsDataModule(predict_path=path, eval_batch_size=4)
    module.setup("predict")
    batches = list(module.predict_dataloader())
    assert [tuple(images.shape) for images, _ in batches] == [(4, 1, 32, 32), (2, 1, 32, 32)]
    assert [name for _, names in batches for name in names] == lvd.find_images(path)


def test_last_training_batch():
    assert len(DigitsDataModule(batch_size=500).train_dataloader()) == 2
    assert len(DigitsDataModule(batch_size=500, drop_last=False).train_dataloader()) == 3
    assert len(DigitsDataModule(batch_size=5000).train_dataloader()) == 1  # dropping it would leave nothing


def test_statistics_by_channel():
    assert DigitsDataModule(in_chans=3).mean == DigitsDataModule.MEAN * 3
    assert CIFAR10DataModule(in_chans=1).mean == (pytest.approx(sum(CIFAR10DataModule.MEAN) / 3),)
    assert CIFAR10DataModule(std=[0.5]).std == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"augmentation": "imgaug"}, "augmentation must be one of .*, got 'imgaug'"),
        ({"in_chans": 0}, "in_chans must be at least 1, got 0"),
        ({"img_size": 0}, "img_size must be a positive side or"),
        ({"img_size": [8, 8, 8]}, "img_size must be a positive side or"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"eval_batch_size": -1}, "eval_batch_size must be at least 1, got -1"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"val_fraction": 1.0}, r"val_fraction must be in \[0, 1\), got 1.0"),
        ({"random_erasing": 2}, "random_erasing must be in"),
        ({"mean": [0.1, 0.2]}, "mean must be 1 or 3 finite numbers, got"),
        ({"mean": [float("nan")]}, "mean must be 1 or 3 finite numbers, got"),
        ({"std": [0.0]}, "std must be 1 or 3 finite numbers, above 0, got"),
    ],
)
def test_bad_arguments(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        DigitsDataModule(**arguments)


@pytest.mark.parametrize("name", [*SUBCLASSES, *TARGETS])
def test_typos_are_not_swallowed(name: str):
    required = {"name": "", "num_classes": 2} if name == "TimmDataModule" else {}
    with pytest.raises(TypeError, match="batchsize"):
        getattr(lvd, name)(**required, batchsize=3)


@pytest.mark.parametrize("name", SUBCLASSES)
def test_every_argument_can_stand_in_a_yaml(name: str, capsys: pytest.CaptureFixture):
    """As LightningCLI reads it: arguments of the base class included, unknown ones refused."""
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(ImageDataModule, "data", subclass_mode=True)
    init_args = {
        "root": "x",
        "img_size": [64, 32],
        "num_workers": 0,
        "mean": [0.1],
        "crop_scale": [0.5, 1.0],
        "seed": 3,
    }
    init_args |= {"predict_path": ["a.png"], "random_erasing": 0.1, "augmentation": "timm", "val_fraction": 0.05}
    if name == "TimmDataModule":
        init_args |= {"name": "torch/cifar10", "num_classes": 10, "dataset_args": {"input_img_mode": "RGB"}}
    if name in ("DetectionDataModule", "SegmentationDataModule", "SlideDataModule"):  # their images keep their size
        init_args = {"root": "x", "seed": 3, "predict_path": ["a.png"], "hflip": 0.1}
    if name == "CanvasDataModule":
        del init_args["img_size"]
        init_args |= {"source": "digits", "side": 96, "num_items": 3, "item_size": 8}
    config = {"class_path": f"luna_vision.data.{name}", "init_args": init_args}
    module = parser.instantiate_classes(parser.parse_object({"data": config})).data
    assert type(module) is getattr(lvd, name)
    assert (
        module.mean[0] == init_args.get("mean", module.mean)[0]
        and module.seed == 3
        and module.predict_path == ["a.png"]
    )
    init_args["batchsize"] = 3
    with pytest.raises(SystemExit):
        parser.parse_object({"data": config})
    assert "batchsize" in capsys.readouterr().err


def test_subclass_defaults_stay_when_one_argument_is_overridden():
    parser = ArgumentParser()
    parser.add_class_arguments(DigitsDataModule, "data")
    module = parser.instantiate_classes(parser.parse_args(["--data.augmentation=torchvision"])).data
    assert module.img_size == (32, 32) and module.in_chans == 1 and module.mean == DigitsDataModule.MEAN


class Counter(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)
        self.ids: list[str] = []

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self.layer(batch[0].flatten(1)).argmax(1) == batch[1]).float().mean())

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        self.ids += batch[1]

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


@pytest.mark.filterwarnings("ignore")
def test_trainer_runs_all_stages():
    trainer = L.Trainer(accelerator="cpu", max_epochs=4, logger=False, **QUIET)
    data, model = DigitsDataModule(img_size=8, augmentation="none"), Counter()
    trainer.fit(model, data)
    assert trainer.test(model, data, verbose=False)[0]["val_acc"] > 0.8  # images and labels belong together
    trainer.predict(model, data)
    assert model.ids == [str(i) for i in range(360)]


def test_albumentations_is_not_asked_for_updates():
    assert "albumentations" in sys.modules
    assert os.environ["NO_ALBUMENTATIONS_UPDATE"]
