"""FSDP2: its checkpoints are those of any other strategy, read by one process and exported."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh

from luna_vision.cli.train import main
from luna_vision.execution import set_band_checkpointing
from luna_vision.tasks.checkpoints import read_checkpoint
from luna_vision.tasks.sharding import FSDP2Strategy, shard

from .ranks import DEBUG, command_line, finish, run, said, start, without_ema

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
def test_one_process_reads_the_checkpoint(trained, tmp_path):
    """One process tests it and resumes from it, and FSDP2 resumes from the result with two."""
    folder = trained / "runs/debug/version_0/checkpoints"
    config = f"--config={trained / 'runs/debug/version_0/config.yaml'}"
    one = ["--trainer.strategy=auto", "--trainer.devices=1", "--model.checkpoint=null"]
    fewer = "--trainer.limit_test_batches=4"  # as many images as for two processes
    run(tmp_path, 1, command_line, "test", config, *one, fewer, f"--ckpt_path={folder / 'best.ckpt'}")

    def loss(path: Path) -> float:
        return float(next(line for line in path.read_text().splitlines() if "test_loss" in line).split("│")[2])

    assert loss(tmp_path / "rank0.txt") == pytest.approx(loss(trained / "rank0.txt"), abs=1e-5)
    last = f"--ckpt_path={folder / 'last.ckpt'}"
    run(tmp_path, 1, command_line, "fit", config, *one, "--trainer.max_epochs=2", "--test_after_fit=false", last)
    whole = tmp_path / "runs/debug/version_1/checkpoints/last.ckpt"
    steps = [read_checkpoint(path)["optimizer_states"][0]["state"] for path in (folder / "last.ckpt", whole)]
    assert [{int(state["step"]) for state in states.values()} for states in steps] == [{2}, {4}]
    again = [*SHARDED[:2], "--trainer.max_epochs=3", "--model.checkpoint=null", f"--ckpt_path={whole}"]
    run(tmp_path / "again", 2, command_line, "fit", config, *again)
    state = read_checkpoint(tmp_path / "again/runs/debug/version_0/checkpoints/last.ckpt")["optimizer_states"][0]
    assert {int(values["step"]) for values in state["state"].values()} == {6}
    assert "processes (1 there, 2 here)" in said(tmp_path / "again")


def test_bands_are_refused():
    model = timm.create_model("test_luna_vit")
    set_band_checkpointing(model, 2)
    with pytest.raises(ValueError, match="set band_rows to 0"):
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


# ---- loading


@pytest.fixture
def sharded() -> Iterator[FSDP2Strategy]:
    """The strategy of a run with one process, and of a model with two weights in two groups."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3))
    shard(model, init_device_mesh("cpu", (1,)), torch.device("cpu"))
    strategy = FSDP2Strategy()
    strategy._lightning_module = strategy._model = model
    model.strict_loading = True
    strategy.optimizers = [grouped(model)]
    yield strategy
    dist.destroy_process_group()


def grouped(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Biases first, as timm has them."""
    biases, others = ([p for p in model.parameters() if (p.ndim < 2) == few] for few in (True, False))
    return torch.optim.AdamW([{"params": biases, "weight_decay": 0.0}, {"params": others, "lr": 0.5}])


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_a_file_that_would_run_code_is_refused(sharded, kind, tmp_path, monkeypatch):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "unpickled"),)

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"state_dict": Hostile()}, tmp_path / "last.ckpt", _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ValueError, match="could run any code"):
        sharded.load_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    assert not (tmp_path / "unpickled").exists()


def test_fsdp2_goes_on_from_a_file(sharded, tmp_path):
    """The state of the optimizer is put to the weights that it belongs to, whatever groups they are in."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3))
    optimizer = grouped(model)
    model(torch.randn(4, 2)).square().sum().backward()
    optimizer.step()
    torch.save({"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}, tmp_path / "last.ckpt")
    sharded.load_checkpoint(tmp_path / "last.ckpt")
    (loaded,) = sharded.optimizers
    assert [group["lr"] for group in loaded.param_groups] == [1e-3, 0.5]
    for own, given in zip(model.parameters(), sharded.model.parameters(), strict=True):
        assert torch.equal(given.full_tensor(), own)
        assert torch.equal(loaded.state[given]["exp_avg"].full_tensor(), optimizer.state[own]["exp_avg"])


def test_strategies_that_read_checkpoints_themselves_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    strategy = '--trainer.strategy={"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}'
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", f"--config={DEBUG}", strategy])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "ModelParallelStrategy" in capsys.readouterr().err
