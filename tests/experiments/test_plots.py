"""Intervals, and plots of the results that are committed."""

import json
from pathlib import Path

import pytest

from experiments.benchmarks import distillation, progressive
from experiments.benchmarks.report import table
from experiments.plots import wilson

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def test_wilson_interval():
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


@pytest.mark.parametrize("benchmark", [distillation, progressive])
def test_committed_results_are_drawn(benchmark, tmp_path):
    name = benchmark.__name__.rpartition(".")[2]
    benchmark.draw(json.loads((RESULTS / name / "results.json").read_text())["runs"], tmp_path / "results.png")
    assert (tmp_path / "results.png").stat().st_size > 10_000


@pytest.mark.parametrize("folder", ["benchmark", "benchmark/masks", "benchmark/tiny"])
def test_table_of_committed_results(folder):
    result = json.loads((RESULTS / folder / "results.json").read_text())
    committed = (RESULTS / folder / "table.md").read_text().splitlines()
    lines = table(result, ["luna_vit_small,mixer=identity"]).splitlines()
    assert len(lines) > 5 and sum(line.startswith("| ") for line in lines) == sum(x.startswith("| ") for x in committed)
