"""Compare mixers, or variants of Luna's own block, in one shell: `python -m experiments.compare --help`.

Every variant is trained by `train.py` with the recipe of the task, `experiments/configs/TASK.yaml`: the same images,
augmented alike, in the same order, the same schedule and budget. It is then tested without fine-tuning at 1, 2 and 4
times the side it was trained at: on images held out of training, or, when all choices are made, with `--split test` on
test images. To add a task is to add a recipe and an entry here, to add a variant an entry.

Results go to `OUT/runs`, one JSON for each finished run, and the report (a table as Markdown and JSON, two plots) is
made from whatever is there. A run that was stopped goes on from its last checkpoint, one that has finished is skipped.
"""

import argparse
import inspect
import sys
import time
from pathlib import Path
from typing import Any

from luna_vision.mixers import MIXERS, mixer_defaults
from luna_vision.models import LunaVit

from .command import Parser, at_least
from .measure import cost, measure
from .report import write_report
from .runs import Config, Run, add_run_arguments, configuration, do_runs, evaluate, make_data, recipe, train, unfinished

__all__ = ["SUITES", "TASKS", "execute", "main", "plan"]

# scaled: arguments of the data that are multiplied for tests at a larger side; the first is the side itself.
# test_images: how many images at each scale, of those held out or of the test set; fewer at 4 times the side, where
# softmax attention works 256 times as long on each. "mosaic": how many mosaics, at twice the side.
TASKS: dict[str, dict[str, Any]] = {
    "cifar10": {
        "title": "CIFAR-10, 32 px",
        "about": "64 patches of 4 px. Tests at 64 and 128 px resize the images.",
        "scaled": ["img_size"],
        "test_images": {"1": 10_000, "2": 5_000, "4": 2_000},
    },
    "tiny_imagenet": {
        "title": "Tiny-ImageNet, 64 px",
        "about": "64 patches of 8 px. Tests at 128 and 256 px resize the images; mosaics of 128 px are 2 x 2 images, "
        "two of them of the class that is the label.",
        "scaled": ["img_size"],
        "test_images": {"1": 10_000, "2": 5_000, "mosaic": 5_000, "4": 2_000},
    },
    "fashion32": {
        "title": "Fashion-MNIST, 32 px",
        "about": "64 patches of 4 px. Tests at 64 and 128 px resize the images.",
        "scaled": ["img_size"],
        "test_images": {"1": 10_000, "2": 2_000, "4": 1_000},
        "no_val": True,
    },
    "canvas": {
        "title": "cued canvas, 128 px",
        "about": "64 patches of 16 px. Two Fashion-MNIST items in frames of different colours, and a square of one of "
        "the two colours far off: the label is the item in the frame of that colour. Each item lies across four "
        "patches. Tests at 256 and 512 px are larger canvases with as many items, of the same size.",
        "scaled": ["side"],
        "test_images": {"1": 4_000, "2": 1_000, "4": 500},
    },
    "digits": {
        "title": "digits, 16 px",
        "about": "scikit-learn's 1,797 digits in 16 patches of 4 px: a smoke test without a download.",
        "scaled": ["img_size"],
        "test_images": {"1": 360, "2": 360, "4": 360},
    },
}
# defaults of the model that go into a result, so that results of other defaults are not taken for those of these
SHELL = ("local_mixing", "mlp", "stem", "pos_embed")
MEMORY = ("global_pool", "memory_len", "pack_heads", "tie_kv", "memory_mlp", "query_gain")  # of Luna alone
# what the ablation changes one at a time; written out, as the defaults of the model follow from the ablation
BLOCK = {
    "local_mixing": "before",
    "mlp": "gelu",
    "stem": "patch",
    "pos_embed": "fourier",
    "global_pool": "avg",
    "memory_len": 16,
    "pack_heads": None,
    "tie_kv": True,
    "memory_mlp": "none",
    "query_gain": 8.0,
}

# the same for photographs, with what the ablation chose
PHOTO_BLOCK = BLOCK | {"memory_len": 8}
TOKEN = {"global_pool": "token", "last_block": "final_pack"}
BOTH = {"global_pool": "both", "last_block": "final_pack"}
BEFORE = {"mlp": "gelu"}  # the shell before it was chosen on photographs
SWIGLU = {"mlp": "swiglu"}
INSIDE = {"local_mixing": "mlp"}  # the convolution in the MLP; where nothing is said, it is before the block
GAIN = {"mixer": "softmax", "mixer_args": {"query_gain": 8.0}}  # initial queries as much larger as Luna's are
SOFTMAX = GAIN | BEFORE
WHOLE = {"data": {"crop": "pad"}}
SIDES = {"train_scales": [1, 2]}

# name: arguments of the model, over those of the task; a variant may change anything, its "data" those of the data,
# and its "train_scales" are sides of training over the task's
SUITES: dict[str, dict[str, dict[str, Any]]] = {
    "mixers": {
        **{name: {"mixer": name} for name in MIXERS},
        "softmax-query-gain-8": GAIN,
        "luna-token": TOKEN,  # the head reads the memory alone
        "luna-before": PHOTO_BLOCK,
        "softmax-query-gain-8-before": SOFTMAX,
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
        }.items()
    },
    # the questions that photographs are to answer
    "photos": {
        "luna": PHOTO_BLOCK,
        "softmax": SOFTMAX,
        # trained on whole images, moved by some pixels, in the place of enlarged parts; or at two sides
        "luna-whole": PHOTO_BLOCK | WHOLE,
        "softmax-whole": SOFTMAX | WHOLE,
        "luna-sides": PHOTO_BLOCK | SIDES,
        "softmax-sides": SOFTMAX | SIDES,
        # the head reads the memory, after one more pack of the finished patches; with the patches
        "luna-final-pack": PHOTO_BLOCK | TOKEN,
        "luna-final-pack-both": PHOTO_BLOCK | BOTH,
        # the MLP, and the convolution
        "luna-local-mlp": PHOTO_BLOCK | {"local_mixing": "mlp"},
        "luna-swiglu-before": PHOTO_BLOCK | SWIGLU,
        "luna-swiglu": PHOTO_BLOCK | SWIGLU | INSIDE,
        "softmax-swiglu": GAIN | SWIGLU | INSIDE,
        # what gained most, together; the latter is the default now
        "luna-final-pack-swiglu": PHOTO_BLOCK | TOKEN | SWIGLU | INSIDE,
        "luna-final-pack-both-swiglu": PHOTO_BLOCK | BOTH | SWIGLU | INSIDE,
        "luna-final-pack-both-swiglu-before": PHOTO_BLOCK | BOTH | SWIGLU,
        "softmax-swiglu-before": GAIN | SWIGLU,
        "luna-local-none": PHOTO_BLOCK | {"local_mixing": "none"},
        "softmax-local-none": SOFTMAX | {"local_mixing": "none"},
    },
}
# variants whose options lost and were deleted: their results stay in the report
DELETED = {
    "mixers": ["luna-pool-token", "softmax-query-gain-8-pool-map"],
    "photos": ["luna-read-memory", "luna-slots", "luna-read-memory-slots", "luna-pool-token", "luna-gate"],
}
REPEATED = {
    "mixers": ["luna", "softmax", "softmax-query-gain-8", "luna-token", "luna-before", "softmax-query-gain-8-before"],
    "ablation": ["luna"],
    "photos": ["all"],
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
    runs = []
    for seed in dict.fromkeys(args.seeds):
        for task in dict.fromkeys(args.tasks):
            for variant in dict.fromkeys(variants):
                config = run_config(args, task, suite[variant], seed, args.split)
                if variant != "luna" and config == run_config(args, task, suite.get("luna", {}), seed, args.split):
                    continue  # what it sets is this task's default: it would be luna again
                if seed == args.seeds[0] or variant in repeated:
                    runs.append(Run(task, variant, seed, config))
    return runs


def run_config(args: argparse.Namespace, task: str, variant: Config, seed: int, split: str = "test") -> Config:
    """The configuration of a run, with the defaults of the model and of its mixer written out.

    Raises:
        ValueError: A number out of its range, or a task that holds no images out.
    """
    if split == "val" and TASKS[task].get("no_val"):
        raise ValueError(f"{task} holds no images out: give --split test")
    defaults = inspect.signature(LunaVit.__init__).parameters
    variant = dict(variant)
    data, scales = variant.pop("data", {}), variant.pop("train_scales", None)
    if scales:
        shape = recipe(task)["model"]["init_args"]["model_kwargs"]
        data = data | {
            "train_sizes": [shape["img_size"] * scale for scale in scales],
            "patch_size": shape["patch_size"],
        }
    mixer = variant.get("mixer", "luna")
    own = (mixer_defaults(mixer) if mixer in MIXERS else {}) | variant.get("mixer_args", {})
    named = SHELL + MEMORY if mixer == "luna" else SHELL  # others have no memory to read
    model = {"mixer": "luna", "global_pool": "avg", **{name: defaults[name].default for name in named}, **variant}
    if model["global_pool"] is None:
        model["global_pool"] = "both"
    if own:
        model["mixer_args"] = own
    config = configuration(args, task, seed, model, data, TASKS[task]["scaled"])
    images = TASKS[task]["test_images"]
    limit = args.test_images or max(images.values())
    own = {"split": split} if split != "test" else {}  # which is what older results do not say
    return config | own | {"test_images": {scale: min(n, limit) for scale, n in images.items()}}


def execute(run: Run, root: str, work: Path) -> dict[str, Any]:
    """Train and test, or go on from the checkpoint in `work`: what is known of a run."""
    facts = cost(run.config)
    cli, training = train(run, root, work)
    since, split = time.perf_counter(), run.config.get("split", "test")
    accuracy = {}
    for name, images in run.config["test_images"].items():
        mosaics = name == "mosaic"
        scale = 2 if mosaics else int(name)
        accuracy[name] = evaluate(cli, make_data(run.config, root, scale), images, scale, split, mosaics)
    return {"accuracy": accuracy, **facts, **training, "test_seconds": round(time.perf_counter() - since, 1)}


def _parser() -> Parser:
    parser = Parser(
        prog="python -m experiments.compare",
        description="Train mixers, or variants of Luna's block, alike, and write tables and plots. Finished runs are "
        "skipped, stopped ones go on.",
        epilog="tasks: " + "; ".join(f"{name}: {task['title']}. {task['about']}" for name, task in TASKS.items()),
    )
    parser.add_argument("--suite", choices=list(SUITES), default="mixers", help="what to compare")
    parser.add_argument(
        "--split", choices=["val", "test"], default="val", help="test on images held out, or the test set"
    )
    parser.add_argument("--tasks", nargs="+", default=["cifar10", "canvas"], metavar="TASK", help="of those below")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="variants of the suite; all if left out")
    parser.add_argument(
        "--repeat",
        nargs="+",
        metavar="NAME",
        help="variants that seeds after the first are for, or 'all'; by default "
        f"{', '.join(REPEATED['mixers'])}, in the ablation luna",
    )
    parser.add_argument("--test-images", type=at_least(1), metavar="N", help="at most, at each side")
    parser.add_argument("--measure", action="store_true", help="only time training steps; run nothing beside it")
    parser.add_argument("--rounds", type=at_least(1), default=7, help="timed steps of --measure")
    add_run_arguments(parser, "compare", depth=6)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; returns the exit code: 1 if a run failed, 130 after Ctrl-C."""
    parser = _parser()
    args = parser.parse_args(argv)
    titles = {name: (task["title"], task["about"]) for name, task in TASKS.items()}

    def report(out: Path) -> str:
        variants = [*SUITES[args.suite], *DELETED.get(args.suite, [])]
        return write_report(out, args.suite, list(TASKS), variants, titles)

    if not args.measure:
        return do_runs(parser, args, plan, execute, report)
    try:
        runs = plan(args)
        unfinished(runs, args.out)
    except ValueError as error:
        parser.error(error)
    first = {(run.task, run.variant): run for run in reversed(runs)}
    failed = measure(list(reversed(first.values())), args.out, args.rounds)
    print(report(args.out))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
