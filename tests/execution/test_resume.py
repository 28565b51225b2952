"""A run that was killed at any moment goes on to the same bits; what does not fit together is refused."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import timm
import torch
import zarr
from safetensors.torch import save_file

import luna_vision
from luna_vision.execution import encode, store
from luna_vision.execution.checkpoint import Checkpoint
from luna_vision.images import open_image
from luna_vision.utils.files import remove


@pytest.fixture
def image(photo) -> np.ndarray:
    return photo[:61, :43]


def run(model, image, folder: Path | None, grid: Path | None = None, **arguments):
    return encode(model, image, store=folder, grid=grid, **{"band_rows": 4, "progress": False, **arguments})


def same(got, want) -> None:
    for name in ("embedding", "logits", "memory", "raw_memory"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


class Killed(BaseException):
    """Nothing catches it, and nothing is kept on its account."""


def die_at(monkeypatch, writes: int, half: bool) -> None:
    """Stop at a write of patches: before it, or half-way through it."""
    write = store.write_all
    count = iter(range(10**6))

    def deadly(file, data):
        if next(count) == writes:
            if half:
                write(file, data[: len(data) // 2])
            raise Killed
        write(file, data)

    monkeypatch.setattr(store, "write_all", deadly)


@pytest.mark.parametrize(
    "mixing, stem, dtype",
    [
        ("before", "conv", torch.float32),
        ("attn", "patch", torch.bfloat16),
        ("mlp", "patch", torch.float32),
        ("none", "patch", torch.float32),
    ],
)
def test_killed_at_a_write_of_patches(mixing, stem, dtype, make, image, tmp_path, monkeypatch):
    model = make(dtype=torch.float32, local_mixing=mixing, stem=stem)
    want = run(model, image, None, tmp_path / "want.npy", store_dtype=dtype)
    folder, grid = tmp_path / "store", tmp_path / "grid.npy"

    for writes, half in ((0, True), (3, True), (2, False), (5, True)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            die_at(patch, writes, half)
            run(model, image, folder, grid, store_dtype=dtype)
    assert not grid.exists()
    same(run(model, image, folder, grid, store_dtype=dtype), want)
    assert grid.read_bytes() == (tmp_path / "want.npy").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["grid.npy", "want.npy"]


KILLED = """
import os, signal, sys, numpy as np, timm, torch, luna_vision
from luna_vision.execution import encode, store
torch.set_num_threads(1)
model = timm.create_model("test_luna_vit", checkpoint_path=sys.argv[1], depth=2)
write, count = store.write_all, iter(range(99))
def deadly(file, data):
    write(file, data[: len(data) // 2])
    if next(count) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    write(file, data[len(data) // 2 :])
store.write_all = deadly
encode(model, np.load(sys.argv[2]), store=sys.argv[3], band_rows=1)
"""


def test_a_process_that_is_killed(image, tmp_path):
    model = timm.create_model("test_luna_vit", depth=2)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    np.save(tmp_path / "image.npy", image)
    paths = [str(tmp_path / name) for name in ("model.safetensors", "image.npy", "store")]
    root = Path(luna_vision.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", KILLED, *paths], cwd=root, check=False)
    assert done.returncode == -signal.SIGKILL
    read = []
    want = run(model, image, None, band_rows=1)
    same(run(model, Recorded(image, read), tmp_path / "store", band_rows=1), want)
    assert [rows.stop for rows in read] == [1], "all of the pixels had been read"


class Recorded:
    """An image that keeps a list of what was read of it."""

    def __init__(self, image, read):
        self.image, self.read, self.shape, self.dtype = image, read, image.shape, image.dtype

    def __getitem__(self, rows):
        self.read.append(rows)
        return self.image[rows]


@pytest.mark.parametrize("pool, moment", [("avg", "before"), ("map", "after"), ("avgmax", "before")])
def test_stopped_at_every_band(pool, moment, make, image, tmp_path, monkeypatch):
    """By Ctrl-C right before or after the state is kept; with a .zarr grid."""
    model = make(dtype=torch.float32, global_pool=pool, depth=2)
    folder, grid = tmp_path / "store", tmp_path / "grid.zarr"
    want = run(model, image, None, tmp_path / "want.npy")
    save = Checkpoint.save
    stops = iter(range(1, 100))

    def stop(self, state, band):
        if moment == "after" or state_of(state) == kept:
            save(self, state, band)
        if state_of(state) != kept:
            kept[:] = state_of(state)
            raise KeyboardInterrupt

    def state_of(state):
        return [state.sweep, state.row]

    kept: list[int] = []
    monkeypatch.setattr(Checkpoint, "save", stop)
    while True:
        try:
            got = run(model, image, folder, grid)
            break
        except KeyboardInterrupt:
            next(stops)
    assert next(stops) > 8
    same(got, want)
    assert np.array_equal(zarr.open_array(grid, mode="r")[:], np.load(tmp_path / "want.npy"))


def stopped(model, image, folder, monkeypatch, bands=5, **arguments):
    count = iter(range(100))
    save = Checkpoint.save

    def stop(self, state, band):
        save(self, state, band)
        if next(count) == bands:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoint, "save", stop)
        run(model, image, folder, **arguments)


@pytest.mark.parametrize("change", ["weights", "architecture", "image shape", "image", "mean", "memory", "store dtype"])
def test_another_run_is_refused(change, make, image, photo, tmp_path, monkeypatch):
    model, arguments = make(dtype=torch.float32), {}
    want = run(model, image, None)
    stopped(model, image, tmp_path / "store", monkeypatch)
    other, picture = model, image
    if change == "weights":
        other = make(dtype=torch.float32)
        other.norm.bias.data[3] += 1e-3
    elif change == "architecture":
        other = make(dtype=torch.float32, query_gain=2.0)
        other.load_state_dict(model.state_dict())
    elif change == "image shape":
        picture = image[:-1]
    elif change == "image":
        picture = photo[61:122, :43]
    elif change == "mean":
        arguments = {"mean": 0.5}
    elif change == "memory":
        arguments = {"memory": want.raw_memory}
    else:
        arguments = {"store_dtype": torch.bfloat16}
    with pytest.raises(ValueError, match=rf"store holds a run that was stopped, with other [a-z, ]*{change}"):
        run(other, picture, tmp_path / "store", **arguments)
    same(run(model, image, tmp_path / "store"), want)


def test_a_budget_may_change_and_the_bands_stay(make, image, tmp_path, monkeypatch):
    model = make(dtype=torch.float32)
    want = run(model, image, None, band_rows=None, memory_budget="1GB")
    stopped(model, image, tmp_path / "store", monkeypatch, bands=1, band_rows=None, memory_budget="1GB")
    with pytest.raises(ValueError, match="too small for a band of 16 rows of patches: it takes .*B at least"):
        run(model, image, tmp_path / "store", band_rows=None, memory_budget="100KB")
    same(run(model, image, tmp_path / "store", band_rows=None, memory_budget="2GB"), want)


def test_pixels_that_cannot_be_read_leave_the_store_as_it_is(make, image, tmp_path):
    class Torn:
        shape, dtype, broken = image.shape, image.dtype, True

        def __getitem__(self, rows):
            if self.broken and rows.stop > 40:
                raise RuntimeError("tile 7 is damaged")
            return image[rows]

    torn, model = Torn(), make(dtype=torch.float32)
    with pytest.raises(OSError, match="cannot read the pixel rows 32 to 47 of the image: tile 7 is damaged"):
        run(model, torn, tmp_path / "store")
    torn.broken = False
    same(run(model, torn, tmp_path / "store"), run(model, image, None))


def test_a_file_that_was_damaged_may_be_replaced(make, image, tmp_path):
    model, path = make(dtype=torch.float32), tmp_path / "a.tif"
    tifffile.imwrite(path, image, photometric="rgb", tile=(16, 16), compression="deflate")
    whole = path.read_bytes()
    with tifffile.TiffFile(path) as file:
        offset, count = file.pages[0].dataoffsets[-1], file.pages[0].databytecounts[-1]
    path.write_bytes(whole[:offset] + b"\xff" * count + whole[offset + count :])
    with pytest.raises(OSError, match="cannot read the pixel rows 48 to 60 of .*a.tif"):
        run(model, open_image(path), tmp_path / "store")
    path.write_bytes(whole + b"\0")  # of another size and date
    same(run(model, open_image(path), tmp_path / "store"), run(model, image, None))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("what", ["patches", "state", "room"])
def test_a_full_disk(what, make, image, tmp_path, monkeypatch):
    model, folder = make(dtype=torch.float32), tmp_path / "store"
    full = OSError(28, "No space left on device")

    def fail(*_):
        raise full

    if what == "room":
        monkeypatch.setattr(store, "reserve", fail)
        with pytest.raises(OSError, match=r"there is no room for .*patches.bin, [\d,]+ bytes: No space left"):
            run(model, image, folder)
        return
    stopped(model, image, folder, monkeypatch)
    with monkeypatch.context() as patch:
        if what == "patches":
            patch.setattr(store, "write_all", fail)
        else:
            patch.setattr(torch, "save", fail)
        with pytest.raises(OSError, match=r"cannot write .*store/[a-z.]+: No space left on device"):
            run(model, image, folder)
    same(run(model, image, folder), run(model, image, None))


def test_the_store_may_be_the_working_directory(make, image, tmp_path, monkeypatch):
    """Which cannot be removed."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run(make(dtype=torch.float32), image, Path("."), tmp_path / "grid.npy")
    assert list(Path(".").iterdir()) == []


def test_a_result_that_cannot_be_saved_leaves_the_store(make, image, tmp_path):
    """As on a disk that is too full for it: the same call does the last step again, and reads no pixels for it."""
    model, folder, grid, read, saved = make(dtype=torch.float32), tmp_path / "store", tmp_path / "grid.npy", [], []
    want = run(model, image, None, tmp_path / "want.npy")

    def fail(result):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        run(model, image, folder, grid, save=fail)
    assert folder.is_dir() and not grid.exists()
    got = run(model, Recorded(image, read), folder, grid, save=saved.append)
    same(got, want)
    assert saved == [got] and [rows.stop for rows in read] == [1]
    assert grid.read_bytes() == (tmp_path / "want.npy").read_bytes() and not folder.exists()


@pytest.mark.parametrize("name", ["grid.npy", "grid.zarr"])
def test_a_grid_that_is_gone_is_not_made_anew(name, make, image, tmp_path, monkeypatch):
    """It would lack the rows that were done."""
    model, grid = make(dtype=torch.float32), tmp_path / name
    stopped(model, image, tmp_path / "store", monkeypatch, bands=14, grid=grid)
    remove(tmp_path / f"{name}.partial")
    with pytest.raises(OSError, match=f"{name}.partial is gone, with the rows that were done: remove the store, too"):
        run(model, image, tmp_path / "store", grid)


@pytest.mark.parametrize("name", ["store/patches.bin", "grid.npy.partial"])
@pytest.mark.parametrize("change", [-100, 100])
def test_a_file_of_another_size_is_not_gone_on_with(name, change, make, image, tmp_path, monkeypatch):
    """Zeros would stand for what is missing."""
    model, grid = make(dtype=torch.float32), tmp_path / "grid.npy"
    stopped(model, image, tmp_path / "store", monkeypatch, grid=grid)
    size = (tmp_path / name).stat().st_size
    os.truncate(tmp_path / name, size + change)
    message = rf"{name} has {size + change:,} bytes where the run that was stopped had {size:,}: .* remove the store"
    with pytest.raises(ValueError, match=message):
        run(model, image, tmp_path / "store", grid)
    assert (tmp_path / name).stat().st_size == size + change


def test_a_zarr_grid_of_another_shape_is_not_gone_on_with(make, image, tmp_path, monkeypatch):
    model, grid = make(dtype=torch.float32), tmp_path / "grid.zarr"
    stopped(model, image, tmp_path / "store", monkeypatch, grid=grid)
    zarr.open_array(f"{grid}.partial", mode="w", shape=(2, 3, 4), chunks=(2, 3, 4), dtype="float32")
    with pytest.raises(ValueError, match=r"grid.zarr.partial has shape \(2, 3, 4\) where the run that was stopped had"):
        run(model, image, tmp_path / "store", grid)


@pytest.mark.parametrize("name", ["grid.npy", "grid.zarr"])
@pytest.mark.parametrize("pool", ["avg", "token"])
def test_killed_when_all_is_written(name, pool, make, image, tmp_path, monkeypatch):
    """The grid has its name, and the store is still there."""
    model, folder, grid = make(dtype=torch.float32, global_pool=pool), tmp_path / "store", tmp_path / name
    want = run(model, image, None)

    def die(self):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Checkpoint, "remove", die)
        run(model, image, folder, grid)
    before = grid.stat()
    same(run(model, image, folder, grid), want)
    assert grid.stat() == before and os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("at, name", [("", "a.zarr"), ("/0", "a.zarr"), ("", "a.zarr/0.zarr")])
def test_a_grid_is_not_written_over_the_image(at, name, make, image, tmp_path):
    path, call = tmp_path / "a.zarr", {"progress": False}
    group = zarr.open_group(path, mode="w")
    group.create_array("0", data=image, chunks=(30, 40, 3))
    group.attrs["multiscales"] = [{"axes": ["y", "x", "c"], "datasets": [{"path": "0"}]}]
    opened = open_image(f"{path}{at}")
    with pytest.raises(ValueError, match="the patch grid .*a.zarr.* would be written over the image .*a.zarr"):
        encode(make(), opened, grid=tmp_path / name, **call)
    assert np.array_equal(opened[0:61], image)
    encode(make(), opened, grid=tmp_path / "grid.zarr", **call)


def test_what_is_no_state(make, image, tmp_path):
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / "patches.bin").write_bytes(b"x")
    (folder / "state.pt").write_bytes(b"not a state")
    with pytest.raises(ValueError, match="is not the state of a run: remove .*store to start again"):
        run(make(), image, folder)
    (folder / "state.pt").unlink()  # patches alone are of no use, and are written over
    (folder / "mine.txt").write_text("mine")
    same(run(make(), image, folder), run(make(), image, None))
    assert os.listdir(folder) == ["mine.txt"]
