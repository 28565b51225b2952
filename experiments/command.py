"""The command line of the experiments."""

import argparse
from collections.abc import Callable
from typing import NoReturn

__all__ = ["Parser", "at_least"]


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser that shows defaults, and whose errors are one line, and exit code 2."""

    def __init__(self, **kwargs) -> None:
        super().__init__(formatter_class=_Help, **kwargs)

    def error(self, message: object) -> NoReturn:
        self.exit(2, f"error: {' '.join(str(message).split())}\n")


def at_least(least: int) -> Callable[[str], int]:
    """An argument type: a whole number of at least `least`."""

    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
        return int(text)

    return whole_number
