"""Which exact form of pack and unpack is faster where: `python -m luna_vision.benchmarks.forms --help`.

`luna_vision.functional.use_absorbed` takes its constants from what this prints.
"""

import argparse
import datetime
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import functional as LF
from .__main__ import machine, write

__all__ = ["best_limit", "main", "regret"]

PARTS = ("pack", "pack, untied", "unpack")


def closure(part: str, form: str, x: Tensor, memory: Tensor, heads: int, training: bool) -> Callable[[], Any]:
    """One call of a part in a form, forward alone or with the backward pass."""
    C = x.shape[-1]
    torch.manual_seed(0)
    w_q, w_k, w_v, w_o = ((torch.randn(C, C) / C**0.5).to(x.dtype).requires_grad_(training) for _ in range(4))
    b = torch.zeros(C, dtype=x.dtype, requires_grad=training)
    if part == "unpack":
        run = LF.unpack_absorbed if form == "absorbed" else LF.unpack_projected
        args = (x, memory, w_q, b, w_k, None, b, w_o, b, heads)
    else:
        run = LF.pack_absorbed if form == "absorbed" else LF.pack_projected
        args = (memory, x, w_q, b, w_k, w_v if "untied" in part else None, b, heads)

    def infer() -> None:
        with torch.inference_mode():
            run(*args)

    def train() -> None:
        run(*args).sum().backward()

    return train if training else infer


def interleaved(runs: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median seconds of each, run in turn for about so long, at least seven times."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(times[next(iter(times))]) < 7:
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(t) for name, t in times.items()}


def regret(row: dict[str, Any], limit: float) -> float:
    """How many times slower than the better form the rule is: absorbed if H L < limit p C."""
    ratio = row["heads"] * row["memory_len"] / (row["projections"] * row["dim"])
    chosen = row["absorbed"] if ratio < limit else row["projected"]
    return chosen / min(row["absorbed"], row["projected"])


def best_limit(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """The limit with the smallest mean regret over the rows, half-way between two measured ratios; and that regret."""
    ratios = sorted({r["heads"] * r["memory_len"] / (r["projections"] * r["dim"]) for r in rows})
    limits = [ratios[0] / 2, *((a * b) ** 0.5 for a, b in itertools.pairwise(ratios)), ratios[-1] * 2]
    costs = {limit: statistics.mean(regret(r, limit) for r in rows) for limit in limits}
    best = min(costs, key=costs.__getitem__)
    return best, costs[best]


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table and the best constants, write JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m luna_vision.benchmarks.forms",
        description="Time the projected and the absorbed form of pack and unpack beside each other.",
    )
    parser.add_argument("--dims", nargs="+", type=int, default=[192, 384, 768], help="widths; heads are of 64")
    parser.add_argument("--memory-lens", nargs="+", type=int, default=[8, 16, 32, 64, 128], metavar="SLOTS")
    parser.add_argument("--patches", nargs="+", type=int, default=[196, 1024, 4096])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--modes", nargs="+", default=["inference", "training"], choices=["inference", "training"])
    parser.add_argument("--seconds", type=float, default=0.4, help="of timing for one pair (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)

    rows: list[dict[str, Any]] = []
    print("| part | mode | width | slots | patches | projected (ms) | absorbed (ms) | projected / absorbed |")
    print("|---|---|---|---|---|---|---|---|")
    grid = itertools.product(PARTS, args.modes, args.dims, args.memory_lens, args.patches)
    for part, mode, dim, slots, patches in grid:
        heads = max(dim // 64, 1)
        x, memory = (torch.randn(1, n, dim).to(getattr(torch, args.dtype)) for n in (patches, slots))
        runs = {form: closure(part, form, x, memory, heads, mode == "training") for form in LF.FORMS[1:]}
        row = dict(part=part, mode=mode, dim=dim, heads=heads, memory_len=slots, patches=patches)
        row.update(projections=1 if part == "pack" else 2, **interleaved(runs, args.seconds))
        rows.append(row)
        ms = [1e3 * row[form] for form in LF.FORMS[1:]]
        cells = f"{ms[0]:.3g} | {ms[1]:.3g} | {ms[0] / ms[1]:.2f}"
        print(f"| {part} | {mode} | {dim} | {slots} | {patches} | {cells} |", flush=True)
    for part in PARTS:
        mine = [r for r in rows if r["part"] == part]
        limit, cost = best_limit(mine)
        print(f"{part}: absorbed if H L < {limit:.2f} p C; mean regret {100 * (cost - 1):.1f}%")
    if args.out:
        result = {"date": datetime.date.today().isoformat(), "machine": machine("cpu"), "dtype": args.dtype}
        result["threads"] = torch.get_num_threads()
        write(args.out, {**result, "rows": rows})


if __name__ == "__main__":
    sys.exit(main())
