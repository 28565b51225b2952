"""The processes that load images."""

import multiprocessing
import os
import signal
import threading

import cv2


def init_worker(worker_id: int) -> None:
    """Start a loader's worker: without threads of OpenCV, and deaf to SIGTERM unless its parent sends it.

    Launchers (torchrun, SLURM, systemd, ``timeout``) send the signal to all processes of a run. The main process still
    finishes its step, may need a batch for that, and reports an error if a worker has gone.
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
            os._exit(0)  # as torch's own handler does: the parent takes any other code for an error
