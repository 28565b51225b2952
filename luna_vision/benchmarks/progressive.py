"""Training at several sides or at one, with the same number of patches: `python -m luna_vision.benchmarks.progressive`.

Both are runs of `train.py` with `configs/canvas_progressive.yaml`: as it is, and with the largest of its sides alone.
Each batch has as many patches as any other (up to rounding), and both runs have as many batches, so that what they see
differs in sides, and in that smaller images are more of them. Both are then tested on canvases of 1, 2 and 4 times the
largest side, which nothing was trained at, of as many items, of the same size.
"""

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from luna_vision.cli.common import run_command
from luna_vision.data import CanvasDataModule
from luna_vision.tasks import ClassificationTask

from .small_runs import error_bars
from .train_runs import Config, complete, figure_file, parser, place, read_config, run_folder

__all__ = ["main", "plan"]

TEST_CANVASES = {1: 2000, 2: 1000, 4: 500}  # at each multiple of the side


def plan(configs: Path, work: Path, root: Path, epochs: int | None = None) -> dict[str, Config]:
    """The runs by name. An epoch of both is as many batches as all images make at the sides of the config."""
    config = read_config(configs / "canvas_progressive.yaml")
    progressive = place("progressive", config, work, root, epochs)
    data = progressive["data"]["init_args"]
    steps = len(CanvasDataModule(**data).train_dataloader())
    fixed = {
        **config,
        "data": {**config["data"], "init_args": {**config["data"]["init_args"], "train_sizes": None}},
        "trainer": {**config["trainer"], "limit_train_batches": steps},
    }
    return {"fixed": place("fixed", fixed, work, root, epochs), "progressive": progressive}


def score_larger(config: Config) -> dict[str, Any]:
    """Accuracy of a run's best weights at multiples of its side."""
    checkpoint = run_folder(config) / "checkpoints" / "best.ckpt"
    task = ClassificationTask.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = Trainer(logger=False, enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False)
    arguments = config["data"]["init_args"]
    accuracy = {}
    for scale, canvases in TEST_CANVASES.items():
        larger = {"side": arguments["side"] * scale, "num_test": min(canvases, arguments["num_test"])}
        larger |= {"train_sizes": None, "eval_batch_size": max(1, arguments["batch_size"] // scale**2)}
        data = CanvasDataModule(**{**arguments, **larger})
        score = trainer.test(task, data, verbose=False)[0]["test_acc1"]
        accuracy[str(scale)] = {"side": larger["side"], "canvases": larger["num_test"], "accuracy": score}
    return {"larger": accuracy}


def draw(runs: dict[str, dict[str, Any]], out: Path) -> None:
    """Accuracy against the side of the test canvases, with 95% intervals."""
    with figure_file(out, (6, 4)) as axes:
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


def main(argv: list[str] | None = None) -> int:
    """Do what is missing, and print the accuracies. Returns the exit code."""
    args = parser(
        "progressive",
        "Canvases at several sides or at one, with the same number of patches. The same "
        "command goes on with what was stopped.",
    ).parse_args(argv)
    runs = plan(args.configs, args.work, args.root, args.epochs)
    done = complete(args.out / "results.json", runs, args.work, args.root, score_larger)
    draw(done, args.out / "results.png")
    for name, row in done.items():
        scores = "  ".join(f"{at['side']} px {at['accuracy']:.4f}" for at in row["larger"].values())
        print(f"{name:<12} test accuracy at {scores}  {row['seconds']:.0f} s of training")
    return 0


if __name__ == "__main__":
    run_command(main)
