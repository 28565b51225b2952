"""Drafts of Triton kernels, never run on a GPU: the absorbed pack and unpack, forward, with norms and residual fused.

    pack:    one pass over X. A program takes a stretch of one image's patches: scores M h^T, online softmax, A h. Its
             (maximum, sum, weighted sum) is a `PackState` of that stretch; `pack` merges the stretches.
    unpack:  one pass over X. h = LN1(x); T = h K'^T + shift; softmax over each head's slots; x + W V'; LN2 of that.

On a CPU they run in Triton's interpreter: `TRITON_INTERPRET=1 python -m experiments.gpu.luna_triton` prints errors.

Shapes: B images, N patches, L slots, H heads, S = H L, C width, which is three times a power of two: 384 = 3 x 128.
"""

import json

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["errors", "make", "pack", "reference", "unpack"]


@triton.jit
def _norm(p0, p1, p2, w_ptr, b_ptr, cols, C: tl.constexpr, K: tl.constexpr, eps):
    mean = (tl.sum(p0, 1) + tl.sum(p1, 1) + tl.sum(p2, 1)) / C
    d0, d1, d2 = p0 - mean[:, None], p1 - mean[:, None], p2 - mean[:, None]
    scale = 1.0 / tl.sqrt((tl.sum(d0 * d0, 1) + tl.sum(d1 * d1, 1) + tl.sum(d2 * d2, 1)) / C + eps)[:, None]
    w0, b0 = tl.load(w_ptr + cols).to(tl.float32), tl.load(b_ptr + cols).to(tl.float32)
    w1, b1 = tl.load(w_ptr + K + cols).to(tl.float32), tl.load(b_ptr + K + cols).to(tl.float32)
    w2, b2 = tl.load(w_ptr + 2 * K + cols).to(tl.float32), tl.load(b_ptr + 2 * K + cols).to(tl.float32)
    h0 = d0 * scale * w0[None, :] + b0[None, :]
    h1 = d1 * scale * w1[None, :] + b1[None, :]
    h2 = d2 * scale * w2[None, :] + b2[None, :]
    return h0, h1, h2


@triton.jit
def _pack_kernel(
    x_ptr, m_ptr, w_ptr, b_ptr, max_ptr, sum_ptr, z_ptr, N, S, stretch, eps,
    C: tl.constexpr, K: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    b, split, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    s, cols = block * BS + tl.arange(0, BS), tl.arange(0, K)
    is_slot = s < S
    rows = m_ptr + (b * S + s)[:, None] * C + cols[None, :]
    m0 = tl.load(rows, mask=is_slot[:, None], other=0.0)
    m1 = tl.load(rows + K, mask=is_slot[:, None], other=0.0)
    m2 = tl.load(rows + 2 * K, mask=is_slot[:, None], other=0.0)
    maximum = tl.full((BS,), -1e30, tl.float32)
    total = tl.zeros((BS,), tl.float32)
    z0, z1, z2 = tl.zeros((BS, K), tl.float32), tl.zeros((BS, K), tl.float32), tl.zeros((BS, K), tl.float32)
    start = split * stretch
    for n0 in range(start, tl.minimum(start + stretch, N), BN):
        n = n0 + tl.arange(0, BN)
        is_patch = (n < N) & (n < start + stretch)
        row = x_ptr + (b * N + n).to(tl.int64)[:, None] * C + cols[None, :]
        p0 = tl.load(row, mask=is_patch[:, None], other=0.0).to(tl.float32)
        p1 = tl.load(row + K, mask=is_patch[:, None], other=0.0).to(tl.float32)
        p2 = tl.load(row + 2 * K, mask=is_patch[:, None], other=0.0).to(tl.float32)
        h0, h1, h2 = _norm(p0, p1, p2, w_ptr, b_ptr, cols, C, K, eps)
        h0, h1, h2 = h0.to(m0.dtype), h1.to(m0.dtype), h2.to(m0.dtype)
        t = tl.dot(m0, tl.trans(h0)) + tl.dot(m1, tl.trans(h1)) + tl.dot(m2, tl.trans(h2))  # BS, BN
        t = tl.where(is_patch[None, :], t, -1e30)
        new = tl.maximum(maximum, tl.max(t, 1))
        a = tl.where(is_patch[None, :], tl.exp(t - new[:, None]), 0.0)
        rescale = tl.exp(maximum - new)
        total = total * rescale + tl.sum(a, 1)
        a = a.to(m0.dtype)
        z0 = z0 * rescale[:, None] + tl.dot(a, h0)
        z1 = z1 * rescale[:, None] + tl.dot(a, h1)
        z2 = z2 * rescale[:, None] + tl.dot(a, h2)
        maximum = new
    o = (b * SPLITS + split) * S + s
    tl.store(max_ptr + o, maximum, mask=is_slot)
    tl.store(sum_ptr + o, total, mask=is_slot)
    rows = z_ptr + o[:, None] * C + cols[None, :]
    tl.store(rows, z0, mask=is_slot[:, None])
    tl.store(rows + K, z1, mask=is_slot[:, None])
    tl.store(rows + 2 * K, z2, mask=is_slot[:, None])


def pack(x: Tensor, m: Tensor, w: Tensor, b: Tensor, eps: float = 1e-6, tile: int = 64) -> Tensor:
    """Weighted sums (B, S, C), float32, of LN(x), x (B, N, C), for folded queries m (B, S, C)."""
    (B, N, C), S = x.shape, m.shape[1]
    slots = min(64, max(16, triton.next_power_of_2(S)))
    blocks = triton.cdiv(S, slots)
    # enough programs to fill 132 multiprocessors about twice, of four tiles at least
    splits = max(1, min(triton.cdiv(264, B * blocks), triton.cdiv(N, 4 * tile)))
    stretch = triton.cdiv(triton.cdiv(N, splits), tile) * tile
    splits = triton.cdiv(N, stretch)
    maximum, total = (torch.empty(B, splits, S, device=x.device) for _ in range(2))
    z = torch.empty(B, splits, S, C, device=x.device)
    sizes = {"C": C, "K": C // 3, "BS": slots, "BN": tile, "SPLITS": splits}
    _pack_kernel[(B, splits, blocks)](
        x, m, w, b, maximum, total, z, N, S, stretch, eps, **sizes, num_warps=8, num_stages=2
    )
    scale = (maximum - maximum.amax(dim=1, keepdim=True)).exp()
    return (z * scale[..., None]).sum(dim=1) / (total * scale).sum(dim=1)[..., None]


@triton.jit
def _unpack_kernel(
    x_ptr, k_ptr, shift_ptr, v_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, y_ptr, h_ptr, N, S, eps,
    C: tl.constexpr, K: tl.constexpr, BS: tl.constexpr, L: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1)
    n, cols = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, K)
    is_patch = n < N
    at = (b * N + n).to(tl.int64)[:, None] * C + cols[None, :]
    p0 = tl.load(x_ptr + at, mask=is_patch[:, None], other=0.0).to(tl.float32)
    p1 = tl.load(x_ptr + at + K, mask=is_patch[:, None], other=0.0).to(tl.float32)
    p2 = tl.load(x_ptr + at + 2 * K, mask=is_patch[:, None], other=0.0).to(tl.float32)
    dtype = x_ptr.dtype.element_ty
    h0, h1, h2 = _norm(p0, p1, p2, w1_ptr, b1_ptr, cols, C, K, eps)
    h0, h1, h2 = h0.to(dtype), h1.to(dtype), h2.to(dtype)
    for s0 in range(0, S, BS):  # whole heads, as BS is a multiple of L
        s = s0 + tl.arange(0, BS)
        is_slot = s < S
        rows = (b * S + s)[:, None] * C + cols[None, :]
        t = tl.dot(h0, tl.trans(tl.load(k_ptr + rows, mask=is_slot[:, None], other=0.0)))
        t += tl.dot(h1, tl.trans(tl.load(k_ptr + rows + K, mask=is_slot[:, None], other=0.0)))
        t += tl.dot(h2, tl.trans(tl.load(k_ptr + rows + 2 * K, mask=is_slot[:, None], other=0.0)))
        t += tl.load(shift_ptr + b * S + s, mask=is_slot, other=0.0)[None, :]
        t = tl.reshape(t, (BN, BS // L, L))
        t = tl.exp(t - tl.max(t, 2)[:, :, None])
        w = tl.reshape(t / tl.sum(t, 2)[:, :, None], (BN, BS)).to(dtype)
        p0 += tl.dot(w, tl.load(v_ptr + rows, mask=is_slot[:, None], other=0.0))
        p1 += tl.dot(w, tl.load(v_ptr + rows + K, mask=is_slot[:, None], other=0.0))
        p2 += tl.dot(w, tl.load(v_ptr + rows + 2 * K, mask=is_slot[:, None], other=0.0))
    tl.store(y_ptr + at, p0.to(dtype), mask=is_patch[:, None])
    tl.store(y_ptr + at + K, p1.to(dtype), mask=is_patch[:, None])
    tl.store(y_ptr + at + 2 * K, p2.to(dtype), mask=is_patch[:, None])
    h0, h1, h2 = _norm(p0, p1, p2, w2_ptr, b2_ptr, cols, C, K, eps)
    tl.store(h_ptr + at, h0.to(dtype), mask=is_patch[:, None])
    tl.store(h_ptr + at + K, h1.to(dtype), mask=is_patch[:, None])
    tl.store(h_ptr + at + 2 * K, h2.to(dtype), mask=is_patch[:, None])


def unpack(
    x: Tensor,
    m_key: Tensor,
    shift: Tensor,
    m_value: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    slots: int,
    eps: float = 1e-6,
    tile: int = 64,
) -> tuple[Tensor, Tensor]:
    """y = x + softmax over each head's slots of (LN1(x) m_key^T + shift), times m_value; and LN2(y).

    Args:
        x: (B, N, C).
        m_key, m_value: Folded keys and values (B, S, C).
        shift: (B, S).
        w1, b1, w2, b2: Of the two norms.
        slots: L, a power of two.
        eps: Of both norms.
        tile: Patches of a program.
    """
    (B, N, C), S = x.shape, m_key.shape[1]
    y, h = torch.empty_like(x), torch.empty_like(x)
    sizes = {"C": C, "K": C // 3, "BS": max(16, slots, min(64, triton.next_power_of_2(S))), "L": slots, "BN": tile}
    norms = (w1, b1, w2, b2)
    _unpack_kernel[(triton.cdiv(N, tile), B)](
        x, m_key, shift, m_value, *norms, y, h, N, S, eps, **sizes, num_warps=8, num_stages=1
    )
    return y, h


def reference(
    x: Tensor, m: Tensor, m_key: Tensor, shift: Tensor, m_value: Tensor, *norms: Tensor, slots: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What `pack` and `unpack` give, by their formulas, in float64."""
    x, m, m_key, shift, m_value, w1, b1, w2, b2 = (t.double() for t in (x, m, m_key, shift, m_value, *norms))
    width = x.shape[2:]
    h = F.layer_norm(x, width, w1, b1, 1e-6)
    z = (m @ h.transpose(1, 2)).softmax(2) @ h
    t = (h @ m_key.transpose(1, 2) + shift[:, None]).unflatten(2, (-1, slots)).softmax(3).flatten(2)
    y = x + t @ m_value
    return z, y, F.layer_norm(y, width, w2, b2, 1e-6)


def make(B: int, N: int, C: int, heads: int, slots: int, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Random x, m, m_key, shift, m_value and the four parameters of two norms."""
    generator, S = torch.Generator().manual_seed(0), heads * slots

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, m, k, v = draw(B, N, C), 2 * draw(B, S, C) / C**0.5, 2 * draw(B, S, C) / C**0.5, draw(B, S, C)
    norms = (1 + 0.1 * draw(C), 0.1 * draw(C), 1 + 0.1 * draw(C), 0.1 * draw(C))
    x, m, k, v, *norms = (t.to(device, dtype) for t in (x, m, k, v, *norms))
    return x, m, k, draw(B, S).to(device), v, *norms


def errors(
    device: str, dtype: torch.dtype, B: int = 2, N: int = 333, C: int = 384, heads: int = 6, slots: int = 8
) -> dict[str, float]:
    """Norms of the differences to `reference` over those of what it gives."""
    inputs = make(B, N, C, heads, slots, device, dtype)
    x, m, k, shift, v, *norms = inputs
    found = (pack(x, m, *norms[:2]), *unpack(x, k, shift, v, *norms, slots))
    expected = reference(*inputs, slots=slots)
    relative = ((a.double() - b).norm() / b.norm() for a, b in zip(found, expected, strict=True))
    return dict(zip(("packed", "unpacked", "normed"), map(float, relative), strict=True))


if __name__ == "__main__":  # small, and without bfloat16, which the interpreter multiplies as integers
    found = {str(dtype)[6:]: errors("cpu", dtype, B=1, N=70, C=48, heads=3) for dtype in (torch.float32, torch.float16)}
    print(json.dumps(found))
