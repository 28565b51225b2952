"""Memory of training by `train_on`: each way trains in a process of its own, and its result is kept."""

import json

import pytest

from experiments.benchmarks import train_on


@pytest.mark.slow
def test_a_way_is_measured_once(tmp_path, capsys):
    out = tmp_path / "a.json"
    words = ["--side", "96", "--model", "test_luna_vit", "--tasks", "segment", "--ways", "bands"]
    words += ["--out", str(out)]
    assert train_on.main(words) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["train_on"] == "bands" and row["loss"] > 0
    assert row["peak_resident_bytes"] >= row["resident_bytes_before"] > 2**20
    assert capsys.readouterr().out.count("GB") == 1
    assert train_on.main(words) == 0 and capsys.readouterr().out == ""
