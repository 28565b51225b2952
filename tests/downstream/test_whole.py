"""Segmentation of an image in pieces: the logits of the model as a whole, in files that viewers open."""

import json
import tracemalloc

import numpy as np
import pytest
import rasterio
import rasterio.features
import rasterio.warp
import tifffile
import torch
import torch.nn.functional as F
import zarr
from torch import Tensor

import luna_vision.downstream.whole
from luna_vision.downstream.pyramid import PyramidBackbone
from luna_vision.downstream.segmentation import FCN
from luna_vision.downstream.whole import PixelSink, segment
from luna_vision.execution import encode
from luna_vision.execution.checkpoint import Checkpoint
from luna_vision.images import open_image
from luna_vision.images.maps import MapFile
from tests.execution.test_budget import Allocations
from tests.stopping import stopped_anywhere

SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8, "memory_len": 3}


def picture(height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3): large blobs and noise."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.random((1, 3, height // 40 + 2, width // 40 + 2)))
    blobs = F.interpolate(coarse, (height, width), mode="bicubic")[0].permute(1, 2, 0).numpy()
    return np.clip(255 * blobs + 20 * rng.standard_normal(blobs.shape), 0, 255).astype(np.uint8)


@torch.no_grad()
def make(stride: int = 4, classes: int = 4, **options) -> FCN:
    """A segmenter in float64, far from where weights start, which finds all classes."""
    torch.manual_seed(0)
    backbone = PyramidBackbone("test_luna_vit", [stride], 8, **SMALL | options)
    model = FCN(backbone, classes).double().eval()
    for parameter in model.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    logits = whole(model, picture(200, 200))
    model.classifier[-1].weight /= logits.std(dim=(1, 2))[:, None, None, None]
    model.classifier[-1].bias.zero_()
    model.classifier[-1].bias -= whole(model, picture(200, 200)).mean(dim=(1, 2))
    return model


@torch.no_grad()
def whole(model: FCN, image: np.ndarray, valid: np.ndarray | None = None) -> Tensor:
    """Logits (K, H, W) of the model, the patches masked as the model masks those of padded batches."""
    x = torch.from_numpy(image).permute(2, 0, 1)[None].double() / 255
    if valid is None:
        return model(x)[0]
    x, mask = (x - model.image_mean) / model.image_std, torch.from_numpy(valid).view(1, -1)
    (y,) = model.backbone.body.forward_intermediates(x, indices=1, norm=True, intermediates_only=True, patch_valid=mask)
    return model.upsample(model.read(y * torch.from_numpy(valid)))[0, :, : x.shape[2], : x.shape[3]]


class Recorder(PixelSink):
    """Puts the logits together."""

    def __init__(self, model: FCN, image: np.ndarray, patches: int | None = None) -> None:
        super().__init__(model, image.shape[:2])
        self.logits = torch.full((4, *image.shape[:2]), torch.nan, dtype=torch.float64)
        if patches is not None:
            self.patches = patches

    def take(self, top, left, logits, valid):
        logits = logits if valid is None else logits.masked_fill(~valid, torch.nan)
        here = self.logits[:, top : top + logits.shape[1], left : left + logits.shape[2]]
        assert here.isnan().all()
        here.copy_(logits)

    def sync(self):
        pass

    def close(self):
        pass

    def is_finished(self):
        return False

    def discard(self):
        pass


def record(model: FCN, image: np.ndarray, patches: int | None = None, **how) -> Tensor:
    sink = Recorder(model, image, patches)
    statistics = {"mean": model.image_mean.flatten().tolist(), "std": model.image_std.flatten().tolist()}
    encode(model.backbone.body, image, grid=sink, progress=False, **statistics, **how)
    return sink.logits


def blobs(rows: int, columns: int) -> np.ndarray:
    """Two pieces of tissue (rows, columns), with empty rows and columns between them."""
    y, x = np.mgrid[:rows, :columns]
    return ((y - 3) ** 2 + (x - 4) ** 2 < 9) | ((y - rows + 4) ** 2 + (x - columns + 3) ** 2 < 11)


@pytest.mark.parametrize(
    "stride, patches, masked",
    [
        *((stride, 8, True) for stride in (1, 2, 4, 8, 16, 32)),
        *((stride, 12, False) for stride in (1, 4, 32)),
        *((4, None, masked) for masked in (False, True)),
    ],
)
def test_the_logits_are_those_of_the_whole_image(stride, patches, masked):
    model, image = make(stride), picture(203, 157)
    valid = blobs(26, 20) if masked else None
    want = whole(model, image, valid)
    got = record(model, image, patches, band_rows=3, mask=valid)
    seen = ~got.isnan()
    if masked:
        pixels = np.kron(valid, np.ones((8, 8), bool))[:203, :157]
        assert np.array_equal(seen[0], pixels)
    else:
        assert seen.all()
    torch.testing.assert_close(got[seen], want[seen], rtol=0, atol=1e-10 * want.abs().max().item())


@pytest.mark.parametrize(
    "size, band", [((5, 7), 2), ((8, 300), 1), ((300, 9), 2), ((64, 64), 5), *(((65, 129), n) for n in (1, 2, 5, 100))]
)
def test_every_size_and_band(size, band):
    model, image = make(), picture(*size)
    got, want = record(model, image, 8, band_rows=band), whole(model, image)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10 * want.abs().max().item())


# ---- files


def answers(model: FCN, image: np.ndarray, valid: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The classes (H, W), 255 where no patch was looked at, and the probabilities (K, H, W), 0 there."""
    logits = whole(model, image, valid)
    classes = logits.argmax(0).numpy().astype(np.uint8)
    shares = (logits.softmax(0) * 255).numpy()
    if valid is not None:
        seen = np.kron(valid, np.ones((8, 8), bool))[: image.shape[0], : image.shape[1]]
        classes[~seen], shares[:, ~seen] = 255, 0
    return classes, shares


def close_to(found: np.ndarray, shares: np.ndarray) -> None:
    assert found.dtype == np.uint8 and np.abs(found - shares).max() < 0.501


NAMES = ["background", "tree", "road", "house"]


@pytest.mark.parametrize("masked", [False, True])
def test_tiff(masked, tmp_path):
    model, image, valid = make(), picture(1203, 701), blobs(151, 88) if masked else None
    paths = tmp_path / "classes.tif", tmp_path / "shares.tif"
    segment(model, image, *paths, class_names=NAMES, mask=valid, progress=False)
    classes, shares = answers(model, image, valid)
    with tifffile.TiffFile(paths[0]) as file:
        page = file.pages.first
        assert page.is_tiled and page.photometric.name == "PALETTE" and not page.colormap[:, 0].any()
        assert json.loads(page.description) == {"classes": dict(zip("0123", NAMES, strict=True)), "nodata": 255}
        levels = file.series[0].levels
        assert [level.shape for level in levels] == [(1203, 701), (602, 351), (301, 176)]
        for i, level in enumerate(levels):
            np.testing.assert_array_equal(level.asarray(), classes[:: 2**i, :: 2**i])
    found = open_image(paths[1])
    assert found.shape == (1203, 701, 4)
    close_to(np.asarray(found[0:1203]).transpose(2, 0, 1), shares)
    close_to(tifffile.imread(paths[1], level=2), shares[:, ::4, ::4])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classes.tif", "shares.tif"]


def test_ome_zarr(tmp_path):
    model, image = make(), picture(603, 517)
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as file:
        about = {"PhysicalSizeX": 0.25, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.25, "PhysicalSizeYUnit": "µm"}
        file.write(image, photometric="rgb", tile=(64, 64), metadata={"axes": "YXS", **about})
    opened = open_image(tmp_path / "a.ome.tif", region=(100, 40, 400, 560))
    (tmp_path / "c.ome.zarr").mkdir()
    (tmp_path / "c.ome.zarr/.zgroup").write_text("{}")  # an older one, which is replaced
    segment(model, opened, tmp_path / "c.ome.zarr", tmp_path / "p.zarr", class_names=NAMES, progress=False)
    classes, shares = answers(model, image[40:600, 100:500])
    group = zarr.open_group(tmp_path / "c.ome.zarr", mode="r")
    (scales,) = group.attrs["multiscales"]
    for i, (level, scale) in enumerate(zip(("0", "1"), scales["datasets"], strict=True)):
        np.testing.assert_array_equal(group[level][:], classes[:: 2**i, :: 2**i])
        steps = [step[step["type"]] for step in scale["coordinateTransformations"]]
        assert scale["path"] == level and steps == [[0.25 * 2**i] * 2, [10.0, 25.0]]
    assert scales["axes"] == [{"name": n, "type": "space", "unit": "micrometer"} for n in "yx"]
    label = group.attrs["image-label"]
    assert [p["class"] for p in label["properties"]] == NAMES and label["colors"][1]["rgba"] == [128, 0, 0, 255]
    found = open_image(tmp_path / "p.zarr", channel=["tree"])
    close_to(np.asarray(found[0:560]), shares[1])


def test_geotiff(tmp_path):
    """A region of a scene at a coarser level lies where it lay."""
    model, image = make(), picture(1200, 1600)
    kind = {"driver": "GTiff", "count": 3, "height": 1200, "width": 1600, "dtype": "uint8", "crs": "EPSG:32633"}
    where = rasterio.Affine(10.0, 0, 500000.0, 0, -10.0, 5200000.0)
    with rasterio.open(tmp_path / "a.tif", "w", transform=where, tiled=True, **kind) as file:
        file.write(image.transpose(2, 0, 1))
    with rasterio.open(tmp_path / "a.tif", "r+") as file:
        file.build_overviews([2], rasterio.enums.Resampling.nearest)
    opened = open_image(tmp_path / "a.tif", level=1, region=(501000, 5199000, 12000, 6000), region_in="map")
    segment(model, opened, tmp_path / "c.tif", tmp_path / "p.tif", class_names=NAMES, progress=False)
    classes, shares = answers(model, np.asarray(opened[0 : opened.shape[0]]))
    with rasterio.open(tmp_path / "c.tif") as file:
        assert file.crs.to_epsg() == 32633 and file.nodata == 255 and file.overviews(1) == [2]
        assert file.transform == rasterio.Affine(20.0, 0, 501000.0, 0, -20.0, 5199000.0)
        assert file.colormap(1)[1] == (128, 0, 0, 255) and file.block_shapes == [(512, 512)]
        np.testing.assert_array_equal(file.read(1), classes)
    with rasterio.open(tmp_path / "p.tif") as file:
        assert file.descriptions == tuple(NAMES)
        close_to(file.read(), shares)


def drawn(features: list, size: tuple[int, int], to_pixels=lambda points: points) -> np.ndarray:
    """The number of the polygon at each pixel, 0 where there is none."""
    rings = [np.array(ring) for feature in features for ring in feature["geometry"]["coordinates"]]
    points = iter(to_pixels(np.concatenate(rings)).tolist())
    rings = iter([[next(points) for _ in ring] for ring in rings])
    shapes = []
    for feature in features:
        own = [next(rings) for _ in feature["geometry"]["coordinates"]]
        shapes.append(({"type": "Polygon", "coordinates": own}, feature["properties"]["number"]))
    count = rasterio.features.rasterize(
        [(shape, 1) for shape, _ in shapes], size, dtype=np.uint8, merge_alg=rasterio.enums.MergeAlg.add
    )
    assert count.max() == 1  # no two overlap
    return rasterio.features.rasterize(shapes, size, dtype=np.uint8)


@pytest.mark.parametrize("place", ["slide", "map"])
def test_polygons_cover_the_classes(place, tmp_path):
    model, image = make(), picture(600, 700)
    kind = {"driver": "GTiff", "count": 3, "height": 600, "width": 700, "dtype": "uint8"}
    where = rasterio.Affine(10.0, 0, 500000.0, 0, -10.0, 5200000.0)
    if place == "map":
        kind |= {"crs": "EPSG:32633", "transform": where}
    with rasterio.open(tmp_path / "a.tif", "w", tiled=True, **kind) as file:
        file.write(image.transpose(2, 0, 1))
    opened = open_image(tmp_path / "a.tif", region=(100, 40, 500, 530))
    segment(model, opened, tmp_path / "c.tif", None, tmp_path / "c.geojson", class_names=NAMES, progress=False)
    features = json.loads((tmp_path / "c.geojson").read_text())["features"]

    def to_pixels(points: np.ndarray) -> np.ndarray:
        x, y = points.T
        if place == "map":
            x, y = map(np.array, rasterio.warp.transform("OGC:CRS84", "EPSG:32633", x, y))
            x, y = (x - where.c) / where.a, (y - where.f) / where.e
        return np.stack([x - 100, y - 40], axis=1).round(3)

    classes = tifffile.imread(tmp_path / "c.tif")
    np.testing.assert_array_equal(drawn(features, (530, 500), to_pixels), classes)
    assert len(np.unique(classes)) == 4
    for feature in features:
        about = feature["properties"]
        assert about["objectType"] == "annotation" and about["classification"]["name"] == NAMES[about["number"]]
        assert about["number"] != 0 and len(about["classification"]["color"]) == 3


def test_numbers_and_colours_are_those_of_the_training_masks(tmp_path):
    model, image = make(), picture(40, 50)
    classes = answers(model, image)[0]
    segment(model, image, tmp_path / "c.tif", values=[0, 255, 7, 9], mask=np.eye(5, 7) > 0, progress=False)
    assert set(np.unique(tifffile.imread(tmp_path / "c.tif"))) <= {0, 255, 7, 9, 254}
    colors = [(9, 9, 9), (255, 0, 0), (0, 255, 0), (1, 2, 3)]
    segment(model, image, tmp_path / "c.tif", values=colors, progress=False)
    with tifffile.TiffFile(tmp_path / "c.tif") as file:
        np.testing.assert_array_equal(file.asarray(), classes)
        np.testing.assert_array_equal(file.pages.first.colormap[:, :4].T // 257, colors)


@pytest.mark.parametrize("values", [None, [(i, 0, 0) for i in range(256)]], ids=["numbers", "colours"])
def test_as_many_classes_as_numbers_of_a_byte_leave_one_for_no_data(values, tmp_path):
    model, image = make(classes=256), picture(16, 16)
    segment(model, image, tmp_path / "c.tif", values=values, mask=np.eye(2) > 0, progress=False)
    classes = tifffile.imread(tmp_path / "c.tif")
    np.testing.assert_array_equal(classes[:8, 8:], np.iinfo(np.uint16).max)
    assert classes.dtype == np.uint16 and classes[:8, :8].max() < 256


def test_missing_numbers_are_filled_as_in_training(tmp_path):
    """By the middle of the range, as the data of segmentation has it."""
    model, image = make(), picture(40, 50).astype(np.float32) / 255
    image[10:20, 10:20] = np.nan
    segment(model, image, tmp_path / "c.tif", progress=False)
    filled = torch.from_numpy(np.nan_to_num(image, nan=0.5)).permute(2, 0, 1)[None].double()
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "c.tif"), model(filled)[0].argmax(0))


# ---- stopped, and too large


@pytest.mark.parametrize("suffix, masked", [(".tif", True), (".zarr", False)])
def test_a_run_that_is_stopped_anywhere_is_resumed(suffix, masked, tmp_path, monkeypatch):
    """After each band of the last sweep, and between the two files."""
    model, image = make(depth=1), picture(203, 157)
    valid = blobs(26, 20) if masked else None
    monkeypatch.setattr("luna_vision.downstream.squares.TILE", 32)
    classes, shares = answers(model, image, valid)
    paths = [tmp_path / f"c{suffix}", tmp_path / f"p{suffix}"]
    paths += [tmp_path / "c.geojson"] if suffix == ".tif" else []
    how = {
        "class_names": NAMES,
        "store": tmp_path / "store",
        "band_rows": 2 if masked else 6,
        "mask": valid,
        "progress": False,
    }
    places = (Checkpoint, "save"), (MapFile, "finish"), (luna_vision.downstream.whole, "write_geojson")
    for _ in stopped_anywhere(lambda: segment(model, image, *paths, **how), monkeypatch, *places, at_least=5):
        segment(model, image, *paths, **how)
        read = tifffile.imread if suffix == ".tif" else lambda path: zarr.open_group(path, mode="r")["0"][:]
        found = [read(path) for path in paths[:2]]
        np.testing.assert_array_equal(found[0], classes)
        close_to(found[1], shares)
        if suffix == ".tif":
            features = json.loads(paths[2].read_text())["features"]
            want = np.where(classes == 255, 0, classes)
            np.testing.assert_array_equal(drawn(features, (203, 157)), want)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)


def test_what_is_allocated_stays_within_the_plan(tmp_path):
    for stride, options in ((4, {}), (1, {}), (16, {}), (4, {"patch_size": 16})):
        model, image = make(stride, **options).float(), picture(900, 1100)
        peak, planned = _allocated(model, image, tmp_path / "c.tif")
        assert 0.1 * planned < peak < planned, (stride, options, peak, planned)


def _allocated(model: FCN, image: np.ndarray, path) -> tuple[int, int]:
    tracemalloc.start()
    try:
        with Allocations() as count:
            result = segment(model, image, path, store=path.parent / "store", progress=False)
        return count.peak + tracemalloc.get_traced_memory()[1], result.peak_bytes
    finally:
        tracemalloc.stop()


def test_mistakes(tmp_path):
    model, image = make(), picture(40, 50)
    with pytest.raises(ValueError, match=r"a map must end in .tif, .tiff, .zarr, got .*c.png"):
        segment(model, image, tmp_path / "c.png")
    (tmp_path / "c.zarr").mkdir()
    (tmp_path / "c.zarr/photo.jpg").write_text("mine")
    with pytest.raises(OSError, match="is a folder, and not a map in zarr"):
        segment(model, image, tmp_path / "c.zarr", progress=False)
    (tmp_path / "d.zarr.partial").mkdir()
    (tmp_path / "d.zarr.partial/photo.jpg").write_text("mine")
    with pytest.raises(OSError, match="is not of this package"):
        segment(model, image, tmp_path / "d.zarr", progress=False)
    assert (tmp_path / "c.zarr/photo.jpg").exists() and (tmp_path / "d.zarr.partial/photo.jpg").exists()
    tifffile.imwrite(tmp_path / "a.tif", image)
    with pytest.raises(ValueError, match=r"the map .*a.tif would be written over the image"):
        segment(model, open_image(tmp_path / "a.tif"), tmp_path / "a.tif", progress=False)
    with pytest.raises(ValueError, match="polygons are drawn from classes in TIFF"):
        segment(model, image, tmp_path / "n.zarr", None, tmp_path / "n.geojson", progress=False)
    other = FCN(PyramidBackbone("test_vit", [8], 8, img_size=32), 3)
    with pytest.raises(ValueError, match="streaming needs a Luna ViT"):
        segment(other, image, tmp_path / "c.tif", progress=False)


def test_a_full_disk_keeps_what_is_done(tmp_path, monkeypatch):
    model, image = make(), picture(203, 157)
    monkeypatch.setattr("luna_vision.downstream.squares.TILE", 32)
    how = {"store": tmp_path / "store", "band_rows": 2, "progress": False}
    written = iter(range(10))

    def full(self, *args, ours=zarr.Array.__setitem__):
        if next(written) == 9:
            raise OSError(28, "No space left on device")
        ours(self, *args)

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"cannot write .*c.tif.partial: No space left"):
        patch.setattr(zarr.Array, "__setitem__", full)
        segment(model, image, tmp_path / "c.tif", **how)
    segment(model, image, tmp_path / "c.tif", **how)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "c.tif"), answers(model, image)[0])
