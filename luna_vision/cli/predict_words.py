"""The short form of predict: `luna-vision predict PHOTO ... [--checkpoint FILE]`, without the YAML of a run."""

import json
from pathlib import Path
from typing import Any

from .. import data as modules
from ..models.checkpoints import image_cfg, training_checkpoint
from ..models.weights import SHIPPED, weights_file
from ..utils.errors import UserError
from .recipe import option_words

__all__ = ["with_weights"]

# by the task that weights were trained by: the data module that reads images for it, and what of its hyperparameters
# the predictions depend on
TASKS = {
    "ClassificationTask": ("ImageFolderDataModule", ("loss",)),
    "MultiLabelTask": ("MultiLabelDataModule", ()),
    "SlideTask": ("SlideDataModule", ("loss",)),
    "DetectionTask": (
        "DetectionDataModule",
        ("detector", "strides", "pyramid_channels", "anchor_sizes", "min_size", "max_size", "detector_kwargs"),
    ),
    "SegmentationTask": ("SegmentationDataModule", ("stride", "pyramid_channels", "background")),
}
IN_PLACE = dict.fromkeys(("ConversionTask", "DistillationTask"), "ClassificationTask")


def with_weights(args: list[str]) -> list[str]:
    """Spell the short form out: paths after `predict`, and `--checkpoint FILE`; other command lines stay as they are.

    All that is needed is in the checkpoint: a `config.yaml`, which is code, is not read. Without a checkpoint, the
    weights that come with the package are used.

    Raises:
        UserError: There are no such weights, they do not say what their outputs mean, or there are no paths.
    """
    if "predict" not in args:
        return args
    start = args.index("predict") + 1
    end = next((i for i in range(start, len(args)) if args[i].startswith("-")), len(args))
    paths, rest, checkpoint = args[start:end], args[end:], None
    for i, word in enumerate(rest):
        if word == "--checkpoint" and i + 1 < len(rest):
            checkpoint, rest = Path(rest[i + 1]), rest[:i] + rest[i + 2 :]
        elif word.startswith("--checkpoint="):
            checkpoint, rest = Path(word.partition("=")[2]), rest[:i] + rest[i + 1 :]
        else:
            continue
        break
    if not paths and checkpoint is None:
        return args
    if any(word.partition("=")[0] in ("-c", "--config", "--ckpt_path") for word in rest):
        raise UserError("predict takes either paths and --checkpoint, or --config, --ckpt_path and --data.predict_path")
    if not paths:
        raise UserError("predict --checkpoint needs images: luna-vision predict PATH ... --checkpoint FILE")
    return [*args[:start], *_words(checkpoint), f"--data.predict_path={json.dumps(paths)}", *rest]


def _words(checkpoint: Path | None) -> list[str]:
    """What stands for a checkpoint in the long form."""
    if checkpoint is None:
        if not SHIPPED:
            raise UserError("predict needs weights: give --checkpoint")
        checkpoint = weights_file(SHIPPED[0])
    if not checkpoint.is_file():
        raise FileNotFoundError(f"--checkpoint: there is no file {checkpoint}")
    run = training_checkpoint(checkpoint)
    task = _task_of(run)
    if task is not None and not run["hyper_parameters"]["num_classes"]:
        raise UserError(
            f"{checkpoint} was trained without labels, and has no classes to predict: use luna-vision embed"
        )
    if task not in TASKS:
        raise UserError(
            f"{checkpoint} does not say how to prepare images and what its outputs mean: give --config config.yaml of "
            "its run, with --ckpt_path"
        )
    return option_words(_options(task, run, checkpoint))


def _task_of(run: dict[str, Any]) -> str | None:
    """The task that a checkpoint was trained by, or that predicts in its place; None if it cannot be known."""
    if "cfg" not in run.get("data", {}):
        return None
    hp, data = run["hyper_parameters"], run["data"]
    if "task" in run:
        return IN_PLACE.get(run["task"], run["task"])
    # older files
    if "pyramid_channels" in hp:
        return "DetectionTask" if "detector" in hp else "SegmentationTask"
    if "bptt_steps" in hp:
        return "SequenceTask"
    if "slides" in data["cfg"]:
        return "SlideTask"
    if data.get("name") == "MultiLabelDataModule":
        return "MultiLabelTask"
    # with data of the user's own, images may have had several labels
    known = hp.get("loss", "ce") == "ce" or data.get("name") in modules.__all__
    return "ClassificationTask" if known else None


def _options(task: str, run: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Model and data that are recorded in weights."""
    hp, cfg = run["hyper_parameters"], image_cfg(run)
    data, arguments = TASKS[task]
    started = ("pretrained", "checkpoint_path")  # the weights before training
    options = {
        "name": "predict",
        "model": task,
        "model.model_name": hp["model_name"],
        "model.model_kwargs": {k: v for k, v in (hp.get("model_kwargs") or {}).items() if k not in started},
        "model.num_classes": hp["num_classes"],
        "model.in_chans": hp["in_chans"],
        **{f"model.{name}": "null" if hp[name] is None else hp[name] for name in arguments if name in hp},
        "model.checkpoint": str(checkpoint),
        "data": data,
        "data.root": str(checkpoint / "none"),  # has no training images, so that the checkpoint says the classes
        "data.in_chans": hp["in_chans"],
    }
    if "pyramid_channels" in hp:  # the model normalises images, and takes them in any size
        return options
    squash, slides = (cfg.get("crop_mode"), cfg["crop_pct"]) == ("squash", 1.0), cfg.get("slides")
    return {
        **options,
        "data.img_size": cfg["input_size"][1:],
        "data.mean": cfg["mean"],
        "data.std": cfg["std"],
        **({"data.crop_pct": "null" if squash else cfg["crop_pct"]} if slides is None else {}),
        **{f"data.{name}": value for name, value in (slides or {}).items()},
    }
