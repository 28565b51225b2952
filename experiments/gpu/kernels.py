"""Errors of the Triton kernels against their formulas in float64, values and gradients, as JSON:

    python -m experiments.gpu.kernels --dtype bfloat16 --width 384 [--launches 1]

On a CPU with TRITON_INTERPRET=1, in small. Each run is a process of its own: what breaks the device breaks that run
alone, and many of them compile side by side.

Shapes: B images, N patches, L slots, H heads, S = H L, C width.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.command import Parser

__all__ = ["LAUNCHES", "errors", "fused_mix", "fused_pack", "fused_unpack", "launches", "make", "mix", "pack", "unpack"]

EPS = 1e-6
# other launches of the pack, the unpack and their backward passes: patches, slots, warps, stages, registers
LAUNCHES = {
    384: [
        ((32, 64, 16, 3), (64, 64, 8), (32, 64, 8), (32, 64, 8)),
        ((16, 64, 8, 3), (32, 16, 8, 1, 128), (16, 64, 8), (32, 32, 8)),
        ((64, 64, 8, 2), (32, 64, 16), (32, 64, 16), (32, 64, 16)),
    ],
    128: [
        ((32, 64, 4, 3), (64, 64, 4), (32, 64, 4), (32, 64, 4)),
        ((64, 64, 8, 3), (64, 64, 8), (64, 64, 8), (64, 64, 8)),
    ],
}
# B, N, L, masked; 64 channels a head
SHAPES = [(2, 333, 8, True), (3, 70, 8, False), (1, 4099, 8, False), (2, 65, 5, True), (1, 300, 64, False)]
SMALL = [(2, 37, 5, True), (1, 270, 8, False)]


@contextmanager
def launches(width: int, index: int) -> Iterator[None]:
    """Kernels of a width run as entry `index` - 1 of `LAUNCHES` says; by default if 0."""
    from luna_vision.functional.kernels import triton_kernels

    if not index:
        yield
        return
    default = triton_kernels.LAUNCHES[width]
    triton_kernels.LAUNCHES[width] = tuple(triton_kernels.Launch(*of) for of in LAUNCHES[width][index - 1])
    try:
        yield
    finally:
        triton_kernels.LAUNCHES[width] = default


def make(B: int, N: int, C: int, slots: int, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random patches, folded queries, keys and values, shifts of the scores, the second norm, and the weights of the
    convolution, whose bias is that of the norm; to differentiate."""
    generator, S = torch.Generator().manual_seed(0), C // 64 * slots

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    m, k, v = 2 * draw(B, S, C) / C**0.5, 2 * draw(B, S, C) / C**0.5, draw(B, S, C)
    found = {"x": draw(B, N, C), "m": m, "k": k, "v": v, "w": 1 + 0.1 * draw(C), "b": 0.1 * draw(C)}
    found["conv"] = draw(C, 1, 3, 3) / 3
    found = {name: t.to(device, dtype).requires_grad_() for name, t in found.items()}
    return {**found, "shift": draw(B, S).to(device).requires_grad_()}


def pack(x: Tensor, m: Tensor, valid: Tensor | None = None) -> Tensor:
    """The formula: weighted sums (B, S, C) of the normed patches."""
    h = F.layer_norm(x, x.shape[2:], eps=EPS)
    scores = torch.bmm(m, h.transpose(1, 2))
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None], float("-inf"))
    return torch.bmm(scores.softmax(2), h)


def unpack(x: Tensor, k: Tensor, shift: Tensor, v: Tensor, w: Tensor, b: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The formula: what the patches read added to them (B, N, C), and the norm of that."""
    h = F.layer_norm(x, x.shape[2:], eps=EPS)
    scores = torch.baddbmm(shift[:, None].to(h.dtype), h, k.transpose(1, 2)).unflatten(2, (-1, slots))
    y = x + torch.bmm(scores.softmax(3).flatten(2), v)
    return y, F.layer_norm(y, y.shape[2:], w, b, EPS)


def fused_pack(x: Tensor, m: Tensor, valid: Tensor | None = None) -> Tensor:
    """`pack` by the kernel."""
    from luna_vision.functional.kernels import ops

    return ops.normed_pack(x, m, valid, EPS)[0]


def fused_unpack(
    x: Tensor, k: Tensor, shift: Tensor, v: Tensor, w: Tensor, b: Tensor, slots: int
) -> tuple[Tensor, Tensor]:
    """`unpack` by the kernel."""
    from luna_vision.functional.kernels import ops

    return ops.normed_unpack(x, k, shift, v, slots, EPS, w, b, EPS)[:2]


def grid(N: int) -> tuple[int, int]:
    """The patch grid of N patches that is most like a square."""
    rows = next(n for n in range(int(N**0.5), 0, -1) if N % n == 0)
    return rows, N // rows


def mix(x: Tensor, conv: Tensor, b: Tensor, valid: Tensor | None = None) -> Tensor:
    """The formula: patches (B, N, C) and their depthwise convolution over the patch grid."""
    h = x if valid is None else x.masked_fill(~valid[:, :, None], 0.0)
    h = h.unflatten(1, grid(x.shape[1])).permute(0, 3, 1, 2).contiguous()  # as the layer does on a GPU
    return x + F.conv2d(h, conv, b, padding=1, groups=x.shape[2]).flatten(2).transpose(1, 2)


def fused_mix(x: Tensor, conv: Tensor, b: Tensor, valid: Tensor | None = None) -> Tensor:
    """`mix` by the kernel."""
    from luna_vision.functional.kernels import ops

    return ops.mix_residual(x, conv, b, valid, *grid(x.shape[1]))


def errors(B: int, N: int, C: int, slots: int, masked: bool, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Norms of the differences to the formulas in float64 over those of what they give."""
    inputs, valid = make(B, N, C, slots, device, dtype), None
    if masked:
        valid = torch.rand(B, N, generator=torch.Generator().manual_seed(1)) < 0.7
        valid[:, 0] = True
    results = []
    for of, mask, functions in (
        (inputs, None if valid is None else valid.to(device), (fused_pack, fused_unpack, fused_mix)),
        ({n: t.detach().cpu().double().requires_grad_() for n, t in inputs.items()}, valid, (pack, unpack, mix)),
    ):
        z = functions[0](of["x"], of["m"], mask)
        y, h = functions[1](*(of[name] for name in ("x", "k", "shift", "v", "w", "b")), slots)
        values = {"packed": z, "unpacked": y, "normed": h, "mixed": functions[2](of["x"], of["conv"], of["b"], mask)}
        generator = torch.Generator().manual_seed(2)
        given = [torch.randn(t.shape, generator=generator).to(t.device, t.dtype) for t in values.values()]
        gradients = torch.autograd.grad(list(values.values()), list(of.values()), given)
        results.append(values | {f"d_{n}": g for n, g in zip(of, gradients, strict=True)})
    found, expected = results
    return {
        n: float((found[n].detach().cpu().double() - e.detach()).norm() / e.detach().norm())
        for n, e in expected.items()
    }


def main() -> None:
    parser = Parser(prog="python -m experiments.gpu.kernels", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--launches", type=int, default=0, help="of LAUNCHES; 0: the defaults")
    args = parser.parse_args()
    found = []
    with launches(args.width, args.launches):
        # other launches are for products in half precision with 8 slots
        for B, N, slots, masked in SMALL if args.device == "cpu" else SHAPES[: 3 if args.launches else None]:
            if args.dtype == "float32":
                slots = min(slots, 32)  # more do not fit shared memory at every width
            row = {"B": B, "N": N, "slots": slots, "masked": masked}
            try:
                row |= errors(B, N, args.width, slots, masked, args.device, getattr(torch, args.dtype))
            except Exception as error:  # what does not compile must not hide the rest
                row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            found.append(row)
            print(json.dumps(found[-1]), flush=True)


if __name__ == "__main__":
    main()
