"""Seconds and memory of training steps on very large images: `python -m experiments.benchmarks.bands --help`.

A step is forward, cross-entropy and backward at batch 1, without optimizer. Each is measured in a process of its own,
whose peak of resident memory is then that of the step: `plain`, with `set_grad_checkpointing`, and in bands with
`set_band_checkpointing`.
"""

import argparse
import sys
import time

import torch
import torch.nn.functional as F

from experiments.command import Parser, at_least, json_file
from luna_vision.execution import set_band_checkpointing
from luna_vision.models import LunaVit

from .cell import Spec
from .jobs import Job, measure_all, peak_resident

__all__ = ["main", "measure"]

WAYS = ("plain", "checkpointing", "bands")
STORE_TYPES = {"float32": None, "bfloat16": torch.bfloat16}
BAND_PATCHES = 2**12  # as many as a band of streaming has


def default_rows(model: LunaVit, side: int) -> int:
    """Rows of a band of about 4,096 patches, of an image of this side."""
    return max(1, BAND_PATCHES // -(-side // model.patch_embed.patch_size[1]))


def measure(job: Job) -> Job:
    """Do one step: what it took."""
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
    return {
        "seconds": seconds,
        "forward_seconds": forward,
        "peak_resident_bytes": peak_resident(),
        "resident_bytes_before": before,  # Python, the libraries, the model and the pixels
        "loss": loss.item(),
        "gradient_norm": float(norm),
    }


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
    parser.add_argument("--out", type=json_file, metavar="FILE", help=".json")
    return parser


def jobs(args: argparse.Namespace, model: LunaVit) -> list[Job]:
    """What is to be measured of a model, in turns."""
    common = {name: getattr(args, name) for name in ("store_dtype", "autocast", "threads")}
    common["model"] = args.model.text
    found = []
    for i in range(args.repeats):
        for way, side in [*((way, args.side) for way in args.ways), *(("bands", side) for side in args.large_side)]:
            rows = (args.rows or default_rows(model, side)) if way == "bands" else 0
            found.append({**common, "way": way, "side": side, "rows": rows, "repeat": i})
    return found


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write; returns the exit code: 1 if something could not be measured."""
    parser = _parser()
    args = parser.parse_args(argv)
    model = args.model.create(device="meta")
    if not isinstance(model, LunaVit):
        parser.error(f"--model must be a Luna ViT, which has bands, got {args.model.text}")
    rows = measure_all(measure, jobs(args, model), args.out, "{0[side]} px, {0[way]}".format)
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
