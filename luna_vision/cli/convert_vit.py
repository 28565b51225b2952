"""``luna-vision convert --vit``: a Luna ViT from a softmax ViT, in stages."""

import sys
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.errors import UserError
from .recipe import Recipe, common_options, fit_words

if TYPE_CHECKING:
    from torch import Tensor

    from ..tasks import ConversionTask
    from .train import LunaCLI

# the options of `fit` in each stage
STAGES: dict[str, dict[str, Any]] = {
    "attention": {"model.init_args.stage": "attention", "model.init_args.lr": 1e-3},
    "features": {"model.init_args.stage": "features", "model.init_args.lr": 5e-4},
    "sizes": {"model.init_args.stage": "features", "model.init_args.lr": 1e-4},
}
STEPS = (3000, 20000, 5000)
REPORT_IMAGES = 1000


def main(words: list[str]) -> int | None:
    """Convert, and return the exit code."""
    if {"-h", "--help"} & set(words):  # also where --vit has no name yet
        _parser().print_help()
        return 0
    args, overrides = _parser().parse_known_args(words)
    from .train import guarded, quiet

    quiet()
    return guarded(lambda: _convert(args, overrides))


def _parser() -> Recipe:
    parser = Recipe(
        "convert",
        usage="--vit NAME_OR_FILE --data FOLDER --out FOLDER [options] [options of fit]",
        description="Make a Luna ViT of a softmax ViT: same width and depth, linear in the number of patches. First "
        "every block learns to imitate an attention, then the whole network the features and predictions, then at "
        "several image sizes. The same command continues where it was stopped.",
        epochs=False,
    )
    parser.add_argument(
        "--vit", required=True, metavar="NAME_OR_FILE", help="a plain ViT of timm, or a file of a training here"
    )
    parser.add_argument("--vit-checkpoint", metavar="FILE", help="weights of the name (default: timm's, from the hub)")
    parser.add_argument("--memory-len", type=int, default=32, metavar="N", help="memory slots (default: %(default)s)")
    parser.add_argument(
        "--steps",
        type=int,
        nargs=3,
        default=STEPS,
        metavar="N",
        help="optimizer steps of the three stages; 0 leaves one out (default: 3000 20000 5000)",
    )
    parser.add_argument(
        "--sizes", type=int, nargs="+", metavar="N", help="of the last stage (default: 3/4, 1 and 5/4 of the size)"
    )
    return parser


def _convert(args: Any, overrides: list[str]) -> None:
    from ..models.vit_init import load_vit, luna_arguments
    from ..tasks.checkpoints import last_checkpoint
    from ..tasks.reporting import export_weights, save_weights
    from ..tasks.teacher import check_teacher, fit_to_size, load_feature_teacher, recorded_kwargs
    from ..utils.files import write_json
    from ..utils.fingerprint import describe

    name, file = _source(args)
    kwargs = recorded_kwargs(name, file)
    check_teacher(name, file, kwargs)
    teacher = load_feature_teacher(name, file, kwargs, head=True)
    vit, cfg = teacher.model, teacher.model.pretrained_cfg
    side = args.img_size or min(cfg["input_size"][1:])
    size = fit_to_size(vit, (side, side))
    options = common_options(args) | {
        "model.init_args.model_kwargs": luna_arguments(vit, args.memory_len) | {"img_size": list(size)},
        "model.init_args.num_classes": vit.num_classes,
        "model.init_args.teacher_model": name,
        "model.init_args.teacher_checkpoint": file,
        "data.init_args.img_size": size[0],
        "data.init_args.patch_size": vit.patch_embed.patch_size[0],
        "data.init_args.in_chans": teacher.channels,
        "data.init_args.mean": list(cfg["mean"]),
        "data.init_args.std": list(cfg["std"]),
    }
    # all of a run, with the user's own options: what is wrong is found before anything is written
    whole = _build(options, overrides, run=False)
    task, data = whole.model, whole.datamodule
    data.prepare_data()
    data.setup("fit")
    vars(task)["teacher"] = teacher
    task.check_data(data, "fit")

    source = {"vit": name, "weights": describe(vit)["weights"], "memory_len": args.memory_len}
    result = _known(args.out / "report.json", source)
    write_json(args.out / "report.json", result)  # first, so that a start of another ViT is never taken for this one's
    start = args.out / "0_initial.safetensors"
    if not start.exists():
        load_vit(task.model, vit)
        save_weights(task, data, start)
    labelled = bool(vit.num_classes)
    if "initial" not in result["stages"]:
        result["stages"]["initial"] = _report(task, start, data, labelled)
        write_json(args.out / "report.json", result)
    for number, (stage, steps) in enumerate(zip(STAGES, args.steps, strict=True), 1):
        end = args.out / f"{number}_{stage}.safetensors"
        if steps and not end.exists():
            own = {"trainer.max_steps": steps, "model.init_args.checkpoint": str(start), "resume": True}
            if stage == "sizes":
                own["data.init_args.train_sizes"] = _sizes(args.sizes, size[0], vit.patch_embed.patch_size[0])
            where = common_options(args, args.out / stage)
            run = _build(options | where | STAGES[stage] | own, overrides, run=True)
            export_weights(last_checkpoint(run.trainer), end)
        if end.exists():
            start = end
            result["stages"][stage] = _report(task, end, data, labelled)
            write_json(args.out / "report.json", result)
    _show(result["stages"])
    print(f"load it with:    import luna_vision; model, transform, class_names = luna_vision.load({str(start)!r})")


def _source(args: Any) -> tuple[str, str | None]:
    """The name of the ViT and the file of its weights, if there is one."""
    from ..models.factory import training_checkpoint

    if not Path(args.vit).is_file():
        return args.vit, args.vit_checkpoint
    recorded = training_checkpoint(args.vit).get("hyper_parameters", {}).get("model_name")
    if recorded is None:
        raise UserError(f"{args.vit} does not say which model it is of: give --vit NAME --vit-checkpoint {args.vit}")
    return recorded, args.vit


def _build(options: dict[str, Any], overrides: list[str], run: bool) -> "LunaCLI":
    from . import train

    words = fit_words("convert_vit.yaml", options, overrides)
    if run:
        sys.argv[1:] = words  # with several devices, Lightning starts the other processes with these arguments
        return train.build()
    words = [word for word in words[1:] if not word.startswith("--resume")]
    before, sys.argv[1:] = sys.argv[1:], words
    try:
        return train.build(run=False)
    finally:
        sys.argv[1:] = before


def _known(path: Path, source: dict[str, Any]) -> dict[str, Any]:
    """The report of the conversion so far."""
    import json

    if not path.exists():
        return {"source": source, "stages": {}}
    found = json.loads(path.read_text(encoding="utf-8"))
    if found.get("source") != source:
        raise UserError(f"{path.parent} has the conversion of another ViT, or to another memory: give another --out")
    return found


def _sizes(given: list[int] | None, side: int, patch: int) -> list[int]:
    """The sides of the last stage, in whole patches."""
    return given or sorted({max(1, round(side * share / patch)) * patch for share in (0.75, 1.0, 1.25)})


def _report(task: "ConversionTask", weights: Path, data: Any, labelled: bool) -> dict[str, Any]:
    from safetensors.torch import load_file

    from ..tasks.conversion import report

    task.model.load_state_dict(load_file(weights))
    return report(task.model, task.teacher, _held_out(data), labelled)


def _held_out(data: Any) -> "chain[Tensor]":
    """Batches of at most `REPORT_IMAGES` held-out images."""
    loader = data.val_dataloader() or data.train_dataloader()
    count = -(-REPORT_IMAGES // data.eval_batch_size)
    return chain(images for (images,), _ in zip(loader, range(count), strict=False))


def _show(stages: dict[str, dict[str, Any]]) -> None:
    """Print the report: a line for each block, with its error after each stage."""
    print("error of each block's attention, given the ViT's patches:")
    print("block " + "".join(f"{name:>11}" for name in stages))
    for block, errors in enumerate(zip(*(found["block_errors"] for found in stages.values()), strict=True)):
        print(f"{block:<6}" + "".join(f"{error:11.4f}" for error in errors))
    for key, what in (("cosine", "cosine of embeddings with the ViT's"), ("agreement", "agreement of predictions")):
        if all(key in found for found in stages.values()):
            print(f"{what}: " + ", ".join(f"{name} {found[key]:.4f}" for name, found in stages.items()))
