"""SIGTERM in a run of several processes: all of them stop after the same step, or none."""

from __future__ import annotations

import signal
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException


class StopTogether(Callback):
    """Ask in every optimizer step whether SIGTERM has reached any process, and if so end all of them after it.

    Lightning 2.6 broadcasts in the signal handler itself. Whether that meets the broadcast of the other processes, or
    the gradients of a step that some have begun and others have not, is a matter of the moment: then it never ends, or
    ends in an error of the backend. With one process there is nothing to agree on, and Lightning's handler stays.

    A signal in a validation counts after the next training step; launchers wait for some time before they kill.
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

        # in place of Lightning's, which it sets before these hooks, and takes back when the run ends
        signal.signal(signal.SIGTERM, on_sigterm)
        # and of its question before every batch, for which it waits for the device
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    on_sanity_check_start = on_train_start = _listen

    def on_before_optimizer_step(self, trainer: Trainer, *args: Any) -> None:
        # where the guard has just waited for the device
        self._stop = trainer.strategy.reduce_boolean_decision(self._received, all=False)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self._stop:
            raise SIGTERMException
