"""With a mask, patches outside are neither read nor computed, and the result is that of the masked forward."""

import json

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from luna_vision.execution import Encoded, encode
from luna_vision.execution.checkpoint import Checkpoint
from luna_vision.execution.layout import Layout
from luna_vision.images import open_image
from luna_vision.images.foreground import patch_mask
from luna_vision.images.formats import ChunkedImage
from tests.stopping import stopped_anywhere

from .conftest import OPTIONS, close, normalised
from .test_budget import allocated

SIDE = 4  # of a patch of the models


def blobs(rows: int, columns: int, kind: str = "blobs") -> np.ndarray:
    """The patches of some tissue (rows, columns)."""
    y, x = np.mgrid[:rows, :columns]
    if kind == "blobs":  # two pieces, one above the other with a gap, and one beside
        one = (y - rows * 0.2) ** 2 + (x - columns * 0.25) ** 2 < 9
        two = (y - rows * 0.75) ** 2 + (x - columns * 0.3) ** 2 < 6
        return one | two | (x > columns - 4) & (y > 2) & (y < 7)
    if kind == "noise":
        return np.random.default_rng(1).random((rows, columns)) < 0.2
    if kind == "diagonal":
        return abs(y * columns - x * rows) < 2 * columns
    if kind == "rows":
        return y % 3 == 1
    if kind == "point":
        return (y == rows - 1) & (x == columns - 1)
    return np.ones((rows, columns), bool)


@torch.no_grad()
def check(model, image, valid, tmp_path, tolerance=1e-10, **arguments):
    """Embedding, logits, memory and grid against the model's own with `patch_valid`."""
    x, mask = normalised(model, image), torch.from_numpy(valid).view(1, -1)
    features = model.forward_features(x, patch_valid=mask)
    path = tmp_path / "grid.npy"
    got = encode(model, image, mask=valid, grid=path, progress=False, **arguments)
    close(got.memory, features[0, : model.memory_len], tolerance)
    close(got.raw_memory, model.encode(x, patch_valid=mask)[1][0], tolerance)
    grid = torch.from_numpy(np.load(path))
    want = features[0, model.memory_len :].view(*valid.shape, -1)
    close(grid[valid], want[torch.from_numpy(valid)], tolerance)
    assert not grid[~valid].any() and np.array_equal(got.patch_valid, valid)
    if model.global_pool:
        close(got.embedding, model.forward_head(features, pre_logits=True, patch_valid=mask)[0], tolerance)
        close(encode(model, image, mask=valid, progress=False, **arguments).embedding, got.embedding, 1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option(options, make, photo, tmp_path):
    model = make(**options)
    image = photo[100:163, 200:271, : model.in_chans]
    p, q = model.patch_embed.patch_size
    check(model, image, blobs(-(-63 // p), -(-71 // q)), tmp_path, band_rows=3)


@pytest.mark.parametrize(
    "kind, band",
    [
        *((kind, 2) for kind in ("blobs", "noise", "diagonal", "rows", "point", "all")),
        *(("blobs", n) for n in (1, 100)),
    ],
)
def test_every_mask_and_band(kind, band, make, photo, tmp_path):
    for options in ({"stem": "conv"}, {"local_mixing": "mlp"}, {"local_mixing": "attn"}):
        check(make(**options), photo[:79, :95], blobs(20, 24, kind), tmp_path, band_rows=band)


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("mixing", ["before", "mlp"])
def test_a_run_that_is_stopped_after_any_band_goes_on(mixing, saved, make, photo, tmp_path, monkeypatch):
    """Whether its state was saved, or only its patches were written."""
    model, valid, image = make(local_mixing=mixing), np.zeros((20, 24), bool), photo[:79, :95]
    valid[3:17, 5:15] = valid[18:, 20:] = True
    how = {"mask": valid, "band_rows": 2, "progress": False}
    want = encode(model, image, **how)

    def run() -> Encoded:
        return encode(model, image, store=tmp_path / "store", **how)

    for _ in stopped_anywhere(run, monkeypatch, (Checkpoint, "save"), after=saved, at_least=9):
        got = run()
        assert torch.equal(got.logits, want.logits) and torch.equal(got.raw_memory, want.raw_memory)


def test_another_mask_does_not_continue_a_run(make, photo, tmp_path, monkeypatch):
    model, image = make(), photo[:79, :95]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("luna_vision.execution.out_of_core.Engine._next_sweep", _stop)
        encode(model, image, mask=blobs(20, 24), store=tmp_path / "store", progress=False)
    with pytest.raises(ValueError, match="with other mask"):
        encode(model, image, mask=blobs(20, 24, "noise"), store=tmp_path / "store", progress=False)


def _stop(*_):
    raise KeyboardInterrupt


# ---- what is saved


class Reader:
    """An image that counts the pixels that are read of it."""

    def __init__(self, array: np.ndarray, chunk: int = 16) -> None:
        self.array, self.shape, self.dtype, self.chunks, self.read = array, array.shape, array.dtype, (chunk, chunk), 0

    def window(self, rows: slice, columns: slice) -> np.ndarray:
        found = self.array[rows, columns]
        self.read += found.shape[0] * found.shape[1]
        return found

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.window(rows, slice(None))


def test_only_what_is_valid_is_read_and_computed(make, photo, monkeypatch):
    """A fifth of the patches: a fifth of the work in the blocks, and not much more of pixels and convolutions."""
    model, image = make(depth=2), photo[:400, :640]
    valid = np.zeros((100, 160), bool)
    valid[20:60, 30:70] = valid[55:85, 100:150] = True
    share = valid.mean()
    counts = {"unpack_tile": 0, "mix_tile": 0, "pack_tile": 0}
    for name in ("unpack_tile", "mix_tile", "pack_tile"):
        ours = getattr(type(model.blocks[0]), name)

        def counted(self, x, *args, name=name, ours=ours, **more):
            counts[name] += x.shape[1]
            return ours(self, x, *args, **more)

        monkeypatch.setattr(type(model.blocks[0]), name, counted)
    reader = Reader(image)
    encode(model, reader, mask=valid, band_rows=4, progress=False)
    stages, whole = len(model.stages()), valid.size
    assert counts["pack_tile"] == stages * valid.sum()
    assert counts["unpack_tile"] == stages * valid.sum()
    assert counts["mix_tile"] < len(model.blocks) * 1.5 * share * whole
    assert reader.read < 1.2 * share * image.shape[0] * image.shape[1]


def test_bands_of_few_patches_have_more_rows():
    whole, blob = Layout((100, 160), 4), blobs(100, 160, "point")
    blob[10:60, 20:40] = True
    layout = Layout((100, 160), 4, blob)
    assert [band.stop - band.start for band in whole.bands] == [4] * 25
    assert len(layout.bands) < 7 and sum(band.stop - band.start for band in layout.bands) == 51
    diagonal = Layout((100, 160), 4, blobs(100, 160, "diagonal"))
    for band in diagonal.bands:
        islands = diagonal.islands(max(band.start - 2, 0), band.stop + 1)
        assert (band.stop - band.start + 2) * sum(r - left for left, r in islands) <= 6 * 160


def test_a_mask_takes_less_memory(make, photo):
    """The store has the valid patches only."""
    valid = np.zeros((100, 160), bool)
    valid[20:40, 30:70] = True
    model, image = make(), photo[:400, :640]
    with pytest.raises(ValueError, match="too small"):
        encode(model, image, memory_budget="2MB", progress=False)
    encode(model, image, mask=valid, memory_budget="2MB", progress=False)


@pytest.mark.parametrize(
    "options, kind",
    [
        *(({}, kind) for kind in ("blobs", "diagonal", "noise", "rows")),
        ({"stem": "conv", "patch_size": 4}, "blobs"),
        ({"local_mixing": "mlp"}, "blobs"),
    ],
    ids=str,
)
def test_what_is_allocated_stays_within_the_plan(kind, options, make, photo):
    valid = blobs(100, 160, kind)
    valid[40:70, 30:110] |= kind == "blobs"
    model = make(dtype=torch.float32, embed_dim=64, **options)
    found, planned = allocated(model, photo[:400], mask=valid, band_rows=4)
    assert found < planned


# ---- where masks come from


def slide(path, side: int = 256) -> np.ndarray:
    """White glass with two colourful pieces on it, in a pyramid; returns the pixels."""
    image = np.full((side, side * 2, 3), 240, np.uint8)
    image += np.random.default_rng(0).integers(0, 9, image.shape[:2], dtype=np.uint8)[:, :, None]
    image[40:120, 64:180] = (180, 60, 140)
    image[152:200, 300:420] = (120, 40, 160)
    with tifffile.TiffWriter(path) as file:
        file.write(image, photometric="rgb", tile=(64, 64), subifds=2)
        for step in (2, 4):
            file.write(image[::step, ::step].copy(), photometric="rgb", tile=(64, 64), subfiletype=1)
    return image


def colourful(image: np.ndarray) -> np.ndarray:
    """The patches that have a pixel of the pieces."""
    there = np.ptp(image, axis=2) > 30
    return there.reshape(there.shape[0] // SIDE, SIDE, -1, SIDE).any(axis=(1, 3))


def test_otsu_finds_the_tissue(make, tmp_path, monkeypatch):
    image = slide(tmp_path / "a.tif")
    opened = open_image(tmp_path / "a.tif")
    monkeypatch.setattr(type(opened), "__getitem__", None)  # a low level is enough
    assert np.array_equal(patch_mask("otsu", opened, (64, 128), (SIDE, SIDE)), colourful(image))
    monkeypatch.undo()
    assert np.array_equal(patch_mask("otsu", image, (64, 128), (SIDE, SIDE)), colourful(image))  # it has no levels
    got = encode(make(), opened, mask="otsu", progress=False)
    close(got.logits, encode(make(), image, mask=colourful(image), progress=False).logits, 1e-12)


def test_otsu_within_a_region(tmp_path):
    image = slide(tmp_path / "a.tif")
    region = open_image(tmp_path / "a.tif", region=(52, 20, 160, 120))
    assert np.array_equal(patch_mask("otsu", region, (30, 40), (SIDE, SIDE)), colourful(image[20:140, 52:212]))


def test_bright_pixels_of_one_band(tmp_path):
    image = np.zeros((64, 64), np.uint16)
    image[16:32, 8:40] = 3000
    found = patch_mask("otsu", image, (16, 16), (SIDE, SIDE))
    assert found[4:8, 2:10].all() and found.sum() == 32


@pytest.mark.parametrize("gone", [np.nan, -9999.0])
def test_otsu_leaves_missing_numbers_out(gone, make):
    """A patch may have some beside others; and a mean of both would be darker than all that is there."""
    image = np.full((64, 64, 1), 0.2, np.float32)
    image[16:32, 8:40] = 0.7
    image[:, 50:] = image[40:45] = image[17, 9] = gone
    found = encode(make(in_chans=1), image, mask="otsu", nodata=-9999, progress=False).patch_valid
    assert found[4:8, 2:10].all() and found.sum() == 32


def test_masks_are_read_a_few_rows_at_a_time(make, tmp_path, monkeypatch):
    """A low level, or a mask file, may be large itself: each row of its tiles is read once, by itself."""
    image, read = slide(tmp_path / "a.tif", 512), []
    Image.fromarray(colourful(image).repeat(SIDE, 0).repeat(SIDE, 1)).convert("L").save(tmp_path / "m.png")
    tifffile.imwrite(tmp_path / "m.tif", np.asarray(Image.open(tmp_path / "m.png")), tile=(64, 64))
    opened, region = (open_image(tmp_path / "a.tif", region=r) for r in (None, (40, 40, 200, 200)))
    ours = ChunkedImage.window
    monkeypatch.setattr(ChunkedImage, "window", lambda *args: read.append(ours(*args).shape[0]) or ours(*args))
    want = colourful(image)
    for mask, side, rows in (
        ("otsu", 8, 128),
        (tmp_path / "m.tif", 4, 512),
    ):  # the level of 1/4 has 2 x 2 pixels a patch
        read.clear()
        found = patch_mask(mask, opened, (512 // side, 1024 // side), (side, side))
        assert max(read) <= 64 and sum(read) == rows
        assert np.array_equal(found, want.reshape(found.shape[0], side // 4, -1, side // 4).any(axis=(1, 3)))
    read.clear()
    patch_mask("otsu", region, (25, 25), (8, 8))
    assert max(read) <= 64 and sum(read) == 50


def test_a_mask_has_missing_numbers(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    mask = np.zeros((16, 16), np.uint8)
    mask[4:8, 4:8], mask[:, :2] = 1, 255
    where = {"crs": "EPSG:32633", "transform": rasterio.transform.from_origin(500000, 5200000, 10, 10)}
    with rasterio.open(
        tmp_path / "m.tif", "w", driver="GTiff", width=16, height=16, count=1, dtype="uint8", nodata=255, **where
    ) as file:
        file.write(mask[None])
    image, lacking = np.zeros((64, 64), np.uint8), np.where(mask == 255, np.nan, mask)
    for one in (tmp_path / "m.tif", lacking, lacking.repeat(2, 0).repeat(2, 1)):
        assert np.array_equal(patch_mask(one, image, (16, 16), (SIDE, SIDE)), mask == 1)


def test_a_mask_file_lies_over_the_whole_slide(tmp_path):
    image = slide(tmp_path / "a.tif")
    Image.fromarray(np.kron(colourful(image)[::2, ::2], np.ones((1, 1))).astype(np.uint8) * 255).save(
        tmp_path / "m.png"
    )
    whole, region = (open_image(tmp_path / "a.tif", **r) for r in ({}, {"region": (48, 16, 160, 120)}))
    half = patch_mask(tmp_path / "m.png", whole, (64, 128), (SIDE, SIDE))
    assert np.array_equal(half[::2, ::2], colourful(image)[::2, ::2])
    part = patch_mask(str(tmp_path / "m.png"), region, (30, 40), (SIDE, SIDE))
    assert np.array_equal(part, half[4:34, 12:52])


def geojson(path, *polygons, **more) -> None:
    features = [
        {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": p}, "properties": {}} for p in polygons
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features, **more}))


def box(left, top, right, bottom) -> list[list[float]]:
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


@pytest.mark.parametrize("level", [0, 1])
def test_polygons_in_pixels_of_level_0(level, tmp_path):
    slide(tmp_path / "a.tif")
    geojson(tmp_path / "p.geojson", [box(64, 40, 180, 120), box(96, 64, 128, 96)], [], [box(300, 160, 420, 200)])
    image = open_image(tmp_path / "a.tif", level)
    rows, columns = image.shape[0] // SIDE, image.shape[1] // SIDE
    found = patch_mask(tmp_path / "p.geojson", image, (rows, columns), (SIDE, SIDE))
    found = found.repeat(SIDE << level, 0).repeat(SIDE << level, 1)
    want = np.zeros((256, 512), bool)
    want[40:120, 64:180] = want[160:200, 300:420] = True
    want[64:96, 96:128] = False
    away = np.ones_like(want)  # from the edges, more than a patch
    for y in (40, 120, 160, 200, 64, 96):
        away[y - 10 : y + 10] = False
    for x in (64, 180, 300, 420, 96, 128):
        away[:, x - 10 : x + 10] = False
    assert np.array_equal(found[away], want[away]) and found[want].all()


@pytest.mark.parametrize("crs", [None, "urn:ogc:def:crs:EPSG::32633"])
def test_polygons_on_a_map(crs, tmp_path):
    rasterio = pytest.importorskip("rasterio")
    from rasterio.warp import transform_geom

    where = {"crs": "EPSG:32633", "transform": rasterio.transform.from_origin(500000, 5200000, 10, 10)}
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", width=128, height=64, count=1, dtype="uint8", **where
    ) as f:
        f.write(np.ones((1, 64, 128), np.uint8))
    ring = [[500000 + 10 * x, 5200000 - 10 * y] for x, y in box(32, 16, 96, 48)]
    if crs is None:  # longitude and latitude
        ring = transform_geom("EPSG:32633", "EPSG:4326", {"type": "Polygon", "coordinates": [ring]})["coordinates"][0]
        geojson(tmp_path / "p.geojson", [ring])
    else:
        geojson(tmp_path / "p.geojson", [ring], crs={"type": "name", "properties": {"name": crs}})
    found = patch_mask(tmp_path / "p.geojson", open_image(tmp_path / "a.tif"), (16, 32), (SIDE, SIDE))
    assert found[5:11, 9:23].all() and not found[:3].any() and not found[:, :7].any() and 12 * 16 >= found.sum() - 30


def test_pixels_that_are_not_looked_at_may_be_missing(make):
    """Not even an image that refuses missing numbers cares."""
    image = np.random.default_rng(0).random((64, 64, 3)).astype(np.float32)
    valid = blobs(16, 16)
    want = encode(make(), image, mask=valid, fill="error", progress=False).logits
    image[~valid.repeat(SIDE, 0).repeat(SIDE, 1)] = np.nan
    assert torch.equal(encode(make(), image, mask=valid, fill="error", progress=False).logits, want)
    image[valid.repeat(SIDE, 0).repeat(SIDE, 1)] = np.nan
    with pytest.raises(ValueError, match="missing"):
        encode(make(), image, mask=valid, fill="error", progress=False)


@torch.no_grad()
def test_a_mask_and_missing_pixels_together(make):
    image = np.random.default_rng(0).random((64, 64, 3)).astype(np.float32)
    image[:, 24:40] = np.nan
    valid = blobs(16, 16)
    got = encode(make(), image, mask=valid, fill="mask", band_rows=3, progress=False)
    both = valid.copy()
    both[:, 6:10] = False
    assert np.array_equal(got.patch_valid, both)
    close(got.logits, encode(make(), np.nan_to_num(image), mask=both, progress=False).logits, 1e-12)


# ---- mistakes


@pytest.mark.parametrize(
    "mask, message",
    [
        (np.zeros((5, 5), bool), "leaves no patch"),
        (np.ones((5, 9), bool), r"mask of shape \(5, 9\) does not lie over the image of 20 x 20"),
        (np.ones((5, 5, 1), bool), "does not lie over"),
        ("other.png", "m.*other.png of 30 x 10 pixels does not lie over 20 x 20 pixels"),
        ("black.png", "black.png leaves no patch of the image"),
        ("no.geojson", "cannot read .*no.geojson as polygons of GeoJSON"),
        ("points.geojson", "there are no polygons"),
        ("far.geojson", "far.geojson leaves no patch of the image"),
        ("empty.geojson", "there are no polygons"),
        ("short.geojson", "a ring has fewer than three points"),
        ("nan.geojson", "places that are no numbers"),
    ],
    ids=str,
)
def test_masks_that_are_none(mask, message, make, photo, tmp_path):
    Image.fromarray(np.ones((10, 30), np.uint8)).save(tmp_path / "other.png")
    Image.fromarray(np.zeros((10, 10), np.uint8)).save(tmp_path / "black.png")
    (tmp_path / "no.geojson").write_text("polygons")
    (tmp_path / "points.geojson").write_text('{"type": "Point", "coordinates": [1, 2]}')
    geojson(tmp_path / "far.geojson", [box(100, 100, 120, 120)])
    geojson(tmp_path / "empty.geojson", [], [])
    geojson(tmp_path / "short.geojson", [], [box(0, 0, 9, 9), [[1, 1]]])
    geojson(tmp_path / "nan.geojson", [box(0, 0, 9, float("nan"))])
    mask = tmp_path / mask if isinstance(mask, str) else mask
    with pytest.raises(ValueError, match=message):
        encode(make(), photo[:20, :20], mask=mask, progress=False)
