"""What tests of several rooms need."""

import os
from collections.abc import Callable

import pytest


@pytest.fixture
def deny(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes folders whose path ends so unreadable, for the superuser too."""
    scandir = os.scandir

    def deny(end: str) -> None:
        def denied(path):
            if str(path).endswith(end):
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", denied)

    return deny
