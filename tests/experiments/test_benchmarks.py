"""The benchmark command: what it writes, and that one cell's death, Ctrl-C or a mistake spoils nothing. No times."""

import json
import os
import signal

import pytest
import torch

from experiments.benchmarks import __main__ as benchmark
from experiments.benchmarks import forms
from experiments.benchmarks.cell import Spec, build
from experiments.benchmarks.report import exponent, plot, short_name, table
from luna_vision.utils.cost import count_macs

SMALL = ["--repeats", "2", "--seconds", "0.1", "--threads", "1"]
MODELS = ["--models", "test_luna_vit", "test_luna_vit,mixer=identity"]


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_measures_every_cell_and_says_on_what(tmp_path, capsys):
    sizes = ["--sizes", "64", "64x80"]
    modes = ["--modes", "inference", "training"]
    assert benchmark.main([*MODELS, *sizes, *modes, *SMALL, "--out", str(tmp_path)]) == 0
    result = results(tmp_path)
    assert len(result["rows"]) == 2 * 2 * 2
    for row in result["rows"]:
        assert row["seconds"] > 0 and row["peak_bytes"] > 0 and row["macs"] > 0 and row["repeats"] >= 1
        assert ("saved_bytes" in row) == (row["mode"] == "training")
    assert {"cpu", "cores", "torch", "timm", "luna_vision"} <= set(result["machine"])
    assert result["gemm_macs_per_second"]["float32/cpu"] > 1e6
    said = capsys.readouterr().out
    assert "test_luna_vit (no mixing) / it" in said and "64 x 80" in said

    # the same command again measures nothing, another size is added
    before = [r["date"] for r in result["rows"]]
    benchmark.main([*MODELS, "--sizes", "64", "32", *SMALL, "--out", str(tmp_path)])
    rows = results(tmp_path)["rows"]
    assert [r["date"] for r in rows[:8]] == before and len(rows) == 10


def test_a_model_that_is_too_large_is_a_row_and_the_others_go_on(tmp_path, capsys):
    models = ["--models", "test_luna_vit,memory_len=1000000000000", "test_luna_vit"]
    benchmark.main([*models, "--sizes", "64", *SMALL, "--out", str(tmp_path)])
    large, small = results(tmp_path)["rows"]
    assert large["error"] == "out of memory" and "seconds" not in large
    assert small["seconds"] > 0
    assert "| out of memory |" in capsys.readouterr().out


def kill_itself(connection, spec):
    """A cell that Linux kills for memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_cell_is_a_row(monkeypatch):
    monkeypatch.setattr(benchmark, "run_cell", kill_itself)
    import multiprocessing

    rows = list(benchmark.measure(multiprocessing.get_context("fork"), [{"model": "test_luna_vit"}], 2, 1.0))
    assert rows[0]["error"] == "out of memory (killed)"


def test_ctrl_c_keeps_what_was_measured(tmp_path, capsys, monkeypatch):
    """It comes while the second size is measured."""
    calls, measure = [], benchmark.measure

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(benchmark, "measure", interrupted)
    words = ["--models", "test_luna_vit", "--sizes", "32", "64", *SMALL, "--out", str(tmp_path)]
    assert benchmark.main(words) == 130
    assert "| 32 x 32 | test_luna_vit" in capsys.readouterr().out
    (row,) = results(tmp_path)["rows"]
    assert row["seconds"] > 0


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--models", "luna_vit_smal"], "unknown model 'luna_vit_smal'"),
        (["--models", "test_vit,masked=True"], "only luna models take a mask"),
        (["--models", "test_luna_vit,memory_len"], "arguments are name=value, got 'memory_len'"),
        (["--sizes", "12by3"], "a size is PIXELS or HEIGHTxWIDTH, got '12by3'"),
        (["--baselines", "test_vit"], "baseline 'test_vit' is not among --models"),
        (["--repeats", "0"], "--repeats: must be a whole number of at least 1, got '0'"),
        (["--report-only"], "--report-only needs --out"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(argv, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(argv)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def row(model, side, seconds, **kwargs):
    shape = dict(height=side, width=side, dtype="float32", device="cpu", execution="eager", mode="inference")
    return dict(
        model=model,
        **shape,
        batch_size=1,
        allocator="keep",
        seconds=seconds,
        quartiles=[seconds] * 2,
        macs=1e9,
        peak_bytes=1e8,
    )


def test_ratios_and_exponent_are_those_of_the_numbers(tmp_path):
    rows = [row("a", s, 1e-6 * s**2) for s in (512, 1024)] + [row("b", s, 1e-9 * s**3) for s in (512, 1024)]
    result = {"rows": rows, "gemm_macs_per_second": {"float32/cpu": 1e10}, "machine": {"cpu": "x"}}
    line = next(x for x in table(result, ["b"]).splitlines() if x.startswith("| 1024 x 1024 | a "))
    assert line.split(" | ")[5] == f"{1e-9 * 1024**3 / (1e-6 * 1024**2):.2f}"
    assert exponent([512**2, 1024**2], [0.512**3, 1.024**3]) == pytest.approx(1.5)
    assert plot(result, tmp_path)[0].stat().st_size > 10_000


def test_names_are_said_as_people_say_them():
    assert short_name("luna_vit_small,memory_len=32") == "luna_vit_small (32 slots)"
    assert short_name("luna_vit_small,mixer=identity") == "luna_vit_small (no mixing)"


def test_form_constants_are_those_that_cost_least(tmp_path, capsys):
    shape = dict(dim=64, heads=2, projections=2, patches=4096, projected=1.0)
    rows = [dict(shape, memory_len=m, absorbed=t) for m, t in ((16, 0.5), (32, 0.9), (64, 2.0))]
    cost, mean, worst = forms.fit(rows)
    assert mean == worst == 1.0
    assert forms.regret(rows[2], cost._replace(absorbed=0.0)) == 2.0

    argv = ["--dims", "64", "--memory-lens", "8", "--patches", "20", "--seconds", "0"]
    forms.main([*argv, "--out", str(tmp_path / "forms.json")])
    assert len(json.loads((tmp_path / "forms.json").read_text())["rows"]) == 6
    assert "unpack: FormCost(absorbed=" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in benchmark.MODELS if "luna" not in name])
def test_peers_take_the_sizes_of_the_benchmark(name):
    with torch.device("meta"):
        model = build(Spec.parse(name), 512, 512)
    assert count_macs(model, 512, 512) > 1e9
