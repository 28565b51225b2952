"""A student on Fashion-MNIST with and without its teacher: `python -m experiments.benchmarks.distillation --help`.

The runs are those of `train.py`: the teacher of `configs/fashion_mnist_teacher.yaml`, then the student of
`configs/fashion_mnist_distill.yaml` on the targets alone, with the teacher's logits, and with its layers, too. What
differs between the students is the loss, and nothing else: initial weights, images and order are the same.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from experiments.command import Parser, at_least
from experiments.plots import figure_file
from experiments.runs import Config, Run, do_runs

from .train_runs import config_parser, fit_and_test, recipe_config, recipe_data, write_results

__all__ = ["draw", "execute", "main", "plan"]

# name: what is laid over the config
STUDENTS: dict[str, Config] = {
    "targets": {"model": {"class_path": "luna_vision.tasks.ClassificationTask"}},
    "logits": {"model": {"init_args": {"feature_layers": None}}},
    "logits-and-layers": {},
}


def plan(args: argparse.Namespace) -> list[Run]:
    """The runs, the teacher first."""
    teacher = Run("fashion_mnist", "teacher", 0, recipe_config("fashion_mnist_teacher", {}, epochs=args.epochs))
    runs = [teacher]
    for seed in range(args.seeds):
        for name, overlay in STUDENTS.items():
            config = recipe_config("fashion_mnist_distill", overlay, seed, args.epochs)
            runs.append(Run("fashion_mnist", name, seed, {**config, "teacher": teacher.work_name}))
    return runs


def execute(run: Run, root: str, work: Path) -> dict[str, Any]:
    """Train, or go on from the checkpoint in `work`, and test."""
    overlays = []
    if run.variant.startswith("logits"):
        checkpoint = work.parent / run.config["teacher"] / "checkpoints" / "best.ckpt"
        overlays.append({"model": {"init_args": {"teacher_checkpoint": str(checkpoint)}}})
    return fit_and_test(run, root, work, overlays)[1]


def draw(runs: dict[str, dict[str, Any]], out: Path) -> None:
    """Validation accuracy by epoch, and test accuracy in the legend."""
    with figure_file(out, (6.5, 4)) as axes:
        for name, row in runs.items():
            shares = [100 * share for share in row["val_acc1"]]
            label = f"{name}: test {100 * row['test_acc1']:.2f}"
            style = {"color": "grey", "linestyle": "--"} if name == "teacher" else {}
            axes.plot(range(1, len(shares) + 1), shares, marker=".", label=label, **style)
        axes.set_xlabel("epoch")
        axes.set_ylabel("validation accuracy (%)")


def write_report(out: Path) -> str:
    """Write `results.json` and `results.png` from the results that there are; returns the accuracies."""
    rows = write_results(out, draw, lambda row: row["variant"] + f"-seed{row['seed']}" * (row["variant"] != "teacher"))
    return "\n".join(
        f"{name:<24} test accuracy {row['test_acc1']:.4f}  {row['seconds']:.0f} s" for name, row in rows.items()
    )


def _parser() -> Parser:
    out = config_parser(
        "distillation",
        "Train a student on Fashion-MNIST on the targets alone, with a teacher's logits, and with its layers, too. "
        "Finished runs are skipped, stopped ones go on.",
    )
    out.add_argument("--seeds", type=at_least(1), default=1, help="so many of each student, with one teacher")
    return out


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; returns the exit code: 1 if a run failed."""
    parser = _parser()
    args = parser.parse_args(argv)
    code = do_runs(parser, args, lambda args: plan(args)[:1], execute, write_report, recipe_data)
    return code or do_runs(parser, args, plan, execute, write_report, recipe_data)


if __name__ == "__main__":
    sys.exit(main())
