"""ImageFolder and timm's dataset factory."""

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from timm.data.readers.shared_count import SharedCount
from torch.utils.data import get_worker_info

from luna_vision.data import FashionMNISTDataModule, ImageFolderDataModule, SampleError, TimmDataModule


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
    assert module.test_dataloader() == []
    with pytest.raises(ValueError, match="there is no indexed test set to predict: give predict_path"):
        module.predict_dataloader()


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
    with pytest.raises(ValueError, match="no images in .*bare/train: expected"):
        folder_module(tmp_path / "bare").setup("fit")
    shutil.copytree(folder_root / "val" / "cat", folder_root / "val" / "yak")
    with pytest.raises(ValueError, match="val has classes that the training folder has not: yak"):
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
    assert module.test_dataloader() == []
    tested = timm_module(folder_root, test_split="validation")
    assert [name for _, names in tested.predict_dataloader() for name in names] == [str(i) for i in range(6)]


def test_timm_agrees_with_the_folder_module(folder_root: Path):
    ours = dict(folder_module(folder_root).make_source("val").samples)
    theirs = {path: label for path, label in timm_module(folder_root).make_source("val").reader.samples}
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
    assert module.test_dataloader() == []
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
    with pytest.raises(SampleError, match="label 2, outside the 2 declared classes"):
        list(timm_module(folder_root, num_classes=2).val_dataloader())
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
