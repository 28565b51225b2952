"""Slides, stacks, multiscales and rasters: the part, level and resolution that was asked for, and nothing else."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image
from sklearn.datasets import load_sample_image

from luna_vision.cli.common import run_command
from luna_vision.cli.encode import main
from luna_vision.images import open_image
from luna_vision.images.decode import read_image
from luna_vision.images.foreground import patch_mask
from luna_vision.images.pixels import Pixels
from luna_vision.images.slides import SlideImage


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """(426, 640, 3) uint8."""
    return load_sample_image("china.jpg")[:426]


def all_of(image) -> np.ndarray:
    """The whole image, read by bands of an odd height."""
    pixels = Pixels(image, image.shape[2] if len(image.shape) == 3 else 1, (0.0,) * 9, (1.0,) * 9)
    return np.concatenate([pixels.raw(a, min(a + 37, image.shape[0])) for a in range(0, image.shape[0], 37)])


def pyramid(path: Path, image: np.ndarray, **first) -> None:
    """A TIFF whose levels are pages one after the other, as of a scanner."""
    with tifffile.TiffWriter(path) as file:
        for step in (1, 2):
            level = np.ascontiguousarray(image[::step, ::step])
            how = {"tile": (64, 64), "compression": "jpeg", "compressionargs": {"level": 95}, "metadata": None}
            file.write(level, photometric="rgb", subfiletype=int(step > 1), **how, **(first if step == 1 else {}))


def levels_of(path: Path) -> list[np.ndarray]:
    with tifffile.TiffFile(path) as file:
        return [page.asarray() for page in file.pages]


# ---- slides


@pytest.fixture
def slide(photo, tmp_path) -> Path:
    """As of a scanner of Aperio."""
    pytest.importorskip("openslide")
    pyramid(tmp_path / "a.svs", photo, description="Aperio Image Library\r\n640x426 |AppMag = 20|MPP = 0.5")
    return tmp_path / "a.svs"


def test_a_slide_is_what_it_is_as_a_whole(slide):
    import openslide

    image = open_image(slide)
    assert isinstance(image, SlideImage) and image.shape == (426, 640, 3)
    whole = openslide.OpenSlide(slide).read_region((0, 0), 0, (640, 426)).convert("RGB")
    np.testing.assert_array_equal(all_of(image), np.asarray(whole))
    assert np.abs(all_of(image).astype(int) - levels_of(slide)[0]).mean() < 1  # decoders differ in rounding


@pytest.mark.parametrize("choice", [{"level": 1}, {"mpp": 1.0}, {"mpp": 0.98}, {"magnification": 10}], ids=str)
def test_a_level_by_number_resolution_or_magnification(choice, slide):
    image = open_image(slide, **choice)
    assert image.shape == (213, 320, 3)
    assert np.abs(all_of(image).astype(int) - levels_of(slide)[1]).mean() < 1


def test_a_resolution_between_two_levels_is_resampled(slide, photo):
    image = open_image(slide, mpp=0.75)
    assert image.shape == (284, 426, 3)
    want = np.asarray(Image.fromarray(photo).resize((427, 284), Image.Resampling.BILINEAR))[:, :426]
    assert np.abs(all_of(image).astype(int) - want).mean() < 4
    np.testing.assert_array_equal(image.window(slice(100, 150), slice(200, 300)), all_of(image)[100:150, 200:300])


def test_levels_that_are_no_fraction_are_read_as_they_are(tmp_path):
    """OpenSlide interpolates them; a complete TIFF need not be read by it."""
    image = np.tile(load_sample_image("china.jpg"), (2, 2, 1))[:, :1279]
    with tifffile.TiffWriter(tmp_path / "a.svs") as file:
        how = {"photometric": "rgb", "tile": (64, 64), "metadata": None}
        about = "Aperio Image Library\r\n{} |AppMag = 20|MPP = 0.5"
        file.write(image, description=about.format("1279x854"), **how)
        file.write(
            image[::8, ::8].copy(), description="Aperio Image Library\r\nthumbnail", photometric="rgb", metadata=None
        )
        file.write(image[::4, ::4].copy(), description=about.format("320x214"), **how)
    low = open_image(tmp_path / "a.svs", mpp=2.0)
    np.testing.assert_array_equal(all_of(low), image[::4, ::4])
    assert open_image(tmp_path / "a.svs", magnification=20).shape == image.shape


def test_a_region_of_a_slide(slide):
    whole, part = all_of(open_image(slide)), open_image(slide, region=(101, 50, 301, 200))
    np.testing.assert_array_equal(all_of(part), whole[50:250, 101:402])
    low, part = all_of(open_image(slide, 1)), open_image(slide, 1, region=(100, 50, 300, 200))
    np.testing.assert_array_equal(all_of(part), low[25:125, 50:200])


def test_transparency_is_background(tmp_path):
    """As of a scanner that leaves out glass."""

    class Transparent:
        level_dimensions, level_downsamples = [(8, 8)], [1.0]
        properties = {"openslide.background-color": "F0E0D0"}

        def read_region(self, corner, level, size):
            image = Image.new("RGBA", size, (0, 0, 0, 0))
            image.putpixel((1, 1), (10, 20, 30, 255))
            image.putpixel((2, 1), (0, 0, 0, 128))
            return image

    pixels = SlideImage(Transparent(), 0, tmp_path)[0:8]
    assert pixels[0, 0].tolist() == [0xF0, 0xE0, 0xD0] and pixels[1, 1].tolist() == [10, 20, 30]
    assert abs(pixels[1, 2].astype(int) - np.array([0xF0, 0xE0, 0xD0]) // 2).max() <= 1
    white = type("White", (Transparent,), {"properties": {}})
    assert SlideImage(white(), 0, tmp_path)[0:8][0, 0].tolist() == [255] * 3


# ---- stacks and channels


STACK = np.random.default_rng(0).integers(0, 255, (2, 3, 5, 60, 90), np.uint8)  # T, Z, C, Y, X
NAMES = ["DAPI", "CD3", "CD8", "CD20", "AF"]


def ome_tiff(path: Path) -> None:
    about = {"axes": "TZCYX", "PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm", "Channel": {"Name": NAMES}}
    tifffile.imwrite(path, STACK, tile=(32, 32), photometric="minisblack", metadata=about)


def ome_zarr(path: Path, zarr_format: int = 3, number: int = 2) -> None:
    """As bioformats2raw writes it: a group for each series."""
    root = zarr.open_group(path, mode="w", zarr_format=zarr_format)
    layout = {"bioformats2raw.layout": 3}
    root.attrs.update({"ome": layout} if zarr_format == 3 else layout)
    for name in map(str, range(number)):
        group, stack = root.create_group(name), STACK if name == "0" else STACK[::-1]
        group.create_array("0", data=stack, chunks=(1, 1, 1, 32, 32))
        group.create_array("1", data=np.ascontiguousarray(stack[..., ::2, ::2]), chunks=(1, 1, 1, 32, 32))
        axes = [{"name": a, **({"type": "space", "unit": "micrometer"} if a in "zyx" else {})} for a in "tzcyx"]
        scales = [[{"type": "scale", "scale": [1, 1, 1, s, s]}] for s in (0.5, 1.0)]
        sets = [{"path": str(i), "coordinateTransformations": scale} for i, scale in enumerate(scales)]
        about = {
            "multiscales": [{"axes": axes, "datasets": sets}],
            "omero": {"channels": [{"label": n} for n in NAMES]},
        }
        group.attrs.update({"ome": about} if zarr_format == 3 else about)


def stacks(folder: Path) -> list[Path]:
    ome_tiff(folder / "a.ome.tif")
    found = [folder / "a.ome.tif"]
    for zarr_format in (2, 3):
        ome_zarr(path := folder / f"a{zarr_format}.zarr", zarr_format)
        for base in (None, path.name):  # with and without the folder's own name
            root = folder if base else path
            found.append(
                Path(shutil.make_archive(str(folder / f"{base or 'flat'}{zarr_format}.zarr"), "zip", root, base))
            )
        found.append(path)
    return found


def test_stacks_channels_and_bands(tmp_path):
    for path in stacks(tmp_path):
        image = open_image(path, z=2, t=1)
        np.testing.assert_array_equal(all_of(image), STACK[1, 2].transpose(1, 2, 0))
        for choice in ({"channel": ["CD8", "DAPI"]}, {"channel": ["2", "0"]}, {"bands": [3, 1]}):
            two = open_image(path, z=0, t=0, region=(10, 5, 70, 40), **choice)
            np.testing.assert_array_equal(all_of(two), STACK[0, 0, [2, 0], 5:45, 10:80].transpose(1, 2, 0))
        one = open_image(path, z=0, t=0, channel=["AF"], mpp=0.5)
        np.testing.assert_array_equal(all_of(one), STACK[0, 0, 4])


def test_channels_that_are_not_asked_for_are_not_read(tmp_path):
    ome_zarr(tmp_path / "a.zarr", number=1)
    for chunk in (tmp_path / "a.zarr/0/0/c/0/0/1").rglob("*"):  # of CD3
        if chunk.is_file():
            chunk.write_bytes(b"damaged")
    whole, two = (open_image(tmp_path / "a.zarr", z=0, t=0, **choice) for choice in ({}, {"channel": ["CD8", "DAPI"]}))
    np.testing.assert_array_equal(all_of(two), STACK[0, 0, [2, 0]].transpose(1, 2, 0))
    with pytest.raises(OSError, match="cannot read the pixel rows"):
        all_of(whole)
    ome_tiff(tmp_path / "a.ome.tif")
    whole, one = (open_image(tmp_path / "a.ome.tif", z=0, t=0, **choice) for choice in ({}, {"channel": ["AF"]}))
    assert one.held_bytes < whole.held_bytes


def test_levels_and_series_of_ome_zarr(tmp_path):
    ome_zarr(tmp_path / "a.zarr")
    for choice in ({"level": 1}, {"mpp": 1.0}):
        image = open_image(tmp_path / "a.zarr", series=1, z=0, t=0, channel=["CD3"], **choice)
        np.testing.assert_array_equal(all_of(image), STACK[1, 0, 1, ::2, ::2])
    np.testing.assert_array_equal(all_of(open_image(tmp_path / "a.zarr/1", z=0, t=0, bands=[1])), STACK[1, 0, 0])


@pytest.mark.parametrize(
    "unit, steps, mpp",
    [
        ("micrometer", [0.25], 0.25),
        ("micrometer", [1.0, 0.5], 0.5),  # of the level, and of all levels
        ("nanometer", [250], 0.25),
        ("millimeter", [0.5, 1e-3], 0.5),
        ("micrometer", [0], None),
        ("pixel", [1.0], None),
        (None, [1.0], None),
    ],
)
def test_the_resolution_of_ome_zarr(unit, steps, mpp, tmp_path):
    """Source: OME-NGFF 0.4, "multiscales" metadata."""
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2)
    group.create_array("0", data=STACK[0, 0], chunks=(1, 32, 32))
    axes = [{"name": a, **({"type": "space", "unit": unit} if a != "c" and unit else {})} for a in "cyx"]
    first, *others = ([{"type": "scale", "scale": [1, step, step]}] for step in steps)
    scale = {"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": first}]}
    group.attrs["multiscales"] = [scale | ({"coordinateTransformations": others[0]} if others else {})]
    assert open_image(tmp_path / "a.zarr").frame.mpp == (mpp if mpp is None else pytest.approx(mpp))


def test_series_of_a_tiff(photo, tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as file:
        for image in (photo[:50, :60], photo[100:140, 100:170]):
            file.write(image, photometric="rgb", metadata={"axes": "YXS"})
    np.testing.assert_array_equal(all_of(open_image(tmp_path / "a.ome.tif", series=1)), photo[100:140, 100:170])


def test_a_zip_that_expands_is_refused_before_it_is_read(tmp_path):
    import zipfile

    ome_zarr(tmp_path / "a.zarr", number=1)
    with zipfile.ZipFile(tmp_path / "a.zarr.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for path in (tmp_path / "a.zarr").rglob("*.json"):
            file.write(path, path.relative_to(tmp_path / "a.zarr"))
        file.writestr("0/0/c/0/0/0/0/0", bytes(10**8))
    image = open_image(tmp_path / "a.zarr.zip", z=0, t=0)
    with pytest.raises(ValueError, match="has 100000000 encoded bytes"):
        image[0:10]
    with zipfile.ZipFile(tmp_path / "b.zarr.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("zarr.json", bytes(10**8))
    with pytest.raises(ValueError, match="100000000 bytes"):
        open_image(tmp_path / "b.zarr.zip")


# ---- rasters


BANDS = np.random.default_rng(1).integers(1, 4000, (4, 150, 200)).astype(np.uint16)


@pytest.fixture
def raster(tmp_path) -> Path:
    rasterio = pytest.importorskip("rasterio")
    where = {"crs": "EPSG:32633", "transform": rasterio.transform.Affine(10, 0, 500000, 0, -10, 5200000)}
    how = {"driver": "GTiff", "width": 200, "height": 150, "count": 4, "dtype": "uint16", "photometric": "MINISBLACK"}
    tiles = {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "deflate"}
    array = BANDS.copy()
    array[:, :30] = 0
    with rasterio.open(tmp_path / "a.tif", "w", nodata=0, **where, **how, **tiles) as file:
        file.write(array)
        file.descriptions = ("blue", "green", "red", "nir")
        file.build_overviews([2, 4])
    return tmp_path / "a.tif"


def test_a_raster_is_what_tifffile_reads(raster, monkeypatch):
    image = open_image(raster)
    assert image.nodata == 0 and image.frame.georeference.transform == (10, 0, 500000, 0, -10, 5200000)
    assert "32633" in image.frame.georeference.crs
    monkeypatch.setattr("luna_vision.images.formats.has_rasterio", lambda: False)
    other = open_image(raster)
    assert other.frame.georeference is None and (other.nodata, other.top, other.dtype) == (0, image.top, image.dtype)
    np.testing.assert_array_equal(all_of(image), all_of(other))
    np.testing.assert_array_equal(all_of(image)[30:], BANDS.transpose(1, 2, 0)[30:])


@pytest.mark.parametrize("more", [{"nodata": 0}, {"photometric": "RGB", "alpha": "YES"}], ids=str)
def test_overviews_beside_a_raster_are_its_levels(more, raster):
    rasterio = pytest.importorskip("rasterio")
    beside = raster.with_name("b.tif")
    with rasterio.open(raster) as inside:
        how = {name: value for name, value in inside.profile.items() if name != "nodata"} | more
    with rasterio.open(beside, "w", **how) as file:
        file.write(BANDS)
    with rasterio.Env(TIFF_USE_OVR=True), rasterio.open(beside, "r+") as file:
        file.build_overviews([2, 4])
        want = [file.read(out_shape=(4, *size)) for size in ((75, 100), (38, 50))]
    assert Path(f"{beside}.ovr").is_file()
    for level in (1, 2):
        bands = want[level - 1][: 3 if "alpha" in more else 4].transpose(1, 2, 0)
        np.testing.assert_array_equal(all_of(open_image(beside, level)), bands)
    assert all_of(open_image(beside, 1).valid).shape == (75, 100)
    with pytest.raises(ValueError, match=r"has levels 0 to 2, got 3"):
        open_image(beside, 3)

    old = Path(f"{beside}.ovr").read_bytes()
    with rasterio.open(beside, "w", **how | {"width": 90}) as file:
        file.write(BANDS[:, :, :90])
    Path(f"{beside}.ovr").write_bytes(old)
    assert open_image(beside).shape[:2] == (150, 90)
    with pytest.raises(ValueError, match=r"has levels 0 to 0, got 1 \(.*b.tif.ovr is not of this file"):
        open_image(beside, 1)
    Path(f"{beside}.ovr").write_bytes(b"<VRTDataset/>")
    with pytest.raises(ValueError, match=r"cannot read .*b.tif.ovr"):
        open_image(beside)


def test_overviews_beside_a_tiff_that_is_read_without_rasterio_are_named(raster, monkeypatch):
    raster.with_name("a.tif.ovr").write_bytes(b"")
    assert open_image(raster, 2).shape == (38, 50, 4)  # of the file itself
    monkeypatch.setattr("luna_vision.images.formats.has_rasterio", lambda: False)
    with pytest.raises(ValueError, match=r"levels 0 to 2, got 3 \(.*a.tif.ovr is .* takes a GeoTIFF and rasterio\)"):
        open_image(raster, 3)


def test_bands_and_regions_of_a_raster(raster):
    for choice in ({"bands": [3, 2, 1]}, {"channel": ["red", "green", "blue"]}):
        for region in ({"region": (20, 40, 100, 60)}, {"region": (500200, 5199600, 1000, 600), "region_in": "map"}):
            image = open_image(raster, **choice, **region)
            np.testing.assert_array_equal(all_of(image), BANDS[[2, 1, 0], 40:100, 20:120].transpose(1, 2, 0))
    assert open_image(raster, 1).shape == (75, 100, 4) and open_image(raster, 2).shape == (38, 50, 4)


def test_a_lossy_raster_has_the_pixels_that_it_has_as_a_whole(photo, tmp_path):
    rasterio = pytest.importorskip("rasterio")
    where = {"crs": "EPSG:32633", "transform": rasterio.transform.Affine(10, 0, 0, 0, -10, 0)}
    how = {"width": 640, "height": 426, "count": 3, "dtype": "uint8", "tiled": True, "compress": "jpeg"}
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", photometric="YCBCR", **how, **where) as file:
        file.write(photo.transpose(2, 0, 1))
        file.build_overviews([2])
    np.testing.assert_array_equal(all_of(open_image(tmp_path / "a.tif")), np.asarray(read_image(tmp_path / "a.tif")))
    assert open_image(tmp_path / "a.tif", 1).shape == (213, 320, 3)
    assert open_image(tmp_path / "a.tif").frame.georeference is not None


def test_alpha_of_a_raster_is_no_band(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    where = {"crs": "EPSG:32633", "transform": rasterio.transform.Affine(10, 0, 0, 0, -10, 0)}
    array = np.random.default_rng(0).integers(0, 255, (4, 40, 50), np.uint8)
    how = {"driver": "GTiff", "width": 50, "height": 40, "count": 4, "dtype": "uint8"}
    with rasterio.open(tmp_path / "a.tif", "w", photometric="RGB", alpha="YES", **how, **where) as file:
        file.write(array)
    np.testing.assert_array_equal(all_of(open_image(tmp_path / "a.tif")), array[:3].transpose(1, 2, 0))


@pytest.mark.parametrize("bits, count, quality", [(8, 3, 20), (15, 1, 100), (16, 4, 30)])
def test_jpeg_2000_with_a_georeference_is_read_in_windows(bits, count, quality, photo, tmp_path):
    """As satellites have it: the numbers are those of the file as a whole, which training reads."""
    rasterio = pytest.importorskip("rasterio")
    where = {"crs": "EPSG:32633", "transform": rasterio.transform.Affine(10, 0, 500000, 0, -10, 5200000)}
    how = {"driver": "JP2OpenJPEG", "width": 640, "height": 426, "count": count, "NBITS": bits, "QUALITY": quality}
    array = np.concatenate([photo, photo[:, ::-1]], axis=2).transpose(2, 0, 1)[:count].astype(float) / 255
    kind = "uint8" if bits == 8 else "uint16"
    tiles = {"BLOCKXSIZE": 128, "BLOCKYSIZE": 128, "YCC": "NO"}
    with rasterio.open(tmp_path / "a.jp2", "w", dtype=kind, **tiles, **how, **where) as file:
        file.write((array * (2**bits - 1)).astype(kind))
        if count == 3:
            file.colorinterp = [getattr(rasterio.enums.ColorInterp, name) for name in ("red", "green", "blue")]
    image, whole = open_image(tmp_path / "a.jp2"), read_image(tmp_path / "a.jp2")
    assert image.frame.georeference is not None and image.chunks[0] == 128
    assert image.top == getattr(whole, "top", None)
    np.testing.assert_array_equal(all_of(image), np.asarray(getattr(whole, "array", whole)).reshape(image.shape))
    part = open_image(tmp_path / "a.jp2", region=(500500, 5198000, 1000, 600), region_in="map")
    np.testing.assert_array_equal(all_of(part), all_of(image)[200:260, 50:150])
    assert open_image(tmp_path / "a.jp2", 1).shape[:2] == (213, 320)
    with pytest.raises(ValueError, match="has levels 0 to"):
        open_image(tmp_path / "a.jp2", 9)


@pytest.mark.parametrize("kind", ["alpha", "mask", "nodata"])
def test_what_holds_data_in_a_raster(kind, tmp_path):
    rasterio = pytest.importorskip("rasterio")
    where = {"crs": "EPSG:32633", "transform": rasterio.transform.Affine(10, 0, 0, 0, -10, 0)}
    valid, array = np.zeros((150, 200), bool), np.random.default_rng(0).integers(1, 255, (3, 150, 200), np.uint8)
    valid[37:101, 64:130] = valid[149, 199] = True
    how = {"width": 200, "height": 150, "dtype": "uint8", "tiled": True, "blockxsize": 64, "blockysize": 64, **where}
    how |= {"count": 4, "photometric": "RGB", "alpha": "YES"} if kind == "alpha" else {"count": 3}
    how |= {"nodata": 0} if kind == "nodata" else {}
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(tmp_path / "a.tif", "w", "GTiff", **how) as file:
        file.write(array * valid if kind == "nodata" else array, [1, 2, 3])
        if kind == "alpha":
            file.write((valid * 255).astype(np.uint8), 4)
        if kind == "mask":
            file.write_mask(valid)
        file.build_overviews([2])
    image = open_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(all_of(image.valid), valid)
    part = open_image(tmp_path / "a.tif", region=(50, 30, 100, 80))
    np.testing.assert_array_equal(all_of(part.valid), valid[30:110, 50:150])
    assert open_image(tmp_path / "a.tif", 1).valid.shape == (75, 100)
    padded = np.pad(valid, ((0, 10), (0, 8)))  # 10 x 13 patches of 16
    want = padded.reshape(10, 16, 13, 16).any((1, 3))
    np.testing.assert_array_equal(patch_mask("valid", image, (10, 13), (16, 16)), want)
    want = np.pad(valid[30:110, 50:150], ((0, 0), (0, 12))).reshape(5, 16, 7, 16).any((1, 3))
    np.testing.assert_array_equal(patch_mask("valid", part, (5, 7), (16, 16)), want)


def test_files_that_do_not_say_what_holds_data(photo, tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", photo, photometric="rgb")
    with pytest.raises(ValueError, match="does not say which pixels hold data"):
        patch_mask("valid", open_image(tmp_path / "a.tif"), (27, 40), (16, 16))


# ---- mistakes: one line, and exit code 2


@pytest.mark.parametrize(
    "words, message",
    [
        ("--level 1 --mpp 1", "level and mpp all say how large pixels are"),
        ("--level 2", "has levels 0 to 1, got 2"),
        ("--mpp 0.2", "pixels of 0.5 micrometres at its finest level, which is coarser"),
        ("--magnification 40", "magnification 20 at its finest level"),
        ("--mpp 0", "mpp must be a number above 0, got 0.0"),
        ("--region 600 0 50 10", "the region 600 0 50 10 is not within .*a.svs, which has 640 x 426 pixels"),
        ("--region 0 0 0 10", "region must be X Y WIDTH HEIGHT"),
        ("--region 0 0 9 9 --region-in map", "has no georeference: give its region in pixels"),
        ("--bands 4", "has bands 1 to 3, got 4"),
        ("--channel DAPI", "has channels 0 to 2, got DAPI"),
        ("--bands 1 --channel 0", "bands and channel both choose bands"),
        ("--series 9", "has series 0 to"),
    ],
)
def test_mistakes(words, message, slide, capsys):
    check_refused([str(slide), *words.split()], message, capsys)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--mpp 1", "does not say how many micrometres a pixel has: give a level"),
        ("--magnification 20", "does not say its magnification: give a level"),
        ("--z 1", "only TIFF and zarr images have series and stacks"),
        ("--level 0", "only TIFF and zarr images have levels"),
    ],
)
def test_files_without_resolution(words, message, photo, tmp_path, capsys):
    Image.fromarray(photo).save(tmp_path / "a.png")
    check_refused([str(tmp_path / "a.png"), *words.split()], message, capsys)


def test_a_stack_of_which_nothing_is_chosen(tmp_path, capsys):
    ome_tiff(tmp_path / "a.ome.tif")
    check_refused([str(tmp_path / "a.ome.tif")], "axes TZCYX of shape .*z and t choose one", capsys)
    check_refused([str(tmp_path / "a.ome.tif"), "--z", "3", "--t", "0"], "it has z 0 to 2, got 3", capsys)
    ome_zarr(tmp_path / "a.zarr")
    check_refused([str(tmp_path / "a.zarr"), "--series", "2"], "it has series 0 to 1, got 2", capsys)


def check_refused(words: list[str], message: str, capsys) -> None:
    out = str(Path(words[0]).parent / "o.npz")
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: main([*words, "--out", out, "--model", "test_luna_vit", "--device", "cpu"]))
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()
    assert len(last) == 1 and last[0].startswith("error: "), last
    import re

    assert re.search(message, last[0]), last[0]


def test_the_command(slide, tmp_path, capsys):
    words = [str(slide), "--out", str(tmp_path / "o.npz"), "--model", "test_luna_vit", "--device", "cpu"]
    assert main([*words, "--mpp", "1", "--region", "32", "32", "320", "256", "--mask", "otsu"]) == 0
    found = np.load(tmp_path / "o.npz")
    about = json.loads(str(found["about"]))
    assert found["patch_valid"].shape == (8, 10) and about["image_shape"] == [128, 160, 3]
    looked = int(found["patch_valid"].sum())
    assert capsys.readouterr().out.endswith(f": 128 x 160 pixels, 8 x 10 patches, {looked} of them looked at\n")
