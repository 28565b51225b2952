"""Decoding: every kind of image file, and every kind of broken one."""

import io
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from luna_vision.data import DigitsDataModule, find_images
from luna_vision.data.images import TransformedDataset
from luna_vision.images.decode import SampleError, decode_image, read_image, to_channels
from luna_vision.images.transforms import eval_transform
from luna_vision.images.values import Values

RAMP = np.tile(np.arange(0, 256, 5, dtype=np.uint8), (20, 1))  # (20, 52)


def round_trip(image: Image.Image, path: Path, **options) -> Image.Image:
    image.save(path, **options)
    return read_image(path)


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I"])
def test_all_modes_give_the_same_grey_ramp(mode: str, in_chans: int, tmp_path: Path):
    ramp = RAMP
    if mode == "I;16":
        image = Image.fromarray(ramp.astype(np.uint16) * 257)
    elif mode == "I":
        image = Image.fromarray(ramp.astype(np.int32) * 257)
    elif mode == "1":
        ramp = np.where(ramp > 127, 255, 0).astype(np.uint8)
        image = Image.fromarray(ramp).convert("1")
    else:
        image = Image.fromarray(ramp).convert("L" if mode == "P" else "RGB").convert(mode)
    image = round_trip(image, tmp_path / f"ramp.{'tif' if mode in ('CMYK', 'I') else 'png'}")
    result = to_channels(image, in_chans, Values(value_range=(0, 65535)) if mode == "I" else None)
    if mode.startswith("I"):
        expected = np.repeat((ramp / 255).astype(np.float32)[..., None], in_chans, axis=2)
        np.testing.assert_allclose(result, expected, atol=1e-6)
        return
    assert result.mode == ("L" if in_chans == 1 else "RGB")
    error = np.abs(np.asarray(result).astype(int) - (ramp if in_chans == 1 else ramp[..., None]))
    assert error.max() <= 1


def test_palette_with_transparency(tmp_path: Path):
    image = Image.fromarray(RAMP // 64).convert("P")
    result = to_channels(round_trip(image, tmp_path / "p.png", transparency=bytes([0, 128, 255, 255])), 3)
    assert result.mode == "RGB" and result.size == image.size


def test_exif_orientation_is_applied(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image = round_trip(Image.fromarray(RAMP), tmp_path / "turned.png", exif=exif)
    assert image.size == (20, 52)
    assert np.array_equal(np.asarray(image), np.rot90(RAMP, -1))


def test_broken_files_are_named(tmp_path: Path):
    empty, text, cut = tmp_path / "empty.png", tmp_path / "text.jpg", tmp_path / "cut.png"
    empty.touch()
    text.write_text("this is no picture")
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 50), dtype=np.uint8)).save(buffer, "png")
    cut.write_bytes(buffer.getvalue()[:900])
    for path, message in (
        (empty, f"image file {empty} is empty (0 bytes)"),
        (text, f"cannot decode image file {text}: not an image of a format that Pillow knows"),
        (cut, f"cannot decode image file {cut}: "),
    ):
        with pytest.raises(SampleError) as caught:
            read_image(path)
        assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="missing.png"):
        read_image(tmp_path / "missing.png")


def test_the_largest_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "large.png"
    Image.fromarray(RAMP).save(path)
    assert read_image(path, max_pixels=20 * 52).size == (52, 20)
    with pytest.raises(SampleError, match="large.png: 52 x 20 pixels are more than max_pixels=1039"):
        read_image(path, max_pixels=20 * 52 - 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(SampleError, match="large.png: .* exceeds limit of 200 pixels"):
        read_image(path)
    assert read_image(path, max_pixels=2000).size == (52, 20)
    assert Image.MAX_IMAGE_PIXELS == 100  # the setting of the process is as it was


class Waiting(io.FileIO):
    """A file that says when Pillow begins to read, and has it wait for something to happen."""

    def __init__(self, path: Path, reached: threading.Event, until: threading.Event) -> None:
        super().__init__(path)
        self.reached, self.until = reached, until

    def read(self, size: int = -1) -> bytes:
        if size > 1 and not self.reached.is_set():  # Pillow, which has been given the limit
            self.reached.set()
            self.until.wait(0.3)  # for ever, where it is the other one's turn after this one
        return super().read(size)


def test_threads_with_limits_of_their_own_leave_the_process_its_limit(tmp_path: Path):
    """One that begins within another, and ends after it, would put back the other's."""
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    limit, (first, second, done) = Image.MAX_IMAGE_PIXELS, (threading.Event() for _ in range(3))

    def begin_within_and_end_after():
        first.wait()
        with Waiting(tmp_path / "a.png", second, done) as file:
            decode_image(file, "a.png", max_pixels=3000)

    thread = threading.Thread(target=begin_within_and_end_after)
    thread.start()
    with Waiting(tmp_path / "a.png", first, second) as file:
        assert decode_image(file, "a.png", max_pixels=2000).size == (52, 20)
    done.set()
    thread.join()
    assert limit == Image.MAX_IMAGE_PIXELS


class FileSource(list):
    def __getitem__(self, index: int):
        return read_image(super().__getitem__(index)), 0


@pytest.mark.parametrize("num_workers", [0, 1])
def test_error_is_one_line_even_from_a_worker(num_workers: int, tmp_path: Path, error_of: Callable):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.fromarray(RAMP).save(good)
    bad.write_bytes(b"\x89PNG but not really")
    transform = eval_transform((8, 8), (0.5,), (0.5,))
    dataset = TransformedDataset(FileSource([good, bad]), transform, in_chans=1, num_classes=2, name="val")
    assert dataset[0][0].shape == (1, 8, 8)
    message = error_of(DataLoader(dataset, 2, num_workers=num_workers))
    assert message.startswith(f"val sample 1: cannot decode image file {bad}: ") and "\n" not in message


@pytest.mark.parametrize("label", [-1, 10])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_label_outside_the_classes(label: int, num_workers: int, error_of: Callable):
    dataset = DigitsDataModule(augmentation="none").dataset("train")
    dataset.source.targets[4] = label
    expected = f"DigitsDataModule train sample 4 has label {label}, outside the 10 declared classes (0 to 9)"
    assert error_of(DataLoader(dataset, 8, num_workers=num_workers)) == expected


def test_dataset_ends_like_a_sequence():
    dataset = DigitsDataModule(augmentation="none").dataset("val")
    assert sum(1 for _ in dataset) == len(dataset)


def test_find_images(folder_root: Path, tmp_path: Path):
    every = find_images(str(folder_root))
    assert len(every) == 24 and every == sorted(every)
    (folder_root / "notes.txt").write_text("not an image")
    assert find_images(str(folder_root)) == every
    assert find_images(every[3]) == every[3:4]
    assert find_images(every[5:2:-1]) == every[5:2:-1]
    with pytest.raises(FileNotFoundError, match="there is no image file or folder nowhere"):
        find_images("nowhere")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=r"no images \(.jpg, .*\) in .*bare"):
        find_images(str(tmp_path / "bare"))
    with pytest.raises(ValueError, match="no images .* in an empty list"):
        find_images([])


def test_links_to_nothing_are_found_and_folders_that_cannot_be_read_are_told(tmp_path, deny):
    for name in ("here", "locked"):
        (tmp_path / name).mkdir()
    (tmp_path / "here" / "link.png").symlink_to("nothing.png")
    os.mkfifo(tmp_path / "here" / "pipe.png")  # which would be read for ever
    deny("locked")
    told = []
    assert find_images(tmp_path, told.append) == [str(tmp_path / "here" / "link.png")]
    assert [error.filename for error in told] == [str(tmp_path / "locked")]
    with pytest.raises(PermissionError):
        find_images(tmp_path)


def test_tensors_are_writable_and_independent():
    dataset = DigitsDataModule(augmentation="none").dataset("val")
    first = dataset[0][0].clone()
    dataset[0][0].zero_()
    assert torch.equal(dataset[0][0], first)


def test_a_folder_of_animations_is_a_folder_of_images(tmp_path):
    frames = [Image.new("L", (4, 3), value) for value in (10, 200)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    (path,) = find_images(str(tmp_path))
    assert np.asarray(to_channels(read_image(path), 1)).max() == 10  # the first frame
