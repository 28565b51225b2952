"""Processes that stay, in groups of any size, for tests: starting one takes longer than what it computes."""

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class Ranks:
    """So many processes, which have joined with gloo.

    `ranks.run(job, count, **arguments)` calls `job(group, **arguments)` on the first `count` of them, with a group of
    just these, and returns what each returns. A job is a function of a module; one that hangs fails.
    """

    def __init__(self, size: int, folder: Path, start_timeout: float = 240) -> None:
        context = mp.get_context("forkserver")
        # what takes long to import, and does not change: it is imported once for all processes
        context.set_forkserver_preload(
            ["torch._dynamo", "torch.distributed.tensor", "timm", "pytest", "sklearn.datasets"]
        )
        self.results = context.Queue()
        self.jobs = [context.SimpleQueue() for _ in range(size)]
        arguments = [(rank, size, str(folder / "store"), self.jobs[rank], self.results) for rank in range(size)]
        self.processes = [context.Process(target=_serve, args=a, daemon=True) for a in arguments]
        threads = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # as the processes read it when they start
        for process in self.processes:
            process.start()
        os.environ.pop("OMP_NUM_THREADS")
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = threads
        self._collect(size, start_timeout)

    def run(self, job: Callable[..., Any], count: int, timeout: float = 60, **arguments: Any) -> list[Any]:
        assert all(process.is_alive() for process in self.processes), "an earlier job has hung, and ended the processes"
        for jobs in self.jobs[:count]:
            jobs.put((job, count, arguments))
        return self._collect(count, timeout)

    def _collect(self, count: int, timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        errors = []
        while len(results) < count:
            try:
                rank, result, error = self.results.get(timeout=timeout)
            except Empty:
                self.stop()
                missing = sorted(set(range(count)) - set(results))
                raise TimeoutError("\n".join([f"no answer of processes {missing} in {timeout} s", *errors])) from None
            results[rank] = result
            if error is not None:
                errors.append(f"process {rank}: {error}")
                timeout = min(timeout, 10)  # the others may wait for it in vain
        assert not errors, "\n".join(errors)
        return [results[rank] for rank in range(count)]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(rank: int, size: int, store: str, jobs: Any, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    groups = {n: dist.new_group(list(range(n))) for n in range(1, size + 1)}
    results.put((rank, None, None))
    while True:
        job, n, arguments = jobs.get()
        try:
            results.put((rank, job(groups[n], **arguments), None))
        except BaseException:
            results.put((rank, None, traceback.format_exc()))
