"""Measurements in processes of their own, whose peak of resident memory is then that of one measurement."""

import multiprocessing
import resource
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from experiments.command import measured_on
from luna_vision.utils.errors import one_line
from luna_vision.utils.files import write_json
from luna_vision.utils.record import read_json

__all__ = ["Job", "measure_all", "peak_resident", "run_job"]

Job = dict[str, Any]  # plain data that says what to measure


def peak_resident() -> int:
    """The most memory that this process has had resident, bytes."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
    except (OSError, StopIteration):  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_job(measure: Callable[[Job], Job], job: Job) -> Job:
    """`measure(job)` in a new process, or its "error"."""
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(measure, job).result()
    except BrokenProcessPool:
        return {"error": "its process was killed, perhaps for its memory"}
    except Exception as error:  # what cannot be measured must not stop the rest
        return {"error": f"{type(error).__name__}: {one_line(error)}"}


def measure_all(
    measure: Callable[[Job], Job], jobs: Iterable[Job], out: Path | None, name: Callable[[Job], str]
) -> list[Job]:
    """Measure what a file has no row of yet, and write the file after each.

    Args:
        measure: Gives "seconds" and "peak_resident_bytes", and more.
        jobs: What to measure; a row has the job and what was found.
        out: The file, JSON; without one, all is measured.
        name: Of a job, for a line of progress.

    Returns:
        The rows, also of earlier runs; those that failed have an "error" and are measured anew the next time.
    """
    known = [] if out is None else read_json(out).get("rows", [])
    rows = [row for row in known if "error" not in row]
    for job in jobs:
        if any(job.items() <= row.items() for row in rows):
            continue
        row = job | run_job(measure, job)
        rows.append(row)
        said = row.get("error") or f"{row['seconds']:.1f} s, peak memory {row['peak_resident_bytes'] / 1e9:.2f} GB"
        print(f"{name(job)}: {said}", flush=True)
        if out is not None:
            write_json(out, {**measured_on(), "rows": rows})
    return rows
