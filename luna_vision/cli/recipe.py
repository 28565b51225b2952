"""Commands that are a `fit` with a complete YAML of their own, such as distill.

A command has a few options. Whatever else stands on its line is an option of `fit` and comes after, so that it wins.
The run writes what it ran with into its `config.yaml`, as every fit does.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

from ..utils.errors import UserError

__all__ = ["Recipe", "WordParser", "common_options", "fit", "fit_words", "loggers", "option_words"]

EPILOG = """\
Any option of fit works on the same line and comes last, such as --trainer.max_steps 8, --model.lr 1e-3,
--data.num_workers 8, --config FILE or --resume; luna-vision fit --help lists some."""


class WordParser(argparse.ArgumentParser):
    """A parser of a command whose other options are those of `fit`; mistakes are UserErrors.

    Args:
        command: Its name.
        usage: Of the command, after its name.
        description: What it does.
        epilog: What the help ends with.
    """

    def __init__(self, command: str, usage: str, description: str, epilog: str | None = None) -> None:
        name, form = f"luna-vision {command}", argparse.RawDescriptionHelpFormatter
        super().__init__(name, f"{name} {usage}", description, epilog, formatter_class=form, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help shows how it is called")


class Recipe(WordParser):
    """The parser of a command with a YAML of its own, with the options that all of them have.

    Args:
        command: Its name.
        usage: Of the command, after its name.
        description: What it does.
        epochs: Whether it has --epochs.
    """

    def __init__(self, command: str, usage: str, description: str, epochs: bool = True) -> None:
        super().__init__(command, usage, description, EPILOG)
        self.add_argument("--data", required=True, metavar="FOLDER", help="images, also in folders in it, or shards")
        self.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where the run writes to")
        self.add_argument(
            "--labels",
            metavar="FOLDER",
            help="train/CLASS/*.jpg, and val or test likewise: kNN and a linear probe while it trains; nothing learns "
            "from them",
        )
        self.add_argument("--img-size", type=int, metavar="N", help="side in pixels (default: 224)")
        self.add_argument("--batch-size", type=int, metavar="N", help="images in a batch, on each device")
        if epochs:
            self.add_argument("--epochs", type=int, metavar="N", help="passes over the images")


def common_options(args: argparse.Namespace, out: Path | None = None) -> dict[str, Any]:
    """What the options of all such commands say, as options of `fit`; None for those of the YAML.

    Args:
        args: The options.
        out: The folder, if it is not that of the options.
    """
    import torch

    out = args.out if out is None else out
    options = {
        "name": out.name,
        "data.init_args.root": args.data,
        "data.init_args.img_size": args.img_size,
        "data.init_args.batch_size": args.batch_size,
        "trainer.max_epochs": getattr(args, "epochs", None),
        "trainer.precision": "bf16-mixed" if torch.cuda.is_available() else None,
        "trainer.default_root_dir": str(out),
        "trainer.logger": loggers(out),
    }
    if args.labels:
        probe = {"class_path": "luna_vision.tasks.OnlineProbe", "init_args": {"root": args.labels}}
        options["trainer.callbacks+"] = probe
    return options


def loggers(out: Path) -> list[dict[str, Any]]:
    """The loggers of a run that writes to this folder, for a YAML."""
    arguments = {
        "CSVLogger": {"save_dir": str(out.parent), "name": out.name},
        "TensorBoardLogger": {"save_dir": str(out), "name": "tensorboard"},
    }
    return [{"class_path": f"lightning.pytorch.loggers.{name}", "init_args": own} for name, own in arguments.items()]


def fit(config: str, options: dict[str, Any], overrides: list[str]) -> NoReturn:
    """Run `fit` with a YAML of this folder, see `fit_words`."""
    from . import train

    # In place: with several devices, Lightning starts the other processes with these arguments.
    sys.argv[1:] = fit_words(config, options, overrides)
    train.main()


def fit_words(config: str, options: dict[str, Any], overrides: list[str]) -> list[str]:
    """The command line of `fit` with a YAML of this folder, options by dotted name (None for that of the YAML), and the
    user's own."""
    return ["fit", "--config", str(Path(__file__).with_name(config)), *option_words(options), *overrides]


def option_words(options: dict[str, Any]) -> list[str]:
    """Options by dotted name as words of a command line; without those that are None."""
    words = {name: x if isinstance(x, str) else json.dumps(x) for name, x in options.items() if x is not None}
    return [f"--{name}={word}" for name, word in words.items()]
