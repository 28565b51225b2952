"""ImageFolder and timm's dataset factory."""

import logging
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from PIL import Image
from timm.data.readers.shared_count import SharedCount
from torch.utils.data import get_worker_info

from luna_vision.data import DigitsDataModule, FashionMNISTDataModule, ImageFolderDataModule, TimmDataModule
from luna_vision.data.images import describe_split
from luna_vision.images.decode import SampleError


def folder_module(root: Path, **kwargs) -> ImageFolderDataModule:
    return ImageFolderDataModule(str(root), **{"img_size": 24, "num_workers": 0, "batch_size": 4} | kwargs)


def timm_module(root: Path | str, **kwargs) -> TimmDataModule:
    arguments = {"name": "", "num_classes": 3, "img_size": 24, "num_workers": 0, "batch_size": 4} | kwargs
    return TimmDataModule(root=str(root), **arguments)


@pytest.mark.parametrize("in_chans, size", [(3, (24, 24)), (1, (20, 33))])
def test_image_folder(folder_root: Path, in_chans: int, size: tuple[int, int]):
    module = folder_module(folder_root, img_size=list(size), in_chans=in_chans, drop_last=False)
    assert (module.num_classes, module.class_names) == (3, ["cat", "dog", "eel"])  # known before setup
    module.setup("fit")
    for loader, length in ((module.train_dataloader(), 18), (module.val_dataloader(), 6)):
        batches = list(loader)
        assert all(images.shape[1:] == (in_chans, *size) and images.dtype == torch.float32 for images, _ in batches)
        assert np.bincount(torch.cat([targets for _, targets in batches])).tolist() == [length // 3] * 3
    assert len(module.dataset("test")) == 6  # no test folder: testing is on the validation images


def test_image_folder_with_a_test_folder(folder_root: Path):
    shutil.copytree(folder_root / "val" / "dog", folder_root / "test" / "dog")
    module = folder_module(folder_root)
    assert [label for _, label in module.make_source("test").samples] == [1, 1]  # numbered as in training
    assert len(module.dataset("val")) == 6


def test_image_folder_without_a_validation_folder(folder_root: Path):
    shutil.rmtree(folder_root / "val")
    module = folder_module(folder_root, val_fraction=1 / 3)
    files = {
        s: {module.dataset(s).source.dataset.samples[i] for i in module.dataset(s).source.indices}
        for s in ("train", "val")
    }
    assert len(files["train"]) == 12 and len(files["val"]) == 6 and not files["train"] & files["val"]
    tested = module.dataset("test")
    assert {tested.source.dataset.samples[i] for i in tested.source.indices} == files["val"]  # there are no others
    assert describe_split("test", tested, 3) == f"test: 6 images held out of 18 in {folder_root}/train, 3 classes"
    assert len(module.predict_dataloader().dataset) == 6


def test_a_class_that_validation_lacks_does_not_shift_labels(folder_root: Path):
    shutil.rmtree(folder_root / "val" / "cat")
    assert {label for _, label in folder_module(folder_root).make_source("val").samples} == {1, 2}


def test_image_folder_errors(folder_root: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError) as caught:
        folder_module(tmp_path / "nowhere").setup("fit")
    assert str(caught.value).startswith(
        f"no folder {tmp_path}/nowhere/train: root= must contain train/<class>/<images>"
    )
    (tmp_path / "bare" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="no class folders in .*bare/train: expected"):
        folder_module(tmp_path / "bare").setup("fit")
    (tmp_path / "bare" / "train" / "cat").mkdir()
    with pytest.raises(ValueError, match="no images in class folders of .*bare/train: cat"):
        folder_module(tmp_path / "bare").setup("fit")
    shutil.copytree(folder_root / "val" / "cat", folder_root / "val" / "yak")
    with pytest.raises(ValueError, match="val has classes that the training folder lacks: yak"):
        folder_module(folder_root).setup("fit")


def clutter(root: Path) -> None:
    """What is no image, in all places: each is skipped."""
    for folder in (root, root / "train", root / "train" / "cat", root / "val" / "dog"):
        for name in (".ipynb_checkpoints", ".Trash-0", "__MACOSX"):
            (folder / name).mkdir()
            (folder / name / "0.png").write_bytes(b"x")
        for name in (".DS_Store", "._0.jpg", "notes.txt"):
            (folder / name).write_bytes(b"x")
        os.mkfifo(folder / "pipe.png")  # which would be read for ever


MODULES = {"folder": folder_module, "timm": timm_module}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_what_is_no_image_is_no_class_and_no_sample(make: Callable, folder_root: Path):
    before = {split: make(folder_root).make_source(split).samples for split in ("train", "val")}
    clutter(folder_root)
    module = make(folder_root)
    assert {split: module.make_source(split).samples for split in ("train", "val")} == before
    assert module.class_names == ["cat", "dog", "eel"]
    module.setup("fit")
    assert sum(len(targets) for _, targets in module.val_dataloader()) == 6


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
@pytest.mark.parametrize("split", ["train", "val"])
def test_classes_without_images_are_named(make: Callable, split: str, folder_root: Path):
    for name in ("eel", "dog"):
        shutil.rmtree(folder_root / split / name)
        (folder_root / split / name).mkdir()
        (folder_root / split / name / "._0.png").touch()
    with pytest.raises(ValueError, match=f"{split}: dog, eel$"):
        make(folder_root).setup("fit")


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
@pytest.mark.parametrize("name", ["validation", "valid"])
def test_usual_names_of_the_validation_folder(make: Callable, name: str, folder_root: Path):
    (folder_root / "val").rename(folder_root / name)
    module = make(folder_root)
    assert (len(module.dataset("train")), len(module.dataset("val"))) == (18, 6)
    (folder_root / "val").mkdir()
    with pytest.raises(ValueError, match=f"photos/val and .*photos/{name} are both for validation"):
        make(folder_root).setup("fit")


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_a_run_says_what_it_has_found(folder_root: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    clutter(folder_root)
    for name in ("masks", "Val"):
        (folder_root / name).mkdir()
    shutil.rmtree(folder_root / "val" / "eel")
    (folder_root / "train" / "cat" / "gone.png").symlink_to("nothing.png")
    module = folder_module(folder_root)
    for stage in ("fit", "test", "fit", "validate"):  # as a run does: the second time it has nothing new to say
        module.setup(stage)
    assert said(caplog) == [
        f"train: 19 images in {folder_root}/train, 3 classes; skipped 10 hidden and 4 other names "
        f"(2 .txt, 2 not a file); links to nothing: {folder_root}/train/cat/gone.png",
        f"val: 4 images in {folder_root}/val, 2 classes; skipped 5 hidden and 2 other names (1 .txt, 1 not a file)",
        f"not used of {folder_root}: Val, masks",
        f"test: 4 images in {folder_root}/val, 2 classes; skipped 5 hidden and 2 other names (1 .txt, 1 not a file)",
    ]


def test_only_the_first_process_says_it(folder_root: Path, caplog: pytest.LogCaptureFixture, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    folder_module(folder_root).setup("fit")
    assert said(caplog) == []


def test_training_and_test_folders_alone(folder_root: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    (folder_root / "val").rename(folder_root / "test")
    module = folder_module(folder_root, val_fraction=1 / 3)
    module.setup("fit")
    module.setup("test")
    assert said(caplog) == [
        f"train: 12 images of 18 in {folder_root}/train, 3 classes",
        f"val: 6 images held out of 18 in {folder_root}/train, 3 classes",
        f"test: 6 images in {folder_root}/test, 3 classes",
    ]
    assert [len(module.dataset(split)) for split in ("train", "val", "test")] == [12, 6, 6]


def test_images_to_predict_are_counted(folder_root: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    clutter(folder_root)
    path = str(folder_root / "val" / "dog")
    folder_module(folder_root / "nowhere", predict_path=path).setup("predict")
    assert said(caplog) == [f"{path}; skipped 5 hidden and 2 other names (1 .txt, 1 not a file)", "predict: 2 images"]


def test_other_data_says_what_it_has(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    DigitsDataModule().setup("fit")
    assert said(caplog) == ["train: 1149 images, 10 classes", "val: 288 images, 10 classes"]


def test_links_in_circles(folder_root: Path):
    (folder_root / "train" / "again").symlink_to(folder_root / "train")
    (folder_root / "train" / "root").symlink_to(folder_root)
    (folder_root / "train" / "dog" / "up").symlink_to("..")
    module = folder_module(folder_root)
    assert module.class_names == ["cat", "dog", "eel"] and len(module.dataset("train")) == 18


def test_classes_that_differ_by_case_are_two(folder_root: Path):
    shutil.copytree(folder_root / "train" / "cat", folder_root / "train" / "Cat")
    module = folder_module(folder_root)
    assert module.class_names == ["Cat", "cat", "dog", "eel"]
    assert np.bincount(module.make_source("train").targets).tolist() == [6] * 4
    (folder_root / "val" / "dog").rename(folder_root / "val" / "Dog")
    with pytest.raises(ValueError, match="val has classes that the training folder lacks: Dog"):
        module.setup("fit")


def test_a_class_folder_that_cannot_be_read(folder_root: Path, deny):
    deny("dog")
    with pytest.raises(PermissionError, match="train/dog"):
        folder_module(folder_root).setup("fit")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_image_is_named(folder_root: Path, num_workers: int, error_of: Callable):
    bad = folder_root / "val" / "dog" / "1.png"
    for content, message in ((b"no picture", "cannot decode image file"), (b"", "image file")):
        bad.write_bytes(content)
        error = error_of(folder_module(folder_root, num_workers=num_workers).val_dataloader())
        assert error.startswith(f"ImageFolderDataModule val sample 3: {message} {bad}") and "\n" not in error
    with pytest.raises(SampleError, match="image file .*1.png is empty"):
        list(folder_module(folder_root, predict_path=str(bad)).predict_dataloader())


def test_timm_folder(folder_root: Path):
    module = timm_module(folder_root, class_names=["cat", "dog", "eel"], drop_last=False)
    module.setup("fit")
    assert sum(len(targets) for _, targets in module.train_dataloader()) == 18
    images, targets = next(iter(module.val_dataloader()))
    assert images.shape == (4, 3, 24, 24) and targets.tolist() == [0, 0, 1, 1]
    assert len(module.dataset("test")) == 6  # those of validation
    tested = timm_module(folder_root, test_split="validation")
    assert [name for _, names in tested.predict_dataloader() for name in names] == [str(i) for i in range(6)]


def test_timm_folders_have_the_classes_of_training(folder_root: Path, tmp_path: Path):
    shutil.rmtree(folder_root / "val" / "cat")
    assert {label for _, label in timm_module(folder_root).make_source("val").samples} == {1, 2}
    shutil.copytree(folder_root / "train" / "cat", tmp_path / "deep" / "train" / "animals" / "10")
    shutil.copytree(folder_root / "train" / "dog", tmp_path / "deep" / "train" / "2")
    module = timm_module(tmp_path / "deep", num_classes=2, val_split=None)
    assert module.class_names == ["2", "10"]  # the innermost folders, in natural order
    assert {Path(path).parent.name: label for path, label in module.make_source("train").dataset.samples} == {
        "2": 0,
        "10": 1,
    }


def test_timm_does_not_validate_on_training_images(folder_root: Path):
    (folder_root / "val").rename(folder_root / "test")  # timm itself would take all images, of both folders
    with pytest.raises(FileNotFoundError, match="no folder for the split 'validation' in .*photos"):
        timm_module(folder_root).setup("fit")
    module = timm_module(folder_root, val_split=None, test_split="test", val_fraction=1 / 3)
    assert [len(module.dataset(split)) for split in ("train", "val", "test")] == [12, 6, 6]


def test_timm_class_map(folder_root: Path):
    module = timm_module(folder_root, num_classes=9, dataset_args={"class_map": {"cat": 7, "eel": 3}})
    assert {label for _, label in module.make_source("val").samples} == {3, 7}  # it chooses among the classes, too


def test_timm_agrees_with_the_folder_module(folder_root: Path):
    ours = dict(folder_module(folder_root).make_source("val").samples)
    theirs = dict(timm_module(folder_root).make_source("val").samples)
    assert ours == theirs


def test_timm_tar(folder_root: Path, tmp_path: Path):
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            tar.add(folder_root / split, arcname="")
    module = timm_module(tmp_path / "train.tar", val_split=None, val_fraction=1 / 3)
    assert len(module.dataset("train")) == 12 and len(module.dataset("val")) == 6
    assert next(iter(module.train_dataloader()))[0].shape == (4, 3, 24, 24)
    with pytest.raises(ValueError, match="splits 'train' and 'validation' in .*train.tar are the same"):
        timm_module(tmp_path / "train.tar").setup("fit")


def test_timm_torch_dataset_equals_our_module(fashion_root: str):
    settings = {"img_size": 28, "in_chans": 1, "num_workers": 0, "augmentation": "none", "mean": [0.5], "std": [0.5]}
    theirs = TimmDataModule("torch/fashion_mnist", 10, fashion_root, val_split=None, test_split="test", **settings)
    ours = FashionMNISTDataModule(fashion_root, **settings)
    for split in ("train", "val", "test"):
        one, two = theirs.dataset(split), ours.dataset(split)
        assert len(one) == len(two)
        assert all(torch.equal(one[i][0], two[i][0]) and one[i][1] == two[i][1] for i in (0, 1, len(one) - 1))


class ColorReader:
    """As timm's stream readers: no indices, its own shuffle by epoch, shared between the workers."""

    def __init__(self, count: int) -> None:
        self.count, self.epoch = count, SharedCount()

    def set_epoch(self, epoch: int) -> None:
        self.epoch.value = epoch

    def __iter__(self):
        worker = get_worker_info()
        order = np.random.default_rng(self.epoch.value).permutation(self.count)
        for i in order[worker.id :: worker.num_workers] if worker else order:
            array = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            yield Image.fromarray(array), int(i % 3)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_dataset(name: str, root: str, split: str, **kwargs):
        return timm.data.IterableImageDataset(root, reader=ColorReader(12 if split == "train" else 5))

    monkeypatch.setattr(timm.data, "create_dataset", create_dataset)


def stream_epochs(num_workers: int) -> list[dict[int, set[bytes]]]:
    """For two epochs, the augmented images by label."""
    module = timm_module("x", name="wds/x", img_size=16, num_workers=num_workers)
    epoch = 0
    module._next_batch = lambda: (epoch, 0)
    loader, result = module.train_dataloader(), []
    for epoch in range(2):  # noqa: B007 - read by the lambda
        seen: dict[int, set[bytes]] = {0: set(), 1: set(), 2: set()}
        for images, targets in loader:
            for image, target in zip(images, targets.tolist(), strict=True):
                seen[target].add(image.numpy().tobytes())
        result.append(seen)
    return result


def test_timm_streams_are_augmented_the_same_in_any_worker(streams: None):
    reference = stream_epochs(0)
    assert [len(images) for seen in reference for images in seen.values()] == [4] * 6
    assert not any(reference[0][label] & reference[1][label] for label in range(3))
    assert stream_epochs(1) == reference


def test_timm_streams(streams: None):
    module = timm_module("x", name="wds/x")
    assert [len(targets) for _, targets in module.val_dataloader()] == [4, 1]
    assert [len(targets) for _, targets in module.test_dataloader()] == [4, 1]  # there are no others
    with pytest.raises(SampleError, match="val stream: an image has label 2, outside the 2 declared classes"):
        list(timm_module("x", name="wds/x", num_classes=2).val_dataloader())
    with pytest.raises(ValueError, match="nothing can be held out of 'wds/x', a stream"):
        timm_module("x", name="wds/x", val_split=None).setup("fit")
    with pytest.raises(ValueError, match="there is no indexed test set to predict"):
        timm_module("x", name="wds/x", test_split="test").predict_dataloader()


def test_timm_errors(folder_root: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="timm cannot open dataset '', split 'train', in .*nowhere"):
        timm_module(tmp_path / "nowhere").setup("fit")
    with pytest.raises(FileNotFoundError, match="timm cannot open dataset 'torch/imagenot', split 'train'"):
        timm_module(tmp_path, name="torch/imagenot").setup("fit")
    with pytest.raises(ValueError, match="class_names has 1 names for num_classes=3"):
        timm_module(folder_root, class_names=["cat"])
    with pytest.raises(ValueError, match="splits 'train' and 'validation' in .*train are the same"):
        timm_module(folder_root / "train").setup("fit")  # not the folder of splits, but one of them
    with pytest.raises(ValueError, match="num_classes=2, but .*train has 3 classes: cat, dog, eel"):
        timm_module(folder_root, num_classes=2).setup("fit")
    with pytest.raises(FileNotFoundError, match="Cannot locate specified class map file"):
        timm_module(folder_root, dataset_args={"class_map": "nowhere.txt"}).setup("fit")
    with pytest.raises(ValueError, match="'torch/folder' is what ImageFolderDataModule reads"):
        timm_module(folder_root, name="torch/folder")
    (folder_root / "val" / "dog" / "0.jpg").write_bytes(b"no picture")
    with pytest.raises(SampleError, match="TimmDataModule val sample 2: cannot decode image file .*0.jpg"):
        list(timm_module(folder_root).val_dataloader())  # timm itself would put the next image in its place


def test_turned_photos_are_turned_back(folder_root: Path):
    path = folder_root / "val" / "cat" / "0.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = np.zeros((64, 32), np.uint8)
    upright[:32] = 255
    Image.fromarray(np.rot90(upright)).save(path, exif=exif, quality=95)
    for module in (folder_module(folder_root, crop_pct=None), timm_module(folder_root)):
        image = module.dataset("val")[0][0][0]
        assert image[:10].min() > image[-10:].max()
