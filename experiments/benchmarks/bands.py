"""Seconds and memory of training steps on very large images: `python -m experiments.benchmarks.bands --help`.

A step is forward, cross-entropy and backward at batch 1, without optimizer. Each is measured in a process of its own,
whose peak of resident memory is then that of the step: `plain`, with `set_grad_checkpointing`, and in bands with
`set_band_checkpointing`.
"""

import argparse
import datetime
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from experiments.command import Parser, at_least
from luna_vision.execution import set_band_checkpointing
from luna_vision.models import LunaVit
from luna_vision.utils.files import write_json
from luna_vision.utils.record import machine

from .cell import Spec
from .gigapixel import peak_resident

__all__ = ["estimate", "main", "measure"]

WAYS = ("plain", "checkpointing", "bands")
STORE_TYPES = {"float32": None, "bfloat16": torch.bfloat16}
BAND_PATCHES = 2**12  # as many as a band of streaming has
WORKER = "import json, sys; from experiments.benchmarks.bands import measure; measure(json.loads(sys.argv[1]))"


def estimate(model: LunaVit, side: int, store_bytes: int, rows: int | None = None) -> int:
    """Bytes that a step in bands holds at its fullest, when the backward pass begins, beyond Python and the libraries.

    The pixels, the input of every block as it is stored, and four times the patches in float32: the last block's
    output, the same joined to the memory, and the two gradients that the final norm turns into each other. Then
    parameters and their gradients, and the band in work: what autograd keeps of a block, about 14 times the width and
    three times the MLP's hidden layer for each patch.

    Args:
        model: A Luna ViT.
        side: Of the image, pixels.
        store_bytes: Of a number, as the inputs are stored.
        rows: Of a band; those of about 4,096 patches if None.
    """
    p, q = model.patch_embed.patch_size
    columns, width = -(-side // q), model.embed_dim
    patches = -(-side // p) * columns
    rows = default_rows(model, side) if rows is None else rows
    pixels = 4 * model.in_chans * side * side
    kept = patches * width * (len(model.blocks) * store_bytes + 4 * 4)
    band = min(patches, rows * columns) * 4 * (14 * width + 3 * model.blocks[0].hidden)
    return pixels + kept + 2 * 4 * sum(x.numel() for x in model.parameters()) + band


def default_rows(model: LunaVit, side: int) -> int:
    """Rows of a band of about 4,096 patches, of an image of this side."""
    return max(1, BAND_PATCHES // -(-side // model.patch_embed.patch_size[1]))


def measure(job: dict[str, Any]) -> None:
    """Do one step, and print what it took as JSON: what the worker processes run."""
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    model = Spec.parse(job["model"]).create().train()
    if job["way"] == "checkpointing":
        model.set_grad_checkpointing(True)
    elif job["way"] == "bands":
        set_band_checkpointing(model, job["rows"], STORE_TYPES[job["store_dtype"]])
    x = torch.rand(1, model.in_chans, job["side"], job["side"])
    before = peak_resident()
    started = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=job["autocast"]):
        loss = F.cross_entropy(model(x).float(), torch.zeros(1, dtype=torch.long))
    forward = time.perf_counter() - started
    loss.backward()
    seconds = time.perf_counter() - started
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    result = {
        "seconds": seconds,
        "forward_seconds": forward,
        "peak_resident_bytes": peak_resident(),
        "resident_bytes_before": before,  # Python, the libraries, the model and the pixels
        "loss": loss.item(),
        "gradient_norm": float(norm),
    }
    if job["way"] == "bands":
        result["estimated_bytes"] = estimate(
            model, job["side"], 2 if job["store_dtype"] == "bfloat16" else 4, job["rows"]
        )
    print(json.dumps(result))


def run_job(job: dict[str, Any], code: str = WORKER) -> dict[str, Any]:
    """`measure` in a process of its own, whose last line is the result; what went wrong, if it was killed for its
    memory."""
    worker = subprocess.run([sys.executable, "-c", code, json.dumps(job)], capture_output=True, text=True)
    if worker.returncode:
        last = worker.stderr.strip().rsplit("\n", 1)[-1] or f"ended with exit code {worker.returncode}"
        return {**job, "error": last}
    return {**job, **json.loads(worker.stdout.strip().rsplit("\n", 1)[-1])}


def _parser() -> Parser:
    parser = Parser(
        prog="python -m experiments.benchmarks.bands",
        description="Seconds and peak resident memory of a training step at batch 1: as it is, with checkpoints of "
        "whole blocks, and in bands of rows. What --out has already is not measured again.",
    )
    parser.add_argument("--model", type=Spec.parse, default="luna_vit_small", metavar="NAME[,ARG=VALUE...]")
    parser.add_argument("--side", type=at_least(1), default=2048, metavar="PIXELS", help="of all ways")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="at --side")
    parser.add_argument(
        "--large-side", type=at_least(1), nargs="*", default=[8192], metavar="PIXELS", help="in bands alone"
    )
    parser.add_argument("--rows", type=at_least(1), metavar="N", help="of a band; by default of about 4,096 patches")
    parser.add_argument("--store-dtype", choices=STORE_TYPES, default="float32", help="of what is kept")
    parser.add_argument("--autocast", action="store_true", help="to bfloat16")
    parser.add_argument("--repeats", type=at_least(1), default=1, help="of each, taking turns")
    parser.add_argument("--threads", type=at_least(1), default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--out", type=Path, metavar="FILE", help=".json")
    return parser


def jobs(args: argparse.Namespace, model: LunaVit) -> list[dict[str, Any]]:
    """What is to be measured of a model, in turns."""
    common = {name: getattr(args, name) for name in ("store_dtype", "autocast", "threads")}
    common["model"] = args.model.text
    cells = [(way, args.side) for way in args.ways] + [("bands", side) for side in args.large_side]

    def rows(way: str, side: int) -> int:
        return (args.rows or default_rows(model, side)) if way == "bands" else 0

    return [
        {**common, "way": way, "side": side, "rows": rows(way, side), "repeat": i}
        for i in range(args.repeats)
        for way, side in cells
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write; returns the exit code: 1 if something could not be measured."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.out is not None and args.out.suffix != ".json":
        parser.error(f"--out must end in .json, got {args.out}")
    model = args.model.create(device="meta")
    if not isinstance(model, LunaVit):
        parser.error(f"--model must be a Luna ViT, which has bands, got {args.model.text}")
    rows: list[dict[str, Any]] = []
    if args.out is not None and args.out.exists():
        rows = [row for row in json.loads(args.out.read_text(encoding="utf-8"))["rows"] if "error" not in row]
    for job in jobs(args, model):
        if any(all(row.get(name) == value for name, value in job.items()) for row in rows):
            continue
        row = run_job(job)
        rows.append(row)
        what = f"{job['side']} px, {job['way']}"
        if "error" in row:
            print(f"{what}: {row['error']}", flush=True)
        else:
            peak, seconds = row["peak_resident_bytes"] / 1e9, row["seconds"]
            print(f"{what}: {seconds:.1f} s, peak resident memory {peak:.2f} GB", flush=True)
        if args.out is not None:
            about = {"date": datetime.datetime.now().isoformat(timespec="seconds"), "machine": machine()}
            write_json(args.out, {**about, "rows": rows})
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
