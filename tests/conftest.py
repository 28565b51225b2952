"""What tests of several rooms need."""

import os
import random
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes of two threads on two cores slow each other tenfold

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Gives every test the same numbers, whichever tests ran before it on its worker: a module's `RNG`, too."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    if rng := getattr(request.module, "RNG", None):
        rng.bit_generator.state = np.random.default_rng(0).bit_generator.state


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
