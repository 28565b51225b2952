"""Models by name, with their weights: as timm builds them, and as a training or an exported folder has left them."""

import difflib
import json
from collections.abc import Callable
from pathlib import Path
from textwrap import shorten
from typing import Any

import timm
import torch
from safetensors import safe_open
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg, is_model_in_modules, split_model_name_tag
from timm.models._input import get_model_input_config
from torch import nn

from ..utils.errors import UserError, arguments_of, one_line
from ..utils.text import printable
from .checkpoints import load_weights
from .luna_vit import LunaVit

__all__ = [
    "LOCAL",
    "PIXELS",
    "PIXEL_CFG",
    "RANDOM_WEIGHTS",
    "build_model",
    "check_arguments",
    "check_model_name",
    "image_cfg",
    "knows_its_images",
    "load_model",
    "pick_device",
    "random_weights",
    "sized",
    "training_checkpoint",
]

RANDOM_WEIGHTS = "random_weights"  # what config.json of an exported folder calls a model that was not trained
LOCAL = "local-dir:"  # what the name of a folder begins with, for timm
# what a checkpoint may say of its images, see `timm_cfg` of the data modules
IMAGE_CFG = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "num_classes", "label_names")
PIXEL_CFG = ("value_range", "nodata", "fill")  # likewise, of numbers in files, see `luna_vision.images.values`
PIXELS = "pixels"  # where config.json of an exported folder has these, which timm does not know


def check_model_name(name: str) -> None:
    """Raise a `UserError` that names similar models, or the tags that there are, unless timm knows this one."""
    architecture, tag = split_model_name_tag(name)
    if tag and timm.is_model(architecture) and name not in get_arch_pretrained_cfgs(architecture):
        known = ", ".join(sorted(get_arch_pretrained_cfgs(architecture)))
        raise UserError(f"there is no {name}, but {known or architecture}")
    if not timm.is_model(name):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else "; timm.list_models() lists all of them"
        raise UserError(f"unknown model name {name!r}{hint}")


def check_arguments(num_classes: Any = None, **model_kwargs: Any) -> None:
    """Raise a `UserError` unless `num_classes` is a number or None, and there is no checkpoint among the others."""
    if num_classes is not None and (type(num_classes) is not int or num_classes < 0):
        raise UserError(f"num_classes must be a whole number of at least 0, got {num_classes!r}")
    if "checkpoint_path" in model_kwargs:  # timm would load it past the filter, and nobody know that there are weights
        raise UserError("checkpoint_path is no argument of a model here: give the file as checkpoint")


def build_model(
    name: str, num_classes: int | None = None, in_chans: int | None = None, **model_kwargs: Any
) -> nn.Module:
    """`timm.create_model`, with an error that names the mistake.

    Args:
        name: Of the model.
        num_classes: 0 for no head; None for the model's own.
        in_chans: Channels of the images; None for the model's own, which are 3.
        **model_kwargs: Further arguments of the model.

    Raises:
        UserError: An unknown name or argument, a checkpoint among them, or there are no pretrained weights.
        OSError: They cannot be fetched.
    """
    check_model_name(name)
    check_arguments(num_classes, **model_kwargs)
    cfg = get_pretrained_cfg(name)
    elsewhere = model_kwargs.keys() & {"pretrained_cfg", "pretrained_cfg_overlay"}
    if model_kwargs.get("pretrained") and not (elsewhere or (cfg and cfg.has_weights)):
        raise UserError(f"model_kwargs pretrained: there are no pretrained weights of {name}")
    try:
        # of numbers, heads that do not divide a width among them, timm says by assertions what it does not take
        with arguments_of(f"model_kwargs {model_kwargs} do not fit {name}", ArithmeticError, AssertionError):
            return timm.create_model(name, num_classes=num_classes, in_chans=in_chans, **model_kwargs)
    except OSError as error:
        raise OSError(f"cannot read the weights of {name}: {one_line(error)}") from error


def sized(name: str, model_kwargs: dict[str, Any] | None, img_size: int | list[int] | None) -> dict[str, Any]:
    """The arguments of a model with the size of the images, side or [height, width] in pixels, where it takes one.

    Those of timm's models do that are built for one size, and a Luna ViT, which only writes it down.
    """
    check_model_name(name)
    cfg = get_pretrained_cfg(name)
    takes_one = cfg is not None and (cfg.fixed_input_size or is_model_in_modules(name, ["luna_vit"]))
    return ({"img_size": img_size} if takes_one and img_size is not None else {}) | (model_kwargs or {})


def pick_device(name: str) -> torch.device:
    """The device that is called "cpu", "cuda" or "auto", which takes a GPU if there is one.

    Raises:
        UserError: "cuda" where there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: torch finds no CUDA device")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def load_model(
    name: str | None = None,
    arguments: dict[str, Any] | None = None,
    checkpoint: str | Path | None = None,
    device: str = "auto",
    default: str = "luna_vit_small",
    say: Callable[[str], object] = lambda line: None,
    **overrides: Any,
) -> nn.Module:
    """A model with its weights, in eval mode.

    A checkpoint of a training, and the weights that it exported, say which model they hold and with which arguments;
    `name` and `arguments` go over them. They also say what their images were like (size, normalisation, names of the
    classes), which goes into the model's `pretrained_cfg`.

    Args:
        name: Of timm, or `local-dir:FOLDER` with what `save_for_hf` wrote; by default what the checkpoint holds.
        arguments: Of the model, such as `memory_len`.
        checkpoint: Weights: .safetensors, a timm or a Lightning checkpoint.
        device: See `pick_device`.
        default: The name where neither `name` nor the checkpoint has one.
        say: Is told what has been loaded, and warned of a model without weights.
        **overrides: Arguments of the model that go over all others.

    Raises:
        UserError: An unknown model or argument, or a checkpoint of another model or with another head: with
            `num_classes=0` there is none.
        OSError: There is no such checkpoint.
    """
    given = arguments or {}
    check_arguments(**given)  # where the head is left out, too
    run = training_checkpoint(checkpoint) if checkpoint else {}
    recorded = run.get("hyper_parameters", {})
    no_weights = random_weights(name, given, checkpoint)
    name = name or recorded.get("model_name") or default
    own = _recorded_arguments(recorded) if name == recorded.get("model_name") else {}
    arguments = own | given | overrides
    if _folder(name):
        model = _from_folder(name, arguments, weights=not checkpoint)
    else:
        model = build_model(name, **arguments)
    if checkpoint:
        load_weights(model, checkpoint, say=lambda text: say(printable(text)), fresh_head=False)
        _set_images(model, run)
    elif no_weights:
        say(f"WARNING: {name} has RANDOM WEIGHTS: what comes out says nothing about the images. Give a checkpoint.")
    return model.eval().to(pick_device(device))


def _set_images(model: nn.Module, run: dict[str, Any]) -> None:
    """Put what a checkpoint says of its images into a model's `pretrained_cfg`.

    A Luna ViT, which takes any size, is meant for theirs from then on, whatever it was built for.
    """
    size = {"input_size": get_model_input_config(model)["input_size"]}
    model.pretrained_cfg = model.pretrained_cfg | size | image_cfg(run)
    if isinstance(model, LunaVit):
        model.set_input_size(model.pretrained_cfg["input_size"][1:])


def _recorded_arguments(recorded: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the model that a task with these hyperparameters has built."""
    # a detector's backbone is built for the size that images are brought to
    arguments = {"img_size": recorded["min_size"]} if "min_size" in recorded else {}
    arguments |= recorded.get("model_kwargs") or {}
    for start in ("pretrained", "checkpoint_path"):  # weights that the training has begun with, and changed
        arguments.pop(start, None)
    return arguments | {key: recorded[key] for key in ("num_classes", "in_chans") if key in recorded}


def random_weights(
    name: str | None = None, arguments: dict[str, Any] | None = None, checkpoint: str | Path | None = None
) -> bool:
    """Whether the model that `load_model` builds of these has no weights but its initial ones."""
    if checkpoint:
        return False
    if folder := _folder(name):
        return bool(_read_config(folder).get(RANDOM_WEIGHTS))
    return not (arguments or {}).get("pretrained")


def knows_its_images(
    name: str | None = None, arguments: dict[str, Any] | None = None, checkpoint: str | Path | None = None
) -> bool:
    """Whether the weights that `load_model` loads of these say how their images were normalised."""
    if checkpoint:
        run = training_checkpoint(checkpoint)
        # detectors and segmenters normalise images themselves, as the model's configuration says
        return "data" in run or "pyramid_channels" in run.get("hyper_parameters", {})
    return bool(_folder(name)) or not random_weights(name, arguments)


def _folder(name: str | None) -> Path | None:
    """The folder of `save_for_hf` that a model's name is, if it is one."""
    return Path(name.removeprefix(LOCAL)) if name and name.startswith(LOCAL) else None


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"model {LOCAL}{folder}: there is no {file}")
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"model {LOCAL}{folder}: {file} is broken: {error}") from error


def _from_folder(name: str, arguments: dict[str, Any], weights: bool) -> nn.Module:
    pixels = _read_config(_folder(name)).get(PIXELS)
    pixels = {key: pixels[key] for key in PIXEL_CFG if key in pixels} if isinstance(pixels, dict) else {}
    # with its own head: for another one timm drops it, and then leaves all that the file has not as initialised, too
    own = {key: value for key, value in arguments.items() if not weights or key != "num_classes"}
    try:
        model = timm.create_model(name, pretrained=weights, **own)
    except Exception as error:  # a file that is cut off, and arguments that do not fit it, raise nearly anything
        reason = shorten(str(error) or type(error).__name__, 300, placeholder=" ...")
        raise UserError(f"model {name}: {reason}") from error
    model.pretrained_cfg = model.pretrained_cfg | pixels
    classes = arguments.get("num_classes", model.num_classes)
    if classes != model.num_classes:
        if classes != 0:
            raise UserError(f"model {name} has a head for {model.num_classes} classes, and not for {classes}")
        model.reset_classifier(0)
    return model


def training_checkpoint(checkpoint: str | Path) -> dict[str, Any]:
    """What a Lightning checkpoint of a training holds, or the header of the weights that it exported; empty for any
    other file."""
    checkpoint = Path(checkpoint)
    if not checkpoint.is_file():
        return {}
    try:
        if checkpoint.suffix == ".safetensors":
            content = _exported_training(checkpoint)
        else:
            content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # reading a file that is no checkpoint raises nearly anything; load_weights says what is wrong
        return {}
    parameters = content.get("hyper_parameters") if isinstance(content, dict) else None
    return content if isinstance(parameters, dict) and "model_name" in parameters else {}


def image_cfg(run: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of its images, and nothing else that it might have a `pretrained_cfg` say."""
    cfg = run.get("data", {}).get("cfg", {})
    return {name: cfg[name] for name in IMAGE_CFG + PIXEL_CFG if name in cfg}


def _exported_training(weights: Path) -> dict[str, Any]:
    """What `luna_vision.tasks.export_weights` has written into the header, with the tuples that JSON makes lists of."""
    with safe_open(weights, "pt") as file:
        content = json.loads((file.metadata() or {}).get("training", "{}"))
    cfg = content.get("data", {}).get("cfg", {})
    cfg |= {name: tuple(cfg[name]) for name in ("input_size", "mean", "std") if name in cfg}
    return content
