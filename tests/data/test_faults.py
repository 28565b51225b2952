"""Broken files in a folder: named, or replaced and counted, in the same way whatever worker meets them."""

import io
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from luna_vision.data import ImageFolderDataModule, TimmDataModule
from luna_vision.data.faults import SkipFaults
from luna_vision.images.decode import SampleError

RNG = np.random.default_rng(0)
PHOTO = Image.fromarray(RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(PHOTO, "jpeg", exif=exif)


READABLE: dict[str, tuple[str, Callable[[], bytes]]] = {
    "cmyk": ("jpg", lambda: encoded(PHOTO.convert("CMYK"), "jpeg")),
    "16-bit": ("png", lambda: encoded(Image.fromarray(RNG.integers(0, 65536, (40, 60), dtype=np.uint16)), "png")),
    "rgba": ("png", lambda: encoded(PHOTO.convert("RGBA"), "png")),
    "palette": ("png", lambda: encoded(PHOTO.convert("P"), "png", transparency=3)),
    "animated": ("webp", lambda: encoded(PHOTO, "webp", save_all=True, append_images=[PHOTO.rotate(90)] * 2)),
    "turned": ("jpg", turned),
}
BROKEN: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "truncated": ("jpg", lambda: encoded(PHOTO, "jpeg")[:-700], "cannot decode image file {}: "),
    "truncated-png": ("png", lambda: encoded(PHOTO, "png")[:3000], "cannot decode image file {}: "),
    "empty": ("jpg", lambda: b"", "image file {} is empty (0 bytes)"),
    "text": ("jpg", lambda: b"<html>404</html>", "cannot decode image file {}: not an image of a format that"),
    "bomb": ("png", lambda: encoded(Image.new("1", (20_000, 20_000)), "png"), "exceeds limit of 178956970 pixels"),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """root/train/{a,b}: twenty photos in each, whose names sort around 'm'."""
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(20):
            image = Image.fromarray(RNG.integers(0, 256, (24, 24, 3), dtype=np.uint8))
            image.save(tmp_path / "train" / name / f"{'cz'[i > 9]}{i:02}.png")
    return tmp_path


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Callable[[], list[str]]]:
    """The lines that were logged, by workers too."""
    handler = logging.FileHandler(tmp_path / "log.txt", delay=False)
    logger = logging.getLogger("luna_vision.data")
    logger.addHandler(handler)
    yield lambda: (tmp_path / "log.txt").read_text().splitlines()
    logger.removeHandler(handler)


def spoil(root: Path, *names: str) -> list[Path]:
    """Break one photo of class a for each name, from sample 10 on."""
    paths = []
    for i, name in enumerate(names):
        suffix, content, _ = BROKEN[name]
        paths.append(root / "train" / "a" / f"m{i}.{suffix}")
        paths[-1].write_bytes(content())
    return paths


def module(root: Path, **kwargs) -> ImageFolderDataModule:
    return ImageFolderDataModule(
        str(root), **{"img_size": 16, "batch_size": 8, "val_fraction": 0.0, "persistent_workers": False} | kwargs
    )


def epoch(data: ImageFolderDataModule) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(data.train_dataloader())
    assert all(len(images) == 8 for images, _ in batches)
    return torch.cat([images for images, _ in batches]), torch.cat([targets for _, targets in batches])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unusual_images_are_no_faults(root: Path, num_workers: int, log: Callable):
    for name, (suffix, content) in READABLE.items():
        (root / "train" / "a" / f"{name}.{suffix}").write_bytes(content())
    data = module(root, drop_last=False, num_workers=num_workers, batch_size=23)
    images = torch.cat([images for images, _ in data.train_dataloader()])
    assert images.shape == (46, 3, 16, 16) and images.isfinite().all() and log() == []


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("name", BROKEN)
def test_raise_names_file_and_sample(name: str, num_workers: int, root: Path, error_of: Callable):
    (path,) = spoil(root, name)
    error = error_of(module(root, num_workers=num_workers).train_dataloader())
    assert error.startswith("ImageFolderDataModule train sample 10: ") and str(path) in error and "\n" not in error
    assert BROKEN[name][2].format(path) in error


def test_skip_puts_the_next_readable_sample_in_the_place(root: Path, log: Callable):
    paths = spoil(root, *BROKEN)
    data = module(root, on_error="skip", max_error_share=0.2, augmentation="none")
    dataset = data.dataset("train")
    for index in range(10, 16):
        assert torch.equal(dataset[index][0], dataset[15][0]) and dataset[index][1] == dataset[15][1] == 0
    assert not torch.equal(dataset[9][0], dataset[15][0])
    assert len(log()) == len(paths) == 5
    assert log()[0].startswith(f"ImageFolderDataModule train sample 10: cannot decode image file {paths[0]}: ")
    assert log()[0].endswith("; the next readable sample takes its place (1 of 45 so far)")


def test_the_first_sample_follows_the_last(root: Path):
    (root / "train" / "b" / "z19.png").write_bytes(b"")
    dataset = module(root, on_error="skip", max_error_share=0.1, augmentation="none").dataset("train")
    assert torch.equal(dataset[39][0], dataset[0][0]) and dataset[39][1] == 0
    assert len(dataset) == 40 and sum(1 for _ in dataset) == 40  # it still ends like a sequence


def test_skip_gives_the_same_epochs_for_any_workers_and_logs_once(root: Path, log: Callable):
    spoil(root, *BROKEN)
    reference = None
    for num_workers in (0, 2):
        data = module(root, on_error="skip", max_error_share=0.2, num_workers=num_workers, seed=3)
        loaders = [epoch(data) for _ in range(2)]  # workers end with their epoch: the next ones know what is broken
        assert data.dataset("train").faults.broken.nonzero().flatten().tolist() == [10, 11, 12, 13, 14]
        if reference is not None:
            for (images, targets), (other_images, other_targets) in zip(loaders, reference, strict=True):
                assert torch.equal(images, other_images) and torch.equal(targets, other_targets)
        reference = loaders
        # two workers may meet one file at the same moment, and both say so
        numbers = [line.split(" sample ")[1].split(":")[0] for line in log()]
        assert set(numbers) == {"10", "11", "12", "13", "14"}
        assert len(numbers) == 5 if num_workers == 0 else len(numbers) <= 12


def test_a_replaced_sample_is_augmented_as_itself(root: Path):
    spoil(root, "empty")
    dataset = module(root, on_error="skip", max_error_share=0.1).dataset("train")
    assert not torch.equal(dataset[10][0], dataset[11][0])  # the same photo, with seeds of their own


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_faults_stop_in_one_line(root: Path, num_workers: int, error_of: Callable):
    paths = spoil(root, "empty", "text", "truncated")
    data = module(root, on_error="skip", max_error_share=2 / 43, num_workers=num_workers, drop_last=False)
    error = error_of(data.train_dataloader())
    start = "ImageFolderDataModule train: 3 of 43 samples cannot be read, more than max_error_share=0.0465116 allows; "
    assert error.startswith(f"{start}the first: sample 10: image file {paths[0]} is empty (0 bytes); sample 11: ")
    assert all(str(path) in error for path in paths) and "\n" not in error


def test_nothing_readable_ends(root: Path):
    faults = SkipFaults(3, 0.9, "train")

    def read(index: int) -> None:
        raise SampleError(f"train sample {index}: broken")

    with pytest.raises(SampleError, match="train: 3 of 3 samples cannot be read"):
        faults.read(read, 1)
    with pytest.raises(SampleError, match="train: not one of 3 samples can be read"):
        faults.read(read, 1)


def test_a_file_that_is_gone_is_a_fault(root: Path, log: Callable):
    dataset = module(root, on_error="skip", max_error_share=0.1).dataset("train")
    (root / "train" / "a" / "c03.png").unlink()
    assert dataset[3][0].shape == (3, 16, 16) and "c03.png" in log()[0]


def test_wrong_labels_are_no_faults(root: Path):
    labels = {"class_map": {"a": 0, "b": 1}}
    arguments = {"img_size": 16, "val_split": None, "val_fraction": 0.0, "on_error": "skip", "dataset_args": labels}
    data = TimmDataModule("", 1, str(root), **arguments)
    with pytest.raises(SampleError, match="sample 30 has label 1, outside the 1 declared classes"):
        data.dataset("train")[30]


def test_timm_folders_skip_too(root: Path, log: Callable):
    paths = spoil(root, "text")
    data = TimmDataModule(
        "", 2, str(root), img_size=16, val_split=None, val_fraction=0.0, on_error="skip", max_error_share=0.1
    )
    assert data.dataset("train")[10][1] == 0
    assert f"cannot decode image file {paths[0]}: " in log()[0]


def test_prediction_stops_always(root: Path):
    (path,) = spoil(root, "text")
    data = module(root, on_error="skip", max_error_share=0.5, num_workers=0, predict_path=str(root))
    with pytest.raises(SampleError, match=f"cannot decode image file {path}"):
        list(data.predict_dataloader())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"on_error": "ignore"}, "on_error must be one of 'raise', 'skip', got 'ignore'"),
        ({"max_error_share": 1.0}, r"max_error_share must be in \[0, 1\), got 1.0"),
        ({"max_error_share": -0.1}, r"max_error_share must be in \[0, 1\), got -0.1"),
    ],
)
def test_bad_policies(root: Path, arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        module(root, **arguments)


def test_a_spawned_worker_knows_what_is_broken(root: Path):
    spoil(root, "empty")
    dataset = module(root, on_error="skip", max_error_share=0.1, augmentation="none").dataset("train")
    dataset[10]
    again = pickle.loads(pickle.dumps(dataset))
    assert again.faults.broken[10] and torch.equal(again[10][0], dataset[11][0])


def test_a_run_that_goes_on_knows_what_is_broken(root: Path, log: Callable):
    """It counts on, reads none of it again, and says nothing of it again."""
    spoil(root, "empty", "text")
    options = {"on_error": "skip", "max_error_share": 2.5 / 43, "num_workers": 0, "drop_last": False}
    first = module(root, **options)
    list(first.train_dataloader())
    state = first.state_dict()
    assert state == {"root": str(root), "broken": {"train": [10, 11]}} and len(log()) == 2
    again = module(root, **options)
    again.setup("validate")
    again.dataset("train")
    again.load_state_dict(state)
    list(again.train_dataloader())
    assert len(log()) == 2
    (root / "train" / "b" / "c05.png").write_bytes(b"")
    with pytest.raises(SampleError, match="3 of 42 samples cannot be read"):
        list(again.train_dataloader())
    other = module(root, **options)
    other.dataset("train")
    other.load_state_dict({**state, "root": "elsewhere"})
    assert not other.dataset("train").faults.broken.any()
    assert module(root).state_dict() == {}


def test_processes_count_together(monkeypatch):
    faults = SkipFaults(40, 0.05, "train")
    faults.broken[[3, 7]] = True
    assert faults.known() == [3, 7]

    def gather(found: list, own: list[int]) -> None:
        found[:] = [own, [7, 9]]

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    with pytest.raises(SampleError, match="train: 3 of 40 .* max_error_share=0.05 allows, of all processes together"):
        faults.known()
    assert faults.broken.nonzero().flatten().tolist() == [3, 7, 9]
