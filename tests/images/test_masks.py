"""Pixels that are missing are left out, by every command: what comes out is the model's masked forward pass."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import timm
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor

from luna_vision.data import ImageFolderDataModule, train_transform
from luna_vision.data.transforms import Augmentation
from luna_vision.downstream.embed import Settings, embed_images
from luna_vision.downstream.features import Extractor
from luna_vision.downstream.probe import extract_features, open_data
from luna_vision.execution import encode
from luna_vision.images import open_image
from luna_vision.images.decode import SampleError, read_image, to_channels
from luna_vision.images.masks import split_missing
from luna_vision.images.transforms import EvalTransform, eval_transform
from luna_vision.images.values import Values
from luna_vision.models.factory import load_model
from luna_vision.tasks import ClassificationTask, DistillationTask, export_weights
from luna_vision.visualize import view
from luna_vision.visualize.view import run

NODATA, TOP = 65535, 4000
OPTIONS = {"value_range": (0, TOP), "nodata": NODATA, "fill": "mask"}


def scene(seed: int = 0, bands: int = 3) -> np.ndarray:
    """(37, 50, bands): the upper rows, the left columns, a corner, and a number or two are missing."""
    x = np.random.default_rng(seed).integers(0, TOP, (37, 50, bands)).astype(np.uint16)
    x[:10] = x[:, :5] = x[30:, 40:] = NODATA
    x[20, 20] = NODATA
    if bands != 3:  # of a colour, all bands are missing or none
        x[25, 25, 1] = NODATA
    return x


def masked(array: np.ndarray, mean: float, std: float, side: int = 4) -> tuple[Tensor, Tensor]:
    """Normalised pixels and `patch_valid` of a scene, by hand."""
    gone, (height, width) = (array == NODATA).all(axis=2), array.shape[:2]
    valid = [not gone[i : i + side, j : j + side].all() for i in range(0, height, side) for j in range(0, width, side)]
    pixels = np.where(array == NODATA, 0, (array.astype(np.float32) / TOP - mean) / std)
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None], torch.tensor(valid)[None]


def embedding(model: torch.nn.Module, pixels: Tensor, valid: Tensor) -> Tensor:
    with torch.no_grad():
        tokens = model.forward_features(pixels, patch_valid=valid)
        return model.forward_head(tokens, pre_logits=True, patch_valid=valid)[0]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"stem": "conv", "pos_embed": "learn"},
        {"local_mixing": "mlp", "global_pool": "max"},
        {"local_mixing": "attn", "global_pool": "map"},
        {"global_pool": "both", "pack_form": "projected"},
        {"global_pool": "token"},
    ],
)
def test_the_result_is_that_of_the_masked_model(arguments, make, tmp_path):
    model, array = make(in_chans=13, **arguments), scene(bands=13)
    np.save(tmp_path / "a.npy", array)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack", planarconfig="contig", rowsperstrip=16)
    want = embedding(model, *masked(array, 0.5, 0.25))
    settings = Settings(mean=(0.5,), std=(0.25,), **OPTIONS)
    for path in (tmp_path / "a.npy", tmp_path / "a.tif"):
        torch.testing.assert_close(
            torch.from_numpy(embed_images(model, path, settings).embedding[0]), want, atol=1e-4, rtol=1e-4
        )
        for rows in (1, None) if path.suffix == ".npy" else (None,):
            how = {"mean": 0.5, "std": 0.25, "band_rows": rows, "progress": False, **OPTIONS}
            found = encode(model, open_image(path), **how).embedding
            torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)


def test_a_stopped_encoding_continues_with_the_mask(make, tmp_path, monkeypatch):
    model, array = make(), scene()
    np.save(tmp_path / "a.npy", array)
    how = {"store": tmp_path / "store", "band_rows": 2, "progress": False, **OPTIONS}
    count = {"left": 8}
    read = type(model.blocks[0]).unpack_tile

    def stop(*args, **kwargs):
        count["left"] -= 1
        if not count["left"]:
            raise KeyboardInterrupt
        return read(*args, **kwargs)

    monkeypatch.setattr(type(model.blocks[0]), "unpack_tile", stop)
    with pytest.raises(KeyboardInterrupt):
        encode(model, open_image(tmp_path / "a.npy"), **how)
    assert (tmp_path / "store").exists()
    found = encode(model, open_image(tmp_path / "a.npy"), **how).embedding
    want = encode(model, open_image(tmp_path / "a.npy"), **{**how, "store": tmp_path / "other"}).embedding
    assert torch.equal(found, want)


def test_images_with_and_without_missing_pixels_share_a_batch(make):
    model = make()
    arrays = [scene(0), np.where(scene(1) == NODATA, 7, scene(1)), scene(2)[:, :30]]
    values = Values(**OPTIONS, mean=(0.5,) * 3)
    own = [eval_transform(a.shape[:2], (0.5,) * 3, (0.25,) * 3)(to_channels(a, 3, values)) for a in arrays]
    for found, array in zip(Extractor(model)(own), arrays, strict=True):
        want = embedding(model, *masked(array, 0.5, 0.25))
        torch.testing.assert_close(torch.from_numpy(found.embedding), want, atol=1e-4, rtol=1e-4)


def test_pictures_are_of_the_masked_model(make):
    model, array = make(), scene()
    seen = view(model, array, mean=(0.5,), std=(0.25,), **OPTIONS)
    pixels, valid = masked(array, 0.5, 0.25)
    with torch.no_grad():
        want = model.get_attention_maps(pixels, patch_valid=valid)
    for found, maps in zip(run(model, seen.pixels, "get_attention_maps"), want, strict=True):
        torch.testing.assert_close(found.pack, maps.pack, atol=1e-4, rtol=1e-4)
        assert not found.pack[0, 0, 0].flatten()[~valid[0]].any()  # the weight of what is missing
    assert not seen.picture[:8].any() and seen.picture[12:20, 8:16].any()


def folder_of(root: Path, count: int = 6) -> Path:
    for i in range(2 * count):
        path = root / "train" / ("ant", "bee")[i % 2] / f"{i}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, scene(i), photometric="rgb")
    shutil.copytree(root / "train", root / "test")
    return root


def test_training_prediction_and_what_comes_after(tmp_path):
    """One checkpoint takes the fill along; all read the same pixels and leave out the same patches."""
    root = folder_of(tmp_path / "scenes")
    data = {"img_size": [37, 50], "crop_pct": None, "batch_size": 4, "num_workers": 0, "val_fraction": 0.2}
    module = ImageFolderDataModule(str(root), crop="none", color_jitter=0.2, mean="data", **data, **OPTIONS)
    kwargs = {"embed_dim": 16, "depth": 2, "patch_size": 4, "num_heads": 2}
    task = ClassificationTask("test_luna_vit", num_classes=2, in_chans=3, model_kwargs=kwargs, mixup=0.2, cutmix=1.0)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=1, enable_checkpointing=False, **quiet)
    trainer.fit(task, module)
    assert trainer.callback_metrics["train_loss"].isfinite() and trainer.callback_metrics["val_loss"].isfinite()
    trainer.save_checkpoint(tmp_path / "best.ckpt")
    export_weights(tmp_path / "best.ckpt", tmp_path / "best.safetensors")
    mean, std = module.mean, module.std

    path = root / "train" / "ant" / "0.tif"
    gone = scene(0) == NODATA
    pixels = (scene(0) / np.float32(TOP) - np.float32(mean)) / np.float32(std)
    pixels = torch.from_numpy(np.where(gone, 0, pixels).astype(np.float32)).permute(2, 0, 1)[None]
    valid = masked(scene(0), 0.0, 1.0)[1]
    again = ImageFolderDataModule(str(root), predict_path=str(path), mean="data", **data)
    predicted = Trainer(**quiet).predict(task, again, ckpt_path=str(tmp_path / "best.ckpt"), weights_only=True)
    assert again.values == module.values and again.mean == mean and again.std == std
    with torch.no_grad():
        want = task.model.eval()(pixels, patch_valid=valid).softmax(1)[0]
    found = predicted[0]["probabilities"][0][predicted[0]["labels"][0].argsort()]
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)

    model = load_model(checkpoint=tmp_path / "best.safetensors", device="cpu", num_classes=0)
    want = embedding(model, pixels, valid)
    found = torch.from_numpy(embed_images(model, path).embedding[0])
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)
    arguments = {**OPTIONS, "root": str(root), "img_size": [37, 50], "crop_pct": None, "num_workers": 0}
    data = open_data("imagefolder", {**arguments, "mean": list(mean), "std": list(std)})
    features, _ = extract_features(model, data.train, progress=False)
    np.testing.assert_allclose(features[0], want, atol=1e-4)
    # who has a tensor alone gets the mean in place of what is missing
    x = EvalTransform(3, (37, 50), mean, std, values=module.values)(path)
    torch.testing.assert_close(x[None], pixels, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("crop", ["resized", "pad", "none"])
@pytest.mark.parametrize("backend", ["albumentations", "torchvision", "none"])
def test_augmentation_moves_the_mask_with_the_image(backend, crop):
    image = np.full((40, 60, 3), 0.75, np.float32)
    image[:, :30] = np.nan
    aug = Augmentation((32, 48), crop=crop, crop_scale=(0.5, 1.0), rotate=10, color_jitter=0.0, mean=(0.5,) * 3)
    transform = train_transform(backend, aug, (0.25,) * 3, (1.0,) * 3)
    coloured = train_transform(backend, replace(aug, color_jitter=0.4), (0.25,) * 3, (1.0,) * 3)
    flipped = set()
    for seed in range(8):
        x = transform(image, seed)
        gone = x.isnan()
        assert x.shape == (3, 32, 48) and torch.equal(gone.any(dim=0), gone.all(dim=0))
        assert 0 < gone.float().mean() < 0.9 and torch.equal(gone, coloured(image, seed).isnan())
        flipped.add(bool(gone[0, :, :10].sum() < gone[0, :, -10:].sum()))
        # what was missing counts as the mean, 0; what is there is brighter, or black where rotation and padding fill
        assert (x[0][~gone[0]].abs() < 0.1).float().mean() < 0.1
    assert flipped == ({False} if backend == "none" else {False, True})


def test_resizing_keeps_a_pixel_that_covers_any_other():
    image = np.full((40, 40, 1), np.nan, np.float32)
    image[20:, :] = 1.0
    image[3, 3] = 1.0
    x = eval_transform((10, 10), (0.5,), (1.0,))(image)
    assert x.isnan().sum() == 49 and not x[0, 0, 0].isnan()


def test_a_crop_without_a_pixel_counts_as_the_mean():
    images = torch.full((2, 3, 8, 8), torch.nan)
    images[1, :, 5:] = 1.0
    numbers, valid = split_missing(images, (4, 4))
    assert (
        valid.tolist() == [[True] * 4, [False, False, True, True]] and not numbers[0].any() and numbers.isfinite().all()
    )


# ---- what is refused


def test_an_image_without_a_pixel(make, tmp_path):
    np.save(tmp_path / "a.npy", np.full((20, 20), NODATA, np.uint16))
    with pytest.raises(SampleError, match="no pixel that is not missing"):
        to_channels(read_image(tmp_path / "a.npy"), 3, Values(**OPTIONS))
    with pytest.raises(ValueError, match="no pixel that is not missing"):
        encode(make(), open_image(tmp_path / "a.npy"), progress=False, **OPTIONS)


def test_models_and_tasks_that_take_no_mask(tmp_path):
    root, data = (
        folder_of(tmp_path / "scenes", 2),
        {"img_size": 32, "num_workers": 0, "batch_size": 2, "val_fraction": 0, **OPTIONS},
    )
    plain = timm.create_model("test_vit", num_classes=0)
    with pytest.raises(ValueError, match="takes no mask"):
        embed_images(plain, root, Settings(img_size=160, **OPTIONS))
    with pytest.raises(ValueError, match="takes no mask"):
        run(plain, torch.full((1, 3, 160, 160), torch.nan), "forward_features")
    trainer = Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", max_epochs=1)
    tasks = [ClassificationTask("resnet18", num_classes=2, in_chans=3)]
    kwargs = {"embed_dim": 16, "depth": 1}
    teacher = {"teacher_model": "test_luna_vit", "teacher_checkpoint": "none.ckpt"}
    tasks.append(
        DistillationTask(model_name="test_luna_vit", num_classes=2, in_chans=3, model_kwargs=kwargs, **teacher)
    )
    for task in tasks:
        with pytest.raises(ValueError, match="takes no mask"):
            trainer.fit(task, ImageFolderDataModule(str(root), **data))
    for augmentation in ({"augmentation": "timm"}, {"augmentation": "torchvision", "auto_augment": "randaugment"}):
        with pytest.raises(ValueError, match="fill 'mask' takes augmentation"):
            ImageFolderDataModule(str(root), **augmentation, **data).setup("fit")


def test_photographs_have_no_missing_pixels(make, tmp_path):
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / "a.png")
    found, want = (embed_images(make(), tmp_path, Settings(fill=fill)).embedding for fill in ("mask", "mean"))
    np.testing.assert_array_equal(found, want)
