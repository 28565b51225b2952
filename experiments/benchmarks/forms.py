"""Which exact form of pack and unpack is faster where: `python -m experiments.benchmarks.forms --help`.

`luna_vision.functional.absorbs` takes its constants from what this prints.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from experiments.command import Parser, json_file, measured_on
from luna_vision import functional as LF
from luna_vision.layers import LunaAttention
from luna_vision.utils.files import write_json

__all__ = ["fit", "main", "regret"]

PARTS = ("pack", "pack, untied", "unpack")


MANY = 1024  # patches from which on a measurement counts: the choice does not depend on the image
LAYERS = 12  # of a model; every call takes the weights of the next, which lie in no cache


def closure(
    part: str, form: str, x: Tensor, memory: Tensor, heads: int, training: bool, compiled: bool
) -> Callable[[], Any]:
    """A call of a part in a form, forward alone or with the backward pass."""
    torch.manual_seed(0)
    layers = [
        LunaAttention(x.shape[-1], heads, tie_kv="untied" not in part, pack_form=form, unpack_form=form)
        .to(x.device, x.dtype)
        .requires_grad_(training)
        for _ in range(LAYERS)
    ]
    calls = [layer.unpack if part == "unpack" else layer.pack for layer in layers]
    turn = itertools.cycle([torch.compile(call, dynamic=False) for call in calls] if compiled else calls)

    def run() -> Tensor:
        y = next(turn)(x, memory)
        if x.is_cuda:
            torch.cuda.synchronize()
        return y

    def infer() -> None:
        with torch.inference_mode():
            run()

    def train() -> None:
        run().sum().backward()
        if x.is_cuda:
            torch.cuda.synchronize()

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


def regret(row: dict[str, Any], cost: LF.FormCost) -> float:
    """How many times slower than the better form the one is that the rule takes with these constants."""
    absorbs = LF.absorbs("auto", row["memory_len"], row["heads"], row["dim"], row["projections"], cost)
    return row["absorbed" if absorbs else "projected"] / min(row["absorbed"], row["projected"])


def fit(rows: list[dict[str, Any]]) -> tuple[LF.FormCost, float, float]:
    """The constants with the smallest mean regret over the rows; that, and the largest regret."""
    grid = itertools.product(
        [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4, 1.6, 1.8, 2.0], [0.0, 0.5, 1.0, 1.5]
    )
    costs = {c: [regret(r, c) for r in rows] for c in itertools.starmap(LF.FormCost, grid)}
    best = min(costs, key=lambda c: statistics.mean(costs[c]))
    return best, statistics.mean(costs[best]), max(costs[best])


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time both forms of every part over the grid of sizes, printing as it goes."""
    rows: list[dict[str, Any]] = []
    print("| part | mode | width | slots | patches | projected (ms) | absorbed (ms) | projected / absorbed |")
    print("|---|---|---|---|---|---|---|---|")
    grid = itertools.product(PARTS, args.modes, args.dims, args.memory_lens, args.patches)
    for part, mode, dim, slots, patches in grid:
        heads = max(dim // 64, 1)
        x, memory = (
            torch.randn(args.batch, n, dim).to(args.device, getattr(torch, args.dtype)) for n in (patches, slots)
        )
        runs = {form: closure(part, form, x, memory, heads, mode == "training", args.compiled) for form in LF.FORMS[1:]}
        row = dict(part=part, mode=mode, dim=dim, heads=heads, memory_len=slots, patches=patches)
        row.update(projections=1 if part == "pack" else 2, **interleaved(runs, args.seconds))
        rows.append(row)
        ms = [1e3 * row[form] for form in LF.FORMS[1:]]
        cells = f"{ms[0]:.3g} | {ms[1]:.3g} | {ms[0] / ms[1]:.2f}"
        print(f"| {part} | {mode} | {dim} | {slots} | {patches} | {cells} |", flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table and the best constants, write JSON."""
    parser = Parser(
        prog="python -m experiments.benchmarks.forms",
        description="Time the projected and the absorbed form of pack and unpack beside each other.",
    )
    parser.add_argument("--dims", nargs="+", type=int, default=[192, 384, 768], help="widths; heads are of 64")
    parser.add_argument("--memory-lens", nargs="+", type=int, default=[8, 16, 32, 64, 128], metavar="SLOTS")
    parser.add_argument("--patches", nargs="+", type=int, default=[196, 1024, 4096])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, default=1, help="images at a time; more for a GPU")
    parser.add_argument("--compiled", action="store_true", help="both forms compiled")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--modes", nargs="+", default=["inference", "training"], choices=["inference", "training"])
    parser.add_argument("--seconds", type=float, default=0.4, help="of timing for one pair")
    parser.add_argument("--out", type=json_file, help="JSON file to write")
    parser.add_argument("--fit-only", action="store_true", help="fit the constants to the rows that --out has")
    args = parser.parse_args(argv)
    if args.fit_only and not (args.out and args.out.is_file()):
        parser.error("--fit-only needs --out, a file that this command wrote")

    rows = json.loads(args.out.read_text())["rows"] if args.fit_only else measure(args)
    fitted = {}
    for part in ("pack", "unpack"):
        mine = [r for r in rows if r["part"].startswith(part)]
        mine = [r for r in mine if r["patches"] >= MANY] or mine
        cost, mean, worst = fit(mine)
        fitted[part] = {**cost._asdict(), "mean_regret": mean, "largest_regret": worst}
        print(f"{part}: {cost}; slower than the better form by {mean - 1:.1%} on average, {worst - 1:.0%} at most")
    if args.out and not args.fit_only:
        about = {name: getattr(args, name) for name in ("dtype", "batch", "compiled")}
        about |= {"threads": torch.get_num_threads(), "constants": fitted}
        write_json(args.out, {**measured_on(args.device), **about, "rows": rows})


if __name__ == "__main__":
    sys.exit(main())
