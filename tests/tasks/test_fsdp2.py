"""FSDP2: its folders of checkpoints are whole or not there, resumed from, read by one process, and exported."""

import os
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from luna_vision.execution import set_band_checkpointing
from luna_vision.tasks.checkpoints import read_checkpoint
from luna_vision.tasks.reporting import export_weights
from luna_vision.tasks.resume import latest_complete
from luna_vision.tasks.sharding import _replace, shard

from .conftest import tiny_trainer
from .ranks import command_line, finish, run, said, start, without_ema

SHARDED = ["--trainer.strategy=fsdp2", "--trainer.devices=2", "--trainer.max_epochs=1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder in which two processes have trained and tested, from weights in a file, with checkpoints."""
    folder = tmp_path_factory.mktemp("fsdp2")
    model = timm.create_model(
        "test_luna_vit", num_classes=10, in_chans=1, img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2
    )
    torch.save(model.state_dict(), folder / "start.pt")
    config = without_ema(folder)
    run(folder, 2, command_line, "fit", f"--config={config}", *SHARDED, f"--model.checkpoint={folder / 'start.pt'}")
    return folder


@pytest.fixture
def checkpoints(trained, tmp_path) -> Path:
    """A copy that may be spoiled."""
    return shutil.copytree(trained / "runs/debug/version_0/checkpoints", tmp_path / "checkpoints")


@pytest.mark.slow
def test_weights_are_exported_as_timm_loads_them(trained):
    said_by_first = (trained / "rank0.txt").read_text()
    line = next(line for line in said_by_first.splitlines() if line.startswith("load it with:"))
    path = trained / "runs/debug/version_0/checkpoints/best.safetensors"
    names = {"__name__": "line"}
    exec(line.removeprefix("load it with:").strip().replace("runs/", f"{trained}/runs/"), names)
    exported = load_file(path)
    loaded = names["model"].state_dict()
    assert exported.keys() == loaded.keys()
    assert all(torch.equal(exported[name], loaded[name]) for name in exported)
    began = torch.load(trained / "start.pt", weights_only=True)
    assert (exported["head.bias"] - began["head.bias"]).abs().max() > 1e-5
    assert (exported["head.weight"] - began["head.weight"]).abs().max() < 0.1  # but it began there


@pytest.mark.slow
def test_one_process_reads_and_tests_the_folder(trained, tmp_path):
    folder = trained / "runs/debug/version_0/checkpoints"
    config = trained / "runs/debug/version_0/config.yaml"
    arguments = ["test", f"--config={config}", "--trainer.strategy=auto", "--trainer.devices=1"]
    arguments += ["--model.checkpoint=null", "--trainer.limit_test_batches=4"]  # as many images as for two processes
    run(tmp_path, 1, command_line, *arguments, f"--ckpt_path={folder / 'best.ckpt'}")

    def loss(path: Path) -> float:
        return float(next(line for line in path.read_text().splitlines() if "test_loss" in line).split("│")[2])

    assert loss(tmp_path / "rank0.txt") == pytest.approx(loss(trained / "rank0.txt"), abs=1e-5)
    again = ["fit", f"--config={config}", "--trainer.strategy=auto", "--trainer.devices=1", "--model.checkpoint=null"]
    codes = finish(tmp_path, start(tmp_path, 1, command_line, *again, f"--ckpt_path={folder / 'last.ckpt'}"))
    assert codes == [2] and "error: the checkpoint is of a sharded run: go on with" in said(tmp_path)


def test_only_whole_folders_are_resumed_from(checkpoints):
    config = read_checkpoint(checkpoints / "last.ckpt", weights=False)["callbacks"]["ExactResume"]["config"]
    arguments = tiny_trainer(checkpoints), checkpoints.parent, config
    shutil.rmtree(checkpoints / "best.ckpt")
    shutil.copytree(checkpoints / "last.ckpt", checkpoints / ".last.ckpt.partial")  # hidden until it is complete
    assert latest_complete(*arguments) == str(checkpoints / "last.ckpt")
    shard = checkpoints / "last.ckpt" / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="last.ckpt is left out.*__1_0.distcp is missing or cut off"):
        assert latest_complete(*arguments) is None
    shutil.copytree(checkpoints / ".last.ckpt.partial", checkpoints / "last.previous.ckpt")  # killed between two moves
    os.utime(checkpoints / "last.previous.ckpt", (1, 1))
    with pytest.warns(UserWarning, match="last.ckpt is left out"):
        assert latest_complete(*arguments) == str(checkpoints / "last.previous.ckpt")
    (checkpoints / "last.previous.ckpt" / "meta.pt").unlink()
    with pytest.warns(UserWarning, match="last.previous.ckpt is left out"):
        assert latest_complete(*arguments) is None


def test_a_folder_or_a_file_is_replaced(tmp_path):
    for old in ("file", "folder", "nothing", "folder"):
        path, new = tmp_path / "last.ckpt", tmp_path / ".last.ckpt.partial"
        if path.is_dir():
            shutil.rmtree(path)
        if old == "file":
            path.write_text("old")
        elif old == "folder":
            path.mkdir()
            (path / "meta.pt").write_text("old")
        new.mkdir()
        (new / "meta.pt").write_text("new")
        _replace(path, new)
        assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"] and (path / "meta.pt").read_text() == "new"


@pytest.mark.parametrize("name", ["last.ckpt", "last.previous.ckpt"])
def test_a_folder_that_is_no_checkpoint_is_left_alone(name, tmp_path):
    path, new = tmp_path / "last.ckpt", tmp_path / ".last.ckpt.partial"
    for folder in (path, new):
        folder.mkdir()
        (folder / "meta.pt").touch()
    (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / name / "meta.pt").unlink(missing_ok=True)
    (tmp_path / name / "mine.txt").touch()
    with pytest.raises(OSError, match=f"{name}.* is"):
        _replace(path, new)
    assert (tmp_path / name / "mine.txt").exists() and path.is_dir()


def test_bands_are_refused():
    model = timm.create_model("test_luna_vit")
    set_band_checkpointing(model, 2)
    with pytest.raises(ValueError, match="gathered for the whole of it: set band_rows to 0"):
        shard(model, None, torch.device("cpu"))


@pytest.mark.slow
def test_mistakes_are_one_line(trained, tmp_path):
    config = trained / "config.yaml"
    last = trained / "runs/debug/version_0/checkpoints/last.ckpt"
    ema = ["--trainer.callbacks+=luna_vision.tasks.EMA"]
    other = ["--model.model_kwargs.embed_dim=16", f"--ckpt_path={last}"]
    for extra, message in ((ema, "error: EMA keeps a copy"), (other, "error: the checkpoint holds another model's")):
        arguments = ["fit", f"--config={config}", *SHARDED, *extra]
        folder = tmp_path / message[7:10]
        assert finish(folder, start(folder, 2, command_line, *arguments)) == [2, 2], said(folder)
        assert message in said(folder)


def test_export_is_a_function(checkpoints):
    export_weights(checkpoints / "last.ckpt", checkpoints / "out.safetensors")
    assert load_file(checkpoints / "out.safetensors")["head.weight"].shape == (10, 32)
