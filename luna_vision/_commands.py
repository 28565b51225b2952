"""What the commands of the package share: one-line errors with exit code 2, and the model that a user names."""

import argparse
import ast
import difflib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, NoReturn

import timm
import torch
from safetensors import safe_open
from timm.models import get_arch_name
from timm.models._input import get_model_input_config
from torch import nn

from .models import LunaVit, load_weights
from .utils.files import check_folder
from .utils.text import printable

USER_ERRORS = (ValueError, OSError)
RANDOM_WEIGHTS = "random_weights"  # what config.json of an exported folder calls a model that was not trained
LOCAL = "local-dir:"  # what the name of a folder begins with, for timm
DEVICES = ("auto", "cpu", "cuda")
# what a checkpoint may say of its images, see `timm_cfg` of the data modules
IMAGE_CFG = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "num_classes", "label_names")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def at_least(least: int) -> Callable[[str], int]:
    """An argument type: a whole number of at least `least`."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
        return value

    return convert


def run_command(command: Callable[[], int | None]) -> NoReturn:
    """Exit with what `command` returns (None is 0); a user's mistake is one line on stderr and 2, Ctrl-C is 130.

    `LUNA_VISION_TRACEBACK=1` in the environment shows the traceback of a mistake too.
    """
    try:
        sys.exit(command())
    except KeyboardInterrupt:
        sys.exit(130)
    except USER_ERRORS as error:
        if os.environ.get("LUNA_VISION_TRACEBACK") == "1":
            raise
        print(f"error: {printable(' '.join(str(error).split())) or type(error).__name__}", file=sys.stderr)
        sys.exit(2)


def check_model_name(name: str) -> None:
    """Raise a `ValueError` that names similar models unless timm knows this one."""
    if not timm.is_model(name):
        close = difflib.get_close_matches(get_arch_name(name), timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else "; timm.list_models() lists all of them"
        raise ValueError(f"unknown model name {name!r}{hint}")


def check_num_classes(num_classes: Any) -> None:
    """Raise a `ValueError` unless it is a number of classes, or None."""
    if num_classes is not None and (type(num_classes) is not int or num_classes < 0):
        raise ValueError(f"num_classes must be a whole number of at least 0, got {num_classes!r}")


def build_model(name: str, num_classes: int | None = None, in_chans: int = 3, **model_kwargs: Any) -> nn.Module:
    """`timm.create_model`, with a `ValueError` for a name or an argument that does not exist."""
    check_model_name(name)
    check_num_classes(num_classes)
    classes = {} if num_classes is None else {"num_classes": num_classes}
    try:
        return timm.create_model(name, in_chans=in_chans, **classes, **model_kwargs)
    except Exception as error:  # no pretrained weights, a checkpoint that does not fit, a list where a number belongs
        if isinstance(error, OSError | ValueError) and (not model_kwargs or any(n in str(error) for n in model_kwargs)):
            raise
        raise ValueError(f"model_kwargs {model_kwargs} do not fit {name}: {error}") from error


def add_model_arguments(parser: argparse.ArgumentParser, default: str | None = "luna_vit_small") -> None:
    """Add --model, --model-args, --checkpoint and --device, which `load_model` reads."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="NAME",
        help="timm name, or local-dir:FOLDER with what save_for_hf wrote; by default that of a training checkpoint, "
        f"else {default}",
    )
    group.add_argument(
        "--model-args",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="arguments of the model, such as memory_len=32",
    )
    group.add_argument("--checkpoint", type=Path, help="weights: .safetensors, a timm or a Lightning checkpoint")
    group.add_argument("--device", choices=DEVICES, default="auto", help="auto takes a GPU if there is one")
    parser.set_defaults(default_model=default)


def parse_pairs(pairs: list[str], option: str = "--model-args") -> dict[str, Any]:
    """Arguments from the `name=value` words of a command-line option; values are Python literals, else strings.

    Raises:
        ValueError: A word without an equals sign.
    """
    arguments: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"{option} are NAME=VALUE, got {pair!r}")
        try:
            arguments[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[key] = value
    return arguments


def pick_device(name: str) -> torch.device:
    """The device that --device names.

    Raises:
        ValueError: "cuda" where there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def load_model(args: argparse.Namespace, **overrides: Any) -> nn.Module:
    """The model that the arguments of `add_model_arguments` name, with its weights, in eval mode on its device.

    A checkpoint of `train.py`, and the weights that it exported, say which model they hold and with which arguments;
    `--model` and `--model-args` go over them. They also say what their images were like (size, normalisation, names of
    the classes), which goes into the model's `pretrained_cfg`. A model without weights is announced loudly on stderr.

    Args:
        args: The parsed command line.
        **overrides: Arguments of the model that go over all others.

    Raises:
        ValueError: An unknown model or argument, or a checkpoint of another model or with another head: with
            `num_classes=0` there is none.
        OSError: There is no such checkpoint.
    """
    run = training_checkpoint(args.checkpoint) if args.checkpoint else {}
    recorded = run.get("hyper_parameters", {})
    name = args.model or recorded.get("model_name") or args.default_model
    arguments = _recorded_arguments(recorded) if name == recorded.get("model_name") else {}
    given = parse_pairs(args.model_args)
    check_num_classes(given.get("num_classes"))  # where the head is left out, too
    arguments |= given | overrides
    if "checkpoint_path" in given:  # of which nobody would know that these are not random weights
        raise ValueError("--model-args checkpoint_path: give the file as --checkpoint")
    if _folder(name):
        model = _from_folder(name, arguments, weights=not args.checkpoint)
    else:
        model = build_model(name, **arguments)
    if args.checkpoint:
        load_weights(model, args.checkpoint, say=lambda text: print(printable(text), file=sys.stderr), fresh_head=False)
        _set_images(model, run)
    elif random_weights(args):
        print(
            f"WARNING: {name} has RANDOM WEIGHTS: what comes out says nothing about the images. Give --checkpoint.",
            file=sys.stderr,
        )
    return model.eval().to(pick_device(args.device))


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


def random_weights(args: argparse.Namespace) -> bool:
    """Whether the model that the arguments of `add_model_arguments` name has no weights but its initial ones."""
    if args.checkpoint:
        return False
    if folder := _folder(args.model):
        return bool(_read_config(folder).get(RANDOM_WEIGHTS))
    return not parse_pairs(args.model_args).get("pretrained")


def knows_its_images(args: argparse.Namespace) -> bool:
    """Whether the weights that the arguments of `add_model_arguments` name say how their images were normalised."""
    if args.checkpoint:
        run = training_checkpoint(args.checkpoint)
        # detectors and segmenters normalise images themselves, as the model's configuration says
        return "data" in run or "pyramid_channels" in run.get("hyper_parameters", {})
    return bool(_folder(args.model)) or not random_weights(args)


def _folder(name: str | None) -> Path | None:
    """The folder of `save_for_hf` that a model's name is, if it is one."""
    return Path(name.removeprefix(LOCAL)) if name and name.startswith(LOCAL) else None


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"--model {LOCAL}{folder}: there is no {file}")
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"--model {LOCAL}{folder}: {file} is broken: {error}") from error


def _from_folder(name: str, arguments: dict[str, Any], weights: bool) -> nn.Module:
    _read_config(_folder(name))
    # with its own head: for another one timm drops it, and then leaves all that the file has not as initialised, too
    own = {key: value for key, value in arguments.items() if not weights or key != "num_classes"}
    try:
        model = timm.create_model(name, pretrained=weights, **own)
    except Exception as error:  # a file that is cut off, and arguments that do not fit it, raise nearly anything
        reason = shorten(str(error) or type(error).__name__, 300, placeholder=" ...")
        raise ValueError(f"--model {name}: {reason}") from error
    classes = arguments.get("num_classes", model.num_classes)
    if classes != model.num_classes:
        if classes != 0:
            raise ValueError(f"--model {name} has a head for {model.num_classes} classes, and not for {classes}")
        model.reset_classifier(0)
    return model


def training_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """What a Lightning checkpoint of `train.py` holds, or the header of the weights that it exported; empty for any
    other file."""
    if not checkpoint.is_file():
        return {}
    try:
        if checkpoint.suffix == ".safetensors":
            content = _exported_training(checkpoint)
        else:
            content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # load_weights says what is wrong with the file
        return {}
    parameters = content.get("hyper_parameters") if isinstance(content, dict) else None
    return content if isinstance(parameters, dict) and "model_name" in parameters else {}


def image_cfg(run: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of its images, and nothing else that it might have a `pretrained_cfg` say."""
    cfg = run.get("data", {}).get("cfg", {})
    return {name: cfg[name] for name in IMAGE_CFG if name in cfg}


def _exported_training(weights: Path) -> dict[str, Any]:
    """What `luna_vision.tasks.export_weights` has written into the header, with the tuples that JSON makes lists of."""
    with safe_open(weights, "pt") as file:
        content = json.loads((file.metadata() or {}).get("training", "{}"))
    cfg = content.get("data", {}).get("cfg", {})
    cfg |= {name: tuple(cfg[name]) for name in ("input_size", "mean", "std") if name in cfg}
    return content


def check_output(path: Path, suffixes: Sequence[str], overwrite: bool) -> None:
    """Make the folder of an output file and see that files can be written there.

    Raises:
        ValueError: The suffix is none of `suffixes`.
        OSError: The file cannot be written, or exists and is not to be overwritten.
    """
    if path.suffix not in suffixes:
        raise ValueError(f"the output must end in {' or '.join(suffixes)}, got {path}")
    if path.is_dir():
        raise IsADirectoryError(f"the output {path} is a folder")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: give --overwrite (overwrite=True) to replace it")
    check_folder(path.parent)
