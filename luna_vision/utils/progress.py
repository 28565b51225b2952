"""Progress: a bar on a terminal, and a line now and then in a log."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

__all__ = ["progress_bar"]

EVERY = 30.0  # seconds between two lines
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}s in {elapsed}, {remaining} to go"


class _Lines:
    """What tqdm draws again and again in one line of a terminal, as lines on stderr."""

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            print(line, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(iterable: Iterable | None = None, show: bool = True, every: float = EVERY, **options: Any) -> tqdm:
    """A progress bar on stderr or, where that is no terminal, a line from time to time.

    Args:
        iterable: As tqdm's.
        show: Whether there is to be anything at all.
        every: Seconds between two lines, and before the first.
        **options: Of tqdm: total, initial, desc, unit.
    """
    if show and not sys.stderr.isatty():
        lines = {"file": _Lines(), "bar_format": LINE, "mininterval": every, "delay": every, "dynamic_ncols": False}
        return tqdm(iterable, **lines, **options)
    return tqdm(iterable, disable=not show, **options)
