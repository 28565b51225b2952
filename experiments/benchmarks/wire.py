"""What one image that is split over processes puts on the wire: `python -m experiments.benchmarks.wire`.

Counted on paper, from a model's architecture, beside ring attention; `tests/execution/test_wire.py` counts what is
really sent and finds the same.

Shapes: N patches, H', W' patch grid, P processes, L memory slots, C width, H heads.
"""

from dataclasses import dataclass

import timm
import torch
from torch import nn

import luna_vision  # noqa: F401  registers the models
from experiments.command import Parser, at_least, markdown_table

__all__ = ["Traffic", "image_traffic", "layer_traffic", "ring_attention"]

DTYPES = {"bf16": 2, "fp32": 4, "fp64": 8}


@dataclass
class Traffic:
    """Numbers that one process hands to an exchange.

    Attributes:
        reduced: Numbers that are reduced over all processes. A ring sends each 2 (P - 1) / P times.
        sent: Numbers that go to neighbours, once each.
    """

    reduced: int = 0
    sent: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.reduced + other.reduced, self.sent + other.sent)

    def bytes_sent(self, processes: int, itemsize: int) -> float:
        """What leaves a process: reduced numbers, which are float32 or wider, and sent ones of `itemsize` bytes."""
        return self.reduced * max(4, itemsize) * 2 * (processes - 1) / processes + self.sent * itemsize


def layer_traffic(block: nn.Module, memory_len: int, columns: int, neighbours: int = 2) -> tuple[Traffic, Traffic]:
    """Of one block and one image, forward and backward.

    Args:
        block: A `LunaBlock`.
        memory_len: L.
        columns: W'.
        neighbours: Of the process: 2, 1 at the ends, 0 where it is alone.
    """
    C, H = block.dim, block.attn.pack_heads
    halo = neighbours * columns * C * (block.mix_halo + block.unpack_halo)
    # the maximum carries no gradient
    return Traffic(memory_len * (C + 2 * H), halo), Traffic(memory_len * (C + H), halo)


def _pool_traffic(model: nn.Module) -> tuple[Traffic, Traffic]:
    """Of one image; sums are in float64, which counts as two numbers."""
    kind, C = "map" if model.attn_pool is not None else model.global_pool, model.embed_dim
    if kind == "map":
        H = model.attn_pool.num_heads
        return Traffic(C + 2 * H), Traffic(C + H)
    wide = 1 if next(model.parameters()).dtype == torch.float64 else 2
    mean = wide * C if kind in ("avg", "avgmax", "both") else 0
    largest = C if kind in ("max", "avgmax") else 0
    return Traffic(mean + 2 * largest), Traffic(mean + largest)  # a maximum, and how many have it


def image_traffic(model: nn.Module, columns: int, neighbours: int = 2) -> tuple[Traffic, Traffic]:
    """Of one image through a Luna ViT, forward and backward, without the reduction of the weights' gradients.

    A convolutional stem sends a row of patches, in pixels, to the process below, and no gradient where none is asked of
    the image. Arguments as in `layer_traffic`.
    """
    forward, backward = _pool_traffic(model)
    for block in model.stages():
        there, back = layer_traffic(block, model.memory_len, columns, neighbours)
        forward, backward = forward + there, backward + back
    return forward, backward


def ring_attention(patches: int, dim: int, processes: int) -> tuple[float, float]:
    """Numbers that leave each process for one layer and image of softmax attention, forward and backward.

    Forward, keys and values of all other processes pass through each; backward, they do so again, and their gradients
    with them. Source: Liu et al., "Ring Attention with Blockwise Transformers", 2023 (arXiv 2310.01889), section 3.
    """
    blocks = 2 * patches * dim * (processes - 1) / processes
    return blocks, 2 * blocks


def _size(number: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.0f} B"


def _parser() -> Parser:
    parser = Parser(
        prog="python -m experiments.benchmarks.wire",
        description="Bytes that leave each process, for one image that is split over processes.",
    )
    parser.add_argument(
        "--model",
        default="luna_vit_small",
        choices=timm.list_models(module="luna_vit"),
        metavar="NAME",
        help="a Luna ViT",
    )
    parser.add_argument("--side", type=at_least(1), default=100_000, help="of the image, pixels")
    parser.add_argument("--processes", type=at_least(2), default=64, help="that share it")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Print the table as Markdown."""
    args = _parser().parse_args(argv)
    model = timm.create_model(args.model, device="meta")
    rows, columns = (-(-args.side // side) for side in model.patch_embed.patch_size)
    patches, P = rows * columns, args.processes
    one = layer_traffic(model.blocks[0], model.memory_len, columns)
    print(f"{args.model}, {args.side} x {args.side} pixels, {rows} x {columns} = {patches:,} patches, {P} processes\n")
    table = []
    for name in ("bf16", "fp32"):
        itemsize, depth = DTYPES[name], len(model.blocks)
        state, halo = ([f(t) for t in one] for f in (lambda t: Traffic(t.reduced), lambda t: Traffic(0, t.sent)))
        ring = [n * itemsize for n in ring_attention(patches, model.embed_dim, P)]
        for label, parts in (
            ("Luna: state of the pack (float32)", [t.bytes_sent(P, itemsize) for t in state]),
            ("Luna: rows to two neighbours", [t.bytes_sent(P, itemsize) for t in halo]),
            ("ring attention: keys, values", ring),
        ):
            table.append([label, name, *map(_size, (*parts, depth * sum(parts)))])
    print(
        markdown_table(
            ["each process sends", "type", "forward, a layer", "backward, a layer", "all layers, both"], table
        )
    )


if __name__ == "__main__":
    main()
