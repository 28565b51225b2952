"""The benchmark of a memory that is handed on, on models of one block."""

import json

import pytest
import torch

from experiments import runs
from experiments.benchmarks.carry import TESTS, _parser, evaluate_memories, main, plan
from luna_vision.tasks import SequenceTask

TINY = ["--width", "32", "--depth", "1", "--samples", "40", "--batch-size", "4", "--test-sequences", "8"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_command_runs_reports_and_skips(preloaded, tmp_path, capfd, monkeypatch):
    words = [*TINY, "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    assert main([*words, "--only", "carry", "mean", "--jobs", "2"]) == 0
    output = capfd.readouterr().out
    assert "2 of 2 runs ended, 0 of them failed" in output
    report = json.loads((tmp_path / "out/carry.json").read_text())
    assert [run["variant"] for run in report["runs"]] == ["carry", "mean"]
    assert all(list(run["accuracy"]) == list(TESTS) for run in report["runs"])
    assert (tmp_path / "out/carry.md").read_text() in output and (tmp_path / "out/carry.png").stat().st_size
    monkeypatch.setattr(runs, "_work", None)  # a second call has nothing to start
    assert main([*words, "--only", "carry", "mean"]) == 0
    with pytest.raises(SystemExit):
        main([*words, "--only", "carry", "--lr", "0.5"])
    assert "was made with another optimization" in capfd.readouterr().err


def test_variants_differ_in_what_they_remember_alone():
    planned = plan(_parser().parse_args(TINY))
    assert [run.config["memory"] for run in planned[:3]] == [
        {"carry": True},
        {"carry": True, "bptt_steps": 1},
        {"carry": False},
    ]
    assert len({json.dumps(run.config | {"memory": None}) for run in planned[:3]}) == 1
    changed = {"model": planned[0].config["model"] | {"memory_mlp": "none"}}
    assert planned[3].variant == "no-memory-mlp" and planned[3].config == planned[0].config | changed


def test_what_is_tested_is_what_it_says():
    torch.manual_seed(0)
    task = SequenceTask(model_name="test_luna_vit", num_classes=3, model_kwargs={"embed_dim": 16, "depth": 1}).eval()
    crops = torch.randn(64, 3, 3, 16, 16)
    with torch.no_grad():
        labels = task(crops)[:, -1].argmax(1)  # so that the test with the memory handed on is right always
        fresh = torch.stack([task.model(crop) for crop in crops.unbind(1)], dim=1)
    found = evaluate_memories(task, [(crops, labels, labels), (crops[:1], labels[:1], labels[:1])])
    assert found["carried"]["correct"] == found["carried"]["images"] == 65
    for name, logits in (("reset", fresh[:, -1]), ("mean", fresh.mean(1))):
        right = logits.argmax(1) == labels
        assert found[name]["correct"] == int(right.sum() + right[0])


def test_wrong_arguments_are_said():
    for words, message in ((["--width", "40"], "multiple of 32"), (["--samples", "3"], "at least one batch, 4 for")):
        with pytest.raises(ValueError, match=message):
            plan(_parser().parse_args([*TINY, *words]))
