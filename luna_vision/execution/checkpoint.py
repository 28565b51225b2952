"""The folder of a run, from which the same call continues after it was stopped.

`patches.bin` has the patches (see `luna_vision.execution.store`). `state.pt` has the rest of the state after the last
complete band, and a record of everything that the result depends on. It is replaced in one move once the patches are on
the disk, and the next band does not change the rows it is computed from, so both files always agree.
"""

import json
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..utils.files import new_file, remove_leftovers
from .out_of_core import State

__all__ = ["Checkpoint"]


class Checkpoint:
    """The folder of a run.

    Attributes:
        band: Rows of a band in the run that was stopped; None if the folder has no such run.
    """

    PATCHES, STATE = "patches.bin", "state.pt"

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        """
        Args:
            folder: It is made if it does not exist.
            about: What the result depends on, as plain data.

        Raises:
            ValueError: The folder has another run, or a state that cannot be read.
            OSError: The folder cannot be made.
        """
        self.folder, self.about = folder, {}
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        self.patches, self.path = folder / self.PATCHES, folder / self.STATE
        self.band: int | None = None
        self._found: dict[str, Any] | None = None
        if self.path.exists():
            try:
                found = torch.load(self.path, "cpu", weights_only=True)
                self.band, self._found = int(found["band"]), dict(found["about"])
            except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{self.path} is not the state of a run: remove {folder} to start again") from error
            if not self.patches.exists():  # the run was finished
                self.path.unlink()
                self.band = self._found = None
        self.expect(about)

    def expect(self, about: dict[str, Any]) -> None:
        """Add to the record of what the result depends on.

        Raises:
            ValueError: The run that was stopped has another value.
        """
        about = json.loads(json.dumps(about))
        self.about |= about
        if self._found is None:
            return
        other = [name.replace("_", " ") for name in sorted(about) if self._found.get(name) != about[name]]
        if other:
            raise ValueError(
                f"{self.folder} holds a run that was stopped, with other {', '.join(other)}: "
                "remove it, or give the same to continue"
            )

    def load(self, device: torch.device) -> State:
        """The state of the run that was stopped."""
        return State(**torch.load(self.path, device, weights_only=True)["state"])

    def save(self, state: State, band: int) -> None:
        """Keep a state.

        Raises:
            OSError: It cannot be written; the last one stays.
        """
        with new_file(self.path) as file:
            torch.save({"about": self.about, "band": band, "state": vars(state)}, file)

    @property
    def is_begun(self) -> bool:
        """Whether there is a state to go on from."""
        return self.path.exists()

    def remove(self) -> None:
        """Remove both files, and the folder if it is empty then."""
        self.patches.unlink(missing_ok=True)  # first: a state without patches is of a finished run
        self.path.unlink(missing_ok=True)
        with suppress(OSError):  # it has other files, is the working directory, or where a disk is mounted
            self.folder.rmdir()
