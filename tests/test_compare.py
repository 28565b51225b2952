"""The comparison command, on scikit-learn's digits and models of one block."""

import argparse
import inspect
import json
import os

import pytest
import torch
from timm.models import create_model
from torch import nn
from torchvision.datasets import FashionMNIST

from luna_vision import _compare_workers, compare
from luna_vision._compare_measure import measure, measured_path
from luna_vision._compare_report import wilson
from luna_vision._compare_run import MODEL, BudgetSampler, execute, make_data, make_task, train_loader
from luna_vision._compare_workers import result_path
from luna_vision.benchmarks.cell import saved_bytes
from luna_vision.compare import SUITES, TASKS, main, plan, unfinished
from luna_vision.mixers import LongformerMixer

TINY = ["--tasks", "digits", "--width", "32", "--depth", "1", "--samples", "320", "--test-images", "40"]


def arguments(*words: str) -> argparse.Namespace:
    return compare._parser().parse_args([*TINY, *words])


def folders(path) -> list[str]:
    return ["--out", str(path / "out"), "--work", str(path / "work")]


def finished(run, accuracy: float = 0.5, images: int = 200) -> dict:
    """A result as a run writes it."""
    tests = {s: {"side": 16 * int(s), "images": images, "correct": round(accuracy * images)} for s in "124"}
    for test in tests.values():
        test["accuracy"] = test["correct"] / images
    names = {"task": run.task, "variant": run.variant, "seed": run.seed, "config": run.config}
    return {**names, "accuracy": tests, "params": 2_500_000, "macs": 10**9, "saved_bytes": 3 * 10**6, "batch_size": 64}


def write(out, run, result: dict) -> None:
    _compare_workers.write_json(result_path(out, run), result)


# ---- runs


@pytest.mark.slow
def test_command_runs_reports_and_skips(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(SUITES, "mixers", {"luna": {"mixer": "luna"}, "broken": {"mixer": "nonsense"}})
    assert main([*TINY, *folders(tmp_path), "--jobs", "2"]) == 1
    output = capsys.readouterr().out
    assert "digits luna seed 0: step 5/5, training accuracy" in output
    assert "digits broken seed 0: failed: ValueError: mixer must be one of" in output
    result = json.loads((tmp_path / "out/runs/digits-luna-seed0.json").read_text())
    assert [test["side"] for test in result["accuracy"].values()] == [16, 32, 64]
    assert [point["samples"] for point in result["curve"]] == [64, 128, 192, 256, 320]
    assert result["machine"]["threads"] == 1
    table = (tmp_path / "out/mixers.md").read_text()
    assert table in output and "| `luna` | 1 |" in table and "`broken`, seed 0, failed: ValueError" in table

    monkeypatch.setitem(SUITES, "mixers", {"luna": {"mixer": "luna"}})
    monkeypatch.setattr(_compare_workers, "_start", None)  # a second call has nothing to start
    assert main([*TINY, *folders(tmp_path)]) == 0
    assert "1 runs, of which 1 have finished before" in capsys.readouterr().out


@pytest.mark.parametrize("mixer, args", [("luna", {}), ("performer", {"redraw_interval": 2}), ("routing", {})])
def test_stopped_run_goes_on_as_if_never_stopped(tmp_path, mixer, args):
    # dropout makes the generator's state matter; random features and centroids are state of the model
    run = plan(arguments("--only", mixer))[0]
    run.config["model"]["proj_drop_rate"] = 0.1
    run.config["model"].setdefault("mixer_args", {}).update(args)
    whole = execute(run, "", tmp_path / "whole", lambda message: None)

    def stop(message):
        if message["step"] == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        execute(run, "", tmp_path / "stopped", stop)
    steps = []
    resumed = execute(run, "", tmp_path / "stopped", lambda message: steps.append(message["step"]))
    assert steps == [3, 4, 5]
    assert resumed["curve"] == whole["curve"] and resumed["accuracy"] == whole["accuracy"]
    weights = [torch.load(tmp_path / f / "last.ckpt", weights_only=True)["state_dict"] for f in ("whole", "stopped")]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_interrupt_ends_workers_and_still_reports(tmp_path, capsys, monkeypatch):
    runs = plan(arguments("--only", "luna", "softmax"))
    write(tmp_path / "out", runs[0], finished(runs[0]))
    started = []
    start = _compare_workers._start
    monkeypatch.setattr(_compare_workers, "_start", lambda *args: started.append(start(*args)) or started[-1])

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(_compare_workers, "wait", interrupt)
    assert main([*TINY, *folders(tmp_path), "--only", "luna", "softmax"]) == 130
    assert len(started) == 1 and not started[0].process.is_alive()
    captured = capsys.readouterr()
    assert "goes on" in captured.err and "| `luna` | 1 | 50.0 [43.1, 56.9] |" in captured.out


def test_worker_that_dies_is_a_row(tmp_path, monkeypatch):
    run = plan(arguments("--only", "luna"))[0]
    start = _compare_workers._start

    def killed(*args):
        worker = start(*args)
        worker.process.kill()
        return worker

    monkeypatch.setattr(_compare_workers, "_start", killed)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    before = dict(os.environ)
    assert _compare_workers.run_all([run], 1, "", tmp_path, tmp_path) == 1
    assert dict(os.environ) == before  # what workers have of their own stays with them
    assert json.loads(result_path(tmp_path, run).read_text())["error"] == "the worker ended with exit code -9"
    assert unfinished([run], tmp_path) == [run]  # to be tried again


# ---- fairness


def test_variants_see_the_same_images_in_the_same_order():
    def batches(variant: str, seed: str) -> list:
        run = next(r for r in plan(arguments("--only", variant, "--seeds", seed)))
        make_task(run.config)  # draws from the global generator, each variant another amount
        loader = train_loader(run.config, make_data(run.config, ""))
        loader.sampler.set_epoch(1)
        return list(loader)

    luna, softmax, other = batches("luna", "3"), batches("softmax", "3"), batches("luna", "4")
    assert len(luna) == 1 and len(luna[0][0]) == 64
    torch.testing.assert_close(luna, softmax, rtol=0, atol=0)
    assert not torch.equal(luna[0][0], other[0][0])


def test_budget_is_cut_out_of_shuffled_passes():
    sampler = BudgetSampler(range(10), seed=0, length=4)
    stream = []
    for piece in range(5):
        sampler.set_epoch(piece)
        stream += sampler
    assert [epoch for epoch, _ in stream] == [0] * 10 + [1] * 10
    first, second = [[index for _, index in stream[i : i + 10]] for i in (0, 10)]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


def test_order_of_runs_makes_partial_results_useful():
    runs = plan(arguments("--only", "softmax", "identity", "luna", "--seeds", "0", "1", "--tasks", "digits", "canvas"))
    names = [(run.seed, run.task, run.variant) for run in runs]
    assert names[:4] == [
        (0, "digits", "softmax"),
        (0, "digits", "identity"),
        (0, "digits", "luna"),
        (0, "canvas", "softmax"),
    ]
    assert names[6:] == [(1, task, variant) for task in ("digits", "canvas") for variant in ("softmax", "luna")]
    assert len(plan(arguments("--only", "identity", "--seeds", "0", "1", "--repeat", "all"))) == 2


@pytest.mark.parametrize("suite", SUITES)
def test_every_variant_is_a_model(suite):
    for run in plan(arguments("--suite", suite, "--width", "64")):  # strided attention needs two heads
        create_model(MODEL, num_classes=10, device="meta", **run.config["model"])


def test_a_result_says_what_its_mixer_was_built_with():
    own = {run.variant: run.config["model"].get("mixer_args") for run in plan(arguments())}
    assert own["longformer"]["window_size"] == inspect.signature(LongformerMixer).parameters["window_size"].default
    assert own["softmax"] == {"query_gain": 1.0} and own["softmax-query-gain-8"] == {"query_gain": 8.0}
    assert own["luna"] is None and own["identity"] is None
    configs = [run.config for run in plan(arguments())]
    assert configs == json.loads(json.dumps(configs))  # as they come back


def test_missing_data_is_fetched(monkeypatch):
    fetched = []
    monkeypatch.setattr(FashionMNIST, "download", lambda self: fetched.append(self.root))
    monkeypatch.setattr(FashionMNIST, "_check_exists", lambda self: False)
    words = ["--tasks", "fashion32", "canvas", "--only", "luna", "--samples", "640"]
    with pytest.raises((RuntimeError, ValueError, OSError)):  # nothing has come
        compare.check(plan(arguments(*words)), "nowhere")
    assert fetched == ["nowhere"] * len(fetched) and fetched


def test_device_is_part_of_the_configuration():
    on_cpu, on_gpu = (plan(arguments("--only", "luna", *words))[0].config for words in ([], ["--device", "cuda"]))
    assert on_gpu == on_cpu | {"accelerator": "cuda"}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_data_at_all_sides(task):
    run = plan(arguments("--tasks", task, "--only", "luna"))[0]
    sides = [make_data(run.config, "nowhere", int(scale)).img_size[0] for scale in TASKS[task]["test_images"]]
    assert sides == [sides[0], 2 * sides[0], 4 * sides[0]]


# ---- measurements and the report


def test_measure(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(
        SUITES, "mixers", {"luna": {}, "softmax": {"mixer": "softmax"}, "broken": {"mixer": "nonsense"}}
    )
    words = [*TINY, *folders(tmp_path), "--measure", "--rounds", "2"]
    threads = torch.get_num_threads()
    try:
        assert main(words) == 1
    finally:
        torch.set_num_threads(threads)
    result = json.loads((tmp_path / "out/measured/digits-luna.json").read_text())
    assert len(result["step_seconds_all"]) == 2 and result["images_per_s"] == 64 / result["step_seconds"]
    assert "| `softmax` | 0 | 0." in (tmp_path / "out/mixers.md").read_text()
    assert "digits broken: failed: ValueError" in capsys.readouterr().out


def test_saved_bytes_counts_a_storage_once_and_no_parameters():
    x = torch.randn(4, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    assert saved_bytes(lambda: model(x), model) == 2 * 4 * 8 * 4  # the input, and the result of the ReLU
    assert measure([], None, 1) == 0


def test_report_of_partial_results(tmp_path, capsys):
    runs = plan(arguments("--only", "luna", "softmax", "identity", "--seeds", "0", "1"))
    luna, softmax, identity, again, _ = runs
    out = tmp_path / "out"
    write(out, luna, finished(luna, 0.5))
    write(out, again, finished(again, 0.6))
    write(out, softmax, finished(softmax, 0.9))
    write(out, identity, {**finished(identity), "error": "ValueError: no"})
    assert main([*TINY, *folders(tmp_path), "--report-only"]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = "| variant | seeds | 16 px | 32 px | 64 px | parameters (M) | GMACs | step (ms) | images/s | saved (MB) |"
    assert heads in lines
    assert f"| `luna` | 2 |{' 55.0 ± 7.1 |' * 3} 2.50 | 1.000 | - | - | 3.0 |" in lines
    assert f"| `softmax` | 1 |{' 90.0 [85.1, 93.4] |' * 3} 2.50 | 1.000 | - | - | 3.0 |" in lines
    assert "| `identity` | 0 | failed | failed | failed | - | - | - | - | - |" in lines
    assert "`identity`, seed 0, failed: ValueError: no" in lines
    rows = json.loads((out / "mixers.json").read_text())["tasks"]["digits"]
    assert [row["variant"] for row in rows] == ["luna", "softmax", "identity"]
    assert rows[0]["accuracy"]["1"]["values"] == [0.5, 0.6] and rows[0]["seeds"] == [0, 1]


def test_plots(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run = plan(arguments("--only", "luna"))[0]
    write(tmp_path / "out", run, finished(run))
    assert main([*folders(tmp_path), "--report-only"]) == 0
    # with nothing measured there is no throughput to show
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["mixers-resolution.png"]
    capsys.readouterr()
    _compare_workers.write_json(
        tmp_path / "out/measured/digits-luna.json", {**finished(run), "step_seconds": 0.5, "images_per_s": 128.0}
    )
    assert main([*folders(tmp_path), "--report-only"]) == 0
    assert "| 500 | 128.0 |" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        "mixers-throughput.png",
        "mixers-resolution.png",
    }


def test_report_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    run = plan(arguments("--only", "luna"))[0]
    write(tmp_path / "out", run, finished(run))
    assert main([*folders(tmp_path), "--report-only"]) == 0
    assert "no plots: they need matplotlib" in capsys.readouterr().out


def test_wilson_interval():
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


# ---- mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "mnist"], "--tasks: unknown 'mnist'; choose from fashion32, canvas, digits"),
        (["--only", "lunar"], "--only: unknown 'lunar'; choose from luna, "),
        (["--repeat", "lunar"], "--repeat: unknown 'lunar'"),
        (["--width", "50"], "--width must be a multiple of 32, got 50"),
        (["--samples", "10"], "--samples must be at least one batch, 64 for digits"),
        (["--jobs", "0"], "argument --jobs: must be a whole number of at least 1, got '0'"),
        (["--suite", "all"], "argument --suite: invalid choice: 'all'"),
        (["--seeds", "-1"], "--seeds must not be negative, got -1"),
        (["--lr", "0"], "--lr must be above 0, got 0.0"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as exit_:
        main([*TINY, *folders(tmp_path), *words])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_results_of_another_configuration_are_not_mixed_in(tmp_path, capsys):
    run = plan(arguments("--only", "luna"))[0]
    write(tmp_path / "out", run, finished(run))
    with pytest.raises(SystemExit) as exit_:
        main([*TINY, *folders(tmp_path), "--only", "luna", "--depth", "2"])
    assert exit_.value.code == 2
    assert "was made with another model: give another --out" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["runs", "measured"])
def test_seeds_of_another_budget_are_not_averaged_in(tmp_path, capsys, where):
    run = plan(arguments("--only", "luna"))[0]
    path = result_path(tmp_path / "out", run) if where == "runs" else measured_path(tmp_path / "out", run)
    _compare_workers.write_json(path, finished(run))
    with pytest.raises(SystemExit) as exit_:
        main([*TINY, *folders(tmp_path), "--only", "luna", "--seeds", "1", "--samples", "640"])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert f"{path} was made with another " in error and "steps" in error
    again = plan(arguments("--only", "luna", "--seeds", "1"))
    assert unfinished(again, tmp_path / "out") == again
