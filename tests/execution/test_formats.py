"""Every kind of file gives the pixels that it holds, converted as everywhere in the package."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import zarr
from PIL import Image, ImageFile

from luna_vision.execution import encode
from luna_vision.images import open_image
from luna_vision.images.decode import read_image, to_channels
from luna_vision.images.pixels import Pixels
from luna_vision.images.transforms import SeededTransform


@pytest.fixture
def picture(photo) -> np.ndarray:
    return photo[100:237, 200:311]  # (137, 111, 3)


def tiff(path, image, **arguments):
    tifffile.imwrite(path, image, photometric="rgb" if image.ndim == 3 else "minisblack", **arguments)


def write(kind: str, path, image) -> None:
    if kind == "npy":
        np.save(path, image)
    elif kind == "tiles":
        tiff(path, image, tile=(32, 48))
    elif kind == "deflate":
        tiff(path, image, tile=(32, 48), compression="deflate", predictor=True)
    elif kind == "lzw":
        tiff(path, image, rowsperstrip=10, compression="lzw")
    elif kind == "strip":
        tiff(path, image)
    elif kind == "planes":
        tifffile.imwrite(path, image.transpose(2, 0, 1), photometric="rgb", planarconfig="separate", tile=(32, 48))
    elif kind == "big":
        tiff(path, image, bigtiff=True, tile=(64, 64))
    elif kind in ("zarr2", "zarr3"):
        chunks = {"chunks": (30, 40, 3)}
        zarr.create_array(path, data=image, zarr_format=int(kind[-1]), **chunks)
    elif kind == "channels first":
        zarr.create_array(path, data=image.transpose(2, 0, 1), chunks=(1, 30, 40))
    else:
        Image.fromarray(image).save(path)


@pytest.mark.parametrize(
    "kind, name",
    [
        ("npy", "a.npy"),
        *((k, "a.tif") for k in ("tiles", "deflate", "lzw", "strip", "planes", "big")),
        *((k, "a.zarr") for k in ("zarr2", "zarr3", "channels first")),
        ("pillow", "a.png"),
        ("pillow", "a.webp"),
        ("pillow", "a.ppm"),
    ],
)
def test_the_pixels_of_a_file(kind, name, picture, tmp_path):
    if name.endswith("webp"):
        Image.fromarray(picture).save(tmp_path / name, lossless=True)
    else:
        write(kind, tmp_path / name, picture)
    image = open_image(tmp_path / name)
    assert image.shape == picture.shape and image.dtype == np.uint8
    pixels = Pixels(image, 3, (0.0,), (1.0,))
    for start, stop in ((0, 5), (3, 64), (64, 65), (60, 137), (0, 137)):
        np.testing.assert_array_equal(pixels.raw(start, stop), picture[start:stop])


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("kind", ["RGB", "RGBA", "L", "LA", "P", "CMYK", "I;16", "1", "turned"])
def test_conversion_is_that_of_the_package(kind, in_chans, picture, tmp_path):
    path = tmp_path / ("a.tiff.jpg" if kind == "CMYK" else "a.png")
    image = Image.fromarray(picture)
    if kind == "I;16":
        image = Image.fromarray(picture[:, :, 0].astype(np.uint16) * 255 + 77)
    elif kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(path, exif=exif)
    elif kind != "RGB":
        image = image.convert(kind)
    if kind != "turned":
        image.save(path)
    mean, std = ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)) if in_chans == 3 else ((0.5,), (0.3,))
    want = SeededTransform(lambda image, seed: image, mean, std)(to_channels(read_image(path), in_chans), 0)
    pixels = Pixels(open_image(path), in_chans, mean, std)
    height = pixels.shape[0]
    got = torch.cat([pixels.rows(a, min(a + 13, height)) for a in range(0, height, 13)], dim=2)[0]
    assert torch.equal(got, want)


def test_floating_point_goes_in_as_it_is(picture):
    x = (picture / 255).astype(np.float32)
    got = Pixels(x, 3, (0.5,) * 3, (0.25,) * 3).rows(0, 5)
    torch.testing.assert_close(got, (torch.from_numpy(x[:5]).permute(2, 0, 1)[None] - 0.5) / 0.25)


@pytest.mark.parametrize("value", [255.0, -3.0, np.nan, np.inf, -np.inf])
def test_a_number_that_is_no_pixel_changes_no_other(value, picture, make):
    x = (picture / 255).astype(np.float32)
    x[70, 8, 1] = value
    pixels = Pixels(x, 3, (0.5,) * 3, (0.25,) * 3).rows(0, len(x))[0].permute(1, 2, 0)
    want = torch.from_numpy((picture / 255).astype(np.float32)).sub(0.5).div(0.25)
    want[70, 8, 1] = {255.0: 2.0, -3.0: -2.0}.get(value, 0.0)  # white, black, and the mean
    torch.testing.assert_close(pixels, want)
    assert encode(make(), x, progress=False).logits.isfinite().all()


def test_nothing_is_decoded_before_a_row_is_asked_for(picture, tmp_path, monkeypatch):
    """So that an image that does not fit into the budget is refused, and not decoded."""
    for name in ("a.png", "a.jpg", "a.webp"):
        Image.fromarray(picture).save(tmp_path / name)
        with monkeypatch.context() as patch:
            patch.setattr(ImageFile.ImageFile, "load", None)
            assert open_image(tmp_path / name).shape == picture.shape


def test_pillow_sets_no_limit_to_the_size_of_a_band(picture, tmp_path, monkeypatch):
    Image.fromarray(picture).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    np.testing.assert_array_equal(Pixels(open_image(tmp_path / "a.png"), 3, (0.0,), (1.0,)).raw(0, 64), picture[:64])
    assert Image.MAX_IMAGE_PIXELS == 100


def test_a_png_that_is_cut_off_is_one_line_with_its_name(picture, tmp_path):
    Image.fromarray(picture).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:5000])
    with pytest.raises(OSError, match="cannot read the pixel rows 0 to 9 of .*a.png: .*truncated"):
        Pixels(open_image(tmp_path / "a.png"), 3, (0.0,), (1.0,)).rows(0, 10)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:20])
    with pytest.raises(OSError, match="cannot read .*a.png|not an image"):
        open_image(tmp_path / "a.png")


def test_every_tile_is_decoded_once(picture, make, tmp_path, monkeypatch):
    tiff(tmp_path / "a.tif", picture, tile=(32, 48))
    image, read = open_image(tmp_path / "a.tif"), []
    get = type(image).__getitem__
    monkeypatch.setattr(type(image), "__getitem__", lambda self, rows: read.append(rows.start) or get(self, rows))
    want = encode(make(), picture, band_rows=3, progress=False).logits
    assert torch.equal(encode(make(), image, band_rows=3, progress=False).logits, want)
    assert read == [0, 32, 64, 96, 128]


@pytest.mark.parametrize("region", [None, (7, 9, 100, 100)])
@pytest.mark.parametrize("orientation", [1, 3, 4, 7])
def test_every_tile_of_a_turned_image_is_decoded_once(orientation, region, picture, tmp_path):
    tiff(tmp_path / "a.tif", picture, tile=(32, 48), extratags=[(274, "H", 1, orientation, True)])
    image = open_image(tmp_path / "a.tif", region=region)
    whole = image if region is None else image.image
    read, sides, side = [], whole.array.chunks, "YX".index(whole.rows)

    class Counted:
        def __init__(self, array) -> None:
            self.array = array

        def __getitem__(self, place):
            read.extend(range(place[side].start // sides[side], -(-place[side].stop // sides[side])))
            return self.array[place]

    whole.array = Counted(whole.array)
    pixels = Pixels(image, 3, (0.0,) * 3, (1.0,) * 3)
    found = np.concatenate([pixels.raw(y, min(y + 5, image.shape[0])) for y in range(0, image.shape[0], 5)])
    assert len(read) == len(set(read))
    assert np.array_equal(found, image[0 : image.shape[0]])


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("kind", ["u2", "f4"])
def test_both_byte_orders(kind, chunked, picture, make, tmp_path):
    x = (picture / 255).astype("f4") if kind == "f4" else picture.astype("u2") * 257
    want = encode(make(), x, band_rows=3, progress=False).logits
    if chunked:
        zarr.create_array(tmp_path / "a.zarr", data=x.astype(f">{kind}"), chunks=(30, 40, 3), zarr_format=2)
        image = open_image(tmp_path / "a.zarr")
    else:
        np.save(tmp_path / "a.npy", x.astype(f">{kind}"))
        image = open_image(tmp_path / "a.npy")
    assert image.dtype == np.dtype(f">{kind}")
    assert torch.equal(encode(make(), image, band_rows=3, progress=False).logits, want)


def test_chunks_as_dask_lists_them(picture, make):
    class Lists:
        shape, dtype, read = picture.shape, picture.dtype, []
        chunks = (50, 50, 37), (111,), (3,)

        def __getitem__(self, rows):
            self.read.append(rows.start)
            return picture[rows]

    want = encode(make(), picture, band_rows=3, progress=False).logits
    assert torch.equal(encode(make(), Lists(), band_rows=3, progress=False).logits, want)
    assert Lists.read == [0, 50, 100]


def test_levels(picture, tmp_path):
    half = picture[::2, ::2].copy()
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(picture, photometric="rgb", tile=(32, 32), subifds=1)
        file.write(half, photometric="rgb", tile=(32, 32), subfiletype=1)
    group = zarr.open_group(tmp_path / "a.zarr", mode="w")
    for name, level in (("0", picture), ("1", half)):
        group.create_array(name, data=level.transpose(2, 0, 1)[None, :, None], chunks=(1, 3, 1, 32, 32))
    axes = [{"name": name} for name in "tczyx"]
    group.attrs["multiscales"] = [{"axes": axes, "datasets": [{"path": "0"}, {"path": "1"}]}]
    for path in (tmp_path / "a.tif", tmp_path / "a.zarr"):
        np.testing.assert_array_equal(open_image(path)[0:137], picture)
        np.testing.assert_array_equal(open_image(path, 1)[0:69], half)
        with pytest.raises(ValueError, match="has levels 0 to 1, got 2"):
            open_image(path, 2)


def test_what_pillow_holds_counts(picture, tmp_path):
    Image.fromarray(picture).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").held_bytes == 137 * 111 * 4


PEAK = """
import os, sys
from PIL import Image
from luna_vision.images import open_image
def resident(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) * 1024
Image.init()
for path in sys.argv[1:]:
    if not os.fork():
        image, before = open_image(path), resident("VmRSS")
        open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here
        image[0:1]
        print(image.held_bytes, resident("VmHWM") - before, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="counts the memory of a process as Linux does")
def test_what_decoders_take_counts(photo, tmp_path):
    image = Image.fromarray(np.tile(photo, (2, 2, 1)))
    image.save(tmp_path / "a.png", compress_level=1)
    image.save(tmp_path / "a.jpg", progressive=True, subsampling=0)
    image.save(tmp_path / "a.webp", method=0)
    image.save(tmp_path / "a.jp2")
    paths = [str(tmp_path / f"a.{suffix}") for suffix in ("png", "jpg", "webp", "jp2")]
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", PEAK, *paths], cwd=root, check=True, capture_output=True, text=True)
    pairs = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert [held / (image.width * image.height) for held, _ in pairs] == [4, 10, 16, 19]
    for held, peak in pairs:
        assert 0.9 * held < peak < 1.05 * held + 2**22


@pytest.mark.parametrize("at_once", [2, 10, None])
def test_chunks_that_are_decoded_at_once_count(at_once, picture, tmp_path):
    tiff(tmp_path / "a.tif", picture, tile=(32, 48))  # three of them in a row
    zarr.create_array(tmp_path / "a.zarr", data=picture.transpose(2, 0, 1), chunks=(1, 30, 111))  # one for each colour
    with zarr.config.set({"async.concurrency": at_once}):
        assert open_image(tmp_path / "a.tif").held_bytes == 2 * min(at_once or 3, 3) * 32 * 48 * 3
        assert open_image(tmp_path / "a.zarr").held_bytes == 2 * min(at_once or 3, 3) * 30 * 111


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.tif", b"", "is empty"),
        ("a.tif", b"no tiff at all", "a.tif|TIFF"),
        ("a.npy", b"no array", "a.npy is not an image of a format"),
        ("a.npy", b"\x93NUMPYno array", "cannot read .*a.npy"),
        ("a.png", b"no picture", "not an image of a format"),
        ("a.npy", np.asfortranarray(np.zeros((4, 5), np.uint8)), "Fortran's order"),
        ("a.npy", np.zeros(5), r"cannot read .*a.npy: an image has shape \(height, width\)"),
        ("a.npy", np.zeros((2, 3, 4, 5)), "an image has shape"),
        ("a.tif", np.zeros((4, 20, 30), np.uint8), r"axes [A-Z]YX of shape \(4, 20, 30\): an image has Y, X"),
    ],
)
def test_files_that_are_no_image(name, content, message, tmp_path):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif name.endswith("npy"):
        np.save(path, content)
    else:
        tifffile.imwrite(path, content, photometric="minisblack")
    with pytest.raises((ValueError, OSError), match=message):
        open_image(path)


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((8, 5, 6), np.uint8), "has 6 bands, and the model takes 1 or 3"),
        (np.zeros((8, 5, 4), np.uint16), "has 4 bands, and the model takes 1 or 3: nothing says that one .* is alpha"),
        (np.zeros((3, 50, 60), np.uint8), "channels come last"),
        (np.zeros((4, 5, 3), np.int64), "pixels of type int64 take a value_range"),
        (np.zeros((4, 5, 3), np.complex64), "numbers of type complex64: integers and floating point are read"),
        (np.zeros((0, 5, 3), np.uint8), "must have shape"),
        (np.zeros(5, np.uint8), "must have shape"),
        ("a.png", "must have shape"),
    ],
    ids=str,
)
def test_arrays_that_are_no_image(image, message, make):
    with pytest.raises(ValueError, match=message):
        encode(make(), image)


def test_a_damaged_tile_is_one_line(picture, make, tmp_path):
    tiff(tmp_path / "a.tif", picture, tile=(32, 48), compression="deflate")
    content = bytearray((tmp_path / "a.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        offset, count = file.pages[0].dataoffsets[6], file.pages[0].databytecounts[6]  # the third row of tiles
    content[offset : offset + count] = b"\xff" * count
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(OSError, match="cannot read the pixel rows 64 to 95 of .*a.tif: "):
        encode(make(), open_image(tmp_path / "a.tif"), progress=False)
