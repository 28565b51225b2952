"""What the scripts share: the command line, tables, and where a number was measured."""

import argparse
import contextlib
import datetime
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from luna_vision.cli.common import at_least
from luna_vision.utils.record import machine

__all__ = ["Parser", "at_least", "json_file", "markdown_table", "measured_on", "quiet_lightning"]


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser that shows defaults, and whose errors are one line, and exit code 2."""

    def __init__(self, **kwargs) -> None:
        super().__init__(formatter_class=_Help, **kwargs)

    def error(self, message: object) -> NoReturn:
        self.exit(2, f"error: {' '.join(str(message).split())}\n")


def json_file(text: str) -> Path:
    """An argument type: a file whose name ends in .json."""
    if not text.endswith(".json"):
        raise argparse.ArgumentTypeError(f"must end in .json, got {text!r}")
    return Path(text)


def measured_on(device: str = "cpu") -> dict[str, Any]:
    """The date and the machine, for a file of results."""
    return {"date": datetime.date.today().isoformat(), "machine": machine(device)}


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)])


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's notes and warnings from a script's own lines of progress; then let it speak as before."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
