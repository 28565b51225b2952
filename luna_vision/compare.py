"""Compare mixers, or variants of Luna's own block, in one shell: `python -m luna_vision.compare --help`.

Every variant is trained by the project's classification task with the same images, augmented alike, in the same order,
the same schedule and budget, and is then tested without fine-tuning at 1, 2 and 4 times the side
it was trained at. A task and a variant are plain data here; to add one is to add an entry.

Results go to `OUT/runs`, one JSON for each finished run, and the report (a table as Markdown and JSON, two plots) is
made from whatever is there. A run that was stopped goes on from its last checkpoint, one that has finished is skipped.
"""

import argparse
import inspect
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luna_vision.benchmarks._command import Parser, at_least
from luna_vision.mixers import MIXERS, mixer_defaults
from luna_vision.models import LunaVit

from ._compare_measure import measure, measured_path
from ._compare_report import write_report
from ._compare_run import Run, make_data
from ._compare_workers import result_path, run_all

__all__ = ["SUITES", "TASKS", "main", "plan"]

# class and args: the data module. scaled: its arguments that are multiplied for tests at a larger side; the first is
# the side itself. model and optimization: arguments of the model and of the classification task. test_images: how many
# test images at each scale, the first of a test set in random order; fewer at 4 times the side, where softmax attention
# works 256 times as long on each.
TASKS: dict[str, dict[str, Any]] = {
    "fashion32": {
        "title": "Fashion-MNIST, 32 px",
        "about": "64 patches of 4 px. Tests at 64 and 128 px resize the images.",
        "class": "FashionMNISTDataModule",
        "args": {"img_size": 32, "in_chans": 1, "val_fraction": 0.0, "crop": "pad", "crop_padding": 2, "hflip": 0.5},
        "scaled": ["img_size"],
        "has_root": True,
        "model": {"patch_size": 4},
        "optimization": {"lr": 1.5e-3},
        "samples": 100_000,
        "batch_size": 64,
        "test_images": {"1": 10_000, "2": 2_000, "4": 1_000},
    },
    "canvas": {
        "title": "cued canvas, 128 px",
        "about": "64 patches of 16 px. Two Fashion-MNIST items in frames of different colours, and a square of one of "
        "the two colours far off: the label is the item in the frame of that colour. Each item lies across four "
        "patches. Tests at 256 and 512 px are larger canvases with as many items, of the same size.",
        "class": "CanvasDataModule",
        "args": {
            "source": "fashion_mnist",
            "side": 128,
            "num_items": 2,
            "item_size": 16,
            "cued": True,
            "frame": 4,
            "cue_size": 16,
            "grid": 16,
            "num_train": 40_000,
            "num_test": 4_000,
            "in_chans": 3,
        },
        "scaled": ["side"],
        "has_root": True,
        "model": {"patch_size": 16},
        "optimization": {"lr": 1e-3},
        "samples": 40_000,
        "batch_size": 32,
        "test_images": {"1": 4_000, "2": 1_000, "4": 500},
    },
    "digits": {
        "title": "digits, 16 px",
        "about": "scikit-learn's 1,797 digits in 16 patches of 4 px: a smoke test without a download.",
        "class": "DigitsDataModule",
        "args": {"img_size": 16, "in_chans": 1, "crop_padding": 1},
        "scaled": ["img_size"],
        "has_root": False,
        "model": {"patch_size": 4},
        "optimization": {"lr": 2e-3},
        "samples": 20_000,
        "batch_size": 64,
        "test_images": {"1": 360, "2": 360, "4": 360},
    },
}
OPTIMIZATION = {
    "optimizer": "adamw",
    "weight_decay": 0.05,
    "scheduler": "cosine",
    "warmup_lr": 1e-6,
    "min_lr": 1e-5,
}
HEAD_WIDTH = 32
# defaults of the model that go into a result, so that results of other defaults are not taken for those of these
SHELL = ("local_mixing", "stem", "pos_embed")
MEMORY = ("global_pool", "memory_len", "pack_heads", "tie_kv", "memory_mlp", "query_gain")  # of Luna alone
# what the ablation changes one at a time; written out, as the defaults of the model follow from the ablation
BLOCK = {
    "local_mixing": "before",
    "stem": "patch",
    "pos_embed": "fourier",
    "global_pool": "avg",
    "memory_len": 16,
    "pack_heads": None,
    "tie_kv": True,
    "memory_mlp": "none",
    "query_gain": 8.0,
}
PIECES = 20  # of a run: after each there is a line of progress and a checkpoint; the warm-up is the first

# name: arguments of the model, over those of the task; a variant may change anything
SUITES: dict[str, dict[str, dict[str, Any]]] = {
    "mixers": {
        **{name: {"mixer": name} for name in MIXERS},
        # with initial queries as much larger as Luna's are by default
        "softmax-query-gain-8": {"mixer": "softmax", "mixer_args": {"query_gain": 8.0}},
        # whose heads do not average the patches: Luna's reads the memory, and softmax attention has one query for it
        "luna-pool-token": {"global_pool": "token"},
        "softmax-query-gain-8-pool-map": {
            "mixer": "softmax",
            "mixer_args": {"query_gain": 8.0},
            "global_pool": "map",
        },
    },
    "ablation": {
        name: BLOCK | change
        for name, change in {
            "luna": {},
            "query-gain-1": {"query_gain": 1.0},
            "query-gain-4": {"query_gain": 4.0},
            "memory-8": {"memory_len": 8},
            "memory-32": {"memory_len": 32},
            "memory-64": {"memory_len": 64},
            "pack-heads-1": {"pack_heads": 1},
            "untied": {"tie_kv": False},
            "local-none": {"local_mixing": "none"},
            "local-attn": {"local_mixing": "attn"},
            "local-mlp": {"local_mixing": "mlp"},
            "memory-mlp-own": {"memory_mlp": "own"},
            "memory-mlp-shared": {"memory_mlp": "shared"},
            "stem-conv": {"stem": "conv"},
            "pos-none": {"pos_embed": "none"},
            "pos-learn": {"pos_embed": "learn"},
            "pool-token": {"global_pool": "token"},
            "pool-both": {"global_pool": "both"},
            # what gained most, together
            "memory-8-pool-token": {"memory_len": 8, "global_pool": "token"},
            "memory-8-pool-both": {"memory_len": 8, "global_pool": "both"},
        }.items()
    },
}
REPEATED = {
    "mixers": [
        "luna",
        "softmax",
        "softmax-query-gain-8",
        "external",
        "luna-pool-token",
        "softmax-query-gain-8-pool-map",
    ],
    "ablation": ["luna"],
}  # what seeds after the first are for


def plan(args: argparse.Namespace) -> list[Run]:
    """All runs that the arguments ask for: the first seed of every variant, then further seeds of those in `--repeat`.

    Raises:
        ValueError: A name that does not exist, or a number out of its range.
    """
    suite = SUITES[args.suite]
    variants, repeated = args.only or list(suite), args.repeat or REPEATED[args.suite]
    repeated = list(suite) if repeated == ["all"] else repeated
    for option, names, options in (
        ("--tasks", args.tasks, TASKS),
        ("--only", variants, suite),
        ("--repeat", repeated if args.repeat else [], suite),
    ):
        for name in names:
            if name not in options:
                raise ValueError(f"{option}: unknown {name!r}; choose from {', '.join(options)}")
    if min(args.seeds) < 0:
        raise ValueError(f"--seeds must not be negative, got {min(args.seeds)}")
    if args.lr is not None and not args.lr > 0:
        raise ValueError(f"--lr must be above 0, got {args.lr}")
    if args.width % HEAD_WIDTH:
        raise ValueError(f"--width must be a multiple of {HEAD_WIDTH}, got {args.width}")
    runs = []
    for seed in dict.fromkeys(args.seeds):
        for task in dict.fromkeys(args.tasks):
            for variant in dict.fromkeys(variants):
                config = configuration(args, task, suite[variant], seed)
                if variant != "luna" and config == configuration(args, task, suite.get("luna", {}), seed):
                    continue  # what it sets is this task's default: it would be luna again
                if seed == args.seeds[0] or variant in repeated:
                    runs.append(Run(task, variant, seed, config))
    return runs


def configuration(args: argparse.Namespace, task: str, variant: dict[str, Any], seed: int) -> dict[str, Any]:
    """Everything that the numbers of a run depend on, as plain data."""
    recipe = TASKS[task]
    batch_size = args.batch_size or recipe["batch_size"]
    steps = (args.samples or recipe["samples"]) // batch_size
    pieces = min(PIECES, steps)
    if not pieces:
        raise ValueError(f"--samples must be at least one batch, {batch_size} for {task}")
    defaults = inspect.signature(LunaVit.__init__).parameters
    mixer = variant.get("mixer", "luna")
    own = (mixer_defaults(mixer) if mixer in MIXERS else {}) | variant.get("mixer_args", {})
    if mixer == "luna":
        shell = {name: defaults[name].default for name in SHELL + MEMORY}
    else:  # without a memory to read
        shell = {name: defaults[name].default for name in SHELL} | {"global_pool": "avg"}
    shell |= {"embed_dim": args.width, "depth": args.depth, "num_heads": args.width // HEAD_WIDTH}
    if own:
        variant = variant | {"mixer_args": own}
    side = recipe["args"][recipe["scaled"][0]]
    optimization = {**OPTIMIZATION, **recipe["optimization"], **({"lr": args.lr} if args.lr else {})}
    limit = args.test_images or max(recipe["test_images"].values())
    config = {
        "data": {name: recipe[name] for name in ("class", "args", "scaled", "has_root")},
        "model": {"mixer": "luna", "img_size": side, **shell, **recipe["model"], **variant},
        # of Lightning's epochs, which are pieces here
        "optimization": {**optimization, "warmup_epochs": pieces / PIECES},
        "gradient_clip_val": 1.0,
        "batch_size": batch_size,
        "steps": steps // pieces * pieces,
        "pieces": pieces,
        "seed": seed,
        "test_images": {scale: min(n, limit) for scale, n in recipe["test_images"].items()},
        **({"accelerator": args.device} if args.device != "cpu" else {}),
    }
    return json.loads(json.dumps(config))  # as it comes back from a result


def unfinished(runs: Sequence[Run], out: Path) -> list[Run]:
    """The runs that have no result yet, or failed.

    Raises:
        ValueError: A result of one of their tasks and variants, of whatever seed, was made with another configuration,
            so that the report would take one for the other.
    """
    done = set()
    for run in runs:
        others = (out / "runs").glob(f"{run.task}-{run.variant}-seed*.json")
        for path in [*sorted(others), measured_path(out, run)]:
            result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"error": "not there"}
            if "error" in result:
                continue
            expected = {**run.config, "seed": result["config"].get("seed")}
            names = [n for n in {**expected, **result["config"]} if expected.get(n) != result["config"].get(n)]
            if names:
                what = " and ".join(names)
                raise ValueError(f"{path} was made with another {what}: give another --out, or remove it")
            done.add(path)
    return [run for run in runs if result_path(out, run) not in done]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m luna_vision.compare",
        description="Train mixers, or variants of Luna's block, alike, and write tables and plots. Finished runs are "
        "skipped, stopped ones go on.",
        epilog="tasks: " + "; ".join(f"{name}: {task['title']}. {task['about']}" for name, task in TASKS.items()),
    )
    parser.add_argument("--suite", choices=list(SUITES), default="mixers", help="what to compare (default: mixers)")
    parser.add_argument("--tasks", nargs="+", default=["fashion32", "canvas"], metavar="TASK", help="of those below")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="variants of the suite; all if left out")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED", help="(default: 0)")
    parser.add_argument(
        "--repeat",
        nargs="+",
        metavar="NAME",
        help="variants that seeds after the first are for, or 'all' "
        f"(default: {', '.join(REPEATED['mixers'])}; in the ablation luna)",
    )
    parser.add_argument("--jobs", type=at_least(1), default=1, help="runs at a time, one thread each (default: 1)")
    parser.add_argument("--samples", type=at_least(1), help="training images of a run (default: the task's)")
    parser.add_argument("--batch-size", type=at_least(1), help="(default: the task's)")
    parser.add_argument("--lr", type=float, help="peak learning rate (default: the task's)")
    parser.add_argument("--width", type=at_least(1), default=96, help=f"in steps of {HEAD_WIDTH} (default: 96)")
    parser.add_argument("--depth", type=at_least(1), default=6, help="blocks (default: 6)")
    parser.add_argument("--test-images", type=at_least(1), metavar="N", help="at most, at each side")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of all runs (default: cpu)")
    parser.add_argument("--root", default="data", help="folder of Fashion-MNIST, fetched if missing (default: data)")
    parser.add_argument("--out", type=Path, default=Path("runs/compare/results"), help="(default: %(default)s)")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/compare/work"), help="checkpoints (default: %(default)s)"
    )
    phases = parser.add_mutually_exclusive_group()
    phases.add_argument("--measure", action="store_true", help="only time training steps; run nothing beside it")
    phases.add_argument("--report-only", action="store_true", help="only make the report from what there is")
    parser.add_argument("--rounds", type=at_least(1), default=7, help="timed steps of --measure (default: 7)")
    return parser


def check(runs: Sequence[Run], root: str) -> None:
    """Fetch the data and build each task's data, so that mistakes show before the first worker starts.

    Raises:
        ValueError, OSError, RuntimeError: What is wrong; a RuntimeError is a failed download.
    """
    for run in {run.task: run for run in runs}.values():
        data = make_data(run.config, root, download=True)
        data.prepare_data()
        data.setup("fit")


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; returns the exit code: 1 if a run failed, 130 after Ctrl-C."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        runs = plan(args)
        todo = unfinished(runs, args.out)
        if not args.measure and not args.report_only:
            check(todo, args.root)
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(" ".join(str(error).split()))
    code = 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if args.measure:
            first = {(run.task, run.variant): run for run in reversed(runs)}
            code = int(measure(list(reversed(first.values())), args.out, args.rounds) > 0)
        elif not args.report_only:
            print(f"{len(runs)} runs, of which {len(runs) - len(todo)} have finished before", flush=True)
            code = int(run_all(todo, args.jobs, args.root, args.out, args.work) > 0)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        code = 130
    titles = {name: (task["title"], task["about"]) for name, task in TASKS.items()}
    print(write_report(args.out, args.suite, list(TASKS), list(SUITES[args.suite]), titles))
    return code


if __name__ == "__main__":
    sys.exit(main())
