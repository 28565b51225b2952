"""Embeddings of files: padding changes nothing, no image is lost, and a stopped run goes on to the same file."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch

from luna_vision.cli.common import run_command
from luna_vision.cli.embed import main
from luna_vision.data import find_images
from luna_vision.downstream import parts, windows
from luna_vision.downstream.embed import Settings, embed_images, embed_to_file
from luna_vision.downstream.windows import group
from luna_vision.images.decode import read_image, to_channels
from luna_vision.images.transforms import eval_transform, to_tensor
from luna_vision.mixers import MIXERS

HALF = {"mean": (0.5,), "std": (0.5,)}


def image(path, mean=0.5, std=0.5, in_chans=3) -> torch.Tensor:
    return ((to_tensor(to_channels(read_image(path), in_chans)) - mean) / std)[None]


def close(x, y):
    torch.testing.assert_close(torch.as_tensor(x), torch.as_tensor(y), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- what is computed


@pytest.mark.parametrize(
    "arguments",
    [*({"mixer": name} for name in MIXERS), {"stem": "conv"}, {"pos_embed": "learn"}, {"patch_size": 5}]
    + [{"global_pool": name} for name in ("max", "map", "token", "both")]
    + [{"norm_first": False, "local_mixing": "none"}],
    ids=str,
)
@torch.no_grad()
def test_a_padded_batch_gives_what_each_image_gives_alone(arguments, photos, tiny):
    model = tiny(**{"patch_size": 4, **arguments})
    memory, forward, batches = model.memory_len > 0, model.forward_features, []

    def count(x, patch_valid=None):
        batches.append((len(x), patch_valid is not None))
        return forward(x, patch_valid)

    model.forward_features = count
    result = embed_images(model, photos, Settings(**HALF, memory=memory, grid=True))
    assert sum(n for n, _ in batches) == 11
    assert sum(n for n, masked in batches if masked) >= 4, "images of different sizes share batches"
    assert result.paths == find_images(photos) and not result.failures
    for i, path in enumerate(result.paths):
        x = image(path)
        tokens = model.forward_features(x)
        close(result.embedding[i], model.forward_head(tokens, pre_logits=True)[0])
        if memory:
            close(result.memory[i], tokens[0, : model.memory_len])
        patch = model.patch_embed.patch_size[0]
        size = -(-x.shape[2] // patch), -(-x.shape[3] // patch)
        close(result.grid[i], tokens[0, model.memory_len :].unflatten(0, size))
    assert result.embedding.dtype == np.float32 and (result.memory is None) == (not memory)


def test_images_of_one_patch_grid_need_no_mask(photos, tiny):
    model = tiny()
    forward, batches = model.forward_features, []
    model.forward_features = lambda x: batches.append(len(x)) or forward(x)
    together = embed_images(model, [photos / f"0{i}.png" for i in (0, 1, 6)])  # all are 3 x 4 patches
    assert batches == [3]
    close(together.embedding[1], embed_images(model, photos / "01.png").embedding[0])


@pytest.mark.parametrize(
    "name, arguments, grid",
    [
        ("test_convnext", {}, (2, 3)),
        ("test_vit", {"dynamic_img_size": True, "dynamic_img_pad": True}, (5, 6)),
        ("test_efficientnet", {"in_chans": 1}, (3, 3)),
    ],
)
@torch.no_grad()
def test_other_timm_models(name, arguments, grid, photos):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **arguments).eval()
    result = embed_images(model, [photos / f"0{i}.png" for i in (2, 0, 8, 2)], Settings(**HALF, grid=True))
    for i, path in enumerate(result.paths):
        x = image(path, in_chans=arguments.get("in_chans", 3))
        close(result.embedding[i], model.forward_head(model.forward_features(x), pre_logits=True)[0])
    assert result.grid[0].shape[:2] == grid
    with pytest.raises(ValueError, match="memory is wanted, and .* has none"):
        embed_images(model, photos, Settings(memory=True))


@torch.no_grad()
def test_the_model_says_how_pixels_are_normalised(photos, tiny, caplog):
    path = photos / "02.png"
    for model, mean, std in ((tiny(), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), (tiny(in_chans=1), 0.449, 0.226)):
        x = image(path, torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1), model.in_chans)
        close(embed_images(model, path).embedding[0], model(x)[0])
    assert not caplog.records


def test_an_image_that_is_named_twice_is_one_row(photos, tiny):
    first, *_, last = find_images(photos)
    result = embed_images(tiny(), [last, photos, first], Settings(**HALF, max_size=32))
    assert result.paths[0] == last and sorted(result.paths) == find_images(photos)


@torch.no_grad()
def test_sizes(photos, tiny):
    model, path = tiny(), str(photos / "02.png")
    small = read_image(path).resize((48, 40), 3)
    close(embed_images(model, path, Settings(**HALF, max_size=48, grid=True)).grid[0].shape[:2], (3, 3))
    want = model((to_tensor(small)[None] - 0.5) / 0.5)
    close(embed_images(model, path, Settings(**HALF, max_size=48)).embedding, want)
    close(embed_images(model, path, Settings(**HALF, max_size=200)).embedding, model(image(path)))  # never enlarged
    square = eval_transform((64, 64), (0.5,), (0.5,), model.pretrained_cfg["crop_pct"])(read_image(path), 0)
    close(embed_images(model, path, Settings(**HALF, img_size=64)).embedding, model(square[None]))
    # as training does by default
    model.pretrained_cfg = model.pretrained_cfg | {"crop_pct": 1.0, "crop_mode": "squash"}
    square = eval_transform((64, 64), (0.5,), (0.5,))(read_image(path), 0)
    close(embed_images(model, path, Settings(**HALF, img_size=64)).embedding, model(square[None]))
    assert len(embed_images(model, photos / "07.png", Settings(max_size=2, grid=True)).grid[0]) == 1


def test_every_kind_of_file(odd_files, tiny):
    for in_chans in (1, 3):
        model = tiny(in_chans=in_chans)
        result = embed_images(model, odd_files)
        assert len(result.paths) == 7 and not result.failures
        # palette and CMYK round the greys by one step
        np.testing.assert_allclose(result.embedding[1:], result.embedding[:1].repeat(6, 0), rtol=0, atol=0.05)
        np.testing.assert_allclose(result.embedding[[1, 2, 4, 6]], result.embedding[:1].repeat(4, 0), atol=1e-4)


def test_workers_change_nothing(photos, tiny):
    model = tiny()
    (photos / "03.png").write_bytes(b"no image")
    one, two = (embed_images(model, photos, Settings(workers=n)) for n in (0, 1))
    assert np.array_equal(one.embedding, two.embedding) and one.failures == two.failures


def test_batches_are_of_similar_size_and_bounded():
    rng = np.random.default_rng(0)
    sizes = [(int(h), int(w)) for h, w in rng.integers(1, 30, (300, 2))] + [(200, 300)]
    for padding in (1.0, 1.25):
        batches = group(sizes, 8, padding, max_pixels=2000)
        assert sorted(sum(batches, [])) == list(range(301))
        for batch in batches:
            own = [sizes[i][0] * sizes[i][1] for i in batch]
            padded = max(sizes[i][0] for i in batch) * max(sizes[i][1] for i in batch) * len(batch)
            assert len(batch) == 1 or padded <= min(2000, padding * sum(own))
            assert len(batch) <= 8 and (padding > 1 or len({sizes[i] for i in batch}) == 1)
    assert len(group([(4, 4)] * 16, 8)) == 2 and len(group([(16, 16), (16, 15)] * 4, 8, 1.25)) == 1


# ---------------------------------------------------------------- files


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an output, by the recipes of its documentation; grids as a list."""
    if path.suffix == ".npz":
        data = dict(np.load(path, allow_pickle=False))
        offsets, shapes = data.pop("grid_offset"), data.pop("grid_shape")
        data["grid"] = [data["grid"][a:b].reshape(s) for a, b, s in zip(offsets, offsets[1:], shapes, strict=False)]
        data["about"] = json.loads(str(data["about"]))
        return data
    table = pq.read_table(path)
    data = {name: np.array(table[name].to_pylist()) for name in ("path", "embedding", "memory")}
    pairs = zip(table["grid"].to_pylist(), table["grid_shape"].to_pylist(), strict=True)
    data["grid"] = [np.array(flat, np.float32).reshape(shape) for flat, shape in pairs]
    data["about"] = json.loads(table.schema.metadata[b"luna_vision"])
    return data


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_the_file_has_what_the_call_returns(suffix, photos, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "WINDOW_IMAGES", 4)
    model, settings = tiny(), Settings(**HALF, memory=True, grid=True)
    want = embed_images(model, photos, settings)
    out = tmp_path / "new" / "folder" / f"features{suffix}"
    assert embed_to_file(model, photos, out, settings) == []
    found = read(out)
    assert found["path"].tolist() == want.paths
    assert np.array_equal(found["embedding"].astype(np.float32), want.embedding)
    assert np.array_equal(found["memory"].astype(np.float32), want.memory)
    assert all(np.array_equal(a, b) for a, b in zip(found["grid"], want.grid, strict=True))
    assert found["about"]["mean"] == [0.5, 0.5, 0.5]
    assert os.listdir(out.parent) == [out.name]


@pytest.mark.parametrize("random", [True, False])
def test_random_weights_are_announced_and_written_down(random, photos, weights, tmp_path, capsys):
    words = ["--model", "test_luna_vit", "--device", "cpu"] if random else weights
    assert main([str(photos / "00.png"), *words, "--out", str(tmp_path / "out.npz")]) == 0
    assert ("test_luna_vit has RANDOM WEIGHTS" in capsys.readouterr().err) == random
    assert json.loads(str(np.load(tmp_path / "out.npz")["about"]))["random_weights"] is random


def test_features_of_half_precision_are_close_and_the_file_says_so(photos, weights, tmp_path):
    found = {}
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / f"{dtype}.npz"
        assert main([str(photos / "00.png"), *weights, "--dtype", dtype, "--out", str(out)]) == 0
        found[dtype] = np.load(out)
        assert json.loads(str(found[dtype]["about"]))["dtype"] == dtype
    whole, half = (found[dtype]["embedding"] for dtype in found)
    assert 0 < np.abs(half - whole).max() < 0.05 * np.abs(whole).max()


def stop_after(monkeypatch, windows: int):
    """Ctrl-C at the moment when the next window would be kept."""
    add = parts.PartFolder.add

    def stop(self, *arguments):
        if len(list(self.folder.glob("part-*"))) == windows:
            raise KeyboardInterrupt
        add(self, *arguments)

    monkeypatch.setattr(parts.PartFolder, "add", stop)


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_a_stopped_run_goes_on(suffix, photos, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(windows, "WINDOW_IMAGES", 3)
    (photos / "01.png").write_bytes(b"no image")
    whole, out = tmp_path / f"whole{suffix}", tmp_path / f"out{suffix}"
    words = [str(photos), *weights, "--memory", "--grid"]
    assert main([*words, "--out", str(whole)]) == 1
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert main([*words, "--out", str(out)]) == 130
        assert capsys.readouterr().err.endswith("stopped; the same command continues from here\n")
    partial = tmp_path / f"out{suffix}.partial"
    assert not out.exists() and len(list(partial.glob("part-*"))) == 2
    # what a kill in the middle of a file leaves behind
    (partial / ".part-000000000006.0123abcd.partial.npz").write_bytes(b"PK half a part")
    opened = []
    monkeypatch.setattr(windows, "read_image", lambda path, limit: opened.append(path) or read_image(path, limit))
    assert main([*words, "--out", str(out), "--batch-size", "16"]) == 1
    assert opened == find_images(photos)[6:]
    assert out.read_bytes() == whole.read_bytes()
    assert not partial.exists()
    assert "1 of 11 images could not be used" in capsys.readouterr().err  # it was found in the first run


def test_a_run_that_was_stopped_while_the_parts_were_joined(photos, tiny, tmp_path, monkeypatch):
    out, model = tmp_path / "out.npz", tiny()
    with monkeypatch.context() as patch:
        patch.setitem(parts.WRITERS, ".npz", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            embed_to_file(model, photos, out)
    assert not out.exists()
    monkeypatch.setattr(windows, "read_image", lambda *_: pytest.fail("all images have been read"))
    embed_to_file(model, photos, out)
    assert len(np.load(out)["path"]) == 11


@pytest.mark.parametrize("change", ["weights", "architecture", "max_size", "mean", "memory", "images", "crop_mode"])
def test_parts_of_another_run_are_refused(change, photos, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "WINDOW_IMAGES", 3)
    out, first = tmp_path / "out.npz", Settings(img_size=64 if change == "crop_mode" else None)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 1)
        embed_to_file(tiny(), photos, out, first)
    model, paths, settings = tiny(), [photos], first
    if change == "weights":
        model.norm.bias.data[3] += 1e-3
    elif change == "architecture":
        model = tiny(num_heads=1)  # with weights of the same shapes
    elif change == "images":
        paths = find_images(photos)[::-1]
    elif change == "crop_mode":
        model.pretrained_cfg = model.pretrained_cfg | {"crop_mode": "squash"}
    else:
        settings = Settings(**{"max_size": {"max_size": 99}, "mean": HALF, "memory": {"memory": True}}[change])
    with pytest.raises(ValueError, match=f"parts of a run .*, with other {change}[a-z, ]*: remove"):
        embed_to_file(model, paths, out, settings)
    assert embed_to_file(tiny(), [photos], out, first) == []


def test_an_old_file_stays_until_the_new_one_is_complete(photos, tiny, tmp_path, monkeypatch):
    out, model = tmp_path / "out.npz", tiny()
    embed_to_file(model, photos / "00.png", out)
    with pytest.raises(FileExistsError, match="out.npz exists: give --overwrite"):
        embed_to_file(model, photos, out)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 0)
        embed_to_file(model, photos, out, overwrite=True)
    assert len(np.load(out)["path"]) == 1
    embed_to_file(model, photos, out, overwrite=True)
    assert len(np.load(out)["path"]) == 11


def test_killed_when_the_file_is_complete(photos, tiny, tmp_path, monkeypatch):
    """Of the parts some are gone, and those that are left are of no use."""
    out, model = tmp_path / "out.npz", tiny()
    monkeypatch.setattr(windows, "WINDOW_IMAGES", 3)
    unlink, removed = Path.unlink, []

    def killed(path, *args, **kwargs):
        if path.name.startswith("part-"):
            removed.append(path)
            if len(removed) == 3:
                raise KeyboardInterrupt
        unlink(path, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        embed_to_file(model, photos, out)
    assert len(np.load(out)["path"]) == 11 and len(list((tmp_path / "out.npz.partial").iterdir())) == 3
    embed_to_file(model, photos / "00.png", out, overwrite=True)
    assert len(np.load(out)["path"]) == 1 and sorted(os.listdir(tmp_path)) == ["out.npz", "photos"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", ["a user's", "one more file", "a link to a file", "a link to a folder", "a file"])
def test_a_folder_that_is_not_embeds_is_left_alone(case, photos, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(windows, "WINDOW_IMAGES", 3)
    out = tmp_path / "results" / "out.npz"
    partial, elsewhere = tmp_path / "results" / "out.npz.partial", tmp_path / "elsewhere"
    words = [str(photos), *weights, "--out", str(out)]
    if case != "a user's":
        with monkeypatch.context() as patch:
            stop_after(patch, 2)
            assert main(words) == 130
    if case == "a user's":
        partial.mkdir(parents=True)
        (partial / "thesis.txt").write_text("mine")
    elif case == "one more file":
        (partial / "notes.txt").write_text("mine")
    elif case == "a link to a file":
        elsewhere.write_bytes((partial / "part-000000000003.npz").read_bytes())
        (partial / "part-000000000003.npz").unlink()
        (partial / "part-000000000003.npz").symlink_to(elsewhere)
    elif case == "a link to a folder":
        os.rename(partial, elsewhere)
        partial.symlink_to(elsewhere)
    else:
        shutil.rmtree(partial)
        partial.write_text("mine")
    before = contents(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run_command(lambda: main([*words, "--overwrite"]))
    errors = [line for line in capsys.readouterr().err.splitlines() if "loaded" not in line]
    assert end.value.code == 2 and len(errors) == 1 and "out.npz.partial" in errors[0]
    assert contents(tmp_path) == before


def test_files_of_a_user_between_the_parts_are_kept(photos, tiny, tmp_path, monkeypatch):
    """Put there while it ran."""
    out, model, add = tmp_path / "out.npz", tiny(), parts.PartFolder.add

    def add_and_more(self, *arguments):
        add(self, *arguments)
        (self.folder / "notes.txt").write_text("mine")

    monkeypatch.setattr(parts.PartFolder, "add", add_and_more)
    with pytest.raises(OSError, match="notes.txt is not of this package"):
        embed_to_file(model, photos, out)
    assert len(np.load(out)["path"]) == 11 and (tmp_path / "out.npz.partial" / "notes.txt").read_text() == "mine"


# ---------------------------------------------------------------- mistakes


def test_files_that_cannot_be_used_are_listed_and_the_others_kept(photos, weights, tmp_path, capsys, monkeypatch):
    good = (photos / "02.png").read_bytes()
    bad = {"00.png": b"", "01.png": b"this is no picture", "03.png": good[:3000]}
    for name, content in bad.items():
        (photos / name).write_bytes(content)
    (photos / "secret.png").write_bytes(good)
    os.rename(photos / "06.png", photos / os.fsdecode(b"06\xff.png"))

    def denied(path, limit):
        if "secret" in path:
            raise PermissionError(13, "Permission denied", path)
        return read_image(path, limit)

    monkeypatch.setattr(windows, "read_image", denied)
    out = tmp_path / "out.parquet"
    assert main([str(photos), "--out", str(out), *weights, "--max-pixels", str(94 * 79)]) == 1
    first, *lines = [line for line in capsys.readouterr().err.splitlines() if "loaded" not in line]
    assert first == "5 of 12 images could not be used:"
    for line, name, reason in zip(
        lines,
        ["00.png", "01.png", "02.png", "03.png", "secret.png"],
        ["is empty", "not an image", "96 x 80 pixels are more than max_pixels=7426", "cannot decode", "denied"],
        strict=True,
    ):
        assert line.startswith("  ") and f"{photos / name}" in line and reason in line
    paths = pq.read_table(out)["path"].to_pylist()
    assert len(paths) == 7 and str(photos / "06\\xff.png") in paths


def test_what_is_not_there_is_listed_and_the_others_kept(photos, weights, tmp_path, capsys, deny):
    (photos / "link.png").symlink_to("nothing.png")
    (photos / "locked").mkdir()
    (tmp_path / "empty").mkdir()
    deny("locked")
    missing = {
        str(photos / "locked"): "Permission denied",
        str(tmp_path / "gone.png"): "there is no image file or folder",
        str(tmp_path / "empty"): "no images",
        str(photos / "link.png"): "No such file",
    }
    words = [str(photos), str(tmp_path / "gone.png"), str(tmp_path / "empty")]
    assert main([*words, "--out", str(tmp_path / "out.npz"), *weights]) == 1
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'out.npz'}: 11 of 15 images\n"
    first, *lines = [line for line in err.splitlines() if "loaded" not in line]
    assert first == "4 of 15 images could not be used:"
    assert all(name in line and missing[name] in line for name, line in zip(missing, lines, strict=True))


def test_hidden_names_are_skipped_and_counted(photos, weights, tmp_path, capsys):
    (photos / ".ipynb_checkpoints").mkdir()
    for name in (".ipynb_checkpoints/00.png", "._00.png"):
        (photos / name).write_bytes(b"x")
    os.mkfifo(photos / "pipe.png")
    assert main([str(photos), "--out", str(tmp_path / "out.npz"), *weights]) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'out.npz'}: 11 of 11 images\n"
    assert f"{photos}; skipped 2 hidden and 1 other names (1 not a file)" in err.splitlines()


def test_no_images_at_all(tiny, tmp_path):
    for call in (lambda: embed_images(tiny(), []), lambda: embed_to_file(tiny(), [], tmp_path / "out.npz")):
        with pytest.raises(ValueError, match="there are no images: the list of paths is empty"):
            call()
    assert not list(tmp_path.iterdir())


def test_a_model_that_refuses_some_sizes(photos, tmp_path):
    convnext = timm.create_model("test_convnext", num_classes=0)
    result = embed_images(convnext, photos)
    assert {Path(path).name for path, _ in result.failures} == {"05.png", "07.png", "09.png"}
    assert result.failures[0][1].startswith("ConvNeXt fails on 1 x 1 pixels: ") and len(result.paths) == 8
    fixed = timm.create_model("vit_tiny_patch16_224", depth=1)
    with pytest.raises(ValueError, match=r"fails on 64 x 48 pixels: Input height .* \(--img-size\) brings all"):
        embed_to_file(fixed, photos, tmp_path / "out.npz")
    assert not list(tmp_path.glob("out*"))  # nothing in the way of the next attempt
    assert len(embed_images(fixed, photos, Settings(img_size=224)).paths) == 11


@pytest.mark.parametrize("name", ["luna", "convnext"])
@pytest.mark.parametrize(
    "raised", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("a bug"), KeyError("a bug")]
)
def test_what_is_not_about_an_image_stops_and_leaves_no_hole(raised, name, photos, tiny, tmp_path):
    """The same call then goes on where it was stopped."""
    model = tiny() if name == "luna" else timm.create_model("test_convnext", num_classes=0)
    forward = model.forward_features

    def fail(x, *args, **kwargs):
        raise raised

    model.forward_features = fail
    with pytest.raises(type(raised), match=r"memory|a bug"):
        embed_to_file(model, photos, tmp_path / "out.npz")
    assert not (tmp_path / "out.npz").exists()
    model.forward_features = forward
    embed_to_file(model, photos, tmp_path / "out.npz")
    assert (tmp_path / "out.npz").exists()


def test_a_bug_in_reading_is_no_image_that_cannot_be_used(photos, tiny, monkeypatch):
    def fail(image, seed, max_size):
        raise ValueError("a bug")

    monkeypatch.setattr(windows, "shrink", fail)
    with pytest.raises(ValueError, match="a bug"):
        embed_images(tiny(), photos)


@pytest.mark.parametrize(
    "out, message",
    [
        ("features.csv", "the output must end in .parquet or .npz, got features.csv"),
        ("folder.npz", "the output folder.npz is a folder"),
        ("file/features.npz", "cannot write into file: File exists"),
        ("/proc/no/features.npz", "cannot write into /proc/no: No such file or directory"),
        ("there.npz", "there.npz exists: give --overwrite"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_any_work(out, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("folder.npz").mkdir()
    Path("file").touch()
    Path("there.npz").touch()
    before = sorted(tmp_path.rglob("*"))
    assert message in mistake(capsys, "no_images_are_looked_for", "--out", out)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "words, message",
    [
        (["empty"], "no images (.jpg, "),
        (["empty", "gone.png"], "no images (.jpg, "),
        (["gone.png"], "there is no image file or folder gone.png"),
        ([], "required, here or in a --config: images"),
        (["photos", "--max-size", "0"], "--max-size: must be a whole number of at least 1"),
        (["photos", "--max-size", "9", "--img-size", "9"], "give one of them"),
        (["photos", "--mean", "0.5", "0.5"], "mean must be 1 or 3 finite numbers, got (0.5, 0.5)"),
        (["photos", "--model-args", "mixer=softmax", "--memory"], "memory is wanted, and LunaVit has none"),
        (["photos", "--model-args", "global_pool="], "not one vector: create it with a global_pool"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(words, message, photos, monkeypatch, capsys):
    monkeypatch.chdir(photos.parent)
    Path("empty").mkdir()
    assert message in mistake(capsys, *words, "--out", "out.npz", "--model", "test_luna_vit")
    assert not list(Path().glob("out*"))


def mistake(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        run_command(lambda: main(list(words)))
    assert end.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "RANDOM WEIGHTS" not in line]
    assert line.startswith("error: ")
    return line


def test_nothing_is_written_if_no_image_can_be_used(photos, weights, tmp_path, capsys):
    (photos / "00.png").write_bytes(b"x")
    assert main([str(photos / "00.png"), "--out", str(tmp_path / "out.npz"), *weights]) == 1
    assert "is not written: it would be empty" in capsys.readouterr().out
    assert not list(tmp_path.glob("out*"))


def test_statistics_may_be_one_number_also_zero(tiny, photos):
    model = tiny()
    for mean, std in ((0.5, 0.25), (0.0, 1.0)):
        one, each = (Settings(mean=a, std=b) for a, b in ((mean, std), ([mean] * 3, [std] * 3)))
        np.testing.assert_array_equal(*(embed_images(model, photos, settings).embedding for settings in (one, each)))
