"""The benchmark of training steps in bands, on a small model."""

import json
import os

import pytest

from experiments.benchmarks import bands, jobs

TINY = ["--model", "test_luna_vit,depth=1", "--side", "64", "--large-side", "96", "--rows", "2"]


@pytest.mark.slow
def test_command_measures_and_goes_on(tmp_path, capsys, monkeypatch):
    out = tmp_path / "bands.json"
    words = [*TINY[:4], "--rows", "2", "--large-side", "--ways", "bands", "--threads", "1", "--out", str(out)]
    assert bands.main(words) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["way"], row["side"], row["rows"]) == ("bands", 64, 2)
    assert row["peak_resident_bytes"] >= row["resident_bytes_before"] > 10**7
    assert row["seconds"] > 0 and row["gradient_norm"] > 0
    assert "64 px, bands: " in capsys.readouterr().out
    monkeypatch.setattr(jobs, "run_job", None)  # a second call has nothing to start
    assert bands.main(words) == 0


def test_bands_of_another_height_are_measured_too(tmp_path, monkeypatch):
    done = []
    measured = {"seconds": 1.0, "peak_resident_bytes": 1}
    monkeypatch.setattr(jobs, "run_job", lambda measure, job: done.append(job["way"]) or measured)
    words = [*TINY[:-2], "--ways", "plain", "bands", "--out", str(tmp_path / "bands.json")]
    for rows, expected in ((2, ["plain", "bands", "bands"]), (2, []), (3, ["bands", "bands"])):
        done.clear()
        assert bands.main([*words, "--rows", str(rows)]) == 0
        assert done == expected


def test_a_step_that_fails_is_a_row_and_exit_code_1(capsys, monkeypatch):
    monkeypatch.setattr(bands, "measure", os.listdir)  # which takes no job
    assert bands.main([*TINY[:4], "--large-side", "--ways", "bands"]) == 1
    assert "64 px, bands: TypeError: listdir" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--out", "x.txt"], "must end in .json"),
        (["--model", "vit_tiny_patch16_224"], "must be a Luna ViT, which has bands, got vit_tiny"),
        (["--model", "test_luna_vit,depth"], "arguments are name=value, got 'depth'"),
    ],
)
def test_wrong_arguments_are_said(words, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        bands.main([*TINY, *words])
    assert exit_.value.code == 2 and message in capsys.readouterr().err
