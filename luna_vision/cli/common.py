"""Shared by the commands: the parser, the options of a model, and the exit with one line."""

import argparse
import ast
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace

from ..utils.errors import UserError, arguments_of, is_check
from ..utils.text import printable

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "WRAPPERS",
    "Hints",
    "Parser",
    "add_model_options",
    "add_speed_options",
    "add_statistics_options",
    "add_value_options",
    "at_least",
    "at_speed",
    "load",
    "model_options",
    "named",
    "pairs",
    "run_command",
    "say_used",
    "value_options",
]

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")  # as in `utils.device`, which imports torch
DTYPE_HELP = "type of products, by autocast; auto is bfloat16 on a GPU that has it, else float32 (default: auto)"
# the beginnings of jsonargparse's messages that wrap another error
UNION, OF_CLASS = "Does not validate against any of the Union subtypes", "Problem with given class_path"
WRAPPERS = (UNION, OF_CLASS, "Call to compute_fn of link")


class _Help(DefaultHelpFormatter):
    """Help without the Python types that jsonargparse adds."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.dest == "print_config":
            return "print the options as YAML, as --config takes them, and exit"
        return action.help or ""


class Hints:
    """Mixin of parsers, which name the nearest option to one that there is not.

    Attributes:
        elsewhere: The options that other programs call by these names.
    """

    elsewhere: dict[str, str] = {}

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # the parser of a subcommand has said it before that of all
        if found := re.search(r"unrecognized arguments: --([^\s=]+)(?!.*; did you mean)", message):
            here = self.elsewhere.get(found[1].replace("-", "_"))
            message += f"; did you mean --{here}?" if here else did_you_mean(found[1], _options_of(self), "--")
        elif found := re.search(r"^Option '([^']*)' is not accepted$", message):  # in a YAML file
            message += did_you_mean(found[1], {name.replace("-", "_") for name in _options_of(self)})
        super().error(message, ex)


def _options_of(parser: argparse.ArgumentParser) -> set[str]:
    """The names of the options of a parser and of its subcommands."""
    options = set()
    for action in parser._actions:
        options |= {text[2:] for text in action.option_strings if text.startswith("--")}
        for inner in action.choices.values() if isinstance(action.choices, dict) else ():
            options |= _options_of(inner)
    return options


def did_you_mean(name: str, known: Iterable[str], dashes: str = "") -> str:
    """The nearest of the known names, as the end of a sentence about another; empty if none is near."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {dashes}{close[0]}?" if close else ""


class Parser(Hints, ArgumentParser):
    """The parser of a command, which also takes options from a YAML file and raises ArgumentErrors."""

    def __init__(self, command: str, **kwargs: Any) -> None:
        prog = f"luna-vision {command}"
        super().__init__(prog=prog, formatter_class=_Help, exit_on_error=False, allow_abbrev=False, **kwargs)
        self.add_argument(
            "--config",
            action=ActionConfigFile,
            metavar="FILE",
            help="options from a YAML file, by their names with _ for -; options after it replace them",
        )

    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:
        with arguments_of("the options cannot be read"):  # a file that is no text, for instance
            return super().parse_args(*args, **kwargs)


class _NotWholeError(argparse.ArgumentTypeError, ValueError):
    """argparse shows the message of an ArgumentTypeError, and jsonargparse, of a YAML file, that of a ValueError."""


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option: a whole number of at least `least`."""

    def whole_number(value: str | int) -> int:
        try:
            number = int(value)
        except ValueError:
            number = least - 1
        if number < least:
            raise _NotWholeError(f"must be a whole number of at least {least}, got {value!r}")
        return number

    return whole_number


def pairs(words: list[str] | dict[str, Any], option: str) -> dict[str, Any]:
    """Arguments from the NAME=VALUE words of an option; values are Python literals, else strings.

    Raises:
        UserError: A word without an equals sign.
    """
    arguments: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise UserError(f"{option} are NAME=VALUE, got {word!r}")
        try:
            arguments[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[name] = value
    return arguments


def add_model_options(parser: Parser, device: str = "auto") -> None:
    """Add --model, --model-args, --checkpoint and --device, which `load` reads."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="NAME",
        help="timm name, or local-dir:FOLDER with what save_for_hf wrote; by default that of a training checkpoint, "
        "else luna_vit_nano_patch8; without a checkpoint, with the weights of the package if it has some",
    )
    group.add_argument(
        "--model-args",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="arguments of the model, such as memory_len=32",
    )
    group.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="weights: .safetensors, a timm or a Lightning checkpoint"
    )
    group.add_argument(
        "--device", choices=DEVICES, default=device, help=f"auto takes a GPU if there is one (default: {device})"
    )


def add_speed_options(parser: Parser, compiles: bool = True) -> None:
    """Add --dtype and, where the command calls the model as a whole, --compile, which `at_speed` reads."""
    group = parser.add_argument_group("speed")
    group.add_argument("--dtype", choices=DTYPES, default="auto", help=DTYPE_HELP)
    if compiles:
        group.add_argument(
            "--compile", action="store_true", help="compile the blocks of the model first: for many images on a GPU"
        )


@contextmanager
def at_speed(args: Namespace, model: "nn.Module") -> Iterator[str]:
    """A context in which a model runs as the options of `add_speed_options` say: the name of the type.

    A line on stderr says what runs where, unless that is float32 on the CPU.
    """
    import torch

    from ..utils.device import compile_blocks, products_in, settle_dtype
    from ..utils.ranks import is_first

    device, dtype = next(model.parameters()).device, settle_dtype(model, args.dtype)
    name = str(dtype).removeprefix("torch.")
    compiled = getattr(args, "compile", False)
    if compiled:
        compile_blocks(model)
    if is_first() and (dtype != torch.float32 or compiled or device.type != "cpu"):
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        print(f"on {where}, in {name}{', compiled' if compiled else ''}", file=sys.stderr)
    with products_in(model, dtype):
        yield name


def add_statistics_options(group: Any, help: str) -> None:
    """Add --mean and --std; `help` says how many numbers they take, and the default."""
    group.add_argument("--mean", type=float, nargs="+", metavar="X", help=f"of pixels in [0, 1], {help}")
    group.add_argument("--std", type=float, nargs="+", metavar="X", help="likewise")


def add_value_options(group: Any, percentile: str = "") -> None:
    """--value-range, --nodata and --fill, which `value_options` reads; `percentile` says of what images, if of any."""
    choice = f", or percentile, the 2nd and 98th of {percentile}" if percentile else ""
    group.add_argument(
        "--value-range",
        nargs="+",
        metavar="X",
        help="what numbers in files become 0 and 1: LOW HIGH, or dtype, what their type can hold, and 0 1 of floating "
        f"point{choice} (default: that of the checkpoint's training, else dtype)",
    )
    group.add_argument(
        "--nodata", type=float, metavar="X", help="a number that means no data, besides that which a file names"
    )
    group.add_argument(
        "--fill",
        metavar="X",
        help="what missing numbers and NaN become: mean, error or a number; mask leaves out patches that have no "
        "others (default: mean)",
    )


def value_options(args: Namespace) -> dict[str, Any]:
    """What the options of `add_value_options` say, as the arguments of these names."""
    from ..images.values import parse_fill, parse_value_range

    return {
        "value_range": parse_value_range(args.value_range),
        "nodata": args.nodata,
        "fill": parse_fill(args.fill),
    }


def model_options(args: Namespace) -> dict[str, Any]:
    """The options of `add_model_options` as arguments for `luna_vision.models.factory`."""
    return {
        "name": args.model,
        "arguments": pairs(args.model_args, "--model-args"),
        "checkpoint": args.checkpoint,
    }


def load(args: Namespace, **overrides: Any) -> "nn.Module":
    """Load the model of the options of `add_model_options`, as `luna_vision.models.factory.load_model` does."""
    from ..models.factory import load_model
    from ..utils.ranks import is_first

    def say(text: str) -> None:
        if is_first():
            print(text, file=sys.stderr)

    return load_model(**model_options(args), device=args.device, say=say, **overrides)


def named(path: str, reason: str) -> str:
    """The reason why an image cannot be used, with its path."""
    name = printable(path)
    return reason if name in reason else f"{name}: {reason}"


def say_used(out: Path, total: int, failures: list[tuple[str, str]]) -> int:
    """Say how many images are in a file, and why the others are not; the exit code."""
    used = total - len(failures)
    print(f"{out}: {used} of {total} images" if used else f"{out} is not written: it would be empty")
    if failures:
        print(f"{len(failures)} of {total} images could not be used:", file=sys.stderr)
    for path, reason in failures:
        print(f"  {named(path, reason)}", file=sys.stderr)
    return int(bool(failures))


def run_command(command: Callable[[], int | None]) -> NoReturn:
    """Exit with the code that `command` returns (None is 0), 2 and a line on stderr for a mistake, 130 for Ctrl-C.

    Other errors keep their traceback. `LUNA_VISION_TRACEBACK=1` in the environment shows that of a mistake, too.
    """
    try:
        sys.exit(command() or 0)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ArgumentError, ValueError, OSError) as error:
        if os.environ.get("LUNA_VISION_TRACEBACK") == "1" or not is_mistake(error):
            raise
        print(f"error: {printable(message(error))}", file=sys.stderr)
        sys.exit(2)


def is_mistake(error: Exception) -> bool:
    """Whether the user can fix it: an option, one of our checks, or an error of the system about a file."""
    from_system = isinstance(error, OSError) and (error.filename is not None or error.errno is not None)
    return isinstance(error, ArgumentError) or from_system or is_check(error)


def message(error: Exception) -> str:
    """The message of an error in one line."""
    text = str(error).strip()
    if "Original Traceback" in text:  # from a data worker, whose own error is in the last line
        last = text.rsplit("\n", 1)[-1]
        text = last.partition(": ")[2] or last
    if isinstance(error, ArgumentError):
        text = useful(text)
    return " ".join(text.split()) or type(error).__name__


_KEY = re.compile(r'Parser key "([^"]*)"( element \d+)?:\s*')


def useful(text: str) -> str:
    """Shorten a message of jsonargparse, which lists every type that a value may have, to the type that was meant.

    ``Parser key "model": ... Problem with given class_path ...: Parser key "lr": Expected ...`` becomes
    ``model.lr: Expected ...``.
    """
    keys = []
    while True:
        found = _KEY.match(text)
        if found:
            keys.append(found[1])
            text = text[found.end() :]
        elif (inner := re.match(rf"{OF_CLASS} [^:]*:\s*(?=Parser key|Option|{UNION})", text)) is not None:
            text = text[inner.end() :]
        elif UNION in text:
            text = _meant(text.partition(UNION)[2])
        else:
            break
    for pattern, words in (
        (r"<class '(?:\w+\.)*(\w+)'>", r"\1"),
        (r"\b(a )?typing.Literal", "one of "),
        ("Expected a int", "Expected an int"),
        ("Expected a dot import path string:", "there is no class"),
        (r"arguments are required: (\w+\.)?", "arguments are required, here or in a --config: "),
    ):
        text = re.sub(pattern, words, text)
    if keys and keys[0] == "model" and re.match("there is no class [a-z]", text):
        text += "; the name of a model is --model.model_name NAME, a task --model CLASS"
    if re.search(r"Option '[^']*' is not accepted", text) and keys and keys[0] in ("data", "model"):
        text += f"{'' if text.endswith('?') else ';'} luna-vision fit --{keys[0]}.help CLASS lists those of a class"
    return f"{'.'.join(keys)}: {text}" if keys else text


def _meant(text: str) -> str:
    """The error for the class that was meant, out of those for all types; if none was, one clause for all."""
    errors, _, value = text.partition("Errors:")[2].rpartition("Given value type:")
    indent = re.match(r"\s*- ", errors)
    clauses = dict.fromkeys(clause.strip() for clause in errors.split(indent[0]) if clause.strip()) if indent else {}
    for start in (OF_CLASS, "Expected a dot import path string"):
        if of_class := [clause for clause in clauses if clause.startswith(start)]:
            return of_class[0]
    expected = [clause for clause in clauses if clause != "Expected a <class 'NoneType'>"]
    if len(expected) == 1 and not expected[0].startswith("Expected a"):
        part = re.search(r"NestedArg\(key='([^']*)'", value)
        return f"{part[1]}: {expected[0]}" if part else expected[0]
    words = " or ".join(clause.removeprefix("Expected a ").partition(". Got value")[0] for clause in expected)
    return f"Expected a {words}. Got value: {value.partition('Given value: ')[2].strip()}"
