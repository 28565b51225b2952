"""The command: what it writes, that it goes on where it was stopped, and one line for each mistake."""

import json

import numpy as np
import pytest
import tifffile
import timm
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import save_file

from luna_vision.cli.common import run_command
from luna_vision.cli.encode import main
from luna_vision.execution import encode
from luna_vision.execution.checkpoint import Checkpoint
from luna_vision.utils.errors import UserError

SMALL = {"embed_dim": 16, "depth": 3, "num_heads": 2, "patch_size": 4, "memory_len": 3, "num_classes": 5}


@pytest.fixture
def words(make, photo, tmp_path) -> list[str]:
    """A command without its output."""
    tifffile.imwrite(tmp_path / "a.tif", photo[:61, :43], photometric="rgb", tile=(16, 16))
    save_file(make(dtype=torch.float32).state_dict(), tmp_path / "tiny.safetensors")
    arguments = ["--model", "test_luna_vit", "--model-args", *(f"{k}={v}" for k, v in SMALL.items())]
    weights = ["--checkpoint", str(tmp_path / "tiny.safetensors"), "--device", "cpu"]
    return [str(tmp_path / "a.tif"), *arguments, *weights]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_what_is_written(suffix, words, make, photo, tmp_path, capsys):
    out, grid = tmp_path / f"out{suffix}", tmp_path / "grid.npy"
    assert main([*words, "--out", str(out), "--grid", str(grid), "--memory-budget", "100MB"]) == 0
    assert capsys.readouterr().out == f"{out}: 61 x 43 pixels, 16 x 11 patches\n"
    want = encode(make(dtype=torch.float32), photo[:61, :43], progress=False)
    if suffix == ".npz":
        found = dict(np.load(out))
        about = json.loads(str(found.pop("about")))
    else:
        found = load_file(out)
        with safe_open(out, "np") as file:
            about = json.loads(file.metadata()["about"])
    assert about["model"] == "test_luna_vit" and about["random_weights"] is False and about["grid_size"] == [16, 11]
    assert sorted(found) == ["embedding", "logits", "memory", "raw_memory"]
    for name, value in found.items():
        np.testing.assert_allclose(value, getattr(want, name).numpy(), rtol=1e-4, atol=1e-5)
    assert np.load(grid).shape == (16, 11, 16)


def test_a_stopped_run_goes_on(words, tmp_path, monkeypatch, capsys):
    save, count = Checkpoint.save, iter(range(100))

    def stop(self, state, band):
        save(self, state, band)
        if next(count) == 6:
            raise KeyboardInterrupt

    words += ["--band-rows", "4"]
    assert main([*words, "--out", str(tmp_path / "want.npz")]) == 0
    words += ["--store", str(tmp_path / "store"), "--out", str(tmp_path / "out.npz")]
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", stop)
        assert main(words) == 130
        assert capsys.readouterr().err.endswith("stopped; the same command continues from here\n")
    assert main(words) == 0
    found, want = np.load(tmp_path / "out.npz"), np.load(tmp_path / "want.npz")
    assert all(np.array_equal(found[name], want[name]) for name in ("embedding", "logits", "memory", "raw_memory"))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name, writer", [("out.npz", "numpy.savez"), ("out.safetensors", "safetensors.numpy.save")])
def test_an_output_that_cannot_be_written_costs_the_last_step_only(name, writer, words, tmp_path, monkeypatch):
    words += ["--store", str(tmp_path / "store"), "--out", str(tmp_path / name)]

    def fail(target, *_, **__):
        if hasattr(target, "write"):
            target.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match=f"cannot write .*{name}: No space left"):
        patch.setattr(writer, fail)
        main(words)
    assert not list(tmp_path.glob(".*")) and (tmp_path / "store/state.pt").exists()
    assert main(words) == 0
    assert (tmp_path / name).exists() and not (tmp_path / "store").exists()


def test_random_weights_are_announced(photo, tmp_path, capsys):
    np.save(tmp_path / "a.npy", photo[:30, :30])
    assert main([str(tmp_path / "a.npy"), "--model", "test_luna_vit", "--out", str(tmp_path / "o.npz")]) == 0
    assert "test_luna_vit has RANDOM WEIGHTS" in capsys.readouterr().err
    assert json.loads(str(np.load(tmp_path / "o.npz")["about"]))["random_weights"] is True


@pytest.mark.parametrize(
    "change, message",
    [
        (["--out", "o.png"], "the output must end in .npz or .safetensors, got o.png"),
        (["--out", "{tmp}/old.npz"], "old.npz exists: give --overwrite"),
        (["--grid", "g.csv"], "the patch grid must end in .npy or .zarr, got g.csv"),
        (["--grid", "{tmp}/old.npy"], "old.npy exists: give --overwrite"),
        (["--memory-budget", "lots"], "a memory budget is a number of bytes or a text such as '8GB'"),
        (["--memory-budget", "1KB"], "a memory budget of 1 KB is too small for this image: it takes "),
        (["--level", "3"], "has levels 0 to 0, got 3"),
        (["--store", "{tmp}/old.npz"], "is a file: give a folder"),
        (["--mean", "1", "2"], "mean must be 1 or 3 finite numbers"),
        (["--checkpoint", "{tmp}/seven.safetensors"], "has a head for 7 classes, the model one for 1000"),
        (["--band-rows", "0"], "must be a whole number of at least 1, got '0'"),
        (["--model-args", "mixer=softmax"], "streaming needs a memory"),
        (["--model", "test_vit", "--model-args", "num_classes=1"], "streaming needs a Luna ViT, got VisionTransformer"),
    ],
    ids=str,
)
def test_mistakes(change, message, words, tmp_path, capsys):
    save_file(timm.create_model("test_luna_vit", num_classes=7).state_dict(), tmp_path / "seven.safetensors")
    for name in ("old.npz", "old.npy"):
        (tmp_path / name).write_bytes(b"")
    words = ["--out", str(tmp_path / "o.npz"), *(w.format(tmp=tmp_path) for w in change)]
    image = [str(tmp_path / "a.tif")]
    model = [] if "--model" in change else ["--model", "test_luna_vit"]
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: main([*image, *model, *words]))
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and message in last, last


def test_the_image_is_not_written_over(photo, tmp_path):
    image, out = tmp_path / "a.npy", tmp_path / "o.npz"
    np.save(image, photo)
    before = image.read_bytes()
    with pytest.raises(
        ValueError, match="the patch grid .*a.npy would be written over the image .*a.npy: give another"
    ):
        main([str(image), "--out", str(out), "--grid", str(image), "--overwrite"])
    with pytest.raises(ValueError, match="the output .*o.npz would be written over the image .*o.npz: give another"):
        main([str(out), "--out", str(out), "--overwrite"])
    assert image.read_bytes() == before


def test_no_image(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: main([str(tmp_path / "no.tif"), "--out", str(tmp_path / "o.npz")]))
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: there is no image {tmp_path / 'no.tif'}\n"


def test_one_image_takes_one_process(words, tmp_path, monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="start the command without torchrun"):
        main([*words, "--out", str(tmp_path / "o.npz")])
