"""`load`: a trained model, ready for use, from one file."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from timm.data.model_config import resolve_input_data_config
from torch import nn

from .downstream.detection import detector_of
from .downstream.segmentation import has_background, segmenter_of
from .images.transforms import EvalTransform, per_channel
from .images.values import model_values
from .models.checkpoints import PIXEL_CFG, load_whole
from .models.factory import LOCAL, load_model, training_checkpoint

__all__ = ["Loaded", "load"]


class Loaded(NamedTuple):
    """The result of `load`."""

    model: nn.Module
    """In eval mode, on the CPU."""
    transform: EvalTransform | None
    """Prepares an image file, PIL image or array as validation did; None for a `crop_mode` of timm that this package
    does not train with."""
    class_names: list[str] | None
    """The name of each label, in the order of the labels; None if they are unknown."""


def load(path: str | os.PathLike) -> Loaded:
    """Load a trained model, the transform of its images, and the names of its classes.

        model, transform, class_names = luna_vision.load("best.safetensors")
        logits = model(transform("photo.jpg")[None])
        class_names[logits.argmax()]

    For a model of whole slides, images keep their size; `luna_vision.execution.encode` reads files by rows. For a
    detector or a segmenter, images keep their size, too, and have pixels in [0, 1]. The first name is "background",
    unless a segmenter was trained without one. A detector takes a list of images: ``model([transform("photo.jpg")])``.

    Args:
        path: `best.safetensors` or a checkpoint (`best.ckpt`) of a training, or a folder of `export --format hf`.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: The file does not record its model, or has weights of another one.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    if path.is_dir():
        source = {"name": f"{LOCAL}{path}"}
    else:
        run = training_checkpoint(path)
        if not run:
            raise ValueError(
                f"{path} is broken, or does not record its model: load takes best.safetensors or best.ckpt of a "
                "training, or a folder of export --format hf"
            )
        if "pyramid_channels" in run["hyper_parameters"]:
            return _load_dense(path, run)
        source = {"checkpoint": path}
    model = load_model(**source, device="cpu")
    return Loaded(model, _transform_of(model), model.pretrained_cfg.get("label_names"))


def _load_dense(path: Path, run: dict[str, Any]) -> Loaded:
    """Load a detector or a segmenter; both normalise images themselves."""
    hp = run["hyper_parameters"]
    started = ("pretrained", "checkpoint_path")  # the weights before training
    kwargs = {name: value for name, value in (hp["model_kwargs"] or {}).items() if name not in started}
    model = (detector_of if "detector" in hp else segmenter_of)(hp | {"model_kwargs": kwargs})
    load_whole(model, path, hp["model_name"])
    cfg = run.get("data", {}).get("cfg", {})
    backbone = model.backbone.pyramid_backbone if "detector" in hp else model.backbone
    known = {name: cfg[name] for name in PIXEL_CFG if name in cfg}
    backbone.body.pretrained_cfg = backbone.body.pretrained_cfg | known  # for images that are streamed
    names = cfg.get("label_names")
    if names and ("detector" in hp or has_background(hp)):
        names = ["background", *names]
    values = model_values(cfg, (0.5,) * hp["in_chans"])  # as the data modules have it
    return Loaded(model.eval(), EvalTransform(hp["in_chans"], values=values), names)


def _transform_of(model: nn.Module) -> EvalTransform | None:
    """The transform of a timm model's images, from its `pretrained_cfg`."""
    cfg = resolve_input_data_config(model)
    in_chans, *size = cfg["input_size"]
    squash = (cfg["crop_mode"], cfg["crop_pct"]) == ("squash", 1.0)
    if not (squash or cfg["crop_mode"] == "center"):
        return None
    crop_pct = None if squash else cfg["crop_pct"]
    mean, std = (per_channel(name, cfg[name], in_chans) for name in ("mean", "std"))
    values = model_values(model.pretrained_cfg, mean)
    size = None if "slides" in model.pretrained_cfg else tuple(size)
    return EvalTransform(in_chans, size, mean, std, crop_pct, cfg["interpolation"], values)
