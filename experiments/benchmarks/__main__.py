"""The benchmark: `python -m experiments.benchmarks --help`."""

import argparse
import datetime
import itertools
import json
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from experiments.command import Parser, at_least
from luna_vision.utils.files import write_json, write_text
from luna_vision.utils.record import machine

from .cell import Spec, gemm_rate, run_cell
from .report import plot, table

# the models of the README's table, and what they are measured against
MODELS = (
    "luna_vit_small",
    "luna_vit_small,memory_len=32",
    "luna_vit_small,memory_len=64",
    "vit_small_patch16_224",
    "xcit_small_12_p16_224",
    "efficientvit_b2",
    "convnext_tiny",
    "swin_tiny_patch4_window7_224",
    "mambaout_tiny",
    "luna_vit_small,mixer=softmax",
    "luna_vit_small,mixer=identity",
)
KEYS = ("model", "height", "width", "dtype", "device", "execution", "mode", "batch_size", "allocator")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; exits with 2 and one line if it makes no sense."""
    parser = Parser(
        prog="python -m experiments.benchmarks",
        description="Time and memory of models beside each other, in one run: models x sizes x types x execution x "
        "mode. Repeats are interleaved, and every model runs in a process of its own. A training step is forward and "
        "backward, without optimizer.",
        epilog="Ctrl-C keeps what was measured; the same command goes on from there.",
    )
    names = {"type": Spec.parse, "metavar": "NAME[,ARG=VALUE...]"}
    parser.add_argument("--models", nargs="+", **names, help="timm names; if left out, those of the README's table")
    parser.add_argument(
        "--baselines",
        nargs="*",
        **names,
        help="models to give ratios to; if left out, the timm models, and the softmax and identity mixers",
    )
    squares = [(side, side) for side in (224, 512, 1024)]
    parser.add_argument("--sizes", nargs="+", type=size, default=squares, metavar="PIXELS", help="512, or 512x2048")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--execution", nargs="+", default=["eager"], choices=["eager", "compiled"])
    parser.add_argument("--modes", nargs="+", default=["inference"], choices=["inference", "training"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--allocator",
        default="keep",
        choices=["keep", "default"],
        help="'keep' tells glibc to keep freed memory, for all models alike: handing it back and getting it again "
        "takes time, and not always the same",
    )
    parser.add_argument("--batch-size", type=at_least(1), default=1)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; torch's choice if left out")
    parser.add_argument("--repeats", type=at_least(1), default=11, help="turns of each model, at most")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="of timing for all models of one size, type and mode"
    )
    parser.add_argument("--out", type=Path, help="folder for results.json, table.md and the plots")
    parser.add_argument("--fresh", action="store_true", help="measure again what --out has already")
    parser.add_argument("--report-only", action="store_true", help="table and plots of what --out has")
    args = parser.parse_args(argv)
    args.models = [m.text for m in args.models] if args.models else list(MODELS)
    if args.baselines is None:
        args.baselines = [m for m in args.models if "luna" not in m or "mixer=softmax" in m or "mixer=identity" in m]
    else:
        args.baselines = [m.text for m in args.baselines]
    absent = [b for b in args.baselines if b not in args.models]
    if absent:
        parser.error(f"baseline {absent[0]!r} is not among --models: {', '.join(args.models)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if args.report_only and not (args.out and (args.out / "results.json").is_file()):
        parser.error("--report-only needs --out with a results.json in it")
    return args


def size(text: str) -> tuple[int, int]:
    """ "512" or "512x2048" (height x width) to pixels; an argument type."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match or int(match[1]) < 1 or int(match[2] or 1) < 1:
        raise argparse.ArgumentTypeError(f"a size is PIXELS or HEIGHTxWIDTH, got {text!r}")
    return int(match[1]), int(match[2] or match[1])


class Cell:
    """A running cell, seen from the parent."""

    def __init__(self, context: Any, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=run_cell, args=(theirs, spec), daemon=True)
        self.process.start()
        theirs.close()
        self.report = self._receive()
        self.times: list[float] = []

    def _receive(self) -> dict[str, Any]:
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join()
            killed = self.process.exitcode == -9
            return {"error": "out of memory (killed)" if killed else f"died with code {self.process.exitcode}"}

    @property
    def alive(self) -> bool:
        """Whether it can still be run."""
        return "error" not in self.report

    def run(self) -> None:
        """Give the model its turn and keep the times."""
        with suppress(BrokenPipeError):  # it was killed while another had its turn
            self.connection.send("run")
        answer = self._receive()
        if "error" in answer:
            self.report["error"] = answer["error"]
        else:
            self.times += answer["seconds"]

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()

    def row(self) -> dict[str, Any]:
        """What was measured."""
        row = {**self.spec, **self.report, "date": datetime.datetime.now().isoformat(timespec="seconds")}
        times = self.times or ([self.report["first_seconds"]] if self.alive else [])
        if times:
            quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
            row.update(seconds=statistics.median(times), quartiles=[quartiles[0], quartiles[2]], repeats=len(times))
        return row


def measure(context: Any, cells: list[dict[str, Any]], repeats: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Measure models beside each other: start them one after the other, then run them in turn.

    A run that takes longer than `seconds` on its own is not repeated: its first run is its time.
    """
    running: list[Cell] = []
    try:
        for spec in cells:
            print(f"  {spec['model']} ...", end="", flush=True, file=sys.stderr)
            cell = Cell(context, spec)
            running.append(cell)
            said = f"{cell.report['first_seconds']:.3g} s" if cell.alive else cell.report["error"]
            print(f" {said}", file=sys.stderr)
            if cell.alive and cell.report["first_seconds"] > seconds:
                cell.close()
        started = time.perf_counter()
        for i in range(repeats):
            for cell in running[i % len(running) :] + running[: i % len(running)]:  # each goes first once
                if cell.alive and cell.report["first_seconds"] <= seconds:
                    cell.run()
            if time.perf_counter() - started > seconds and i >= 2:
                break
    finally:
        for cell in running:
            cell.close()
    yield from (cell.row() for cell in running)


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write JSON and plots. Returns the exit code: 130 after Ctrl-C."""
    args = parse_args(argv)
    result: dict[str, Any] = {"rows": [], "gemm_macs_per_second": {}}
    if args.out and (args.out / "results.json").is_file() and not args.fresh:
        result = json.loads((args.out / "results.json").read_text())
    code = 0
    if not args.report_only:
        shell = " ".join(sys.argv[1:] if argv is None else argv)
        command = f"python -m experiments.benchmarks {shell}".strip()
        commands = result.setdefault("commands", [])
        if command not in commands:
            commands.append(command)
        result.update(machine=machine(args.device))
        try:
            run(args, result)
        except KeyboardInterrupt:
            print("\ninterrupted; what was measured is kept", file=sys.stderr)
            code = 130
    text = table(result, args.baselines)
    print(text)
    if args.out:
        write_json(args.out / "results.json", result)
        write_text(args.out / "table.md", text.lstrip() + "\n")
        for path in plot(result, args.out):
            print(path)
    return code


def run(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Measure what `result` lacks, and write it after every group."""
    if args.allocator == "keep":  # read when the server of the cells starts
        os.environ.update(MALLOC_MMAP_THRESHOLD_=str(2**30), MALLOC_TRIM_THRESHOLD_=str(2**40))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.benchmarks.cell"])
    have = {tuple(row[k] for k in KEYS) for row in result["rows"]}
    threads = args.threads or torch.get_num_threads()
    groups = list(itertools.product(args.dtypes, args.execution, args.modes, args.sizes))
    for n, (dtype, execution, mode, (height, width)) in enumerate(groups, 1):
        common = dict(height=height, width=width, dtype=dtype, device=args.device, execution=execution, mode=mode)
        common.update(batch_size=args.batch_size, threads=threads, allocator=args.allocator)
        cells = [{"model": m, **common} for m in args.models]
        if all(tuple(c[k] for k in KEYS) in have for c in cells):
            continue
        print(f"[{n}/{len(groups)}] {height} x {width}, {dtype}, {execution}, {mode}", file=sys.stderr)
        name = f"{dtype}/{args.device}"
        if name not in result["gemm_macs_per_second"]:
            torch.set_num_threads(threads)
            result["gemm_macs_per_second"][name] = gemm_rate(getattr(torch, dtype), args.device)
        # ratios are of one run: a group is measured as a whole, or not at all
        rows = list(measure(context, cells, args.repeats, args.seconds))
        mine = {tuple(c[k] for k in KEYS) for c in cells}
        result["rows"] = [r for r in result["rows"] if tuple(r[k] for k in KEYS) not in mine] + rows
        if args.out:
            write_json(args.out / "results.json", result)


if __name__ == "__main__":
    sys.exit(main())
