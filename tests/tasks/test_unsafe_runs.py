"""A stranger's checkpoint, or folder of a run: no file is written or deleted but the run's own, no terminal steered."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from luna_vision.cli import export
from luna_vision.cli.common import run_command
from luna_vision.cli.train import main
from luna_vision.tasks.teacher import load_teacher_model

DEBUG = str(Path(__file__).parents[2] / "configs" / "debug.yaml")
RUN = Path("runs/debug/version_0")
SHORT = ["--config", DEBUG, "--test_after_fit=false", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
pytestmark = pytest.mark.filterwarnings("ignore")


def fit(*words: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", "fit", *SHORT, *words])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
    return 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        assert fit() == 0
    return path


@pytest.fixture
def runs(trained, tmp_path, monkeypatch) -> Iterator[Path]:
    """The working directory, with a copy of a run that was stopped."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    record(finished=False)
    return tmp_path


def record(**changes) -> None:
    path = RUN / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def began_anew() -> bool:
    return Path("runs/debug/version_1/run.json").is_file()


def test_the_same_command_is_a_new_run(runs, caplog):
    assert fit() == 0 and began_anew()
    assert f"{RUN} is an unfinished run of this configuration: --resume" in caplog.text


@pytest.mark.parametrize(
    "words", [["--resume"], ["--resume=true", "--ckpt_path=runs/debug/version_0/checkpoints/best.ckpt"]]
)
def test_a_stopped_run_is_resumed(words, runs, caplog):
    """From its own newest checkpoint, wherever it had begun."""
    assert fit(*words) == 0 and not began_anew()
    assert f"resuming the unfinished run in {RUN}, from {RUN}/checkpoints/last.ckpt" in caplog.text
    assert json.loads((RUN / "run.json").read_text())["finished"] is True


@pytest.mark.parametrize("content", ["[]", "null", '{"finished": false, "config": []}', "{"])
def test_a_record_that_is_none(content, runs):
    (RUN / "run.json").write_text(content)
    assert fit("--resume") == 0 and began_anew()


@pytest.mark.parametrize("config", [{}, {"model": "\x1b[2J" * 999}, {"model": {"lr": {"a": [1]}}}])
def test_a_record_of_another_configuration(config, runs, capsys):
    record(config=config)
    assert fit("--resume") == 2 and not began_anew()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "--resume" in line and str(RUN) in line and not steers(line) and len(line) < 2000


@pytest.mark.parametrize("name", [".", "metrics.csv", "checkpoints", "checkpoints/best.safetensors", "hparams.yaml"])
def test_a_run_with_a_link_in_it_is_left_alone(name, runs):
    target, path = runs / "elsewhere", RUN / name
    shutil.move(path, target)
    before = target.read_bytes() if target.is_file() else sorted(target.rglob("*"))
    path = path if name != "." else RUN
    path.symlink_to(target)
    assert fit("--resume") == 0 and began_anew()
    assert before == (target.read_bytes() if target.is_file() else sorted(target.rglob("*")))


def test_runs_may_be_a_link_itself(runs):
    shutil.move("runs", "disk")
    os.symlink("disk", "runs")
    assert fit("--resume") == 0 and not began_anew()


# ---- checkpoints


def poisoned(**state) -> str:
    """A checkpoint whose ModelCheckpoint has another state."""
    checkpoint = torch.load(RUN / "checkpoints/best.ckpt", weights_only=True)
    (own,) = [value for name, value in checkpoint["callbacks"].items() if name.startswith("ModelCheckpoint")]
    own.update(state)
    torch.save(checkpoint, "stranger.ckpt")
    return "--ckpt_path=stranger.ckpt"


PATHS = ["local://{}/precious", "runs/debug/version_1/checkpoints/../../../../precious", "memory://precious"]


@pytest.mark.parametrize("path", PATHS)
def test_a_checkpoint_has_nothing_deleted(path, runs, capsys):
    """Lightning would delete what is not among the best any more, and folders with all that is in them."""
    Path("precious/mine").mkdir(parents=True)
    path, worst = path.format(runs), torch.tensor(-1.0)
    best = {"best_model_path": path, "best_model_score": worst, "best_k_models": {path: worst}}
    best |= {"kth_best_model_path": path, "kth_value": worst, "dirpath": "runs/debug/version_1/checkpoints"}
    assert fit(poisoned(**best), "--trainer.max_epochs=3") == 2
    assert Path("precious/mine").is_dir() and "deleted" in capsys.readouterr().err


def test_weights_are_not_written_beside_the_best_checkpoint_of_another_run(runs):
    Path("precious").mkdir()
    shutil.copy(RUN / "checkpoints/best.ckpt", "precious/best.ckpt")
    Path("precious/best.safetensors").write_text("mine")
    assert fit(poisoned(best_model_path="precious/best.ckpt")) == 0
    assert Path("precious/best.safetensors").read_text() == "mine"
    assert "head.weight" in load_file("runs/debug/version_1/checkpoints/best.safetensors")


ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"


def steers(text: str) -> bool:
    return any(letter in text for letter in ESCAPES if not letter.isprintable())


def test_names_in_a_checkpoint_steer_no_terminal(runs, capfd):
    checkpoint = torch.load(RUN / "checkpoints/best.ckpt", weights_only=True)
    checkpoint["state_dict"] = {f"aa{ESCAPES}{name}": value for name, value in checkpoint["state_dict"].items()}
    torch.save(checkpoint, "stranger.ckpt")
    assert fit("--ckpt_path=stranger.ckpt") == 2  # another model's weights
    save_file({f"aa{ESCAPES}": torch.ones(1)}, "stranger.safetensors")
    words = ["--model", "test_luna_vit", "--checkpoint", "stranger.safetensors", "--format", "hf", "--out", "it"]
    with pytest.raises(SystemExit) as end:
        run_command(lambda: export.main(words))
    said = capfd.readouterr()
    assert end.value.code == 2 and said.err.count("error: ") == 2 and "owned" in said.err
    assert not steers(said.err) and not steers(said.out)


def test_a_teacher_says_how_its_images_were_and_nothing_else(runs):
    checkpoint = torch.load(RUN / "checkpoints/best.ckpt", weights_only=True)
    checkpoint["data"]["cfg"] |= {"url": "https://evil.example", "architecture": "resnet18", "mean": (0.25,)}
    torch.save(checkpoint, "stranger.ckpt")
    arguments = checkpoint["hyper_parameters"]["model_kwargs"]
    model = load_teacher_model("test_luna_vit", "stranger.ckpt", arguments | {"in_chans": 1}, 10)
    about = model.pretrained_cfg
    assert (about["architecture"], about["mean"]) == ("test_luna_vit", (0.25,)) and "evil" not in str(about)
