"""What a memory is good for that is handed on from crop to crop: `python -m experiments.benchmarks.carry --help`.

A camera moves over a cued canvas (`luna_vision.data.canvas_sequence`) and never has the cue and an item in view at
once. Models are trained alike but for what they remember: `carry` hands its memory on, with gradients through all
crops; `bptt-1` hands it on without gradients; `mean` begins each crop anew and takes the mean of the logits. These have
an MLP on the memory in each block, with which what a slot carries can be compared to what it has just read;
`no-memory-mlp` is `carry` without. Each is tested with the memory handed on, with a fresh one for each crop (of which
the last crop is read), and by the mean of the logits of all crops with fresh memories. Without remembering, no more can
be told than which items there were.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from experiments.command import Parser, at_least
from experiments.plots import cell, figure_file
from experiments.runs import Run, add_run_arguments, configuration, do_runs, finished, make_data, train, write_table
from luna_vision.data.canvas_module import ITEM_SOURCES
from luna_vision.tasks import SequenceTask

__all__ = ["evaluate_memories", "execute", "main", "plan"]

# name: arguments of the task, and of the model
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "carry": ({"carry": True}, {"memory_mlp": "own"}),
    "bptt-1": ({"carry": True, "bptt_steps": 1}, {"memory_mlp": "own"}),
    "mean": ({"carry": False}, {"memory_mlp": "own"}),
    "no-memory-mlp": ({"carry": True}, {"memory_mlp": "none"}),
}
TESTS = {"carried": "memory handed on", "reset": "fresh memory, last crop", "mean": "fresh memories, mean logits"}


def plan(args: argparse.Namespace) -> list[Run]:
    """The runs that the arguments ask for.

    Raises:
        ValueError: A number out of its range.
    """
    data = {"source": args.source, "num_items": args.items, "steps": args.crops, "cue_first": args.cue_first}
    data |= {"num_train": args.samples, "num_test": args.test_sequences}
    runs = []
    for seed in dict.fromkeys(args.seeds):
        for variant in args.only:
            memory, model = VARIANTS[variant]
            config = configuration(args, "canvas-sequence", seed, model, data)
            runs.append(Run("canvas-sequence", variant, seed, {**config, "memory": memory}))
    return runs


def execute(run: Run, root: str, work: Path) -> dict[str, Any]:
    """Train, or go on from the checkpoint in `work`, and test."""
    cli, training = train(run, root, work, [{"model": {"init_args": run.config["memory"]}}])
    since = time.perf_counter()
    accuracy = evaluate_memories(cli.model, make_data(run.config, root).test_dataloader())
    return {"accuracy": accuracy, **training, "test_seconds": round(time.perf_counter() - since, 1)}


@torch.inference_mode()
def evaluate_memories(task: SequenceTask, loader: DataLoader) -> dict[str, dict[str, Any]]:
    """Accuracy on sequences by each of `TESTS`, whatever the task was trained for."""
    model, correct, count = task.model.eval(), dict.fromkeys(TESTS, 0), 0
    for crops, labels, _ in loader:
        fresh = torch.stack([model(crop) for crop in crops.unbind(1)], dim=1)
        logits = {"carried": _carried(task, crops), "reset": fresh[:, -1], "mean": fresh.mean(1)}
        for name, found in logits.items():
            correct[name] += int((found.argmax(1) == labels).sum())
        count += len(labels)
    return {
        name: {"where": f"with {TESTS[name]}", "images": count, "correct": n, "accuracy": n / count}
        for name, n in correct.items()
    }


def _carried(task: SequenceTask, crops: Tensor) -> Tensor:
    """Logits of the last crop, by the model's own interface."""
    memory = None
    for crop in crops[:, :-1].unbind(1):
        _, memory = task.model.encode(crop, memory=memory)
    return task.model(crops[:, -1], memory=memory)


def write_report(out: Path) -> str:
    """Write `carry.md`, `carry.json` and `carry.png` from the results that there are; returns the table."""
    done = finished(out)
    if not done:
        return f"no results in {out / 'runs'} yet"
    rows = [[one["variant"], str(one["seed"]), *(cell(one["accuracy"][name]) for name in TESTS)] for one in done]
    items = {result["config"]["data"]["args"]["num_items"] for result in done}
    chance = ", ".join(f"{100 / n:.0f}% with {n} items" for n in sorted(items))
    about = (
        f"Test accuracy in %, and the 95% interval of the binomial (Wilson). Knowing the items alone gives {chance}."
    )
    text = write_table(out, "carry", ["training", "seed", *TESTS.values()], rows, about, done)
    with figure_file(out / "carry.png") as axes:
        for result in done:
            samples, shares = zip(*((point["samples"], 100 * point["acc1"]) for point in result["curve"]), strict=True)
            axes.plot(samples, shares, label=f"{result['variant']}, seed {result['seed']}")
        for n in items:
            axes.axhline(100 / n, color="grey", linestyle="--", label=f"the items alone, {n} of them")
        axes.set_xlabel("training sequences")
        axes.set_ylabel("training accuracy after the last crop (%)")
    return text


def _parser() -> Parser:
    parser = Parser(
        prog="python -m experiments.benchmarks.carry",
        description="Train models on crops that move over a canvas, with a memory that is handed on and without, and "
        "test both with and without. Finished runs are skipped, stopped ones go on.",
    )
    names = list(VARIANTS)
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="what to train")
    parser.add_argument("--source", choices=list(ITEM_SOURCES), default="digits", help="of the items")
    parser.add_argument("--items", type=at_least(2), default=2, help="on a canvas")
    parser.add_argument("--crops", type=at_least(3), default=4, help="in a sequence")
    parser.add_argument("--cue-first", action="store_true", help="show the cue before any item")
    parser.add_argument("--test-sequences", type=at_least(1), default=2000, metavar="N", help="to test on")
    add_run_arguments(parser, "carry", depth=4)
    parser.set_defaults(samples=120_000)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; returns the exit code: 1 if a run failed."""
    parser = _parser()
    return do_runs(parser, parser.parse_args(argv), plan, execute, write_report)


if __name__ == "__main__":
    sys.exit(main())
