"""The console script ``luna-vision``: which command is meant, and no more than that is imported."""

import difflib
import sys
from importlib import import_module
from typing import NoReturn

from .. import __version__
from ..utils.errors import UserError
from .common import run_command
from .training_help import short_help

__all__ = ["main"]

TRAINING = {
    "fit": "train a model and test its best checkpoint",
    "validate": "evaluate a checkpoint on the validation images",
    "test": "evaluate a checkpoint on the test images",
    "predict": "write the classes of images to a CSV file",
}
# each is a file here, of the same name, with main(words)
COMMANDS = {
    "embed": "embeddings of images, as parquet or npz",
    "probe": "how good frozen features are: nearest neighbours and a linear classifier",
    "visualize": "pictures of what the memory looks at, and of patch features",
    "encode": "one image of any size, out of core",
    "export": "ONNX, torch.export, or a folder for the Hugging Face hub",
    "convert": "an image folder as WebDataset or LitData shards",
}
# the extra of the package that brings what a command takes
EXTRAS = dict.fromkeys(TRAINING, "train") | {
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
    if text := short_help([name, *words]):
        print(text)
        return 0
    try:
        if name in COMMANDS:
            return import_module(f"{__package__}.{name}").main([*words])
        sys.path.append("")  # classes of a config may be the user's own, beside it
        return import_module(f"{__package__}.train").main()
    except ModuleNotFoundError as error:
        raise UserError(f"{name} needs {error.name}: pip install 'luna-vision[{EXTRAS[name]}]'") from error


def _overview() -> str:
    lines = [f"  {name:<10} {what}" for name, what in (TRAINING | COMMANDS).items()]
    return "\n".join(
        ["usage: luna-vision COMMAND ...", "", *lines, "", "luna-vision COMMAND --help says what a command takes."]
    )
