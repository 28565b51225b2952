"""Ctrl-C at every place of a run."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest


def stopped_anywhere(
    call: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
    *places: tuple[Any, str],
    at_least: int,
    after: bool = False,
) -> Iterator[None]:
    """Stop `call` at its first visit of the places, then at its second, ...; yields after each stop.

    It ends with a call that reaches its end.

    Args:
        call: Begins the run, or resumes it.
        monkeypatch: Pytest's.
        places: Of a class or module, the name of a function; calls of all are counted together.
        at_least: Of a run, calls of the places.
        after: Whether the function that is stopped at does its work first.
    """
    for stop_at in range(100):
        count = itertools.count()

        def stopping(ours: Callable[..., Any], count: Iterator[int] = count, stop_at: int = stop_at) -> Any:
            def stop(*args: Any) -> Any:
                stops = next(count) == stop_at
                result = None if stops and not after else ours(*args)
                if stops:
                    raise KeyboardInterrupt
                return result

            return stop

        with monkeypatch.context() as patch:
            for owner, name in places:
                patch.setattr(owner, name, stopping(getattr(owner, name)))
            try:
                call()
                assert stop_at >= at_least
                return
            except KeyboardInterrupt:
                pass
        yield
    raise AssertionError("the run never reached its end")
