"""What is refused or fails, and cannot go on, leaves nothing behind."""

import os

import numpy as np
import pytest
import tifffile

from luna_vision.cli.common import run_command
from luna_vision.cli.encode import main
from luna_vision.execution import encode
from luna_vision.images import open_image


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
@pytest.mark.parametrize("store", [True, False])
def test_a_refused_image_leaves_neither_store_nor_grid(suffix, store, photo, make, tmp_path):
    where = {"grid": tmp_path / f"grid{suffix}", "store": tmp_path / "store" if store else None}
    with pytest.raises(ValueError, match="memory budget"):
        encode(make(), photo, memory_budget="1KB", progress=False, **where)
    with pytest.raises(ValueError, match="are missing"):
        broken = np.where(np.arange(640)[:, None] < 600, photo / 255, np.nan)
        encode(make(), broken, fill="error", progress=False, **where)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
def test_a_grid_that_cannot_go_on_is_removed(suffix, photo, make, tmp_path):
    """Of a tile that is damaged, and nothing is kept of the tiles before."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, photo, photometric="rgb", tile=(32, 32), compression="deflate")
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        offset, count = file.pages[0].dataoffsets[-1], file.pages[0].databytecounts[-1]
    content[offset : offset + count] = bytes(count)
    path.write_bytes(content)
    with pytest.raises(OSError, match="a.tif"):
        encode(make(), open_image(path), grid=tmp_path / f"grid{suffix}", band_rows=8, progress=False)
    assert os.listdir(tmp_path) == ["a.tif"]
    with pytest.raises(OSError, match="a.tif"):  # with a store, both stay for the same call
        encode(make(), open_image(path), grid=tmp_path / f"grid{suffix}", store=tmp_path / "s", band_rows=8)
    assert sorted(os.listdir(tmp_path)) == ["a.tif", f"grid{suffix}.partial", "s"]


def test_a_disk_that_is_full_in_the_end_is_named(photo, tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "a.npy", photo[:40, :40])
    words = [str(tmp_path / "a.npy"), "--out", str(tmp_path / "o.npz"), "--store", str(tmp_path / "store")]
    words += ["--model", "test_luna_vit", "--device", "cpu"]

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as end:
        run_command(lambda: main(words))
    line = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and line.startswith("error: ") and "store" in line and "No space left" in line
    assert sorted(os.listdir(tmp_path)) == ["a.npy"]


@pytest.mark.parametrize("name", ["a.bif", "a.dat", "a.png"])
def test_a_tiled_tiff_of_any_name_is_read_in_rows(name, photo, tmp_path):
    tifffile.imwrite(tmp_path / name, photo, photometric="rgb", tile=(64, 64))
    image = open_image(tmp_path / name)
    assert image.chunks == (64, 64) and image.held_bytes < photo.nbytes
    np.testing.assert_array_equal(image[10:90], photo[10:90])
