"""SIGTERM in a run of several processes: all of them stop after the same step."""

from __future__ import annotations

import signal
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException


class StopTogether(Callback):
    """Ask in every optimizer step whether SIGTERM has reached any process, and if so end all of them after the step.

    Lightning 2.6 broadcasts in the signal handler. Depending on the moment, that meets another collective operation of
    the other processes, and hangs or fails. With one process, Lightning's handler stays.

    A signal in a validation acts after the next training step.
    """

    def __init__(self) -> None:
        self._received = self._stop = False

    def _listen(self, trainer: Trainer, *args: Any) -> None:
        if trainer.world_size == 1:
            return

        def on_sigterm(number: int, frame: Any) -> None:
            if not self._received and trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(number)  # to the processes that this one has started, if any
            self._received = True

        # replaces Lightning's handler, which is set before these hooks; Lightning restores the former one at the end
        signal.signal(signal.SIGTERM, on_sigterm)
        # Lightning would also ask before every batch, and wait for the device
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    on_sanity_check_start = on_train_start = _listen

    def on_before_optimizer_step(self, trainer: Trainer, *args: Any) -> None:
        # the guard has just waited for the device
        self._stop = trainer.strategy.reduce_boolean_decision(self._received, all=False)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self._stop:
            raise SIGTERMException
