"""What the benchmarks that train small models share: their arguments, and how they read and show their results."""

import argparse
import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from luna_vision._compare_report import wilson
from luna_vision._compare_run import Run
from luna_vision._compare_workers import run_all
from luna_vision.benchmarks._command import at_least
from luna_vision.compare import check, unfinished

__all__ = ["add_run_arguments", "cell", "do_runs", "error_bars", "finished"]


def add_run_arguments(parser: argparse.ArgumentParser, name: str, depth: int) -> None:
    """Arguments of runs: seeds, budget, shell and folders."""
    parser.add_argument("--seeds", nargs="+", type=at_least(0), default=[0], metavar="SEED", help="(default: 0)")
    parser.add_argument("--jobs", type=at_least(1), default=1, help="runs at a time, one thread each (default: 1)")
    parser.add_argument("--width", type=at_least(32), default=96, help="a multiple of 32 (default: 96)")
    parser.add_argument("--depth", type=at_least(1), default=depth, help="blocks (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of all runs (default: cpu)")
    parser.add_argument("--root", default="data", help="folder of Fashion-MNIST, fetched if missing (default: data)")
    parser.add_argument("--out", type=Path, default=Path(f"runs/{name}/results"), help="(default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path(f"runs/{name}/work"), help="checkpoints (%(default)s)")
    parser.add_argument("--report-only", action="store_true", help="only make the report from what there is")


def do_runs(
    args: argparse.Namespace, runs: Sequence[Run], execute: Callable[..., dict[str, Any]], report: Callable[[Path], str]
) -> int:
    """Do what has not finished yet, and print the report.

    Args:
        args: With what `add_run_arguments` adds.
        runs: All runs.
        execute: Does one, as `luna_vision._compare_run.execute` does.
        report: Writes the report into a folder, and returns its text.

    Returns:
        The exit code: 1 if a run failed.
    """
    todo = [] if args.report_only else unfinished(runs, args.out)
    check(todo, args.root)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"{len(runs)} runs, of which {len(runs) - len(todo)} have finished before", flush=True)
    failed = run_all(todo, args.jobs, args.root, args.out, args.work, execute)
    print(report(args.out))
    return int(failed > 0)


def finished(out: Path) -> list[dict[str, Any]]:
    """The results in a folder, without those that are errors."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "runs").glob("*.json"))]
    return [result for result in results if "error" not in result]


def cell(found: dict[str, Any] | None) -> str:
    """A share and its 95% interval, in %, for a table."""
    if found is None:
        return "-"
    low, high = wilson(found["correct"], found["images"])
    return f"{100 * found['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def error_bars(tests: list[dict[str, Any]]) -> list[list[float]]:
    """Lengths of the 95% intervals downwards and upwards, in %, as `Axes.errorbar` takes them."""
    bounds = [wilson(one["correct"], one["images"]) for one in tests]
    down = [100 * (one["accuracy"] - low) for one, (low, _) in zip(tests, bounds, strict=True)]
    return [down, [100 * (high - one["accuracy"]) for one, (_, high) in zip(tests, bounds, strict=True)]]
