"""Runs of several processes as torchrun starts them, from a server that has imported everything once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DEBUG = ROOT / "configs" / "debug.yaml"
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["luna_vision.data", "luna_vision.cli.train", "torch.distributed.fsdp"])


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def _work(folder: str, variables: dict[str, str], function: Callable[..., Any], arguments: tuple) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    os.environ.update(variables)
    os.chdir(folder)
    output = os.open(f"rank{variables.get('RANK', 0)}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import torch

    torch.set_num_threads(1)
    try:
        function(*arguments)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def start(folder: Path, world_size: int, function: Callable[..., Any], *arguments: Any) -> list:
    """Processes that call ``function`` in ``folder``; what they print is in rank0.txt and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    shared = {"OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    if world_size > 1:
        shared |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "GROUP_RANK": "0"}
        shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "test"}
    processes = []
    for rank in range(world_size):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else {}
        processes.append(CONTEXT.Process(target=_work, args=(str(folder), shared | own, function, arguments)))
        processes[-1].start()
    return processes


def finish(folder: Path, processes: list, timeout: float = 300) -> list[int]:
    """Their exit codes; after so many seconds they are killed, and the test fails."""
    end = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    assert not late, f"processes {late} did not end: {said(folder)}"
    return [process.exitcode for process in processes]


def run(folder: Path, world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 300) -> None:
    codes = finish(folder, start(folder, world_size, function, *arguments), timeout)
    assert codes == [0] * world_size, said(folder)


def said(folder: Path) -> str:
    return "\n".join(path.read_text(errors="replace") for path in sorted(folder.glob("rank*.txt")))


def command_line(*arguments: str) -> None:
    """``python train.py`` with these arguments."""
    from luna_vision.cli.train import main

    sys.argv = ["train.py", *arguments]
    main()


def without_ema(folder: Path) -> Path:
    """The debug config without the callback that FSDP2 refuses."""
    text = DEBUG.read_text()
    config = folder / "config.yaml"
    config.write_text(text[: text.index("  callbacks+:")])
    return config


def until(happened: Callable[[], bool], processes: list, seconds: float = 300) -> None:
    """Wait until something has happened, or a process has ended."""
    end = time.monotonic() + seconds
    while not happened() and time.monotonic() < end and all(process.is_alive() for process in processes):
        time.sleep(0.02)
