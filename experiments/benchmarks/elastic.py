"""What a memory that may be shortened gives at each length: `python -m experiments.benchmarks.elastic --help`.

Two models are trained alike but for one callback: `plain` with the whole memory in every step, `nested` with a number
of slots that is drawn for each batch (`luna_vision.tasks.NestedMemory`). Each is then tested with every length that was
asked for, without any training in between. Shell, data, schedule and budget are those of `experiments.compare`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from experiments.command import Parser, at_least
from experiments.compare import SUITES, TASKS, run_config
from experiments.plots import cell, error_bars, figure_file
from experiments.runs import Run, add_run_arguments, do_runs, evaluate, finished, make_data, train, write_table

__all__ = ["execute", "main", "plan"]

VARIANTS = ("plain", "nested")


def plan(args: argparse.Namespace) -> list[Run]:
    """The runs that the arguments ask for.

    Raises:
        ValueError: A number out of its range, or lengths that do not fit the memory.
    """
    for option, lens in (("--lens", args.lens), ("--test-lens", args.test_lens)):
        if max(lens) > args.memory_len:
            raise ValueError(f"{option} must be at most --memory-len, {args.memory_len}, got {max(lens)}")
    if max(args.lens) != args.memory_len:
        raise ValueError(f"--lens must have the whole memory, {args.memory_len}, among them, got {args.lens}")
    runs = []
    for seed in dict.fromkeys(args.seeds):
        config = run_config(args, args.task, SUITES["ablation"]["luna"] | {"memory_len": args.memory_len}, seed)
        config["test_images"] = {"1": config["test_images"]["1"]}
        config["test_lens"] = sorted(set(args.test_lens))
        for variant in args.only:
            lens = args.lens if variant == "nested" else None
            runs.append(Run(args.task, variant, seed, {**config, "memory_lens": lens}))
    return runs


def execute(run: Run, root: str, work: Path) -> dict[str, Any]:
    """Train, or go on from the checkpoint in `work`, and test with each length."""
    config, overlays = run.config, []
    if config["memory_lens"] is not None:
        arguments = {"lens": config["memory_lens"], "seed": run.seed}
        nested = {"class_path": "luna_vision.tasks.NestedMemory", "init_args": arguments}
        overlays.append({"trainer": {"callbacks+": [nested]}})
    cli, training = train(run, root, work, overlays)
    data, accuracy = make_data(config, root), {}
    for slots in config["test_lens"]:
        cli.model.model.set_memory_len(slots)
        found = evaluate(cli, data, config["test_images"]["1"])
        accuracy[str(slots)] = {"where": f"with {slots} slots", **found}
    return {"accuracy": accuracy, **training}


def write_report(out: Path) -> str:
    """Write `elastic.md`, `elastic.json` and `elastic.png` from the results that there are; returns the table."""
    done = finished(out)
    if not done:
        return f"no results in {out / 'runs'} yet"
    lens = sorted({int(slots) for result in done for slots in result["accuracy"]})
    rows = [[one["variant"], str(one["seed"]), *(cell(one["accuracy"].get(str(n))) for n in lens)] for one in done]
    about = "Test accuracy in %, and the 95% interval of the binomial (Wilson), of one model each, by the slots in use."
    text = write_table(out, "elastic", ["training", "seed", *(f"{n} slots" for n in lens)], rows, about, done)
    with figure_file(out / "elastic.png") as axes:
        for result in done:
            tests, i = list(result["accuracy"].values()), VARIANTS.index(result["variant"])
            slots, means = [int(n) for n in result["accuracy"]], [100 * one["accuracy"] for one in tests]
            style = {"color": f"C{i}", "marker": "os"[i], "capsize": 3}
            axes.errorbar(slots, means, error_bars(tests), label=f"{result['variant']}, seed {result['seed']}", **style)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lens, [str(slots) for slots in lens])
        axes.set_xlabel("memory slots in use")
        axes.set_ylabel("test accuracy (%)")
    return text


def _parser() -> Parser:
    parser = Parser(
        prog="python -m experiments.benchmarks.elastic",
        description="Train a model with its whole memory and one with prefixes of it, and test both with fewer and "
        "fewer slots. Finished runs are skipped, stopped ones go on.",
    )
    parser.add_argument("--task", choices=list(TASKS), default="canvas", help="of experiments.compare")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="what to train")
    parser.add_argument("--memory-len", type=at_least(1), default=16, help="slots")
    parser.add_argument("--lens", nargs="+", type=at_least(1), default=[1, 2, 4, 8, 16], help="of nested training")
    parser.add_argument("--test-lens", nargs="+", type=at_least(1), default=[1, 2, 3, 4, 6, 8, 12, 16], help="of tests")
    parser.add_argument("--test-images", type=at_least(1), metavar="N", help="at most")
    add_run_arguments(parser, "elastic", depth=6)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; returns the exit code: 1 if a run failed."""
    parser = _parser()
    return do_runs(parser, parser.parse_args(argv), plan, execute, write_report)


if __name__ == "__main__":
    sys.exit(main())
