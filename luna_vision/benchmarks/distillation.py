"""A student on Fashion-MNIST with and without its teacher: `python -m luna_vision.benchmarks.distillation --help`.

The runs are those of `train.py`, one after the other: the teacher of `configs/fashion_mnist_teacher.yaml`, then the
student of `configs/fashion_mnist_distill.yaml` on the targets alone, with the teacher's logits, and with its layers,
too. What differs between the students is the loss, and nothing else: initial weights, images and order are the same.
"""

from pathlib import Path
from typing import Any

from luna_vision.benchmarks._command import at_least
from luna_vision.cli.common import run_command

from .train_runs import Config, complete, figure_file, parser, place, read_config, run_folder

__all__ = ["main", "plan"]

TEACHERS_ARGUMENTS = ("teacher_", "temperature", "task_weight", "logit_weight", "feature_")


def plan(configs: Path, work: Path, root: Path, seeds: int = 1, epochs: int | None = None) -> dict[str, Config]:
    """The runs by name, in order.

    Args:
        configs: Folder of the project's configs.
        work: Folder that the runs write to.
        root: Folder of the data.
        seeds: So many of each student, all with the same teacher.
        epochs: Of every run; None takes what the configs say.
    """
    where = (work, root, epochs)
    runs = {"teacher": place("teacher", read_config(configs / "fashion_mnist_teacher.yaml"), *where)}
    distilled = read_config(configs / "fashion_mnist_distill.yaml")
    arguments = distilled["model"]["init_args"]
    arguments["teacher_checkpoint"] = str(run_folder(runs["teacher"]) / "checkpoints" / "best.ckpt")
    plain = {name: value for name, value in arguments.items() if not name.startswith(TEACHERS_ARGUMENTS)}
    students = {
        "targets": {**distilled, "model": {"class_path": "luna_vision.tasks.ClassificationTask", "init_args": plain}},
        "logits": {**distilled, "model": {**distilled["model"], "init_args": {**arguments, "feature_layers": None}}},
        "logits-and-layers": distilled,
    }
    for seed in range(seeds):
        for name, config in students.items():
            seeded = {**config["data"], "init_args": {**config["data"]["init_args"], "seed": seed}}
            name = f"{name}-seed{seed}"
            runs[name] = place(name, {**config, "seed_everything": seed, "data": seeded}, *where)
    return runs


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


def main(argv: list[str] | None = None) -> int:
    """Do what is missing, and print the accuracies. Returns the exit code."""
    arguments = parser(
        "distillation",
        "A student on Fashion-MNIST on the targets alone, with a teacher's logits, and "
        "with its layers, too. The same command goes on with what was stopped.",
    )
    arguments.add_argument("--seeds", type=at_least(1), default=1, help="so many of each student, with one teacher")
    args = arguments.parse_args(argv)
    runs = plan(args.configs, args.work, args.root, args.seeds, args.epochs)
    done = complete(args.out / "results.json", runs, args.work, args.root)
    draw(done, args.out / "results.png")
    for name, row in done.items():
        print(f"{name:<24} test accuracy {row['test_acc1']:.4f}  {row['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    run_command(main)
