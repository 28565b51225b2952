"""TIFF of every kind: whole images and rows are the same numbers, and those that the file was written of.

The judge is a formula of each kind, applied to the samples that were written, and Pillow where it reads all bits.
"""

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image

from luna_vision.images import decode, open_image
from luna_vision.images.decode import SampleError, plain, read_image, to_channels, to_raster
from luna_vision.images.pixels import Pixels
from luna_vision.images.transforms import to_tensor

PHOTOMETRIC = {"miniswhite": 1, "minisblack": 1, "rgb": 3, "palette": 1, "separated": 4}  # samples of a pixel
NUMBERS = [
    *((np.uint8, bits) for bits in (1, 2, 4, 6, 8)),
    *((np.uint16, bits) for bits in (10, 12, 16)),
    *((kind, np.dtype(kind).itemsize * 8) for kind in (np.uint32, np.int8, np.int16, np.int32)),
    *((kind, np.dtype(kind).itemsize * 8) for kind in (np.float16, np.float32, np.float64)),
]
EXTRAS = {
    "no alpha": (),
    "alpha": ("unassalpha",),
    "alpha multiplied in": ("assocalpha",),
    "a band": ("unspecified",),
    "alpha and a band": ("unassalpha", "unspecified"),
    "a band and alpha": ("unspecified", "assocalpha"),
}
KINDS = list(itertools.product(PHOTOMETRIC, NUMBERS, EXTRAS))
TURNS = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: lambda x: np.rot90(x, 1),
}
SIZE = (19, 26)
COLOURS = np.random.default_rng(5).integers(0, 256, (3, 256), np.uint8).astype(np.uint16) * 257


def samples_of(dtype, bits: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Random samples (H, W, count), the least and the largest among them."""
    shape = (*SIZE, count)
    if np.dtype(dtype).kind == "f":
        samples = rng.random(shape).astype(dtype)
        samples[0, 0], samples[0, 1] = 0, 1
        return samples
    low, high = (0, 2**bits - 1) if np.dtype(dtype).kind == "u" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    samples = rng.integers(low, high, shape, dtype=dtype, endpoint=True)
    samples[0, 0], samples[0, 1] = low, high
    return samples


def wanted(samples: np.ndarray, photometric: str, bits: int, extras: tuple[str, ...]) -> np.ndarray | None:
    """The numbers (H, W, bands) that a file of these samples holds; None where it makes no sense."""
    dtype, base, top = samples.dtype, PHOTOMETRIC[photometric], 2**bits - 1
    if photometric in ("miniswhite", "palette", "separated") and (dtype.kind != "u" or "unspecified" in extras):
        if dtype.kind != "u" or photometric != "miniswhite":
            return None
    numbers = samples[:, :, :base]
    if "assocalpha" in extras:
        alpha = samples[:, :, [base + extras.index("assocalpha")]]
        if dtype.kind == "u":
            numbers = np.where(alpha == 0, 0, np.minimum(numbers.astype(object) * top // np.maximum(alpha, 1), top))
            numbers = numbers.astype(dtype)
        else:
            with np.errstate(all="ignore"):
                numbers = np.where(alpha == 0, 0, numbers / alpha).astype(dtype)
    others = [base + i for i, extra in enumerate(extras) if extra == "unspecified"]
    numbers = np.concatenate([numbers, samples[:, :, others]], axis=2)
    if photometric == "miniswhite":
        numbers = (top - numbers.astype(np.int64)).astype(dtype)
    elif photometric == "palette":
        return (COLOURS[:, : top + 1] // 257).T[numbers[:, :, 0]].astype(np.uint8)
    if bits < 8:
        numbers, top = np.floor(numbers * (255 / top) + 0.5).astype(np.uint8), 255
    if photometric == "separated":
        inks = numbers.astype(np.float64) / top
        return np.floor((1 - inks[:, :, :3]) * (1 - inks[:, :, 3:]) * top + 0.5).astype(dtype)
    return numbers


def write(path: Path, samples, photometric, bits, extras, rng: random.Random, **given) -> tuple[int, str]:
    """Write a TIFF of these samples, all else drawn at random; returns its orientation, and all in words."""
    packed = bits not in (8, 16, 32, 64)
    orientation = rng.choice(list(TURNS))
    planar = rng.choice(["contig", "separate"]) if samples.shape[2] > 1 else None
    if bits == 1 and planar:
        planar = "separate"  # tifffile writes others wrongly
    # of fewer bits than a byte, compressors and predictors of rows that do not end at a byte are not written
    compression = None if packed else rng.choice([None, "lzw", "deflate", "packbits", "zstd", "adobe_deflate"])
    predictor = compression in ("lzw", "deflate", "zstd", "adobe_deflate") and rng.random() < 0.5
    options = {
        "photometric": photometric,
        "extrasamples": extras or None,
        "planarconfig": planar,
        "compression": compression,
        "predictor": predictor or None,
        "byteorder": "<" if packed and bits > 8 else rng.choice("<>"),  # of which tifffile writes others wrongly
        "bigtiff": rng.random() < 0.2,
        **given,
    }
    if packed:
        options["bitspersample"] = bits
    tags = [(274, 3, 1, orientation, True)]
    if photometric == "palette" and bits == 8:
        options["colormap"] = COLOURS
    elif photometric == "palette":  # which tifffile does not write
        options["photometric"] = "minisblack"
        tags.append((320, 3, 3 * 2**bits, COLOURS[:, : 2**bits].ravel().tolist(), True))
    if rng.random() < 0.5 and not packed:
        options["tile"] = (16, 16)
    else:
        options["rowsperstrip"] = rng.choice([4, 100])
    array = samples.transpose(2, 0, 1) if planar == "separate" else samples
    if samples.shape[2] == 1:
        array = samples[:, :, 0]
    if bits == 1:
        array = array.astype(bool)
    tifffile.imwrite(path, array, metadata=None, extratags=tags, **options)
    if photometric == "palette" and bits < 8:
        with tifffile.TiffFile(path, mode="r+b") as file:
            file.pages[0].tags[262].overwrite(3)
    return orientation, str({name: value for name, value in options.items() if name != "colormap"})


def by_rows(path: Path, in_chans: int) -> torch.Tensor:
    pixels = Pixels(open_image(path), in_chans, (0.0,) * in_chans, (1.0,) * in_chans)
    height = pixels.shape[0]
    return torch.cat([pixels.rows(a, min(a + 7, height)) for a in range(0, height, 7)], dim=2)[0]


def check(path: Path, want: np.ndarray | None, what: str) -> None:
    if want is None:
        for read in (read_image, open_image):
            with pytest.raises(ValueError, match=path.name):
                read(path)
        return
    whole, rows = read_image(path), open_image(path)
    number = to_raster(whole).array
    assert number.shape == want.shape, what
    np.testing.assert_array_equal(number, want, err_msg=what, strict=True)
    np.testing.assert_array_equal(np.asarray(rows[0 : want.shape[0]]).reshape(want.shape), want, err_msg=what)
    assert rows.dtype == want.dtype and rows.shape[:2] == want.shape[:2], what
    bands = want.shape[2]
    for in_chans in (1, 3) if bands in (1, 3) else (bands,):
        assert torch.equal(by_rows(path, in_chans), to_tensor(to_channels(whole, in_chans))), what
    if bands not in (1, 3):
        with pytest.raises(SampleError, match=f"{bands} bands"):
            to_channels(whole, 3)
        with pytest.raises(ValueError, match=f"{bands} bands"):
            Pixels(rows, 3, (0.0,) * 3, (1.0,) * 3)


def pillow(path: Path) -> np.ndarray | None:
    """The image as Pillow reads it, without alpha; None where it does not."""
    try:
        # by its name, Pillow would map the file, and mistake the rows of an image that lies on its side
        with open(path, "rb") as file, Image.open(file) as image:
            image.load()
            return np.asarray(plain(ImageOps.exif_transpose(image), image.mode in ("1", "L", "LA", "La")))
    except (OSError, ValueError):
        return None


def differ(path: Path, kinds: list, seed: int, compressions: list | None = None) -> int:
    """Write, read and compare a file of each kind; returns how many Pillow could judge."""
    rng, compared = random.Random(seed), 0
    for i, (photometric, (dtype, bits), extra) in enumerate(kinds):
        extras = EXTRAS[extra]
        if photometric == "palette" and (dtype != np.uint8 or extras):
            continue  # not written by tifffile
        numbers = np.random.default_rng((seed, i))
        samples = samples_of(dtype, bits, PHOTOMETRIC[photometric] + len(extras), numbers)
        if "assocalpha" in extras:
            samples[samples[:, :, PHOTOMETRIC[photometric] + extras.index("assocalpha")] == 0] = 0
        given = {"compression": rng.choice(compressions)} if compressions else {}
        orientation, drawn = write(path, samples, photometric, bits, extras, rng, **given)
        want = wanted(samples, photometric, bits, extras)
        what = f"{photometric}, {np.dtype(dtype)}, {bits} bits, {extra}, orientation {orientation}, {drawn}"
        check(path, None if want is None else np.ascontiguousarray(TURNS[orientation](want)), what)
        # Pillow leaves multiplied alpha in planes of greys as it is
        planes = "assocalpha" in extras and "separate" in drawn and photometric == "minisblack"
        if want is not None and bits <= 8 and dtype == np.uint8 and "unspecified" not in extras and not planes:
            found = pillow(path)
            if found is not None:
                upright = TURNS[orientation](want)
                np.testing.assert_array_equal(found.reshape(upright.shape), upright, err_msg=f"Pillow: {what}")
                compared += 1
    return compared


@pytest.mark.parametrize("photometric", PHOTOMETRIC)
def test_every_kind_of_tiff_is_read_alike(photometric: str, tmp_path: Path):
    kinds = [kind for kind in KINDS if kind[0] == photometric]
    assert differ(tmp_path / "a.tif", kinds, seed=1) > 0


@pytest.mark.slow
def test_every_kind_of_tiff_is_read_alike_in_another_draw(tmp_path: Path):
    differ(tmp_path / "a.tif", KINDS, seed=2)


@pytest.mark.parametrize("compression", ["jpeg", "tiff_lzma", "group4", "tiff_lzw", "tiff_adobe_deflate"])
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr", "LAB", "I;16"])
def test_files_that_pillow_writes(mode: str, compression: str, photo: np.ndarray, tmp_path: Path):
    """Some of them by compressions and colours that only Pillow reads, as a whole."""
    image = Image.fromarray(photo[:, :, 0].astype(np.uint16) * 200) if mode == "I;16" else None
    image = image or Image.fromarray(photo).convert("L" if mode == "1" else "RGB").convert(mode)
    path = tmp_path / "a.tif"
    try:
        image.save(path, compression=compression)
    except OSError:
        pytest.skip("not written")
    whole = to_raster(read_image(path)).array
    assert whole.dtype == (np.uint16 if mode == "I;16" else np.uint8)
    np.testing.assert_array_equal(np.asarray(open_image(path)[0 : len(whole)]).reshape(whole.shape), whole)
    with Image.open(path) as opened:
        opened.load()
        expected = np.asarray(opened if mode == "I;16" else plain(opened, mode in ("1", "L")))
    np.testing.assert_array_equal(whole.squeeze(), expected)


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return load_sample_image("china.jpg")[100:163, 200:271]


@pytest.mark.parametrize("name", ["jpeg", "jpeg2000", "webp"])
@pytest.mark.parametrize("tile", [None, (32, 32)])
def test_tiles_that_are_images(name: str, tile, photo: np.ndarray, tmp_path: Path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, photo, photometric="rgb", compression=name, tile=tile, rowsperstrip=16, metadata=None)
    whole = np.asarray(read_image(path))
    np.testing.assert_array_equal(open_image(path)[0:63], whole)
    assert np.abs(whole.astype(int) - photo).mean() < 10
    if name == "jpeg":
        np.testing.assert_array_equal(whole, pillow(path))


def test_without_the_libraries_pillow_reads_what_it_reads_rightly(photo, tmp_path, monkeypatch):
    tags = {"extratags": [(42113, 2, 2, "0", True)]}
    deep, four = photo.astype(np.uint16) * 257, np.concatenate([photo, photo[..., :1]], 2)
    files = {
        "rgb.tif": (photo, {"photometric": "rgb"}),
        "grey.tif": (photo[..., 0], {"photometric": "minisblack"}),
        "deep.tif": (deep[..., 0], {"photometric": "minisblack"}),
        "twelve.tif": (deep[..., 0] >> 4, {"photometric": "minisblack", "bitspersample": 12}),
        "nodata.tif": (photo[..., 0], {"photometric": "minisblack", **tags}),
        "deep-rgb.tif": (deep, {"photometric": "rgb"}),
        "inverted.tif": (deep[..., 0], {"photometric": "miniswhite"}),
        "signed.tif": ((photo[..., 0].astype(int) - 128).astype(np.int8), {"photometric": "minisblack"}),
        "bands.tif": (four, {"photometric": "rgb", "extrasamples": ["unspecified"]}),
    }
    for name, (array, options) in files.items():
        tifffile.imwrite(tmp_path / name, array, metadata=None, **options)
    wanted = {name: to_raster(read_image(tmp_path / name)) for name in files}
    monkeypatch.setattr(decode, "missing_library", lambda: "tifffile")
    for name in files:
        if name in ("deep-rgb.tif", "inverted.tif", "signed.tif", "bands.tif"):
            with pytest.raises(SampleError, match=name):
                read_image(tmp_path / name)
            continue
        found, want = to_raster(read_image(tmp_path / name)), wanted[name]
        np.testing.assert_array_equal(found.array, want.array)
        assert (found.top, found.nodata) == (want.top, want.nodata), name
