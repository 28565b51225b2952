"""What weights are worth on other data: `python -m experiments.transfer --help`.

Models that begin with weights, and the same models with random ones, are compared on CIFAR-10 and CamVid: nearest
neighbours and a linear classifier on frozen embeddings of images of 64 px, a linear classifier on frozen patches of
street scenes (`experiments.dense_probe`), and fine-tuning at 64 and 128 px. The recipe of fine-tuning is that of the
task "cifar10" of `experiments.compare`, with as many steps for all, and a third of its rate where there are weights.
"""

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from luna_vision.downstream.probe import open_data, probe_model
from luna_vision.models.factory import training_checkpoint

from .command import Parser, at_least
from .dense_probe import probe
from .measure import fresh_model
from .plots import cell, figure_file
from .runs import Run, add_run_arguments, configuration, do_runs, evaluate, finished, make_data, train, write_table

__all__ = ["execute", "main", "plan"]

KINDS = {"frozen": 64, "finetune64": 64, "finetune128": 128}  # and the side of images, px
RATE = 1.5e-3
SHAPE = {"patch_size": 8}


def plan(args: argparse.Namespace) -> list[Run]:
    """A run for each kind, and each model with and without weights.

    Raises:
        ValueError: A file of weights that does not record its training, or one of another model.
    """
    runs = []
    for kind in args.kinds:
        for name, file in (("luna", args.luna), ("softmax", args.softmax)):
            for weights in (file, None):
                runs.append(_run(args, kind, name, weights))
    return runs


def _run(args: argparse.Namespace, kind: str, name: str, weights: Path | None) -> Run:
    mixer = {"mixer": "luna"} if name == "luna" else {"mixer": "softmax", "mixer_args": {"query_gain": 8.0}}
    side, seed = KINDS[kind], args.seeds[0]
    samples = argparse.Namespace(**vars(args) | {"samples": args.samples or (90_000 if side == 64 else 45_000)})
    config = configuration(
        samples, "cifar10", seed, SHAPE | {"img_size": side} | mixer, {"img_size": side}, ["img_size"]
    )
    config["optimization"]["lr"] = RATE / 3 if weights else RATE
    config["test_images"], config["scenes"], config["weights"] = args.test_images, args.scenes, None
    if weights:
        record = training_checkpoint(weights)
        if not record:
            raise ValueError(f"{weights} does not record its training")
        cfg = record["data"]["cfg"]
        config["data"]["args"] |= {"mean": list(cfg["mean"]), "std": list(cfg["std"])}
        config["weights"] = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
        config["file"] = str(weights)
    config["kind"], config["start"] = kind, name if weights else f"{name}-random"
    return Run("cifar10", f"{kind}-{config['start']}", seed, config)


def begin(config: dict[str, Any]) -> nn.Module:
    """The model of a configuration with its weights, without the head of their classes."""
    model = fresh_model(config).eval()
    if config["weights"]:
        state = {key: x for key, x in load_file(config["file"]).items() if not key.startswith("head.")}
        missing, other = model.load_state_dict(state, strict=False)
        if other or set(missing) - {"head.weight", "head.bias"}:
            raise ValueError(f"{config['file']} is not of this model: {', '.join([*missing, *other][:3])}")
    return model


def execute(run: Run, root: str, work: Path) -> dict[str, Any]:
    """Do a run: what is known of it."""
    config, images = run.config, run.config["test_images"]
    if config["kind"] == "frozen":
        model = begin(config)
        model.reset_classifier(0)
        args = {name: config["data"]["args"][name] for name in ("img_size", "in_chans", "mean", "std")}
        folder = str(Path(root, config["data"]["folder"]))
        found = probe_model(model, open_data("imagefolder", args | {"root": folder}, images and 5 * images, images))
        return {
            "knn": found.knn,
            "linear": found.linear.accuracy,
            "camvid": probe(model, args["mean"], args["std"], Path(root, "camvid"), config["scenes"]),
        }
    overlays = [{"model": {"init_args": {"checkpoint": config["file"]}}}] if config["weights"] else []
    cli, training = train(run, root, work, overlays)
    return {"accuracy": evaluate(cli, make_data(config, root), images or 10_000, split="test"), **training}


def write_report(out: Path) -> str:
    """Write `transfer.md`, `transfer.json` and `transfer.png` from the results that there are; returns the table."""
    done = {(result["config"]["kind"], result["config"]["start"]): result for result in finished(out)}
    if not done:
        return f"no results in {out / 'runs'} yet"
    names = [name for name in ("luna", "luna-random", "softmax", "softmax-random") if any(name == v for _, v in done)]
    heads = ["start", "kNN", "linear", "CamVid patches, %", "mIoU", "fine-tuned, 64 px", "fine-tuned, 128 px"]
    rows = []
    for name in names:
        frozen = done.get(("frozen", name), {})
        scene = frozen.get("camvid") or {}
        shares = [frozen.get("knn"), frozen.get("linear"), scene.get("accuracy"), scene.get("mean_iou")]
        cells = ["-" if share is None else f"{100 * share:.1f}" for share in shares]
        cells += [cell(done.get((kind, name), {}).get("accuracy")) for kind in ("finetune64", "finetune128")]
        rows.append([f"`{name}`", *cells])
    about = "In %, of test images; in brackets, the 95% interval of the binomial (Wilson)."
    text = write_table(out, "transfer", heads, rows, about, list(done.values()))
    kinds = {kind for kind, _ in done}
    columns = {"kNN": "knn", "linear": "linear", "64 px": "finetune64", "128 px": "finetune128"}
    # the kinds that were run
    columns = {title: column for title, column in columns.items() if {column, "frozen" * (column not in KINDS)} & kinds}
    with figure_file(out / "transfer.png", (7, 4)) as axes:
        for i, name in enumerate(names):
            heights = []
            for column in columns.values():
                found = done.get((column, name), {}).get("accuracy") or {}
                heights.append(done.get(("frozen", name), {}).get(column, found.get("accuracy", 0.0)))
            places = [x + (i - (len(names) - 1) / 2) * 0.2 for x in range(len(columns))]
            axes.bar(places, [100 * h for h in heights], 0.19, label=name, color=f"C{i // 2}", alpha=1 - 0.5 * (i % 2))
        axes.set_xticks(range(len(columns)), list(columns))
        axes.set_xlabel("frozen (kNN, linear) and fine-tuned at a side")
        axes.set_ylabel("test accuracy on CIFAR-10 (%)")
        axes.set_ylim(0, 100)
    return text


def _parser() -> Parser:
    parser = Parser(
        prog="python -m experiments.transfer",
        description="Compare models that begin with weights to the same models with random ones, on CIFAR-10 and "
        "CamVid. Finished runs are skipped, stopped ones go on.",
    )
    parser.add_argument("--luna", type=Path, required=True, metavar="FILE", help="best.safetensors of a Luna ViT")
    parser.add_argument("--softmax", type=Path, required=True, metavar="FILE", help="that of the same with softmax")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="what to do")
    parser.add_argument("--test-images", type=at_least(1), metavar="N", help="at most")
    parser.add_argument("--scenes", type=at_least(1), default=120, help="of CamVid, to fit and to test, at most")
    add_run_arguments(parser, "transfer", depth=8)
    parser.set_defaults(width=128)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; returns the exit code: 1 if a run failed."""
    torch.set_num_threads(1)
    parser = _parser()
    return do_runs(parser, parser.parse_args(argv), plan, execute, write_report)


if __name__ == "__main__":
    sys.exit(main())
