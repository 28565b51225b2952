"""Workers stay until their parent lets them go, whoever else sends a signal, and end with it."""

import os
import signal
import subprocess
import sys

import pytest

from luna_vision.data import DigitsDataModule

pytestmark = pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the system has no sigwaitinfo")


def test_only_its_parent_ends_a_worker():
    loader = DigitsDataModule(img_size=8, batch_size=256, num_workers=1).train_dataloader()
    batches = iter(loader)
    next(batches)
    (worker,) = loader._iterator._workers
    subprocess.run(["kill", str(worker.pid)], check=True)
    assert len(list(batches)) == len(loader) - 1 and worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


WAITING = """
import time
from luna_vision.data import DigitsDataModule
loader = DigitsDataModule(img_size=8, batch_size=256, num_workers=1).train_dataloader()
batches = iter(loader)
next(batches)
print(loader._iterator._workers[0].pid, flush=True)
time.sleep(100)
"""


@pytest.mark.slow
@pytest.mark.parametrize("also_told", [False, True])
def test_a_worker_ends_with_its_parent(also_told):
    process = subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    process.kill()
    process.wait()
    if also_told:
        os.kill(worker, signal.SIGTERM)
    process.communicate(timeout=4 if also_told else 60)  # until nobody holds the other end
