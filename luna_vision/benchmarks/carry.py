"""What a memory is good for that is handed on from crop to crop: `python -m luna_vision.benchmarks.carry --help`.

A camera moves over a cued canvas (`luna_vision.data.canvas_sequence`) and never has the cue and an item in view at
once. Models are trained alike but for what they remember: `carry` hands its memory on, with gradients through all
crops; `bptt-1` hands it on without gradients; `mean` begins each crop anew and takes the mean of the logits. These have
an MLP on the memory in each block, with which what a slot carries can be compared to what it has just read;
`no-memory-mlp` is `carry` without. Each is tested with the memory handed on, with a fresh one for each crop (of which
the last crop is read), and by the mean of the logits of all crops with fresh memories. Without remembering, no more can
be told than which items there were.
"""

import argparse
import datetime
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from torch import Tensor
from torch.utils.data import DataLoader

from luna_vision._compare_run import MODEL, Progress, Run, make_data, provenance, train, train_loader
from luna_vision.benchmarks._command import Parser, at_least
from luna_vision.cli.common import run_command
from luna_vision.compare import HEAD_WIDTH, OPTIMIZATION, PIECES
from luna_vision.data.canvas_module import ITEM_SOURCES
from luna_vision.tasks import SequenceTask
from luna_vision.utils.files import save_figure, write_json, write_text

from .small_runs import add_run_arguments, cell, do_runs, finished

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
    if args.width % HEAD_WIDTH:
        raise ValueError(f"--width must be a multiple of {HEAD_WIDTH}, got {args.width}")
    steps = args.samples // args.batch_size
    pieces = min(PIECES, steps)
    if not pieces:
        raise ValueError(f"--samples must be at least one batch, {args.batch_size}, got {args.samples}")
    data = {"source": args.source, "num_items": args.items, "steps": args.crops, "num_train": args.samples}
    data["cue_first"] = args.cue_first
    shape = {"img_size": 64, "patch_size": 16, "embed_dim": args.width, "depth": args.depth}
    config = {
        "data": {
            "class": "CanvasSequenceDataModule",
            "args": {**data, "num_test": args.test_sequences},
            "scaled": [],
            "has_root": True,
        },
        # the memory that leaves the last block is read, by the next crop, and the head reads it too
        "model": {**shape, "num_heads": args.width // HEAD_WIDTH, "global_pool": "both"},
        "optimization": {**OPTIMIZATION, "lr": args.lr, "warmup_epochs": pieces / PIECES},
        "gradient_clip_val": 1.0,
        "batch_size": args.batch_size,
        "steps": steps // pieces * pieces,
        "pieces": pieces,
        **({"accelerator": args.device} if args.device != "cpu" else {}),
    }
    runs = []
    for seed in dict.fromkeys(args.seeds):
        for variant in args.only:
            memory, model = VARIANTS[variant]
            own = {"seed": seed, "memory": memory, "model": {**config["model"], **model}}
            runs.append(Run("canvas-sequence", variant, seed, {**config, **own}))
    return runs


def execute(run: Run, root: str, work: Path, report: Progress) -> dict[str, Any]:
    """Train, or go on from the checkpoint in `work`, and test. Arguments as in `luna_vision._compare_run.execute`."""
    config = run.config
    seed_everything(config["seed"], verbose=False)
    arguments = {"num_classes": 10, "in_chans": 3, "model_kwargs": config["model"], **config["optimization"]}
    task, data = SequenceTask(model_name=MODEL, **arguments, **config["memory"]), make_data(config, root)
    _, ledger = train(config, task, train_loader(config, data), work, report)
    since = time.perf_counter()
    accuracy = evaluate_memories(task, data.test_dataloader())
    return {
        "task": run.task,
        "variant": run.variant,
        "seed": run.seed,
        "accuracy": accuracy,
        "train_seconds": round(ledger.seconds, 1),
        "test_seconds": round(time.perf_counter() - since, 1),
        "curve": ledger.curve,
        "config": config,
        **provenance(config.get("accelerator", "cpu")),
    }


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
    lines = [f"| training | seed | {' | '.join(TESTS.values())} |", "|---" * (len(TESTS) + 2) + "|"]
    for result in done:
        cells = [cell(result["accuracy"][name]) for name in TESTS]
        lines.append(f"| {result['variant']} | {result['seed']} | {' | '.join(cells)} |")
    items = {result["config"]["data"]["args"]["num_items"] for result in done}
    chance = ", ".join(f"{100 / n:.0f}% with {n} items" for n in sorted(items))
    about = (
        f"Test accuracy in %, and the 95% interval of the binomial (Wilson). Knowing the items alone gives {chance}."
    )
    text = "\n".join([*lines, "", about, ""])
    write_text(out / "carry.md", text)
    write_json(out / "carry.json", {"date": datetime.date.today().isoformat(), "runs": done})
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return text + "\nno plot: it needs matplotlib (pip install matplotlib)"
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for result in done:
        samples, shares = zip(*((point["samples"], 100 * point["acc1"]) for point in result["curve"]), strict=True)
        axes.plot(samples, shares, label=f"{result['variant']}, seed {result['seed']}")
    for n in items:
        axes.axhline(100 / n, color="grey", linestyle="--", label=f"the items alone, {n} of them")
    axes.set_xlabel("training sequences")
    axes.set_ylabel("training accuracy after the last crop (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, out / "carry.png", dpi=120)
    return text


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m luna_vision.benchmarks.carry",
        description="Train models on crops that move over a canvas, with a memory that is handed on and without, and "
        "test both with and without. Finished runs are skipped, stopped ones go on.",
    )
    names = list(VARIANTS)
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="(default: all)")
    parser.add_argument("--source", choices=list(ITEM_SOURCES), default="digits", help="(default: digits)")
    parser.add_argument("--items", type=at_least(2), default=2, help="on a canvas (default: 2)")
    parser.add_argument("--crops", type=at_least(3), default=4, help="in a sequence (default: 4)")
    parser.add_argument("--cue-first", action="store_true", help="show the cue before any item")
    parser.add_argument("--samples", type=at_least(1), default=120_000, help="training sequences (%(default)s)")
    parser.add_argument("--batch-size", type=at_least(1), default=32, help="(default: 32)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--test-sequences", type=at_least(1), default=2000, metavar="N", help="(default: 2000)")
    add_run_arguments(parser, "carry", depth=4)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; returns the exit code: 1 if a run failed."""
    args = _parser().parse_args(argv)
    return do_runs(args, plan(args), execute, write_report)


if __name__ == "__main__":
    run_command(main)
