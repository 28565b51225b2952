"""The console script ``luna-vision``, which imports only the command that runs."""

import difflib
import sys
from importlib import import_module
from typing import NoReturn

from .. import __version__
from ..utils.errors import UserError
from .common import run_command
from .predict_image import is_of_image
from .training_help import TRAINING, short_help

__all__ = ["main"]

# each is a file of this folder with main(words)
COMMANDS = {
    "finetune": "Train on labelled files of your own: recognise their format, write a YAML, train, test and report.",
    "preview": "Draw augmented training images with their boxes, masks or labels.",
    "report": "Write what a run has learned as a page: curves, classes, confusion, calibration, best and worst images.",
    "distill": "Train a Luna ViT to have the features of any timm model, without labels.",
    "pretrain": "Train a Luna ViT on images alone, without labels or a teacher.",
    "embed": "Write embeddings of images, as parquet or npz.",
    "probe": "Measure frozen features by nearest neighbours and a linear classifier.",
    "visualize": "Draw where the memory looks, and patch features.",
    "encode": "Encode images of any size, out of core.",
    "export": "Export to ONNX, torch.export, or a folder for the Hugging Face hub.",
    "convert": "Write an image folder as shards, or with --vit make a Luna ViT of a softmax ViT.",
}
# the extra of the package that a command needs
EXTRAS = dict.fromkeys((*TRAINING, "distill", "pretrain"), "train") | {
    "finetune": "downstream",
    "preview": "downstream",
    "report": "downstream",
    "embed": "downstream",
    "probe": "downstream",
    "visualize": "visualize",
    "encode": "streaming",
    "export": "export",
    "convert": "shards",
}


def main() -> NoReturn:
    """Run the command line of this process and exit with its code."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        sys.exit(0 if words else 2)
    if words[0] == "--version":
        print(__version__)
        sys.exit()
    run_command(lambda: _run(*words))


def _run(name: str, *words: str) -> int | None:
    if name not in EXTRAS:
        close = difflib.get_close_matches(name, EXTRAS, n=1)
        hint = f"did you mean {close[0]}?" if close else "luna-vision --help lists them"
        raise UserError(f"there is no command {name!r}; {hint}")
    of_image = name == "predict" and is_of_image(words)
    if name in TRAINING and not of_image and (text := short_help([name, *words])):
        print(text)
        return 0
    try:
        if of_image:
            return import_module(f"{__package__}.predict_image").main([*words])
        if name in COMMANDS:
            return import_module(f"{__package__}.{name}").main([*words])
        sys.path.append("")  # a config may name the user's own classes
        return import_module(f"{__package__}.train").main()
    except ModuleNotFoundError as error:
        extras = "train,streaming" if of_image else EXTRAS[name]
        raise UserError(f"{name} needs {error.name}: pip install 'luna-vision[{extras}]'") from error


def _overview() -> str:
    lines = [f"  {name:<10} {what.partition('.')[0]}" for name, what in (TRAINING | COMMANDS).items()]
    return "\n".join(
        ["usage: luna-vision COMMAND ...", "", *lines, "", "luna-vision COMMAND --help lists the options of a command."]
    )
