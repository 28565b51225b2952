"""The comparison command, on scikit-learn's digits and models of one block."""

import argparse
import inspect
import json
import logging
import multiprocessing
import os
import signal
import time

import pytest
import torch

from experiments import compare, runs
from experiments.compare import SUITES, TASKS, execute, main, plan
from experiments.measure import fresh_model
from experiments.runs import Ledger, make_data, measured_path, result_path, unfinished
from luna_vision.mixers import LongformerMixer
from luna_vision.utils.files import write_json

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
    write_json(result_path(out, run), result)


# ---- runs


@pytest.mark.slow
def test_command_runs_reports_and_skips(tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(SUITES, "mixers", {"luna": {"mixer": "luna"}, "broken": {"mixer": "nonsense"}})
    assert main([*TINY, *folders(tmp_path), "--jobs", "2"]) == 1
    output = capfd.readouterr().out
    assert "digits-luna-seed0" in output and ": step 5/5, training accuracy" in output
    assert "digits-broken-seed0: failed: ValueError: mixer must be one of" in output
    result = json.loads((tmp_path / "out/runs/digits-luna-seed0.json").read_text())
    assert [test["side"] for test in result["accuracy"].values()] == [16, 32, 64]
    assert [point["samples"] for point in result["curve"]] == [64, 128, 192, 256, 320]
    assert result["machine"]["threads"] == 1
    table = (tmp_path / "out/mixers.md").read_text()
    assert table in output and "| `luna` | 1 |" in table and "`broken`, seed 0, failed: ValueError" in table

    monkeypatch.setitem(SUITES, "mixers", {"luna": {"mixer": "luna"}})
    monkeypatch.setattr(runs, "_work", None)  # a second call has nothing to start
    assert main([*TINY, *folders(tmp_path)]) == 0
    assert "1 runs, of which 1 have finished before" in capfd.readouterr().out


def last(folder) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.filterwarnings("ignore")
def test_stopped_run_goes_on_as_if_never_stopped(tmp_path, monkeypatch):
    # dropout makes the generator's state matter, and random features are state of the model; two passes over 17
    # batches, with a checkpoint after each
    run = plan(arguments("--only", "performer", "--samples", str(34 * 64)))[0]
    run.config["model"]["proj_drop_rate"] = 0.1
    run.config["steps"], run.config["test_images"] = 34, {"1": 40}
    whole = execute(run, "", tmp_path / "whole")

    class Stopped(BaseException):
        pass

    steps = []

    def count(self, trainer, *args):
        steps.append(trainer.global_step)
        on_train_batch_end(self, trainer, *args)
        if len(steps) == 20:
            raise Stopped

    on_train_batch_end = Ledger.on_train_batch_end
    monkeypatch.setattr(Ledger, "on_train_batch_end", count)
    with pytest.raises(Stopped):
        execute(run, "", tmp_path / "stopped")
    resumed = execute(run, "", tmp_path / "stopped")
    assert steps[20:] == list(range(18, 35))
    assert resumed["curve"] == whole["curve"] and resumed["accuracy"] == whole["accuracy"]
    weights = [last(tmp_path / folder)["state_dict"] for folder in ("whole", "stopped")]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    again = execute(run, "", tmp_path / "stopped")  # has nothing to train, and still tests the trained weights
    assert len(steps) == 37 and again["accuracy"] == whole["accuracy"]
    assert again["train_seconds"] == resumed["train_seconds"]


def sleep(*args) -> None:
    """A run without end."""
    time.sleep(60)


def die(*args) -> None:
    """A run that is killed."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_interrupt_ends_workers_and_still_reports(tmp_path, capsys, monkeypatch):
    luna, _ = plan(arguments("--only", "luna", "softmax"))
    write(tmp_path / "out", luna, finished(luna))

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "wait", interrupt)
    monkeypatch.setattr(compare, "execute", sleep)
    before = set(multiprocessing.active_children())  # loaders of other tests
    assert main([*TINY, *folders(tmp_path), "--only", "luna", "softmax"]) == 130
    assert set(multiprocessing.active_children()) <= before
    captured = capsys.readouterr()
    assert "goes on" in captured.err and "| `luna` | 1 | 50.0 [43.1, 56.9] |" in captured.out


def test_worker_that_dies_is_a_row(tmp_path):
    run = plan(arguments("--only", "luna"))[0]
    assert runs.run_all([run], 1, "", tmp_path, tmp_path, die) == 1
    assert json.loads(result_path(tmp_path, run).read_text())["error"] == "the worker ended with exit code -9"
    assert unfinished([run], tmp_path) == [run]  # to be tried again


# ---- fairness


@pytest.mark.filterwarnings("ignore")
def test_variants_see_the_same_images_in_the_same_order(tmp_path, monkeypatch):
    seen, level = [], logging.getLogger("lightning.pytorch").level

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        seen[-1].append(batch)

    monkeypatch.setattr(Ledger, "on_train_batch_start", on_train_batch_start)
    for variant, seed in (("luna", "3"), ("softmax", "3"), ("luna", "4")):
        seen.append([])
        run = plan(arguments("--only", variant, "--seeds", seed, "--samples", "128"))[0]
        runs.train(run, "", tmp_path / run.name)
    luna, softmax, other = seen
    assert len(luna) == 2 and len(luna[0][0]) == 64
    torch.testing.assert_close(luna, softmax, rtol=0, atol=0)
    assert not torch.equal(luna[0][0], other[0][0])
    assert logging.getLogger("lightning.pytorch").level == level  # else later messages of the process would be lost


def test_order_of_runs_makes_partial_results_useful():
    words = ["--only", "softmax", "identity", "luna", "--seeds", "0", "1", "--tasks", "digits", "canvas"]
    planned = plan(arguments(*words))
    names = [(run.seed, run.task, run.variant) for run in planned]
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
        fresh_model(run.config, device="meta")


def test_a_result_says_what_its_mixer_was_built_with():
    own = {run.variant: run.config["model"].get("mixer_args") for run in plan(arguments())}
    assert own["longformer"]["window_size"] == inspect.signature(LongformerMixer).parameters["window_size"].default
    assert own["softmax"] == {"query_gain": 1.0} and own["softmax-query-gain-8"] == {"query_gain": 8.0}
    assert own["luna"] is None and own["identity"] is None
    configs = [run.config for run in plan(arguments())]
    assert configs == json.loads(json.dumps(configs))  # as they come back


def test_missing_data_is_fetched(tmp_path, capsys, monkeypatch):
    def download(self):
        raise RuntimeError(f"fetching into {self.root}")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST.download", download)
    for task in ("fashion32", "canvas"):
        words = ["--tasks", task, "--split", "test", "--only", "luna", "--root", str(tmp_path / "nowhere")]
        with pytest.raises(SystemExit):
            main([*words, *folders(tmp_path)])
        assert f"fetching into {tmp_path / 'nowhere'}" in capsys.readouterr().err


def test_device_is_part_of_the_configuration():
    on_cpu, on_gpu = (plan(arguments("--only", "luna", *words))[0].config for words in ([], ["--device", "cuda"]))
    assert on_gpu == on_cpu | {"accelerator": "cuda"}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_data_at_all_sides(task):
    run = plan(arguments("--tasks", task, "--only", "luna", "--split", "test"))[0]
    sides = [make_data(run.config, "nowhere", int(scale)).img_size[0] for scale in (1, 2, 4)]
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


def test_report_of_partial_results(tmp_path, capsys):
    luna, softmax, identity, again, _ = plan(arguments("--only", "luna", "softmax", "identity", "--seeds", "0", "1"))
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
    run = plan(arguments("--only", "luna"))[0]
    write(tmp_path / "out", run, finished(run))
    assert main([*folders(tmp_path), "--report-only"]) == 0
    # with nothing measured there is no throughput to show
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["mixers-resolution.png"]
    capsys.readouterr()
    write_json(
        tmp_path / "out/measured/digits-luna.json", {**finished(run), "step_seconds": 0.5, "images_per_s": 128.0}
    )
    assert main([*folders(tmp_path), "--report-only"]) == 0
    assert "| 500 | 128.0 |" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        "mixers-throughput.png",
        "mixers-resolution.png",
    }


# ---- mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--tasks", "mnist"],
            "--tasks: unknown 'mnist'; choose from cifar10, tiny_imagenet, fashion32, canvas, digits",
        ),
        (["--only", "lunar"], "--only: unknown 'lunar'; choose from luna, "),
        (["--repeat", "lunar"], "--repeat: unknown 'lunar'"),
        (["--width", "50"], "--width must be a multiple of 32, got 50"),
        (["--samples", "10"], "--samples must be at least one batch, 64 for digits"),
        (["--jobs", "0"], "argument --jobs: must be a whole number of at least 1, got '0'"),
        (["--suite", "all"], "argument --suite: invalid choice: 'all'"),
        (["--seeds", "-1"], "argument --seeds: must be a whole number of at least 0, got '-1'"),
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
    write_json(path, finished(run))
    with pytest.raises(SystemExit) as exit_:
        main([*TINY, *folders(tmp_path), "--only", "luna", "--seeds", "1", "--samples", "640"])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert f"{path} was made with another " in error and "steps" in error
    again = plan(arguments("--only", "luna", "--seeds", "1"))
    assert unfinished(again, tmp_path / "out") == again
