"""Checks of arguments."""

from collections.abc import Iterable

__all__ = ["check_at_least", "check_option", "check_share"]


def check_option(name: str, value: str, options: Iterable[str]) -> None:
    """Raise a ValueError unless `value` is one of the options of the argument `name`."""
    options = tuple(options)
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")


def check_at_least(least: float, **values: float) -> None:
    """
    Raises:
        ValueError: One of the arguments `values`, by name, is below `least`.
    """
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def check_share(**values: float) -> None:
    """
    Raises:
        ValueError: One of the arguments `values`, by name, is no share or probability.
    """
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
