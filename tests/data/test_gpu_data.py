"""The data set that stays on the device; here the device is the CPU."""

import numpy as np
import pytest
import torch
from PIL import Image

from luna_vision.data import GpuDataModule, ImageFolderDataModule
from luna_vision.data.gpu import DRAWS, augment_batch, erase_batch
from luna_vision.data.transforms import Augmentation

SIDE = 8


@pytest.fixture(scope="module")
def pixels():
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (20, SIDE, SIDE, 3), np.uint8),
        "y_train": np.repeat(np.arange(2), 10),
        "x_test": rng.integers(0, 256, (7, SIDE, SIDE, 3), np.uint8),
        "y_test": np.array([0, 0, 0, 1, 1, 1, 1]),
        "classes": np.array(["cat", "dog"]),
    }


@pytest.fixture(scope="module")
def file(pixels, tmp_path_factory):
    path = tmp_path_factory.mktemp("arrays") / "data.npz"
    np.savez(path, **pixels)
    return path


@pytest.fixture(scope="module")
def folder(pixels, tmp_path_factory):
    root = tmp_path_factory.mktemp("folder")
    for split in ("train", "test"):
        for number, (image, label) in enumerate(zip(pixels[f"x_{split}"], pixels[f"y_{split}"], strict=True)):
            at = root / split / pixels["classes"][label]
            at.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(at / f"{number:02d}.png")
    return root


def module(root, kind=GpuDataModule, **options):
    arguments = {"img_size": SIDE, "batch_size": 4, "num_workers": 2, "crop_pct": None, "val_fraction": 0.2}
    return kind(root=str(root), **arguments | options)


def batches(data, split):
    data.setup()
    loader = getattr(data, f"{split}_dataloader")()
    return [data.on_after_batch_transfer(batch, 0) for batch in loader]


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("options", [{}, {"crop_pct": 0.75}, {"img_size": [6, 9]}, {"in_chans": 1}], ids=str)
def test_evaluation_has_the_images_of_a_folder(file, folder, split, options):
    expected = batches(module(folder, ImageFolderDataModule, **options), split)
    for root in (file, folder):
        found = batches(module(root, **options), split)
        assert len(found) == len(expected)
        for (images, labels), (images_, labels_) in zip(found, expected, strict=True):
            torch.testing.assert_close(images, images_)
            assert labels.tolist() == labels_.tolist()


def test_names_and_counts(file, folder):
    for root in (file, folder):
        data = module(root)
        assert (data.class_names, data.num_classes) == (["cat", "dog"], 2)
        assert data.timm_cfg()["input_size"] == (3, SIDE, SIDE)


def test_unaugmented_training_images_are_those_of_the_file(file, pixels):
    data = module(file, augmentation="none", val_fraction=0, mean=[0.0] * 3, std=[1.0] * 3)
    images = torch.cat([images for images, _ in batches(data, "train")])
    given = {image.tobytes() for image in pixels["x_train"]}
    assert {(image * 255).round().byte().permute(1, 2, 0).numpy().tobytes() for image in images} == given


def test_augmentation_depends_on_seed_epoch_and_image_alone(file):
    def by_label_and_draw(**options):
        data = module(file, val_fraction=0, **options)
        data.setup("fit")
        keys = next(iter(data.train_dataloader()))
        images, _ = data.on_after_batch_transfer(keys, 0)
        return dict(zip(keys.index.tolist(), images, strict=True)), data, keys

    large, data, keys = by_label_and_draw(batch_size=20)
    small, *_ = by_label_and_draw(batch_size=3)
    for index, image in small.items():
        torch.testing.assert_close(image, large[index])
    other, *_ = by_label_and_draw(batch_size=20, seed=1)
    later, _ = data.on_after_batch_transfer(keys._replace(epoch=1), 0)
    assert all(not torch.equal(other[index], large[index]) for index in large)
    assert all(not torch.equal(image, large[index]) for index, image in zip(keys.index.tolist(), later, strict=True))


def draws(count, **columns):
    table = torch.full((count, DRAWS), 0.5)
    for column, values in columns.items():
        table[:, int(column[1:])] = torch.as_tensor(values)
    return table


def plain(**options):
    off = {"crop": "none", "hflip": 0.0, "rotate": 0.0, "color_jitter": 0.0, "mean": (0.5,) * 3}
    return Augmentation(**{"size": (6, 9)} | off | options)


def test_flip_and_shift_are_exact():
    images = torch.rand(3, 3, 6, 9)
    flipped = augment_batch(images, draws(3, c4=[0.2, 0.7, 0.2]), plain(hflip=0.5))
    expected = torch.stack([images[0].flip(2), images[1], images[2].flip(2)])
    torch.testing.assert_close(flipped, expected, atol=1e-5, rtol=0)
    # 5 steps of -2 to 2 pixels, to the right and down in the padded image
    shifted = augment_batch(images, draws(3, c2=0.99, c3=0.0), plain(crop="pad", crop_padding=2))
    expected = torch.zeros_like(images)
    expected[:, :, 2:, :-2] = images[:, :, :-2, 2:]
    torch.testing.assert_close(shifted, expected, atol=1e-5, rtol=0)


def test_a_resized_crop_shows_the_part_that_was_drawn():
    columns = torch.linspace(0, 1, 32).expand(2, 3, 32, 32)
    # a quarter of the area, square: at the left end, and at the right end
    part = augment_batch(columns, draws(2, c0=0.0, c2=[0.0, 1.0]), plain(crop="resized", crop_scale=(0.25, 1.0)))
    assert part[0].max() < 0.51 and part[1].min() > 0.49
    whole = augment_batch(columns, draws(2, c0=1.0), plain(crop="resized", crop_scale=(0.25, 1.0)))
    torch.testing.assert_close(whole, columns, atol=1e-5, rtol=0)


def test_a_quarter_turn():
    images = torch.rand(1, 3, 8, 8)
    turned = augment_batch(images, draws(1, c5=1.0), plain(rotate=90.0))
    assert any(torch.allclose(turned, images.rot90(k, (2, 3)), atol=1e-4) for k in (1, 3))


def test_colours_stay_in_their_range_and_grey_stays_grey():
    table = torch.rand(50, DRAWS, generator=torch.Generator().manual_seed(0))
    changed = augment_batch(torch.rand(50, 3, 4, 5), table, plain(color_jitter=0.9))
    assert changed.min() >= 0 and changed.max() <= 1
    grey = torch.rand(50, 1, 4, 5).expand(50, 3, 4, 5)
    changed = augment_batch(grey, table, plain(color_jitter=0.5))
    torch.testing.assert_close(changed[:, 0], changed[:, 2], atol=1e-5, rtol=0)
    assert not torch.allclose(changed, grey)


def test_erasing_takes_a_rectangle_of_some_images():
    table = torch.rand(200, DRAWS, generator=torch.Generator().manual_seed(0))
    erased = erase_batch(torch.ones(200, 1, 32, 32), table, 0.5) == 0
    area = erased.float().mean((1, 2, 3))
    assert 0.35 < (area > 0).float().mean() < 0.65
    assert area.max() < 0.45
    for mask in erased[area > 0][:, 0]:
        assert mask.sum() == mask.any(0).sum() * mask.any(1).sum()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x_train": None}, "x_train"),
        ({"y_test": None}, "y_test"),
        ({"x_train": np.zeros((20, 8, 8, 3), np.float32)}, "float32"),
        ({"x_train": np.zeros((20, 8, 8, 2), np.uint8)}, "(20, 8, 8, 2)"),
        ({"y_train": np.zeros(3, np.int64)}, "20 integers"),
        ({"classes": np.array(["one"])}, "y_train"),
        ({"y_test": np.full(7, 2)}, "y_test"),
    ],
)
def test_wrong_arrays_are_named(pixels, tmp_path, change, said):
    np.savez(tmp_path / "bad.npz", **{k: v for k, v in (pixels | change).items() if v is not None})
    with pytest.raises(ValueError, match=said.replace("(", r"\(").replace(")", r"\)")):
        module(tmp_path / "bad.npz").setup()


def test_what_is_no_file_of_arrays(tmp_path):
    (tmp_path / "text.npz").write_text("nothing")
    with pytest.raises(ValueError, match="text.npz"):
        module(tmp_path / "text.npz").setup()
    with pytest.raises(FileNotFoundError, match="none.npz"):
        module(tmp_path / "none.npz").setup()


@pytest.mark.parametrize(
    "options", [{"auto_augment": "rand-m9"}, {"train_sizes": [8, 16]}, {"on_error": "skip"}, {"fill": "mask"}]
)
def test_what_has_no_place_here_is_refused(file, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        module(file, **options)


@pytest.mark.parametrize("how", ["percentile", "checkpoint"])
def test_a_range_that_is_known_late_counts(how, tmp_path):
    rng = np.random.default_rng(0)
    for number in range(20):
        at = tmp_path / "train" / ("cat", "dog")[number % 2]
        at.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(1000, 2000, (SIDE, SIDE), np.uint16)).save(at / f"{number}.png")
    found = []
    for kind in (ImageFolderDataModule, GpuDataModule):
        data = module(tmp_path, kind, in_chans=1, value_range="percentile" if how == "percentile" else None)
        data.setup("fit")
        if how == "checkpoint":
            data.adopt_values(data.timm_cfg() | {"value_range": (1000, 2000)})
        found.append(batches(data, "val")[0][0])
    assert found[0].std() > 0.5
    torch.testing.assert_close(*found, rtol=0, atol=0.01)  # they are kept in 8 bits
