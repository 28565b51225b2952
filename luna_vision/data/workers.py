"""The processes that load images."""

import multiprocessing
import os
import signal
import threading

import cv2


def init_worker(worker_id: int) -> None:
    """To be called at the start of a loader's worker: no threads of its own, and SIGTERM by its parent only.

    Launchers (torchrun, SLURM, systemd, ``timeout``) send the signal to all processes of a run. The main process then
    ends the step that it is at, for which it may still want a batch, and takes a worker that has gone for an error.
    """
    cv2.setNumThreads(0)  # each worker would start a thread for every core
    if hasattr(signal, "sigwaitinfo"):  # macOS has none
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    while True:
        sent = signal.sigwaitinfo({signal.SIGTERM})
        if sent.si_pid == parent.pid or not parent.is_alive():
            os._exit(0)  # as torch's own handler does: any other code would be an error to the parent
