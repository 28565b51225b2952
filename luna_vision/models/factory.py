"""Models with their weights, by timm's name, from a checkpoint of a training, or from an exported folder."""

import difflib
import json
import os
from collections.abc import Callable
from pathlib import Path
from textwrap import shorten
from typing import Any

import timm
import torch
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg, is_model_in_modules, split_model_name_tag
from timm.models._input import get_model_input_config
from torch import nn

from ..utils.errors import UserError, arguments_of, one_line
from ..utils.text import printable
from .checkpoints import PIXEL_CFG, image_cfg, load_weights, training_checkpoint
from .luna_vit import LunaVit
from .weights import SHIPPED

RANDOM_WEIGHTS = "random_weights"  # a key in config.json of an exported folder: the model was not trained
DEFAULT = "luna_vit_nano_patch8"  # it has weights
LOCAL = "local-dir:"  # timm's prefix for the name of a folder
PIXELS = "pixels"  # where config.json of an exported folder has these, which timm does not know


def check_model_name(name: str) -> None:
    """Raise an error that names similar models, or the known tags, unless timm knows this name."""
    architecture, tag = split_model_name_tag(name)
    if tag and timm.is_model(architecture) and name not in get_arch_pretrained_cfgs(architecture):
        known = ", ".join(sorted(get_arch_pretrained_cfgs(architecture)))
        raise UserError(f"there is no {name}, but {known or architecture}")
    if not timm.is_model(name):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else "; timm.list_models() lists all of them"
        raise UserError(f"unknown model name {name!r}{hint}")


def check_arguments(num_classes: Any = None, **model_kwargs: Any) -> None:
    """Raise a `UserError` if `num_classes` is neither a whole number nor None, or for a `checkpoint_path`."""
    if num_classes is not None and (type(num_classes) is not int or num_classes < 0):
        raise UserError(f"num_classes must be a whole number of at least 0, got {num_classes!r}")
    if "checkpoint_path" in model_kwargs:  # timm would load it without the filter, and `random_weights` be wrong
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
        ours = SHIPPED and is_model_in_modules(name, ["luna_vit"])
        some = f"; there are some of {' and '.join(SHIPPED)}" if ours else ""
        raise UserError(f"model_kwargs pretrained: there are no pretrained weights of {name}{some}")
    try:
        # timm checks numbers, such as heads that do not divide a width, by assertions
        with arguments_of(f"model_kwargs {model_kwargs} do not fit {name}", ArithmeticError, AssertionError):
            return timm.create_model(name, num_classes=num_classes, in_chans=in_chans, **model_kwargs)
    except OSError as error:
        raise OSError(f"cannot read the weights of {name}: {one_line(error)}") from error
    except RuntimeError as error:
        if not model_kwargs.get("pretrained"):
            raise
        others = {key: value for key, value in model_kwargs.items() if key != "pretrained"}
        why = shorten(one_line(error), 300, placeholder=" ...")
        raise UserError(
            f"the weights of {name} do not fit model_kwargs {others}; with pretrained=False it starts without: {why}"
        ) from error


def sized(name: str, model_kwargs: dict[str, Any] | None, img_size: int | list[int] | None) -> dict[str, Any]:
    """The arguments of a model, with `img_size` (side or [height, width] in pixels) if the model takes one.

    timm's models of a fixed size do, and so does a Luna ViT, for which it is only a note.
    """
    check_model_name(name)
    cfg = get_pretrained_cfg(name)
    takes_one = cfg is not None and (cfg.fixed_input_size or is_model_in_modules(name, ["luna_vit"]))
    return ({"img_size": img_size} if takes_one and img_size is not None else {}) | (model_kwargs or {})


def pick_device(name: str) -> torch.device:
    """The device for "cpu", "cuda" or "auto", which takes a GPU if there is one; a process of torchrun takes its own.

    Raises:
        UserError: "cuda" where there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: torch finds no CUDA device")
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if name == "cuda" and torch.distributed.is_torchelastic_launched():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return torch.device(name)


def load_model(
    name: str | None = None,
    arguments: dict[str, Any] | None = None,
    checkpoint: str | Path | None = None,
    device: str = "auto",
    say: Callable[[str], object] = lambda line: None,
    **overrides: Any,
) -> nn.Module:
    """A model with its weights, in eval mode.

    A checkpoint of a training, and the weights that it exported, record the name and the arguments of their model;
    `name` and `arguments` override them. The record of their images (size, normalisation, names of the classes) goes
    into the model's `pretrained_cfg`. Without a checkpoint, a model has the weights of the package, or those that the
    tag of its name asks for, unless `arguments` have `pretrained`.

    Args:
        name: A name of timm, or `local-dir:FOLDER` with a folder of `save_for_hf`; by default that of the checkpoint,
            else `DEFAULT`.
        arguments: Arguments of the model, such as `memory_len`.
        checkpoint: Weights: .safetensors, a timm or a Lightning checkpoint.
        device: See `pick_device`.
        say: Gets a line about the weights, or a warning where there are none.
        **overrides: Arguments of the model that override all others.

    Raises:
        UserError: An unknown model or argument, a checkpoint of another model, or one with another head (with
            `num_classes=0` the head is left out).
        OSError: There is no such checkpoint.
    """
    given = arguments or {}
    check_arguments(**given)  # also where an override replaces them
    run = training_checkpoint(checkpoint) if checkpoint else {}
    recorded = run.get("hyper_parameters", {})
    no_weights = random_weights(name, given, checkpoint)
    name = name or recorded.get("model_name") or DEFAULT
    own = _recorded_arguments(recorded) if name == recorded.get("model_name") else {}
    arguments = own | (given if checkpoint else _trained(name, given)) | overrides
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
    """Put a checkpoint's record of its images into a model's `pretrained_cfg`, and their size into a Luna ViT."""
    size = {"input_size": get_model_input_config(model)["input_size"]}
    model.pretrained_cfg = model.pretrained_cfg | size | image_cfg(run)
    if isinstance(model, LunaVit):
        model.set_input_size(model.pretrained_cfg["input_size"][1:])


def _recorded_arguments(recorded: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the model of a task with these hyperparameters."""
    # a detector resizes images to this size
    arguments = {"img_size": recorded["min_size"]} if "min_size" in recorded else {}
    if "pyramid_channels" in recorded and is_model_in_modules(recorded["model_name"], ["luna_vit"]):
        arguments["global_pool"] = "avg"  # a detector or segmenter learned patches, and nothing that reads the memory
    arguments |= recorded.get("model_kwargs") or {}
    for start in ("pretrained", "checkpoint_path"):  # weights before the training
        arguments.pop(start, None)
    arguments |= {key: recorded[key] for key in ("num_classes", "in_chans") if key in recorded}
    return arguments | ({"num_classes": 0} if "pyramid_channels" in recorded else {})  # whose head is no classifier


def random_weights(
    name: str | None = None, arguments: dict[str, Any] | None = None, checkpoint: str | Path | None = None
) -> bool:
    """Whether `load_model` gives a model with its initial weights only for these arguments."""
    if checkpoint:
        return False
    if folder := _folder(name):
        return bool(_read_config(folder).get(RANDOM_WEIGHTS))
    return not _trained(name or DEFAULT, arguments or {}).get("pretrained")


def _trained(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a model, with `pretrained` if the package has its weights, or if the name has a tag."""
    known = "." in name or any(full.startswith(f"{name}.") for full in SHIPPED)
    return {"pretrained": True} | arguments if known and not _folder(name) else arguments


def knows_its_images(
    name: str | None = None, arguments: dict[str, Any] | None = None, checkpoint: str | Path | None = None
) -> bool:
    """Whether the weights that `load_model` loads for these arguments record the normalisation of their images."""
    if checkpoint:
        run = training_checkpoint(checkpoint)
        # detectors and segmenters normalise images themselves, as the model's configuration says
        return "data" in run or "pyramid_channels" in run.get("hyper_parameters", {})
    return bool(_folder(name)) or not random_weights(name, arguments)


def _folder(name: str | None) -> Path | None:
    """The folder in a name `local-dir:FOLDER`; None for any other name."""
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
    # with its own head: for another number of classes, timm would load loosely and ignore missing weights
    own = {key: value for key, value in arguments.items() if not weights or key != "num_classes"}
    try:
        model = timm.create_model(name, pretrained=weights, **own)
    except Exception as error:  # a truncated file, and arguments that do not fit it, raise nearly anything
        reason = shorten(str(error) or type(error).__name__, 300, placeholder=" ...")
        raise UserError(f"model {name}: {reason}") from error
    model.pretrained_cfg = model.pretrained_cfg | pixels
    classes = arguments.get("num_classes", model.num_classes)
    if classes != model.num_classes:
        if classes != 0:
            raise UserError(f"model {name} has a head for {model.num_classes} classes, and not for {classes}")
        model.reset_classifier(0)
    return model
