"""What inference should take on a GPU: kernels, bytes and operations counted from the code, and times predicted from
these alone. Nothing here is measured.

A kernel takes as long as its bytes at the rate of memory, or its operations at the rate of matrix products, whichever
is longer. "eager" is every operation as it is dispatched. "compiled" fuses, as a compiler would, what is neither a
product, a convolution nor a fused attention: neighbours between the same products are one kernel, which reads and
writes what the others need of it. "kernels" is the same with `use_kernels=True`.
`python -m experiments.gpu.cost_model --help`.
"""

import argparse
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.benchmarks.cell import Spec, build
from experiments.command import Parser
from experiments.gpu.fake import Kernel, Kernels, fake_cuda, on_fake_cuda
from luna_vision.utils.files import write_json

__all__ = ["main", "predict"]

# of an H100: bytes a second, and operations in bfloat16, of matrix products and of fused attention with heads of 64
BANDWIDTH, RATE, FLASH_RATE = 2.9e12, 650e12, 390e12
LAUNCH = 3.5e-6  # seconds from one kernel to the next in eager mode
BATCHES = {224: 256, 512: 48, 1024: 12, 2048: 3}
MODELS = ["luna_vit_small", "vit_small_patch16_224", "luna_vit_small,mixer=identity"]
# the least that luna_vit_small is to be faster than the ViT, and the most that it may be slower than no mixing
BOUNDS = {224: (1.5, 1.3), 512: (2.0, 1.15), 1024: (3.8, 1.15), 2048: (11.0, 1.15)}
LIBRARY = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product_flash_attention", "copy_")


def flash(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **_: Any) -> Tensor:
    """Fused attention, which without a GPU would not be chosen."""
    assert attn_mask is None
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p)[0]


def run(spec: Spec, side: int, batch: int, compiled: bool = False) -> Kernels:
    """The kernels of a forward pass in bfloat16, as the package runs eager or as it is when it is compiled."""
    model = build(spec, side, side, device="meta", dtype=torch.bfloat16).eval()
    fused = mock.patch.object(F, "scaled_dot_product_attention", flash)
    compiling = mock.patch("torch.compiler.is_compiling", return_value=compiled)
    with fused, compiling, fake_cuda(), torch.no_grad(), Kernels() as kernels:
        x = torch.empty(batch, 3, side, side, device="cuda", dtype=torch.bfloat16)
        model = on_fake_cuda(model)
        kernels.ran.clear()
        model(x)
    return kernels


def seconds(kernel: Kernel) -> float:
    """What a kernel should take."""
    return max(kernel.bytes / BANDWIDTH, kernel.flops / (FLASH_RATE if "flash" in kernel.name else RATE))


def fuse(kernels: list[Kernel]) -> list[Kernel]:
    """The kernels that a compiler would leave."""
    depth: dict[int, int] = defaultdict(int)  # of a piece of memory: products on the way to it
    group: dict[int, int] = {}  # of a piece of memory, that of the kernel which wrote it
    groups: dict[int, list[Kernel]] = {}
    for i, kernel in enumerate(kernels):
        level = max((depth[piece] for piece, _ in kernel.reads), default=0)
        library = not _fusible([kernel])
        mine = i
        if not library:  # it joins those that wrote what it reads, since the same product
            near = {
                group[p] for p, _ in kernel.reads if p in group and depth[p] == level and _fusible(groups[group[p]])
            }
            mine = min(near, default=i)
            for other in near - {mine}:
                groups[mine] += groups.pop(other)
                group |= {piece: mine for piece, of in group.items() if of == other}
        groups.setdefault(mine, []).append(kernel)
        for piece, _ in kernel.writes:
            depth[piece], group[piece] = level + library, mine
    readers: dict[int, set[int]] = defaultdict(set)
    for number, members in groups.items():
        for kernel in members:
            for piece, _ in kernel.reads:
                readers[piece].add(number)
    left = []
    for number, members in groups.items():
        written = {piece: size for kernel in members for piece, size in kernel.writes}
        read = {piece: size for kernel in members for piece, size in kernel.reads if piece not in written}
        kept = sum(size for piece, size in written.items() if readers[piece] != {number})
        last = members[-1]
        left.append(last._replace(bytes=sum(read.values()) + kept, flops=sum(k.flops for k in members)))
    return left


def _fusible(members: list[Kernel]) -> bool:
    return members[0].name.removeprefix("aten::") not in LIBRARY and not members[0].name.startswith("luna_vision::")


def predict(spec: Spec, side: int, batch: int) -> dict[str, Any]:
    """Counts and predicted microseconds an image."""
    ours = "luna" in spec.name
    plain = replace(spec, args=spec.args | {"use_kernels": False}) if ours else spec
    eager = run(plain, side, batch).ran
    row: dict[str, Any] = {"model": spec.text, "side": side, "batch": batch}
    row["GFLOP_an_image"] = sum(k.flops for k in eager) / batch / 1e9
    ways = {"eager": eager, "compiled": fuse(run(plain, side, batch, compiled=True).ran)}
    if ours and spec.args.get("mixer", "luna") == "luna":
        fused = replace(spec, args=spec.args | {"use_kernels": True})
        ways["kernels"] = fuse(run(fused, side, batch, compiled=True).ran)
    for name, ran in ways.items():
        row[name] = {
            "kernels": len(ran),
            "GB_an_image": sum(k.bytes for k in ran) / batch / 1e9,
            "us_an_image": 1e6 * max(sum(map(seconds, ran)), len(ran) * LAUNCH * (name == "eager")) / batch,
        }
    return row


def main(argv: list[str] | None = None) -> int:
    """Count, print a table and write the JSON."""
    parser = Parser(prog="python -m experiments.gpu.cost_model", description="Predict the times of inference on a GPU.")
    parser.add_argument("--sizes", nargs="+", type=int, default=list(BATCHES), metavar="PIXELS", help="of the images")
    parser.add_argument("--batch", type=int, metavar="N", help="images at a time (default: what fills the card)")
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME[,ARG=VALUE]")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args: argparse.Namespace = parser.parse_args(argv)
    rows = []
    print("eager / compiled / compiled with fused kernels")
    print("| model | px | batch | GFLOP an image | kernels | MB an image | us an image |")
    print("|---|---|---|---|---|---|---|")
    for side in args.sizes:
        for name in args.models:
            row = predict(Spec.parse(name), side, args.batch or BATCHES.get(side, 1))
            rows.append(row)
            ways = [row[way] for way in ("eager", "compiled", "kernels") if way in row]
            pairs = [
                " / ".join(format(way[key] * factor, form) for way in ways)
                for key, factor, form in (("kernels", 1, "d"), ("GB_an_image", 1e3, ".0f"), ("us_an_image", 1, ".3g"))
            ]
            print(
                f"| {name} | {side} | {row['batch']} | {row['GFLOP_an_image']:.1f} | {' | '.join(pairs)} |", flush=True
            )
    for side in [side for side in args.sizes if side in BOUNDS and args.models == MODELS]:
        luna, vit, plain = (r for r in rows if r["side"] == side)
        for way in ("compiled", "kernels"):
            faster = vit["compiled"]["us_an_image"] / luna[way]["us_an_image"]
            slower = luna[way]["us_an_image"] / plain["compiled"]["us_an_image"]
            wanted = "wanted: {}, and at most {}".format(*BOUNDS[side])
            print(f"{side} px, {way}: {faster:.2f} times as fast as the ViT, {slower:.2f} of no mixing ({wanted})")
    if args.out:
        assumed = {
            "bytes_a_second": BANDWIDTH,
            "operations_a_second": RATE,
            "of_attention": FLASH_RATE,
            "launch_seconds": LAUNCH,
        }
        write_json(args.out, {"predicted": True, "assumed": assumed, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
