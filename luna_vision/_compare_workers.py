"""Worker processes of `luna_vision.compare`, one for each run, on one thread each."""

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from ._compare_run import Run, execute, provenance
from .utils.files import write_json

# read when a worker imports torch, which is before any code of ours
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass
class _Worker:
    process: BaseProcess
    messages: Connection
    error: str | None = None
    finished: bool = False


def run_all(
    runs: Sequence[Run], jobs: int, root: str, out: Path, work: Path, execute: Callable[..., dict[str, Any]] = execute
) -> int:
    """Do all runs, `jobs` at a time, and write a result for each: its numbers, or the error it ended with.

    However this function is left, no worker is left running: their results and checkpoints are written in one move, so
    they can be ended at any time.

    Args:
        runs: What to do.
        jobs: Workers at a time.
        root: Folder of the data.
        out, work: Folders of results and of checkpoints.
        execute: Does a run, as `luna_vision._compare_run.execute` does it.

    Returns:
        The number of runs that failed.
    """
    waiting, active, ended, failed = deque(runs), {}, 0, 0
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                run = waiting.popleft()
                active[run] = _start(run, root, out, work, execute)
            wait([w.messages for w in active.values()], timeout=1.0)
            for run, worker in list(active.items()):
                if _listen(run, worker):
                    continue
                del active[run]
                worker.process.join()
                ended += 1
                if not worker.finished:
                    failed += 1
                    error = worker.error or f"the worker ended with exit code {worker.process.exitcode}"
                    names = {"task": run.task, "variant": run.variant, "seed": run.seed, "error": error}
                    write_json(result_path(out, run), {**names, "config": run.config, **provenance()})
                    _say(run, f"failed: {error}")
                print(f"{ended} of {len(runs)} runs ended, {failed} of them failed", flush=True)
    finally:
        for worker in active.values():
            worker.process.kill()
            worker.process.join()
    return failed


def result_path(out: Path, run: Run) -> Path:
    """Where the result of a run is written."""
    return out / "runs" / f"{run.name}.json"


def _start(run: Run, root: str, out: Path, work: Path, execute: Callable[..., dict[str, Any]]) -> _Worker:
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads in any state
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(run, root, out, work, execute, send), name=run.name)
    with _one_thread():
        process.start()
    send.close()  # so that the worker holds the only end, and its death ends the messages
    _say(run, "started")
    return _Worker(process, receive)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The environment of a worker, for this process until it has started it."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            os.environ.update({} if value is None else {name: value})


def _listen(run: Run, worker: _Worker) -> bool:
    """Print what a worker has sent; False once it has ended."""
    try:
        while worker.messages.poll():
            message = worker.messages.recv()
            if message["kind"] == "failed":
                worker.error = message["error"]
            elif message["kind"] == "progress":
                steps, left = f"{message['step']}/{run.config['steps']}", _duration(message["seconds_left"])
                _say(run, f"step {steps}, training accuracy {message['accuracy']:.3f}, {left} left")
            else:
                worker.finished = True
                shown = ", ".join(f"{accuracy:.4f} {where}" for where, accuracy in message["tests"])
                _say(run, f"done in {_duration(message['seconds'])}: test accuracy {shown}")
    except EOFError:
        return False
    return True


def _work(
    run: Run, root: str, out: Path, work: Path, execute: Callable[..., dict[str, Any]], messages: Connection
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of the terminal: the parent ends us
    torch.set_num_threads(1)
    try:
        result = execute(run, root, work / run.work_name, messages.send)
        write_json(result_path(out, run), result)
        tests = [
            (test.get("where") or f"at {test['side']} px", test["accuracy"]) for test in result["accuracy"].values()
        ]
        seconds = result["train_seconds"] + result["test_seconds"]
        messages.send({"kind": "done", "tests": tests, "seconds": seconds})
    except BrokenPipeError:
        pass  # the parent is gone
    except Exception as error:  # whatever a variant does wrong is its own row, not the end of the others
        text = " ".join(str(error).split())
        messages.send({"kind": "failed", "error": f"{type(error).__name__}: {text}"})


def _say(run: Run, text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {run.task} {run.variant} seed {run.seed}: {text}", flush=True)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
