"""Learning without labels, on CIFAR-10: `python -m experiments.unlabelled RUN --help`.

Runs of the commands of the package, in a folder of their own, each resumable by the same command, and what they are
worth: nearest neighbours and a linear classifier on the frozen embeddings (all training images, the test images), and a
linear classifier of CamVid's patches. All models have width 96, depth 6 and 64 patches of 4 x 4.

    teacher      a softmax ViT with labels          distill, distill_tiny   its features, on images of CIFAR-10 or of
    supervised   a Luna ViT with labels                                     Tiny-ImageNet, without labels
    random       a Luna ViT as it begins            lejepa                  images of CIFAR-10 alone
    finetune_X   trained further with labels        convert                 the teacher as a Luna ViT

`RUN=report` prints a table of all results.
"""

import json
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import luna_vision
from luna_vision.utils.files import write_json
from luna_vision.utils.record import machine

from .command import Parser, at_least

SHAPE = {"patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3, "stem": "patch"}
CPU = ["--trainer.precision=bf16-mixed", "--model.compile=true", "--data.num_workers=0"]
RESULTS = Path(__file__).parents[1] / "docs" / "results" / "unlabelled"
RUNS = ("teacher", "supervised", "random", "distill", "distill_tiny", "lejepa", "convert")
FINETUNED = tuple(f"finetune_{name}" for name in ("distill", "distill_tiny", "lejepa", "convert"))


def weights_of(name: str, args: Namespace) -> Path:
    """The weights that a run leaves."""
    out = args.out / f"{name}-seed{args.seed}"
    if name == "convert":
        return sorted(out.glob("[0-9]_*.safetensors"))[-1]
    return out / "version_0" / "checkpoints" / "best.safetensors"


def arguments(prefix: str = "model.model_kwargs", **kwargs: Any) -> list[str]:
    """Options for the arguments of a model."""
    words = {name: x if isinstance(x, str) else json.dumps(x) for name, x in (SHAPE | kwargs).items()}
    return [f"--{prefix}.{name}={word}" for name, word in words.items()]


def command(name: str, args: Namespace) -> list[str]:
    """The words of `luna-vision` for a run."""
    cifar, out = args.data / "cifar10", args.out / f"{name}-seed{args.seed}"
    epochs = [f"--trainer.max_epochs={args.epochs}"]
    every = [*CPU, f"--seed_everything={args.seed}", f"--data.seed={args.seed}", "--resume"]
    teacher = weights_of("teacher", Namespace(**vars(args) | {"seed": 0}))
    unlabelled = ["--out", str(out), "--labels", str(cifar), "--img-size", "32", "--batch-size", "128"]
    small = ["--data.augmentation=albumentations", "--data.val_fraction=0.02"]
    if name in ("teacher", "supervised") or name.startswith("finetune_"):
        kwargs: dict[str, Any] = {"mixer": "softmax"} if name == "teacher" else {"memory_len": 16}
        begin = []
        if name.startswith("finetune_"):
            start = weights_of(name.removeprefix("finetune_"), args)
            recorded = luna_vision.models.factory.training_checkpoint(start)["hyper_parameters"]["model_kwargs"]
            kwargs, begin = (
                {key: value for key, value in recorded.items() if key != "img_size"},
                [
                    f"--model.checkpoint={start}",
                    "--model.lr=5e-4",
                ],
            )
        config = Path(__file__).parents[1] / "configs" / "cifar10.yaml"
        data = ["--data=ImageFolderDataModule", f"--data.root={cifar}", "--data.crop_pct=null", "--data.batch_size=128"]
        place = [f"--trainer.default_root_dir={out}", f"--name={out.name}"]
        logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(out.parent), "name": out.name}}
        words = [*data, *place, f"--trainer.logger={json.dumps(logger)}", "--test_after_fit=true", *begin]
        recipe = ["--model.warmup_epochs=2", "--trainer.callbacks.decay=0.999", "--trainer.devices=1"]
        return ["fit", "--config", str(config), *words, *recipe, *arguments(**kwargs), *epochs, *every]
    if name.startswith("distill"):
        images = cifar / "train" if name == "distill" else args.data / "tiny_imagenet" / "train"
        student = arguments("model.init_args.model_kwargs", memory_len=16)
        given = ["--data", str(images), "--teacher-checkpoint", str(teacher), *unlabelled, *small]
        return ["distill", *given, "--model", "luna_vit_tiny", *student, *epochs, *every]
    if name == "lejepa":
        student = arguments("model.init_args.model_kwargs", memory_len=16)
        views = ["--data.local_views=4", "--data.local_size=16", "--data.patch_size=4", "--data.val_fraction=0.02"]
        given = ["--data", str(cifar / "train"), *unlabelled, *views, "--model.projector_hidden=512"]
        return ["pretrain", *given, "--model", "luna_vit_tiny", *student, *epochs, *every]
    given = ["--data", str(cifar / "train"), "--out", str(out), "--img-size", "32", "--batch-size", "128", *small]
    steps = [str(max(1, round(share * args.epochs * 383))) for share in (0.15, 0.7, 0.15)]
    every = [word for word in every if word != "--resume"]  # it resumes by itself
    return ["convert", "--vit", str(teacher), *given, "--steps", *steps, "--sizes", "24", "32", "40", *every]


def probe(weights: Path | None, args: Namespace) -> dict[str, Any]:
    """What `luna-vision probe` finds on CIFAR-10."""
    file = args.out / "probe.json"
    words = ["--data", "imagefolder", "--root", str(args.data / "cifar10"), "--img-size", "32", "--out", str(file)]
    words += ["--num-train", str(args.images), "--num-test", str(args.images)] if args.images else []
    if weights is None:
        shape = [f"{name}={value}" for name, value in (SHAPE | {"memory_len": 16, "global_pool": "both"}).items()]
        words += ["--model", "luna_vit_tiny", "--model-args", *shape]
    else:
        words += ["--checkpoint", str(weights)]
    run(["probe", *words])
    found = json.loads(file.read_text())
    return {"knn": found["knn"]["top1"], "linear": found["linear"]["top1"], "images": found["images"]}


def camvid(weights: Path | None, args: Namespace) -> dict[str, float] | None:
    """How well a linear classifier names CamVid's patches; None without the data."""
    from .dense_probe import fit, patches, score

    root = args.data / "camvid"
    if not (root / "train").is_dir():
        return None
    if weights is None:
        model = luna_vision.models.factory.load_model(
            "luna_vit_tiny", SHAPE | {"memory_len": 16, "num_classes": 0, "global_pool": "both"}, device="cpu"
        )
    else:
        model = luna_vision.load(weights).model
    cfg = model.pretrained_cfg
    config = {"data": {"args": {"mean": cfg["mean"], "std": cfg["std"]}}, "model": {"patch_size": SHAPE["patch_size"]}}
    (x, y), (held, labels) = (patches(model, config, root, split, args.scenes) for split in ("train", "val"))
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    weight, bias = fit((x - mean) / std, y)
    predicted = (((held - mean) / std) @ weight.T + bias).argmax(1)
    return score(predicted, labels)


def run(words: list[str]) -> None:
    """A command of the package; its output goes to the terminal."""
    print("luna-vision", *words, flush=True)
    start = "from luna_vision.cli.main import main; main()"
    subprocess.run([sys.executable, "-c", start, *words], check=True)


def report(results: Path) -> None:
    """Print all results as a table in Markdown."""
    columns = ("run", "seed", "epochs", "kNN", "linear", "accuracy", "CamVid patches, mIoU", "hours")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for file in sorted(results.glob("*.json")):
        found = json.loads(file.read_text())
        scene = (found["camvid"] or {}).get("mean_iou")
        shown = [found["probe"]["knn"], found["probe"]["linear"], found["test_acc1"], scene]
        cells = ["" if value is None else f"{100 * value:.2f}" for value in shown]
        print(f"| {found['run']} | {found['seed']} | {found['epochs']} | {' | '.join(cells)} | {found['hours']:.2f} |")


def accuracy(name: str, args: Namespace) -> float | None:
    """The accuracy on the test images that a run with labels has logged."""
    import csv

    files = sorted((args.out / f"{name}-seed{args.seed}").glob("version_*/metrics.csv"))
    rows = [row for file in files for row in csv.DictReader(file.open(newline="")) if row.get("test_acc1")]
    return float(rows[-1]["test_acc1"]) if rows else None


def main() -> None:
    """Run the command."""
    parser = Parser(prog="python -m experiments.unlabelled", description=__doc__.partition("\n")[0])
    parser.add_argument("run", choices=[*RUNS, *FINETUNED, "report"], metavar="RUN", help="see the file, or report")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with cifar10, tiny_imagenet and camvid")
    parser.add_argument("--out", type=Path, default=Path("runs/unlabelled"), help="folder of the runs")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of weights and augmentation")
    parser.add_argument("--epochs", type=at_least(1), default=30, help="passes over 50,000 images")
    parser.add_argument("--scenes", type=at_least(1), default=100, help="of CamVid, for each split")
    parser.add_argument("--images", type=at_least(1), help="of the probes at most, for each split; by default all")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="print the command and stop")
    args, overrides = parser.parse_known_args()
    if args.run == "report":
        report(args.results)
        return
    words = [] if args.run == "random" else [*command(args.run, args), *overrides]
    if args.dry_run:
        print("luna-vision", *words)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    if words:
        run(words)
    hours = (time.perf_counter() - begin) / 3600
    weights = weights_of(args.run, args) if words else None
    result = {
        "run": args.run,
        "seed": args.seed,
        "epochs": args.epochs,
        "overrides": overrides,
        "hours": hours,
        "test_acc1": accuracy(args.run, args),
        "probe": probe(weights, args),
        "camvid": camvid(weights, args),
        "machine": machine("cpu"),
    }
    if args.run == "convert":
        stages = json.loads((args.out / f"convert-seed{args.seed}" / "report.json").read_text())["stages"]
        result["conversion"] = stages
    write_json(args.results / f"{args.run}-seed{args.seed}.json", result)


if __name__ == "__main__":
    main()
