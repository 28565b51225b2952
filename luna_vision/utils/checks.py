"""Checks of arguments."""

from collections.abc import Iterable

__all__ = ["check_option"]


def check_option(name: str, value: str, options: Iterable[str]) -> None:
    """
    Raises:
        ValueError: `value` is not among the options that the argument `name` has.
    """
    options = tuple(options)
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")
