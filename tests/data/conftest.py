"""Small files in the formats of the real datasets."""

import hashlib
import pickle
import struct
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets as tvd
from PIL import Image
from torch.utils.data import DataLoader

from luna_vision.images.decode import SampleError


def write_idx(path: Path, array: np.ndarray) -> None:
    """The IDX format of MNIST: two zero bytes, type code 8 for uint8, number of dimensions, the dimensions, data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    )


@pytest.fixture
def fashion_root(tmp_path: Path) -> str:
    """Fashion-MNIST with 100 training and 40 test images; image i of class c is a square of its own brightness."""
    for prefix, count, offset in (("train", 100, 0), ("t10k", 40, 100)):
        images = np.zeros((count, 28, 28), np.uint8)
        images[:, 6:22, 6:22] = np.arange(offset, offset + count)[:, None, None] + 50
        write_idx(tmp_path / f"FashionMNIST/raw/{prefix}-images-idx3-ubyte", images)
        write_idx(tmp_path / f"FashionMNIST/raw/{prefix}-labels-idx1-ubyte", np.arange(count) % 10)
    return str(tmp_path)


@pytest.fixture(params=[10, 100])
def cifar(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """(10 or 100, root) of a CIFAR in its pickled format, two images a class and file; torchvision checks its sums."""
    classes = request.param
    dataset = tvd.CIFAR10 if classes == 10 else tvd.CIFAR100
    folder = tmp_path / dataset.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)

    def write(name: str, content: dict) -> list[str]:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    def batch(name: str) -> list[str]:
        labels = list(range(classes)) * 2
        data = rng.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        return write(name, {"data": data, "labels" if classes == 10 else "fine_labels": labels})

    monkeypatch.setattr(dataset, "train_list", [batch(name) for name, _ in dataset.train_list])
    monkeypatch.setattr(dataset, "test_list", [batch(name) for name, _ in dataset.test_list])
    key = dataset.meta["key"]
    name, md5 = write(dataset.meta["filename"], {key: [f"class {i}" for i in range(classes)]})
    monkeypatch.setattr(dataset, "meta", {"filename": name, "key": key, "md5": md5})
    return classes, str(tmp_path)


@pytest.fixture
def folder_root(tmp_path: Path) -> Path:
    """root/{train,val}/{cat,dog,eel} with PNGs and JPEGs of odd, non-square sizes."""
    rng = np.random.default_rng(0)
    root = tmp_path / "photos"
    for split, count in (("train", 6), ("val", 2)):
        for name in ("cat", "dog", "eel"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                size = (17 + 5 * i, 41 - 3 * i, 3)
                image = Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8))
                image.save(root / split / name / f"{i}.{'png' if i % 2 else 'jpg'}")
    return root


@pytest.fixture
def error_of() -> Callable[[DataLoader], str]:
    """Reads a loader until its SampleError, and returns the message."""

    def read(loader: DataLoader) -> str:
        with pytest.raises(SampleError) as caught:
            list(loader)
        # Else the frames keep the iterator alive in a cycle, in which workers take five seconds to end.
        traceback.clear_frames(caught.tb)
        return str(caught.value)

    return read
