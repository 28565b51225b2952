"""Training for a given time."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, Trainer

from .base import TimmTask

MEASURED_AFTER = 10  # batches: in the first few, a model is compiled and memory is found


class TimeBudget(Callback):
    """Train for about so many seconds: the number of epochs follows from the measured time of one, with validation.

    It is planned anew after every epoch, and the schedule of the learning rate with it, so that the rate arrives at its
    end when the time is over. ``max_epochs`` of the trainer remains the largest number, and gives the schedule of the
    first epoch: let that be one of warm-up, which does not depend on the length of the run. What comes before the first
    epoch and after the last does not count. A resumed run has the time that is left.

    Args:
        max_seconds: Time of training and validation.

    Raises:
        ValueError: It is not above 0; or, in ``setup``, the trainer has no ``max_epochs``.
    """

    def __init__(self, max_seconds: float) -> None:
        if not max_seconds > 0:
            raise ValueError(f"max_seconds must be above 0, got {max_seconds}")
        self.max_seconds, self.used = max_seconds, 0.0
        self._planned: int | None = None
        self._since: float | None = None  # the end of the last epoch, or the start

    def setup(self, trainer: Trainer, pl_module: TimmTask, stage: str) -> None:
        if stage == "fit":
            if (trainer.max_epochs or -1) < 1:
                raise ValueError("TimeBudget needs the largest number of epochs: set trainer.max_epochs")
            self._most = trainer.max_epochs

    def on_train_start(self, trainer: Trainer, pl_module: TimmTask) -> None:
        self._since, self._batches = time.perf_counter(), 0
        if self._planned is not None:  # by the run that this one resumes
            self._plan(trainer, pl_module, self._planned)

    def _plan(self, trainer: Trainer, pl_module: TimmTask, epochs: int) -> None:
        self._planned = min(epochs, self._most)
        if self._planned != trainer.max_epochs:
            trainer.fit_loop.max_epochs = self._planned
            pl_module.reschedule()

    def on_train_batch_end(self, trainer: Trainer, pl_module: TimmTask, *args: Any) -> None:
        self._batches += 1
        self._skipped = min(MEASURED_AFTER, trainer.num_training_batches)
        if self._batches == self._skipped:
            self._measured_since = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: TimmTask) -> None:
        now = time.perf_counter()
        self.used, self._since = self.used + now - self._since, now
        measured = (self._batches - self._skipped) / trainer.num_training_batches  # epochs
        if measured <= 0:
            return
        done = trainer.current_epoch + 1
        more = int((self.max_seconds - self.used) / (now - self._measured_since) * measured)
        self._plan(trainer, pl_module, trainer.strategy.broadcast(done + max(more, 0)))

    def state_dict(self) -> dict[str, Any]:
        since = 0.0 if self._since is None else time.perf_counter() - self._since
        return {"used": self.used + since, "planned": self._planned, "max_seconds": self.max_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.used = state_dict["used"]
        self._planned = state_dict["planned"] if state_dict["max_seconds"] == self.max_seconds else None
