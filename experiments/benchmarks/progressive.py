"""Training at several sides or at one, with the same number of patches: `python -m experiments.benchmarks.progressive`.

Both are runs of `train.py` with `configs/canvas_progressive.yaml`: as it is, and with the largest of its sides alone.
Each batch has as many patches as any other (up to rounding), and both runs have as many batches, so that what they see
differs in sides, and in that smaller images are more of them. Both are then tested on canvases of 1, 2 and 4 times the
largest side, which nothing was trained at, of as many items, of the same size.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from experiments.command import Parser
from experiments.plots import error_bars, figure_file
from experiments.runs import Config, Run, do_runs, evaluate

from .train_runs import config_parser, fit_and_test, recipe_config, recipe_data, write_results

__all__ = ["draw", "execute", "main", "plan"]

# name: what is laid over the config
VARIANTS: dict[str, Config] = {"fixed": {"data": {"init_args": {"train_sizes": None}}}, "progressive": {}}
TEST_CANVASES = {1: 2000, 2: 1000, 4: 500}  # at each multiple of the side


def plan(args: argparse.Namespace) -> list[Run]:
    """The two runs."""
    configs = {name: recipe_config("canvas_progressive", overlay, 0, args.epochs) for name, overlay in VARIANTS.items()}
    return [Run("canvas_progressive", name, 0, config) for name, config in configs.items()]


def execute(run: Run, root: str, work: Path) -> dict[str, Any]:
    """Train, or go on from the checkpoint in `work`, and test at each side. An epoch of both is as many batches as all
    images make at the sides of the config."""
    steps = len(recipe_data(run.config, root).train_dataloader())
    cli, result = fit_and_test(run, root, work, [{"trainer": {"limit_train_batches": steps}}])
    given, larger = run.config["recipe"]["data"]["init_args"], {}
    for scale, canvases in TEST_CANVASES.items():
        changes = {"side": given["side"] * scale, "num_test": min(canvases, given["num_test"]), "train_sizes": None}
        found = evaluate(cli, recipe_data(run.config, root, **changes), canvases, scale)
        larger[str(scale)] = {"side": found["side"], "canvases": found["images"], "accuracy": found["accuracy"]}
    return {**result, "larger": larger}


def draw(runs: dict[str, dict[str, Any]], out: Path) -> None:
    """Accuracy against the side of the test canvases, with 95% intervals."""
    with figure_file(out) as axes:
        for name, row in runs.items():
            tests = [
                {**at, "images": at["canvases"], "correct": round(at["accuracy"] * at["canvases"])}
                for at in row["larger"].values()
            ]
            sides, scores = [test["side"] for test in tests], [100 * test["accuracy"] for test in tests]
            axes.errorbar(sides, scores, error_bars(tests), marker="o", capsize=3, label=f"{name} sides in training")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sides, [str(side) for side in sides])
        axes.set_xlabel("side of test canvases (px); training ends at the first")
        axes.set_ylabel("test accuracy (%)")


def write_report(out: Path) -> str:
    """Write `results.json` and `results.png` from the results that there are; returns the accuracies."""
    lines = []
    for name, row in write_results(out, draw, lambda row: row["variant"]).items():
        scores = "  ".join(f"{at['side']} px {at['accuracy']:.4f}" for at in row["larger"].values())
        lines.append(f"{name:<12} test accuracy at {scores}  {row['seconds']:.0f} s of training")
    return "\n".join(lines)


def _parser() -> Parser:
    return config_parser(
        "progressive",
        "Train on canvases at several sides and at one, with the same number of patches. Finished runs are skipped, "
        "stopped ones go on.",
    )


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; returns the exit code: 1 if a run failed."""
    parser = _parser()
    return do_runs(parser, parser.parse_args(argv), plan, execute, write_report, recipe_data)


if __name__ == "__main__":
    sys.exit(main())
