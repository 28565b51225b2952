"""The runs without labels are commands of the package, and their results two tables."""

import json
import shlex
import sys

import pytest

from experiments import unlabelled


def words_of(run: str, monkeypatch, capsys, *words: str) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["unlabelled", run, "--data", "d", "--out", "o", "--dry-run", *words])
    unlabelled.main()
    return shlex.split(capsys.readouterr().out)


@pytest.mark.parametrize("run, command", [("supervised", "fit"), ("distill_tiny", "distill"), ("lejepa", "pretrain")])
def test_a_run_is_a_command_that_takes_further_options(run, command, monkeypatch, capsys):
    words = words_of(run, monkeypatch, capsys, "--seed", "3", "--epochs", "2", "--trainer.max_steps=1")
    assert words[:2] == ["luna-vision", command] and words[-1] == "--trainer.max_steps=1"
    assert {"--trainer.max_epochs=2", "--seed_everything=3", "--data.seed=3"} <= set(words)


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
