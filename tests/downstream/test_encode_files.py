"""A table of many large images: the rows of each alone, no image lost, and the same by any number of processes."""

import errno
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
import zarr
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from torch import nn

from luna_vision.cli.common import run_command
from luna_vision.cli.embed import main as embed
from luna_vision.cli.encode import main
from luna_vision.downstream import encode_files, parts
from luna_vision.downstream.embed import embed_to_file
from luna_vision.execution import encode
from luna_vision.execution.checkpoint import Checkpoint
from luna_vision.images import open_image
from luna_vision.images.find import Listed, region_of
from tests.tasks.ranks import finish, run, start, until

SIZES = [(61, 43), (80, 64), (48, 120), (96, 33)]


@pytest.fixture
def slides(tmp_path) -> Path:
    """A folder of three TIFFs in tiles, one of them in a folder of its own, and an array of zarr."""
    photo, folder = load_sample_image("china.jpg"), tmp_path / "slides"
    (folder / "more").mkdir(parents=True)
    for name, (height, width) in zip(("a.tif", "b.tif", "more/a.tif"), SIZES, strict=False):
        tifffile.imwrite(folder / name, photo[:height, :width], photometric="rgb", tile=(16, 16))
    array = photo[: SIZES[3][0], : SIZES[3][1]]
    zarr.create_array(folder / "c.zarr", data=array, chunks=(32, 32, 3))
    return folder


@pytest.fixture
def model(tiny) -> nn.Module:
    return tiny(num_classes=5)


@pytest.fixture
def weights(tmp_path, model) -> list[str]:
    """The words of a command line that name that model."""
    save_file(model.state_dict(), tmp_path / "tiny.safetensors")
    arguments = ["--model", "test_luna_vit", "--model-args", "embed_dim=32", "depth=2", "num_classes=5"]
    return [*arguments, "--checkpoint", str(tmp_path / "tiny.safetensors"), "--device", "cpu"]


def table(path: Path) -> dict[str, list]:
    return pq.read_table(path).to_pydict()


def same(found: dict[str, list], want: dict[str, list]) -> None:
    """The same rows, bit by bit, wherever their files are."""
    assert found.keys() == want.keys()
    for name in want.keys() - {"path"}:
        assert found[name] == want[name], name
    assert [Path(path).name for path in found["path"]] == [Path(path).name for path in want["path"]]


def test_a_mask_for_all_is_that_of_each_without_one(slides, model, tmp_path):
    path = str(slides / "a.tif")
    for name, item, how in (("own", Listed(path, mask="otsu"), {}), ("all", Listed(path), {"mask": "otsu"})):
        assert encode_files.encode_files(model, [item], tmp_path / f"{name}.parquet", {}, **how) == []
    own, every = (table(tmp_path / f"{name}.parquet") for name in ("own", "all"))
    assert own["mask"] == ["otsu"]
    same(every, own)


def test_each_image_has_the_row_that_it_has_alone(slides, weights, model, tmp_path, capsys):
    assert main([str(slides), *weights, "--out", str(tmp_path / "run"), "--grid", str(tmp_path / "grids")]) == 0
    out = tmp_path / "run/encodings.parquet"
    assert capsys.readouterr().out == f"{out}: 4 of 4 images\n"
    rows = pq.read_table(out).to_pylist()
    assert [Path(row["path"]).relative_to(slides).as_posix() for row in rows] == [
        "a.tif",
        "b.tif",
        "c.zarr",
        "more/a.tif",
    ]
    grids = ("a-0.npy", "b.npy", "c.npy", "a-3.npy")
    for row, grid in zip(rows, grids, strict=True):
        image = open_image(row["path"])
        want = encode(model, image, progress=False)
        assert torch.equal(torch.tensor(row["embedding"]), want.embedding)
        assert torch.equal(torch.tensor(row["logits"]), want.logits)
        assert torch.equal(torch.tensor(row["memory"]), want.memory)
        assert row["size"] == list(image.shape[:2]) and row["grid_size"] == list(want.grid_size)
        assert row["patches"] == np.prod(want.grid_size) and row["broken_tiles"] == 0
        assert np.load(tmp_path / "grids" / grid).shape[:2] == want.grid_size
    about = json.loads(pq.read_schema(out).metadata[b"luna_vision"])
    assert about["random_weights"] is False and about["on_error"] == "raise"
    assert not (tmp_path / "run/encodings.parquet.partial").exists()


def test_a_region_on_a_map_has_all_its_digits(model, tmp_path):
    region = (500123.25, 5200017.0, 160.0, 160.0)
    result = encode(model, np.zeros((16, 16), np.uint8), progress=False)
    (text,) = encode_files.row_of(Listed("a.tif", None, region), (16, 16), result)["region"]
    assert text == "500123.25 5200017 160 160" and region_of(text, "") == region


def test_a_list_has_masks_and_regions_of_its_own(slides, weights, model, tmp_path):
    tifffile.imwrite(slides / "mask.png.tif", np.kron(np.eye(2, dtype=np.uint8), np.ones((40, 32), np.uint8)))
    shutil.move(slides / "a.tif", slides / 'a, "1".tif')
    lines = ["path,label,mask,region,split", '"a, ""1"".tif",x,,,train', "b.tif,y,mask.png.tif,,", ",,,,"]
    lines += ['b.tif,y,,"8,4,40,50",val']
    (slides / "list.csv").write_text("\n".join(lines))
    out = tmp_path / "o.parquet"
    assert main([str(slides / "list.csv"), *weights, "--out", str(out)]) == 0
    rows = pq.read_table(out).to_pylist()
    image = slides / "b.tif"
    wanted = (
        encode(model, open_image(slides / 'a, "1".tif'), progress=False),
        encode(model, open_image(image), mask=slides / "mask.png.tif", progress=False),
        encode(model, open_image(image, region=(8, 4, 40, 50)), progress=False),
    )
    for row, want in zip(rows, wanted, strict=True):
        assert torch.equal(torch.tensor(row["embedding"]), want.embedding)
    assert rows[1]["patches"] == int(wanted[1].patch_valid.sum()) < np.prod(wanted[1].grid_size)
    assert [row["region"] for row in rows] == ["", "", "8 4 40 50"] and rows[2]["size"] == [50, 40]


def test_a_stopped_run_goes_on_in_the_middle_of_an_image(slides, weights, tmp_path, monkeypatch, capsys):
    words = [str(slides), *weights, "--band-rows", "1"]
    assert main([*words, "--out", str(tmp_path / "want.parquet")]) == 0
    words += ["--store", str(tmp_path / "store"), "--out", str(tmp_path / "o.parquet")]
    save, count, opened = Checkpoint.save, iter(range(1000)), []

    def stop(self, state, band):
        save(self, state, band)
        if next(count) == 30:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", stop)
        assert main(words) == 130
    assert capsys.readouterr().err.endswith("stopped; the same command continues from here\n")
    assert len(list((tmp_path / "store").iterdir())) == 1
    done = len(list((tmp_path / "o.parquet.partial").glob("part-*")))
    assert 0 < done < 4
    take = encode_files.open_image
    monkeypatch.setattr(encode_files, "open_image", lambda path, **how: opened.append(path) or take(path, **how))
    monkeypatch.setattr(Checkpoint, "save", lambda *_: next(count) and save(*_))
    before = next(count)
    assert main(words) == 0
    assert len(opened) == 4 - done and next(count) - before < 100
    same(table(tmp_path / "o.parquet"), table(tmp_path / "want.parquet"))
    assert not (tmp_path / "store").exists() and not (tmp_path / "o.parquet.partial").exists()


def test_images_that_cannot_be_used_are_listed_and_tried_again(slides, weights, tmp_path, monkeypatch, capsys):
    whole = (slides / "b.tif").read_bytes()
    words = [str(slides), *weights, "--out", str(tmp_path / "o.parquet")]
    (slides / "b.tif").write_bytes(whole[:-500])
    (slides / "d.svs").write_bytes(b"no slide")
    assert main(words) == 1
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'o.parquet'}: 3 of 5 images\n"
    lines = err.splitlines()[-3:]
    assert lines[0] == "2 of 5 images could not be used:" and "b.tif" in lines[1] and "d.svs" in lines[2]
    assert len(table(tmp_path / "o.parquet")["path"]) == 3
    (slides / "b.tif").write_bytes(whole)
    opened, take = [], encode_files.open_image
    monkeypatch.setattr(encode_files, "open_image", lambda path, **how: opened.append(path) or take(path, **how))
    assert main([*words, "--overwrite"]) == 1
    assert [Path(path).name for path in opened] == ["b.tif", "d.svs"]
    assert [Path(path).name for path in table(tmp_path / "o.parquet")["path"]] == ["a.tif", "b.tif", "c.zarr", "a.tif"]


@pytest.mark.parametrize("where", ["luna_vision.execution.store.reserve", "luna_vision.downstream.parts.np.savez"])
def test_a_full_disk_stops_the_run_and_is_no_fault_of_an_image(where, slides, weights, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(where, full)
    with pytest.raises(OSError, match="No space left"):
        main([str(slides), *weights, "--out", str(tmp_path / "o.parquet"), "--store", str(tmp_path / "run")])
    assert not (tmp_path / "o.parquet").exists()


def test_no_two_images_share_a_name(slides, weights, tmp_path):
    for name in ("more/B.tif", "more/a-0.tif", "more/a-0-5.tif"):
        shutil.copy(slides / "a.tif", slides / name)
    assert main([str(slides), *weights, "--out", str(tmp_path / "o.parquet"), "--grid", str(tmp_path / "grids")]) == 0
    names = {path.name.lower() for path in (tmp_path / "grids").iterdir()}
    assert len(names) == 7 and "c.npy" in names


@pytest.mark.parametrize("name", ["encode", "embed"])
def test_a_program_under_torchrun_may_call_one_process_alone(name, slides, photos, model, tmp_path, monkeypatch):
    for variable, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(variable, value)
    out = tmp_path / "o.parquet"
    if name == "encode":
        assert encode_files.encode_files(model, [Listed(str(slides / "a.tif"))], out, {}) == []
    else:
        assert embed_to_file(model, photos / "00.png", out) == []
    assert len(table(out)["path"]) == 1


@pytest.mark.parametrize(
    "change, message",
    [
        (["--out", "{tmp}/old.parquet"], "old.parquet exists: give --overwrite"),
        (["--out", "o.npz", "{tmp}/list.csv"], "list.csv lists many images: give --out FILE.parquet"),
        (["--grid", "g.npy"], "--grid of many images is a folder, got g.npy"),
        (["--out", "o.npz", "{tmp}/slides"], "slides holds many images: give --out FILE.parquet"),
        (["--grid", "{tmp}/slides/more", "{tmp}/slides"], "--grid {tmp}/slides/more lies in {tmp}/slides"),
        (["--attention", "{tmp}/slides", "{tmp}/slides"], "--attention {tmp}/slides lies in {tmp}/slides"),
        (["--store", "{tmp}/slides/run", "{tmp}/slides"], "--store {tmp}/slides/run lies in {tmp}/slides"),
        (["--grid", "{tmp}/grids"], "a.npy exists: give --overwrite"),
        (["--mean", "1", "2"], "mean must be 1 or 3 finite numbers"),
        (["--level", "1", "--mpp", "2"], "level and mpp all say how large pixels are"),
        (["{tmp}/bad.csv"], "bad.csv must have a column path, got name, region"),
        (["{tmp}/list.csv"], "list.csv line 2: region must be X Y WIDTH HEIGHT, got '1 2 3'"),
        (["{tmp}/empty.csv"], "empty.csv lists no images"),
        (["{tmp}/few.csv"], "few.csv line 4 has 1 cells and the header 2"),
        (["{tmp}/many.csv"], "many.csv line 3 has 3 cells and the header 2: a cell with a comma takes quotes"),
        (["{tmp}/unnamed.csv"], "unnamed.csv line 2 has no path"),
        (["{tmp}/nothing"], "there is no image file or folder {tmp}/nothing"),
    ],
    ids=str,
)
def test_mistakes(change, message, slides, weights, tmp_path, capsys):
    (tmp_path / "old.parquet").write_bytes(b"")
    (tmp_path / "grids").mkdir()
    shutil.copy(slides / "a.tif", tmp_path / "grids/a.npy")
    (tmp_path / "bad.csv").write_text("name,region\na.tif,\n")
    (tmp_path / "list.csv").write_text("path,region\na.tif,1 2 3\n")
    (tmp_path / "empty.csv").write_text("path,region\n")
    (tmp_path / "few.csv").write_text("path,mask\na.tif,\n,\na.tif\n")
    (tmp_path / "many.csv").write_text("path,mask\na.tif,otsu\na, b.tif,\n")
    (tmp_path / "unnamed.csv").write_text("path,mask\n,otsu\n")
    change = [word.format(tmp=tmp_path) for word in change]
    image = [] if change[-1].endswith(("csv", "nothing", "/slides")) else [str(slides / "a.tif")]
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: main([*image, *weights, "--out", str(tmp_path / "o.parquet"), *change]))
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and message.format(tmp=tmp_path) in last, last


def command(name: str, words: list[str], stop_after: int = 0) -> None:
    """Run a command in this process of torchrun; it ends the hard way after so many parts, if that is not 0."""
    add, added = parts.PartFolder.add, iter(range(1, 1000))

    def stop(self, *arguments) -> None:
        add(self, *arguments)
        if next(added) == stop_after:
            import os

            os._exit(9)

    parts.PartFolder.add = stop
    sys.exit({"embed": embed, "encode": main}[name](words))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["encode", "embed"])
def test_processes_of_torchrun_write_one_table(name, slides, photos, weights, tmp_path, monkeypatch):
    monkeypatch.setattr("luna_vision.downstream.windows.WINDOW_IMAGES", 2)
    folder, count = (slides, 4) if name == "encode" else (photos, 11)
    one, two, resumed = (tmp_path / f"{n}.parquet" for n in ("one", "two", "resumed"))
    words = [str(folder), *weights, "--out"]
    assert (main if name == "encode" else embed)([*words, str(one)]) == 0
    run(tmp_path / "two", 2, command, name, [*words, str(two)])
    want, found = table(one), table(two)
    assert len(want["path"]) == count and found["path"] == want["path"]
    np.testing.assert_allclose(found["embedding"], want["embedding"], rtol=1e-4, atol=1e-5)
    if name == "encode":
        same(found, want)
    said = [(tmp_path / f"two/rank{rank}.txt").read_text() for rank in range(2)]
    assert f"{two}: {count} of {count} images" in said[0] and "images" not in said[1]

    processes = start(tmp_path / "killed", 2, command, name, [*words, str(resumed)], 1)
    until(lambda: len(list(tmp_path.glob("resumed.parquet.partial/part-*"))) >= 1, processes)
    assert 9 in finish(tmp_path / "killed", processes) and not resumed.exists()
    assert (main if name == "encode" else embed)([*words, str(resumed)]) == 0  # by one process
    found = table(resumed)
    assert found["path"] == want["path"]
    np.testing.assert_allclose(found["embedding"], want["embedding"], rtol=1e-4, atol=1e-5)
    assert not list(tmp_path.glob("*.partial"))
