"""Images without labels: what is found, how many views there are, and what they depend on."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from luna_vision.data import UnlabelledDataModule
from luna_vision.data.convert import convert
from luna_vision.data.unlabelled import read_region
from luna_vision.images.decode import SampleError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """24 parts of photographs of several sizes and formats in nested folders, and a file that is none."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(image) for image in load_sample_images().images]
    for i in range(24):
        folder = tmp_path / "photos" / ("a", "a/b", ".", "c/d e")[i % 4]
        folder.mkdir(parents=True, exist_ok=True)
        x, y, w, h = *rng.integers(0, 300, 2), *rng.integers(9, 120, 2)
        picture = pictures[i % 2].crop((x, y, x + w, y + h))
        picture = picture.convert("L") if i % 5 == 0 else picture
        picture.save(folder / f"{i}.{('png', 'jpg', 'tif', 'webp')[i // 4 % 4]}")
    (tmp_path / "photos" / "notes.txt").write_text("none")
    return tmp_path / "photos"


def module(root: Path, **arguments) -> UnlabelledDataModule:
    defaults = {"img_size": 24, "batch_size": 4, "num_workers": 0, "val_fraction": 0.25, "patch_size": 4}
    data = UnlabelledDataModule(str(root), **defaults | arguments)
    data.setup("fit")
    return data


def epoch(data: UnlabelledDataModule, number: int = 0) -> list[tuple[torch.Tensor, ...]]:
    loader = data.train_dataloader()
    loader.sampler.begin(number)
    return list(loader)


def test_all_images_of_a_folder_are_taken_once(photos):
    data = module(photos)
    train, val = (set(data.dataset(split).source.files) for split in ("train", "val"))
    assert (len(train), len(val)) == (18, 6) and not train & val
    assert {Path(file).suffix for file in train | val} == {".png", ".jpg", ".tif", ".webp"}
    (images,) = epoch(data)[0]
    assert images.shape == (4, 3, 24, 24) and images.isfinite().all()
    assert [len(images) for (images,) in data.val_dataloader()] == [4, 2]
    assert data.test_dataloader() == []
    assert not {"num_classes", "label_names"} & data.timm_cfg().keys()


def test_views_are_normalised_as_measured_or_as_a_checkpoint_says(photos):
    views = {"global_views": 2, "local_views": 1}
    data, plain = module(photos, **views, mean="data"), module(photos, **views, mean=[0.0] * 3, std=[1.0] * 3)
    assert data.mean == module(photos, mean="data").mean != plain.mean
    mean, std = (0.2, 0.3, 0.4), (0.5, 0.5, 0.25)
    data.adopt_values(data.timm_cfg() | {"mean": mean, "std": std})
    for images, expected in zip(epoch(data)[0], epoch(plain)[0], strict=True):
        found = images * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
        torch.testing.assert_close(found, expected)


def test_views_have_their_sizes_and_differ(photos):
    data = module(photos, global_views=2, local_views=3, img_size=28)
    large, small = epoch(data)[0]
    assert large.shape == (4, 2, 3, 28, 28) and small.shape == (4, 3, 3, 12, 12)
    for views in (large, small):
        assert all(not torch.equal(views[:, 0], views[:, v]) for v in range(1, views.shape[1]))
    held = [next(iter(data.val_dataloader())) for _ in range(2)]
    assert held[0][0].shape == (4, 2, 3, 28, 28) and torch.equal(held[0][1], held[1][1])


@pytest.mark.parametrize("views", [{}, {"global_views": 2, "local_views": 1}])
def test_views_depend_on_seed_epoch_and_image_alone(photos, views):
    first, again, workers = (epoch(module(photos, **views, num_workers=n)) for n in (0, 0, 2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    torch.testing.assert_close(first, workers, rtol=0, atol=0)
    data = module(photos, **views)
    one, next_one = (data.dataset("train")[number, 3] for number in (0, 1))
    other = module(photos, **views, seed=1).dataset("train")[0, 3]
    assert not torch.equal(one[0], next_one[0]) and not torch.equal(one[0], other[0])


def test_views_can_repeat(photos):
    data = module(photos, repeat_epochs=2).dataset("train")
    assert torch.equal(data[0, 5][0], data[2, 5][0]) and not torch.equal(data[0, 5][0], data[1, 5][0])


@pytest.mark.parametrize("form", ["webdataset", "litdata"])
def test_shards_need_no_labels(photos, tmp_path, form):
    pytest.importorskip(form)
    classes = tmp_path / "classes" / "train" / "x"
    classes.parent.mkdir(parents=True)
    photos.rename(classes)
    convert(tmp_path / "classes", tmp_path / "shards", form)
    (tmp_path / "shards" / "classes.txt").unlink()
    data = module(tmp_path / "shards", val_fraction=0.0, global_views=2)
    (views,) = next(iter(data.train_dataloader()))
    assert views.shape == (4, 2, 3, 24, 24) and len(data.dataset("train")) == 24


def test_regions_of_large_images(tmp_path):
    rows, columns = np.mgrid[:300, :400].astype(np.uint16)
    for name, options in (("tiled", {"tile": (64, 64)}), ("turned", {"tile": (64, 64), "orientation": 6})):
        extra = [(274, "H", 1, options.pop("orientation", 1), True)]
        pixels = np.stack([rows, columns, rows], 2)
        tifffile.imwrite(tmp_path / f"{name}.tif", pixels, photometric="rgb", extratags=extra, **options)
    seen = set()
    for seed in range(8):
        part = read_region(str(tmp_path / "tiled.tif"), 50, seed).array
        top, left, _ = part[0, 0]
        np.testing.assert_array_equal(part[..., 0] - top, np.mgrid[:50, :50][0])
        np.testing.assert_array_equal(part[..., 1] - left, np.mgrid[:50, :50][1])
        seen.add((top, left))
        turned = read_region(str(tmp_path / "turned.tif"), 50, seed).array  # a quarter to the right
        assert (np.diff(turned[..., 1].astype(int), axis=0) == 1).all()
        assert (np.diff(turned[..., 0].astype(int), axis=1) == -1).all()
    assert len(seen) == 8
    with pytest.raises(SampleError, match="400 x 300 pixels is smaller than a region of 301 x 301"):
        read_region(str(tmp_path / "tiled.tif"), 301, 0)


def test_regions_move_from_epoch_to_epoch(photos, tmp_path):
    folder = tmp_path / "large"
    folder.mkdir()
    for i, picture in enumerate(load_sample_images().images):
        Image.fromarray(picture).save(folder / f"{i}.png")
    data = module(folder, region=64, batch_size=1, val_fraction=0.0, augmentation="none").dataset("train")
    parts = [data[number, 0][0] for number in (0, 0, 1)]
    assert torch.equal(parts[0], parts[1]) and not torch.equal(parts[0], parts[2])


def test_mistakes_are_one_line(photos, tmp_path):
    with pytest.raises(ValueError, match="18 images to train on, fewer than batch_size=64"):
        module(photos, batch_size=64)
    with pytest.raises(ValueError, match="train_sizes is for one view"):
        module(photos, global_views=2, train_sizes=[16, 24])
    with pytest.raises(FileNotFoundError):
        module(tmp_path / "nothing")
    with pytest.raises(SampleError, match="smaller than a region"):
        epoch(module(photos, region=500))
