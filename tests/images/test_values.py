"""Numbers in files keep their meaning, and every command makes the same pixels of the same file."""

import io
import math
import struct
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
import zarr
from lightning.pytorch import Trainer
from PIL import Image

import luna_vision
from luna_vision.cli.export import main as export_command
from luna_vision.data import ImageFolderDataModule, train_transform
from luna_vision.data.images import PredictDataset
from luna_vision.data.transforms import TORCHVISION_POLICIES, Augmentation
from luna_vision.downstream.embed import Settings, embed_images
from luna_vision.execution import encode
from luna_vision.images import open_image
from luna_vision.images.decode import SampleError, read_image, to_channels
from luna_vision.images.pixels import Pixels
from luna_vision.images.transforms import EvalTransform, SeededTransform
from luna_vision.images.values import Raster, Values, parse_fill, parse_value_range, percentile_range, warned
from luna_vision.models.factory import load_model
from luna_vision.tasks import ClassificationTask, export_weights
from luna_vision.visualize import view

RNG = np.random.default_rng(0)
NAN, INF = np.nan, np.inf


def tiff(path: Path, array: np.ndarray, nodata: str = "", **options) -> Path:
    tags = [(42113, 2, len(nodata) + 1, nodata, True)] if nodata else []
    tifffile.imwrite(path, array, **{"photometric": "minisblack", "metadata": None, "extratags": tags, **options})
    return path


def unit(array: np.ndarray, in_chans: int = 1, values: Values | None = None, **raster) -> np.ndarray:
    """Pixels of numbers, as (H, W) for one channel."""
    x = np.asarray(to_channels(Raster(array, **raster), in_chans, values))
    return x[:, :, 0] if in_chans == 1 else x


def alike(x: torch.Tensor, y: torch.Tensor) -> None:
    torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


# ---- what numbers become


@pytest.mark.parametrize(
    "dtype, top, low, high",
    [
        (np.uint8, None, 0, 255),
        (np.uint16, None, 0, 65535),
        (np.uint16, 4095, 0, 4095),
        (np.int16, None, -32768, 32767),
        (np.int8, None, -128, 127),
        (np.uint32, None, 0, 2**32 - 1),
        (np.int32, None, -(2**31), 2**31 - 1),
        (np.float32, None, 0, 1),
    ],
)
def test_the_default_range_is_that_of_the_type(dtype, top, low, high):
    numbers = np.array([[low, high, (low + high) / 2]]).astype(dtype)
    np.testing.assert_allclose(unit(numbers, top=top), [[0, 1, 0.5]], atol=0.01)


def test_nothing_goes_through_8_bits():
    for array in (np.arange(3500, dtype=np.uint16), np.arange(-1750, 1750, dtype=np.int16), np.arange(3500) / 65536):
        assert len(np.unique(unit(array.astype(array.dtype)[None]))) == 3500
    thirteen = RNG.integers(0, 3500, (20, 30, 13), dtype=np.uint16)
    pixels = Pixels(thirteen, 13, (0.0,) * 13, (1.0,) * 13).rows(0, 20)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(pixels, thirteen / 65535, rtol=1e-6)


def test_one_number_changes_no_other():
    image = RNG.random((8, 9)).astype(np.float32)
    for number in (1.01, 255.0, INF, 3.4e38, -3.4e38, NAN):
        changed = image.copy()
        changed[3, 4] = number
        same = np.ones(image.shape, bool)
        same[3, 4] = False
        np.testing.assert_array_equal(unit(changed)[same], image[same])
        assert np.isfinite(unit(changed)).all()


def test_a_range_that_is_given_holds_for_every_type():
    for array in (np.array([[-30, -15, 0, 20]], kind) for kind in (np.float32, np.float64, np.int16, np.int64)):
        np.testing.assert_allclose(unit(array, values=Values((-30, 0))), [[0, 0.5, 1, 1]])
    eight = Image.fromarray(np.array([[0, 50, 100, 200]], np.uint8))
    np.testing.assert_allclose(to_channels(eight, 1, Values((0, 100)))[:, :, 0], [[0, 0.5, 1, 1]])


def test_8_bits_stay_8_bits():
    photo = Image.fromarray(RNG.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    assert to_channels(photo, 3) is photo and to_channels(photo, 1).mode == "L"
    assert to_channels(photo, 3, Values(fill="error")) is photo


def test_missing_numbers_are_filled_as_the_option_says():
    image = np.array([[0.2, NAN, INF, -9999.0]], np.float32)
    for fill, expected in (("mean", [0.2, 0.3, 0.3, 0.3]), (0.9, [0.2, 0.9, 0.9, 0.9]), (-7, [0.2, 0, 0, 0])):
        np.testing.assert_allclose(unit(image, values=Values(nodata=-9999, fill=fill, mean=(0.3,))), [expected])
        np.testing.assert_allclose(unit(image, nodata=-9999, values=Values(fill=fill, mean=(0.3,))), [expected])
    with pytest.raises(SampleError, match="a.tif has 3 numbers that are missing"):
        unit(image, name="a.tif", nodata=-9999, values=Values(fill="error"))
    colours = unit(image, 3, Values(nodata=-9999, mean=(0.1, 0.2, 0.3)))
    np.testing.assert_allclose(colours[0, 1:], [[0.1, 0.2, 0.3]] * 3)


def test_black_is_no_data_only_where_all_colours_are():
    image = np.array([[[0, 0, 0], [0, 9, 9]]], np.uint8)
    x = unit(image, 3, Values(mean=(0.5, 0.6, 0.7)), nodata=0)
    np.testing.assert_allclose(x, [[[0.5, 0.6, 0.7], [0, 9 / 255, 9 / 255]]], rtol=1e-6)
    pair = unit(np.array([[[0, 9]]], np.uint8), 2, Values(mean=(0.5, 0.6)), nodata=0)  # bands, and no colours
    np.testing.assert_allclose(pair, [[[0.5, 9 / 255]]], rtol=1e-6)


@pytest.mark.parametrize(
    "array, text",
    [
        (np.array([[5, 0, 9]], np.uint16), "0"),
        (np.array([[5, -9999, 9]], np.int16), "-9999"),
        (np.array([[0.5, -3.4028234663852886e38, 0.9]], np.float32), "-3.40282e+38"),
        (np.array([[0.5, NAN, 0.9]], np.float64), "nan"),
        (np.array([[5, 255, 9]], np.uint8), "255"),
    ],
)
@pytest.mark.parametrize("level", [None, 0])
def test_the_number_that_gdal_writes_for_no_data(array, text, level, tmp_path, caplog):
    path = tiff(tmp_path / "a.tif", array, text)
    x = np.asarray(to_channels(read_image(path), 1, Values((0, 10), mean=(0.25,))))[0, :, 0]
    rows = Pixels(open_image(path, level), 1, (0.0,), (1.0,), values=Values((0, 10), mean=(0.25,))).rows(0, 1)
    np.testing.assert_allclose(x, [array[0, 0] / 10, 0.25, array[0, 2] / 10], rtol=1e-6)
    np.testing.assert_array_equal(rows[0, 0, 0].numpy(), x)
    assert not [record for record in caplog.records if record.name.startswith("luna_vision")]  # it is meant


@pytest.mark.parametrize("photometric", ["miniswhite", "palette", "separated"])
def test_no_data_of_other_colours(photometric, tmp_path):
    samples = np.full((4, 5, 4), 9, np.uint8) if photometric == "separated" else np.full((4, 5), 9, np.uint8)
    samples[1, 2] = 7
    colours = {"colormap": np.full((3, 256), 65535, np.uint16)} if photometric == "palette" else {}
    path = tiff(tmp_path / "a.tif", samples, "7", photometric=photometric, **colours)
    values = Values(mean=(0.123,))
    x = np.asarray(to_channels(read_image(path), 1, values))[:, :, 0]
    rows = Pixels(open_image(path), 1, (0.0,), (1.0,), values=values).rows(0, 4)[0, 0].numpy()
    np.testing.assert_array_equal(rows, x)
    assert x[1, 2] == np.float32(0.123) and (x != x[1, 2]).sum() == 19


# ---- what is said


def test_a_default_that_throws_levels_away_is_told(tmp_path, caplog):
    decibels = tiff(tmp_path / "decibels.tif", RNG.normal(-20, 3, (9, 9)).astype(np.float32))
    twelve = tiff(tmp_path / "twelve.tif", RNG.integers(0, 4096, (9, 9), dtype=np.uint16))
    holes = RNG.random((9, 9)).astype(np.float32)
    holes[:3] = NAN
    holes = tiff(tmp_path / "holes.tif", holes)
    whole = tiff(tmp_path / "whole.tif", RNG.integers(0, 65536, (9, 9), dtype=np.uint16))
    for path in (decibels, twelve, holes, whole):
        caplog.clear()
        to_channels(read_image(path), 1)
        told = [record.getMessage() for record in caplog.records]
        assert len(told) == (path is not whole) and all(path.name in line for line in told)
        for again in (False, True):
            caplog.clear()
            pixels = Pixels(open_image(path), 1, (0.0,), (1.0,))
            pixels.rows(0, 5), pixels.rows(5, 9)
            assert [record.getMessage() for record in caplog.records] == (told if again else [])  # by rows, too
            warned.clear()
    caplog.clear()
    to_channels(read_image(decibels), 1, Values((-30, 0)))
    to_channels(read_image(twelve), 1, Values((0, 4095)))
    assert not caplog.records


def test_a_thousand_files_are_not_a_thousand_lines(caplog):
    for i in range(1000):
        unit(np.arange(6, dtype=np.uint16)[None], name=f"{i}.tif")
    assert 1 <= len(caplog.records) < 10


@pytest.mark.parametrize("option", ["0", "1 0", (3, 3), "dtypes", (0, INF), [1, 2, 3], (NAN, 1), 5])
def test_a_range_that_is_none_is_refused(option):
    with pytest.raises(ValueError, match="value_range must be two finite numbers, the lower one first, 'dtype'"):
        parse_value_range(option)


def test_options():
    assert (
        parse_value_range(["0", "1e4"]) == parse_value_range("[0, 10000]") == parse_value_range("0 10000") == (0, 10000)
    )
    assert parse_value_range(["dtype"]) == "dtype" and parse_value_range("percentile") == "percentile"
    assert parse_fill("error") == "error" and parse_fill("mask") == "mask" and parse_fill("-1.5") == -1.5
    for fill in ("median", "nan", [1]):
        with pytest.raises(ValueError, match="fill must be 'mean', 'error', 'mask' or a finite number"):
            parse_fill(fill)
    with pytest.raises(ValueError, match="int64 take a value_range"):
        unit(np.zeros((2, 2), np.int64))


# ---- bands


def test_a_band_is_alpha_only_where_the_file_says_so(tmp_path, make):
    pair = RNG.integers(0, 65536, (12, 13, 2), dtype=np.uint16)
    four = RNG.integers(0, 65536, (12, 13, 4), dtype=np.uint16)
    planes = {"planarconfig": "contig"}
    for bands, in_chans in ((pair, 1), (four, 3)):
        path = tiff(tmp_path / "bands.tif", bands, **planes)
        for refused in (
            lambda path=path, n=in_chans: EvalTransform(n)(path),
            lambda path=path, n=in_chans: encode(make(in_chans=n), open_image(path), progress=False),
            lambda bands=bands, n=in_chans: encode(make(in_chans=n), bands, progress=False),
        ):
            with pytest.raises(ValueError, match=f"has {bands.shape[2]} bands, and the model takes 1 or 3"):
                refused()
        n = bands.shape[2]
        rows = Pixels(open_image(path), n, (0.0,) * n, (1.0,) * n).rows(0, 12)[0]
        assert torch.equal(rows, EvalTransform(n)(path))
        kind = "rgb" if n == 4 else "minisblack"
        alpha = tiff(tmp_path / "alpha.tif", bands, photometric=kind, extrasamples=["unassalpha"], **planes)
        np.testing.assert_allclose(
            EvalTransform(in_chans)(alpha), bands[..., :-1].transpose(2, 0, 1) / 65535, rtol=1e-6
        )
    image = Image.fromarray((four >> 8).astype(np.uint8), "RGBA")  # whose mode says so
    assert to_channels(image, 3).mode == "RGB"


# ---- the same pixels everywhere


def jpeg2000(path: Path, array: np.ndarray) -> None:
    path.write_bytes(imagecodecs.jpeg2k_encode(array, level=0, reversible=True))


def avif(path: Path, array: np.ndarray, bits: int) -> None:
    path.write_bytes(imagecodecs.avif_encode(array, level=100, bitspersample=bits))


def ppm(path: Path, array: np.ndarray, top: int) -> None:
    kind = "P6" if array.ndim == 3 else "P5"
    head = f"{kind}\n# a comment\n{array.shape[1]} {array.shape[0]}\n{top}\n"
    path.write_bytes(head.encode() + array.astype(">u2").tobytes())


def fits(path: Path, array: np.ndarray, **more: int) -> None:
    """FITS begins with the lowest row."""
    height, width = array.shape
    keys = {"SIMPLE": "T", "BITPIX": 16, "NAXIS": 2, "NAXIS1": width, "NAXIS2": height, **more}
    head = "".join(f"{key:8}= {value:>20}".ljust(80) for key, value in keys.items()) + "END".ljust(80)
    path.write_bytes(head.ljust(2880).encode() + np.ascontiguousarray(array[::-1]).tobytes())


def deep_files(folder: Path) -> dict[str, tuple[Path, np.ndarray, float]]:
    """Files of every kind that holds more than 8 bits, their numbers (H, W[, 3]), and what becomes 1."""
    grey = RNG.integers(0, 65536, (37, 50), dtype=np.uint16)
    rgb = RNG.integers(0, 65536, (37, 50, 3), dtype=np.uint16)
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {}

    def add(name: str, array: np.ndarray, top: float) -> Path:
        files[name] = folder / name, array, top
        return folder / name

    tiff(add("rgb.tif", rgb, 65535), rgb, photometric="rgb", tile=(16, 16), compression="deflate", predictor=True)
    tiff(add("twelve.tif", grey >> 4, 4095), grey >> 4, bitspersample=12)
    tiff(add("float.tif", rgb / 65535, 1), (rgb / 65535).astype(np.float64), photometric="rgb")
    Image.fromarray(grey).save(add("grey.png", grey, 65535))
    add("rgb.png", rgb, 65535).write_bytes(imagecodecs.png_encode(rgb))
    add("rgba.png", rgb, 65535).write_bytes(imagecodecs.png_encode(np.concatenate([rgb, rgb[..., :1]], 2)))
    add("la.png", grey, 65535).write_bytes(imagecodecs.png_encode(np.stack([grey, grey // 2], 2)))
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "png", exif=turned)
    add("turned.png", np.rot90(grey, -1), 65535).write_bytes(buffer.getvalue())
    ppm(add("grey.pgm", grey, 65535), grey, 65535)
    ppm(add("ten.pgm", grey >> 6, 1023), grey >> 6, 1023)
    ppm(add("rgb.ppm", rgb, 65535), rgb, 65535)
    ppm(add("ten.ppm", rgb >> 6, 1023), rgb >> 6, 1023)
    jpeg2000(add("grey.jp2", grey, 65535), grey)
    jpeg2000(add("rgb.jp2", rgb, 65535), rgb)
    avif(add("ten.avif", rgb >> 6, 1023), rgb >> 6, 10)
    avif(add("alpha.avif", rgb >> 4, 4095), np.concatenate([rgb, rgb[..., :1]], 2) >> 4, 12)
    avif(add("grey.avif", grey >> 4, 4095), grey >> 4, 12)
    fits(add("unsigned.fits", grey, 65535), (grey ^ 0x8000).astype(">i2"), BZERO=32768)
    fits(add("signed.fits", grey >> 1, 1), (grey >> 1).astype(">i2"))
    files["signed.fits"] = folder / "signed.fits", (grey >> 1) + 32768.0, 65535
    np.save(add("a.npy", rgb, 65535), rgb)
    np.save(add("big.npy", grey, 65535), grey.astype(">u2"))
    return files


def test_every_kind_of_deep_file_gives_its_numbers_in_every_command(tmp_path, make):
    models = {n: make(in_chans=n, img_size=[37, 50]) for n in (1, 3)}
    for name, (path, numbers, top) in deep_files(tmp_path).items():
        in_chans = 3 if numbers.ndim == 3 else 1
        model = models[in_chans]
        mean, std = (torch.tensor(x).view(-1, 1, 1) for x in normalisation(model, in_chans))
        want = torch.from_numpy((numbers / top).astype(np.float32)).reshape(*numbers.shape[:2], in_chans)
        want = (want.permute(2, 0, 1) - mean) / std
        args = (tuple(mean.flatten().tolist()), tuple(std.flatten().tolist()))
        rows = Pixels(open_image(path), in_chans, *args)
        transform = SeededTransform(lambda image, seed: image, *args)
        pixels = {
            "encode": torch.cat([rows.rows(a, min(a + 10, want.shape[1])) for a in range(0, want.shape[1], 10)], 2)[0],
            "predict": PredictDataset([str(path)], transform, in_chans)[0][0],
            "load": EvalTransform(in_chans, tuple(want.shape[1:]), *args)(path),
            "visualize": view(model, path).pixels[0],
        }
        for command, found in pixels.items():
            torch.testing.assert_close(found, want, atol=2e-5, rtol=0, msg=lambda m, c=command, n=name: f"{c} {n} {m}")
            assert torch.equal(found, pixels["encode"]) or command in ("load", "visualize"), (command, name)
        with torch.no_grad():
            expected = model(want[None])[0]
        torch.testing.assert_close(
            torch.from_numpy(embed_images(model, path).embedding[0]), expected, atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(
            encode(model, open_image(path), progress=False).embedding, expected, atol=1e-4, rtol=1e-4
        )


def normalisation(model, in_chans):
    cfg = model.pretrained_cfg
    return (cfg["mean"], cfg["std"]) if in_chans == 3 else ((sum(cfg["mean"]) / 3,), (sum(cfg["std"]) / 3,))


def test_what_only_zarr_and_memory_hold(tmp_path, make):
    numbers = RNG.integers(-500, 3000, (20, 30, 5), dtype=np.int16)
    zarr.create_array(tmp_path / "a.zarr", data=numbers, chunks=(7, 8, 5))
    model, options = make(in_chans=5), {"mean": 0, "std": 1, "value_range": (-500, 3000)}
    with torch.no_grad():
        want = model(torch.from_numpy((numbers + 500) / 3500).float().permute(2, 0, 1)[None])[0]
    for image in (open_image(tmp_path / "a.zarr"), numbers):
        got = encode(model, image, **options, progress=False).embedding
        alike(got, want)


# ---- data sets and checkpoints


def folder_of(root: Path, low: int = 1000, high: int = 4000) -> Path:
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            for i in range(3):
                numbers = RNG.integers(low, high, (20, 24), dtype=np.uint16)
                tiff(root / split / name / f"{i}.tif", numbers, "0")
    return root


def test_percentiles_are_of_the_data_set():
    dark, bright = (Raster(np.linspace(a, a + 100, 900, dtype=np.float32).reshape(30, 30)) for a in (0, 900))
    low, high = percentile_range([dark, bright])
    assert 2 < low < 6 and 994 < high < 998
    bright.array[:5] = NAN
    bright.array[5] = -9999
    assert percentile_range([dark, bright], nodata=-9999)[0] == pytest.approx(low)
    for thin in ((1, 100_000), (100_000, 2)):
        found = percentile_range([Raster(np.linspace(0, 100, math.prod(thin), dtype=np.float32).reshape(thin))])
        assert found == pytest.approx((2, 98), abs=1)
    with pytest.raises(ValueError, match="no numbers"):
        percentile_range([])
    with pytest.raises(ValueError, match="nearly all numbers are 3"):
        percentile_range([Raster(np.full((4, 4), 3, np.uint16))])


def test_the_percentiles_of_files_that_are_embedded(tmp_path, make):
    images = [RNG.integers(low, low + 999, (9, 9), dtype=np.uint16) for low in (0, 5000)]
    paths = [tiff(tmp_path / f"{i}.tif", image) for i, image in enumerate(images)]
    low, high = percentile_range(Raster(tifffile.imread(path)) for path in paths)
    got, want = (
        embed_images(make(), [*paths], Settings(value_range=value_range)).embedding
        for value_range in ("percentile", (low, high))
    )
    np.testing.assert_array_equal(got, want)


def test_a_checkpoint_takes_its_range_along(tmp_path, caplog):
    """To prediction, by a checkpoint or by weights, to `load`, `embed`, `encode`, and to an exported folder."""
    root, folder = folder_of(tmp_path / "photos"), tmp_path
    data = {"img_size": [20, 24], "in_chans": 1, "batch_size": 4, "num_workers": 0, "crop_pct": None}
    kwargs = {"embed_dim": 16, "depth": 1, "patch_size": 4, "num_heads": 2}
    task = ClassificationTask("test_luna_vit", num_classes=2, model_kwargs=kwargs, in_chans=1)
    module = ImageFolderDataModule(str(root), value_range="percentile", fill=1500.0, augmentation="none", **data)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=1, enable_checkpointing=False, **quiet)
    trainer.fit(task, module)
    low, high = module.values.value_range
    assert 1000 <= low < 1200 and 3800 < high <= 4000
    trainer.save_checkpoint(folder / "best.ckpt")
    export_weights(folder / "best.ckpt", folder / "best.safetensors")
    export_command([f"--checkpoint={folder / 'best.ckpt'}", "--format=hf", f"--out={folder / 'hf'}"])

    path = root / "train" / "ant" / "0.tif"
    numbers = tifffile.imread(path).astype(np.float32)
    want = torch.from_numpy((((numbers - low) / (high - low)).clip(0, 1) - module.mean[0]) / module.std[0])[None]
    for source in ("best.ckpt", "best.safetensors", "hf"):
        model, transform, _ = luna_vision.load(folder / source)
        assert transform.values.value_range == (low, high) and transform.values.fill == 1500
        torch.testing.assert_close(transform(path), want)
    model = load_model(checkpoint=folder / "best.safetensors", device="cpu", num_classes=0)
    with torch.no_grad():
        embedding = model(want[None])[0]
    torch.testing.assert_close(
        torch.from_numpy(embed_images(model, path).embedding[0]), embedding, atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        encode(model, open_image(path), progress=False).embedding, embedding, atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(view(model, path).pixels[0], want)

    for how in ("ckpt_path", "checkpoint"):
        plain = ImageFolderDataModule(str(root), **data)
        start = {"checkpoint": str(folder / "best.safetensors")} if how == "checkpoint" else {}
        again = ClassificationTask("test_luna_vit", num_classes=2, model_kwargs=kwargs, in_chans=1, **start)
        ckpt = {"ckpt_path": str(folder / "best.ckpt"), "weights_only": True} if how == "ckpt_path" else {}
        Trainer(**quiet).predict(again, plain, **ckpt)
        assert plain.values.value_range == (low, high) and plain.values.fill == 1500, how
        given = ImageFolderDataModule(str(root), value_range="dtype", fill="mean", **data)
        Trainer(**quiet).predict(again, given, **ckpt)
        assert given.values.value_range is None and given.values.fill == "mean", how
    # options go over it everywhere
    result = embed_images(model, path, Settings(value_range=(0, 1e6))).embedding
    assert not np.allclose(result, embedding, atol=1e-3)
    with pytest.raises(ValueError, match="is of a data set"):
        encode(make_like(model), open_image(path), value_range="percentile", progress=False)


def make_like(model):
    model.pretrained_cfg = {k: v for k, v in model.pretrained_cfg.items() if k != "value_range"}
    return model


# ---- augmentation


DEEP = RNG.integers(0, 4096, (40, 48, 3)).astype(np.float32) / 4095


@pytest.mark.parametrize("crop", ["resized", "pad", "none"])
@pytest.mark.parametrize("backend", ["albumentations", "torchvision", "none"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_training_keeps_the_levels(backend, crop, in_chans, caplog):
    aug = Augmentation((24, 32), crop=crop, rotate=10, color_jitter=0.1, mean=(0.5,) * in_chans)
    transform = train_transform(backend, aug, (0.0,) * in_chans, (1.0,) * in_chans)
    x = transform(DEEP[..., :in_chans], 3)
    assert x.shape == (in_chans, 24, 32) and 0 <= x.min() and x.max() <= 1
    assert len(x.unique()) > 500 and torch.equal(x, transform(DEEP[..., :in_chans], 3)) and not caplog.records


@pytest.mark.parametrize("policy", TORCHVISION_POLICIES)
def test_policies_take_deep_images(policy, caplog):
    aug = Augmentation((24, 32), auto_augment=policy, mean=(0.5,) * 3)
    transform = train_transform("torchvision", aug, (0.0,) * 3, (1.0,) * 3)
    images = [transform(DEEP, seed) for seed in range(40)]
    assert all(0 <= x.min() and x.max() <= 1 for x in images)
    assert sum(len(x.unique()) > 500 for x in images) > 20 and len(caplog.records) == 1


def test_what_works_in_8_bits_says_so_once(caplog):
    transform = train_transform("timm", Augmentation((24, 32), mean=(0.5,) * 3), (0.0,) * 3, (1.0,) * 3)
    assert all(len(transform(DEEP, seed).unique()) <= 256 for seed in range(3))
    (record,) = caplog.records
    assert "8 bits" in record.getMessage()


def test_a_deep_image_is_resized_and_cut_as_a_photograph_is():
    # Neither black nor white: Pillow cuts what overshoots after each of its two passes, floats are cut at the end.
    photo = RNG.integers(64, 192, (50, 80, 3), dtype=np.uint8)
    for crop_pct in (None, 0.8):
        eight = EvalTransform(3, (24, 32), crop_pct=crop_pct, mean=(0.0,) * 3, std=(1.0,) * 3)
        deep = EvalTransform(3, (24, 32), crop_pct=crop_pct, mean=(0.0,) * 3, std=(1.0,) * 3, values=Values((0, 255)))
        torch.testing.assert_close(eight(photo), deep(photo), atol=0.01, rtol=0)


@pytest.mark.parametrize("mode", ["RGB", "I;16", "rgb of 16 bits"])
def test_a_png_may_say_behind_its_pixels_that_it_lies_on_its_side(mode, tmp_path):
    numbers = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    if mode == "RGB":
        Image.fromarray(numbers).save(buffer, "png")
    elif mode == "I;16":
        numbers = numbers[..., 0].astype(np.uint16)
        Image.fromarray(numbers).save(buffer, "png")
    else:
        numbers = numbers.astype(np.uint16)
        buffer.write(imagecodecs.png_encode(numbers))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(data)) + b"eXIf" + data + struct.pack(">I", zlib.crc32(b"eXIf" + data))
    content = buffer.getvalue()
    (tmp_path / "a.png").write_bytes(content[:-12] + chunk + content[-12:])
    upright = np.rot90(numbers, -1)
    whole = read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(np.squeeze(whole.array if isinstance(whole, Raster) else whole), upright)
    image = open_image(tmp_path / "a.png")
    assert image.shape == upright.shape
    np.testing.assert_array_equal(np.concatenate([image[0:7], image[7:30]]), upright)
