"""What several tests of experiments need."""

import multiprocessing

import pytest

from tests.tasks.ranks import CONTEXT


@pytest.fixture
def preloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of experiments are forked by a server that has imported everything once, and has its own output."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda method=None: CONTEXT)
