"""The command line of the benchmarks."""

import argparse
from collections.abc import Callable
from typing import NoReturn

__all__ = ["Parser", "at_least"]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def at_least(least: int) -> Callable[[str], int]:
    """An argument type: a whole number of at least `least`."""

    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
        return int(text)

    return whole_number
