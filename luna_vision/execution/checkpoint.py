"""What a stopped run leaves in its folder, so that the same call goes on from there.

The folder has the patches (`patches.bin`, see `luna_vision.execution.store`) and `state.safetensors`: what else is
known after the last complete band, and everything that the result depends on. The state takes its place in one move
after the patches are on the disk, and the next band leaves alone what it was computed from; so the two always fit.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..utils.files import new_file, remove_leftovers
from .out_of_core import State

__all__ = ["Checkpoint"]


class Checkpoint:
    """The folder of a run.

    Attributes:
        band: Rows of patches that go through a layer together in a run that was stopped; None if there is none.
    """

    PATCHES, STATE = "patches.bin", "state.safetensors"

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        """
        Args:
            folder: Made if it is not there.
            about: What the result depends on, as JSON can hold it.

        Raises:
            ValueError: A run that was stopped is another one, or its state cannot be read.
            OSError: The folder cannot be made.
        """
        self.folder, self.about, self._found = folder, {}, None
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        self.patches, self.path = folder / self.PATCHES, folder / self.STATE
        self.band: int | None = None
        if self.path.exists():
            try:
                with safe_open(self.path, "pt") as file:
                    found = file.metadata()
                    self.band, self._place = int(found["band"]), (int(found["sweep"]), int(found["row"]))
                    self._found = dict(json.loads(found["about"]))
            except (SafetensorError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{self.path} is not the state of a run: remove {folder} to begin anew") from error
            if not self.patches.exists():  # of a run that was finished
                self.path.unlink()
                self.band = self._found = None
        self.expect(about)

    def expect(self, about: dict[str, Any]) -> None:
        """Add to what the result depends on.

        Raises:
            ValueError: A run that was stopped is another one.
        """
        about = json.loads(json.dumps(about))
        self.about |= about
        if self._found is None:
            return
        other = [name.replace("_", " ") for name in sorted(about) if self._found.get(name) != about[name]]
        if other:
            raise ValueError(
                f"{self.folder} holds a run that was stopped, with other {', '.join(other)}: "
                "remove it, or give the same to go on"
            )

    def load(self, device: torch.device) -> State:
        """Where the stopped run was."""
        with safe_open(self.path, "pt", device=str(device)) as file:
            return State.of(*self._place, {name: file.get_tensor(name) for name in file.keys()})

    def save(self, state: State, band: int) -> None:
        """Keep a state.

        Raises:
            OSError: It cannot be written; the last one is still there.
        """
        place = {"sweep": str(state.sweep), "row": str(state.row), "band": str(band)}
        with new_file(self.path) as file:
            file.write(save(state.tensors(), {"about": json.dumps(self.about), **place}))

    @property
    def is_begun(self) -> bool:
        """Whether there is a state to go on from."""
        return self.path.exists()

    def remove(self) -> None:
        """Remove what is here, and the folder if that was all."""
        self.patches.unlink(missing_ok=True)  # first: a state without patches counts for nothing
        self.path.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()
