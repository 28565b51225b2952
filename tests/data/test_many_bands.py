"""Images of any number of bands, as TIFF and .npy, through training and all that comes after."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from lightning.pytorch import Trainer
from PIL import Image

import luna_vision
from luna_vision.cli.probe import main as probe_command
from luna_vision.data import ImageFolderDataModule, SegmentationDataModule, train_transform
from luna_vision.data.transforms import Augmentation
from luna_vision.downstream.embed import embed_images
from luna_vision.execution import encode
from luna_vision.images import open_image
from luna_vision.images.values import Raster, Values, channel_statistics
from luna_vision.tasks import ClassificationTask, export_weights

BANDS = 13
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def pixels(seed: int) -> np.ndarray:
    """(20, 24, 13): band i is around 200 + 200 i."""
    levels = 200 + 200 * np.arange(BANDS) + 100 * (seed % 2)
    return (levels + np.random.default_rng(seed).normal(0, 50, (20, 24, BANDS))).clip(0, 4000)


def folder_of(root: Path) -> Path:
    for i in range(12):
        path = root / ("test" if i > 7 else "train") / ("crop", "water")[i % 2] / f"{i}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i % 4 < 2:
            tifffile.imwrite(
                path.with_suffix(".tif"), pixels(i).astype(np.uint16), photometric="minisblack", planarconfig="contig"
            )
        else:
            np.save(path.with_suffix(".npy"), pixels(i).astype(np.float32 if i % 8 == 2 else np.uint16))
    return root


def test_thirteen_bands_from_training_to_probe(tmp_path, capsys):
    root = folder_of(tmp_path / "scenes")
    data = {"img_size": [20, 24], "in_chans": BANDS, "batch_size": 4, "num_workers": 0, "crop_pct": None}
    module = ImageFolderDataModule(str(root), mean="data", value_range=[0, 4000], val_fraction=0.25, **data)
    kwargs = {"embed_dim": 16, "depth": 1, "patch_size": 4, "num_heads": 2}
    task = ClassificationTask("test_luna_vit", num_classes=2, in_chans=BANDS, model_kwargs=kwargs)
    trainer = Trainer(max_epochs=1, enable_checkpointing=False, **QUIET)
    trainer.fit(task, module)
    expected = (200 + 200 * np.arange(BANDS) + 50) / 4000
    np.testing.assert_allclose(module.mean, expected, atol=0.01)
    assert len(module.std) == BANDS and all(0.01 < std < 0.03 for std in module.std)
    trainer.save_checkpoint(tmp_path / "best.ckpt")
    export_weights(tmp_path / "best.ckpt", tmp_path / "best.safetensors")

    path = next((root / "test" / "crop").iterdir())
    predicting = ImageFolderDataModule(str(root), mean="data", predict_path=str(path), **data)
    ckpt = {"ckpt_path": str(tmp_path / "best.ckpt"), "weights_only": True}
    (predicted,) = Trainer(**QUIET).predict(task, predicting, **ckpt)
    assert predicting.mean == module.mean and predicting.std == module.std and predicting.values == module.values
    model, transform, names = luna_vision.load(tmp_path / "best.safetensors")
    assert names == ["crop", "water"]
    with torch.no_grad():
        probabilities = model(transform(path)[None]).softmax(1)[0]
    torch.testing.assert_close(probabilities.sort(descending=True).values, predicted["probabilities"][0])

    embedded = embed_images(model, root / "test").embedding
    assert embedded.shape == (4, 16)
    one = embed_images(model, path).embedding[0]
    found = encode(model, open_image(path), progress=False).embedding
    np.testing.assert_allclose(found, one, atol=1e-4)
    # the probe sees images at the size of the checkpoint
    words = ["--data", "imagefolder", "--root", str(root), "--knn-k", "2", "--device", "cpu"]
    assert probe_command([*words, "--checkpoint", str(tmp_path / "best.safetensors")]) == 0
    assert "of 20 x 24 pixels" in capsys.readouterr().out


def test_statistics_of_a_data_set():
    """By channel, of pixels in [0, 1], over all images alike; what is missing does not count."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(1, 1000, (30, 40, 4)).astype(np.uint16) for _ in range(3)]
    arrays[0][:10, :, 2] = 0
    arrays[0][..., 3] = arrays[1][..., 3] = arrays[2][..., 3] = 500
    mean, std = channel_statistics(map(Raster, arrays), 4, Values((0, 1000), nodata=0))
    unit = [np.where(a == 0, np.nan, a / 1000) for a in arrays]
    want = np.mean([np.nanmean(u, axis=(0, 1)) for u in unit], axis=0)
    np.testing.assert_allclose(mean, want, atol=1e-6)
    square = np.mean([np.nanmean(u**2, axis=(0, 1)) for u in unit], axis=0)
    np.testing.assert_allclose(std[:3], np.sqrt(square - want**2)[:3], atol=1e-6)
    assert std[3] == 1  # a constant channel is not blown up
    with pytest.raises(ValueError, match="no numbers in channel 0"):
        channel_statistics([Raster(np.zeros((4, 4), np.uint16))], 1, Values(nodata=0))


@pytest.mark.parametrize("crop", ["resized", "pad", "none"])
@pytest.mark.parametrize("backend", ["albumentations", "torchvision", "none"])
def test_augmentation_of_bands(backend, crop):
    aug = Augmentation((24, 32), crop=crop, rotate=10, color_jitter=0.0, mean=(0.5,) * BANDS)
    image = (np.arange(40 * 48 * BANDS).reshape(40, 48, BANDS) % 97 / 96).astype(np.float32)
    transform = train_transform(backend, aug, (0.0,) * BANDS, (1.0,) * BANDS, random_erasing=0.5)
    assert transform(image, 1).shape == (BANDS, 24, 32) and torch.equal(transform(image, 1), transform(image, 1))
    with pytest.raises(ValueError, match="13 channels are neither grey nor colour"):
        train_transform(backend, replace(aug, color_jitter=0.1), (0.0,) * BANDS, (1.0,) * BANDS)


@pytest.mark.parametrize("train_on", ["whole", "crops"])
def test_bands_with_masks(train_on, tmp_path):
    for i in range(2):
        for kind in ("images", "masks"):
            (tmp_path / "train" / kind).mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / f"train/images/{i}.npy", pixels(i).astype(np.uint16))
        Image.fromarray((pixels(i)[..., 0] > 200).astype(np.uint8)).save(tmp_path / f"train/masks/{i}.png")
    options = {"in_chans": BANDS, "num_workers": 0, "batch_size": 2, "val_fraction": 0}
    data = SegmentationDataModule(tmp_path, **options, train_on=train_on, crop_size=32, scale=[0.75, 1.33])
    images, masks = next(iter(data.train_dataloader()))
    assert all(image.shape == (BANDS, *mask.shape) for image, mask in zip(images, masks, strict=True))


def test_mistakes_about_bands(tmp_path):
    with pytest.raises(ValueError, match="images of 13 channels take color_jitter 0, got 0.2"):
        SegmentationDataModule(tmp_path, in_chans=BANDS, color_jitter=0.2)
    with pytest.raises(ValueError, match="in_chans must be at least 1"):
        ImageFolderDataModule(str(tmp_path), in_chans=0)
    with pytest.raises(ValueError, match="augmentation 'albumentations'"):
        ImageFolderDataModule(str(tmp_path), in_chans=4, augmentation="timm")
    for mistake in ({"mean": "dat"}, {"mean": "data", "std": [0.5]}):
        with pytest.raises(ValueError, match="mean must be numbers, or 'data' without std"):
            ImageFolderDataModule(str(tmp_path), **mistake)
