"""The benchmark of memories of several lengths, on scikit-learn's digits and models of one block."""

import json

import pytest

from experiments import runs
from experiments.benchmarks.elastic import _parser, execute, main, plan

TINY = ["--task", "digits", "--width", "32", "--depth", "1", "--samples", "320", "--test-images", "40"]
LENS = ["--memory-len", "4", "--lens", "1", "4", "--test-lens", "1", "3", "4"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_command_runs_reports_and_skips(preloaded, tmp_path, capfd, monkeypatch):
    words = [*TINY, *LENS, "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    assert main([*words, "--jobs", "2"]) == 0
    output = capfd.readouterr().out
    assert "2 of 2 runs ended, 0 of them failed" in output and "3 slots" in output
    report = json.loads((tmp_path / "out/elastic.json").read_text())
    assert {row["variant"]: list(row["accuracy"]) for row in report["runs"]} == {
        "plain": ["1", "3", "4"],
        "nested": ["1", "3", "4"],
    }
    assert (tmp_path / "out/elastic.md").read_text() in output and (tmp_path / "out/elastic.png").stat().st_size
    monkeypatch.setattr(runs, "_work", None)  # a second call has nothing to start
    assert main(words) == 0
    with pytest.raises(SystemExit):
        main([*words, "--lens", "2", "4"])
    assert "was made with another memory_lens" in capfd.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_the_two_differ_in_their_training_alone(tmp_path):
    plain, nested = plan(_parser().parse_args([*TINY, *LENS]))
    assert plain.config | {"memory_lens": [1, 4]} == nested.config
    curves = [execute(run, "", tmp_path / run.variant)["curve"] for run in (plain, nested)]
    assert len(curves[0]) == len(curves[1]) and curves[0] != curves[1]


def test_lengths_that_do_not_fit_are_said():
    for words, message in (
        (["--lens", "1", "8"], "--lens must be at most --memory-len, 4, got 8"),
        (["--lens", "1", "2"], "--lens must have the whole memory, 4, among them"),
        (["--test-lens", "5"], "--test-lens must be at most --memory-len, 4, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(_parser().parse_args([*TINY, *LENS, *words]))
