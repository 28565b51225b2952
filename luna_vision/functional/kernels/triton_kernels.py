"""Triton kernels of the absorbed pack and unpack, with the patches' norm inside: forward and backward.

    pack:    z = softmax over N of (M n(X)^T), times n(X)                        one pass over X
    unpack:  Y = X + softmax over each head's slots of (n(X) K^T + shift), times V;  and LN(Y)

n is a norm without weight and bias, which `ops.fold_norm` moves into the projections. A program reads whole rows of X,
as two blocks of columns: A of them, a power of two, and the rest, padded to a power of two, R (0 for none). Scores and
sums are in float32, products in the type of M, K and V.

A program of the pack takes a stretch of an image's patches; a stretch ends in (maximum, sum, weighted sum), which
`_merge_kernel` merges as `PackState.merge` does. The backward passes recompute the weights. They write the gradient of
X, and for each patch and slot the weights and the gradient of the scores, whose products with the patches
(`_sums_kernel`) are the gradients of M, K and V.

Sources: online softmax, Milakov and Gimelshein 2018 (arXiv 1805.02867); backward pass by recomputation, Dao et al.
2022 (arXiv 2205.14135), appendix B.4.

Shapes: B images, N patches, L slots of a head, H heads, S = H L, C width.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MULTIPROCESSORS = 132  # of an H100
SIZES = ["N", "stretch", "splits"]  # change from image to image: nothing is compiled for their values


class Launch(NamedTuple):
    """How a kernel runs."""

    tile: int
    """Patches that a program reads at once."""
    slots: int
    """Slots that it multiplies with at once, at most."""
    warps: int
    stages: int = 1
    """Tiles on their way from memory at once."""
    registers: int | None = None
    """Of a thread, at most; with 128 and 8 warps, two programs fit a multiprocessor."""


# What registers and shared memory of Hopper allow, found by compiling for it: not measured. Up to which width, for
# the pack, the unpack and their backward passes; products in half precision.
LAUNCHES = {
    128: (Launch(64, 64, 4, 3), Launch(32, 64, 4, 1, 128), Launch(32, 32, 4, 1, 128), Launch(32, 32, 4, 1, 128)),
    192: (Launch(32, 64, 4, 3), Launch(32, 32, 4, 1, 128), Launch(16, 32, 4, 1, 128), Launch(16, 32, 4, 1, 128)),
    384: (Launch(32, 64, 8, 3), Launch(32, 64, 8, 1, 128), Launch(16, 32, 8, 1, 128), Launch(16, 64, 8, 1, 128)),
    768: (Launch(16, 32, 8, 2), Launch(16, 32, 8), Launch(16, 16, 8), Launch(16, 16, 8)),
}
SMALL = Launch(16, 16, 8)  # wider, or in float32, which tensor cores do not multiply exactly
PACK, UNPACK, PACK_BACKWARD, UNPACK_BACKWARD = range(4)


def default_launch(kernel: int, C: int, dtype: torch.dtype) -> Launch:
    """How a kernel runs at a width, with products in a type."""
    if dtype != torch.float32:
        for most, launches in LAUNCHES.items():
            if C <= most:
                return launches[kernel]
    return SMALL


@triton.jit
def _columns(A: tl.constexpr, R: tl.constexpr):
    first = tl.arange(0, A)
    rest = first
    if R > 0:
        rest = A + tl.arange(0, R)
    return first, rest


@triton.jit
def _load(ptr, row, is_row, first, rest, C: tl.constexpr, R: tl.constexpr):
    """Both blocks of rows, which are the same one if R is 0."""
    at = ptr + row.to(tl.int64)[:, None] * C
    a = tl.load(at + first[None, :], mask=is_row[:, None], other=0.0)
    b = a
    if R > 0:
        b = tl.load(at + rest[None, :], mask=is_row[:, None] & (rest < C)[None, :], other=0.0)
    return a, b


@triton.jit
def _store(ptr, row, is_row, first, rest, a, b, C: tl.constexpr, R: tl.constexpr):
    at = ptr + row.to(tl.int64)[:, None] * C
    tl.store(at + first[None, :], a, mask=is_row[:, None])
    if R > 0:
        tl.store(at + rest[None, :], b, mask=is_row[:, None] & (rest < C)[None, :])


@triton.jit
def _norm(a, b, rest, eps, C: tl.constexpr, R: tl.constexpr):
    """Rows of mean 0 and variance 1, with the mean and 1 / the deviation that they had; all float32."""
    total = tl.sum(a, 1)
    if R > 0:
        total += tl.sum(b, 1)
    mean = total / C
    a -= mean[:, None]
    square = tl.sum(a * a, 1)
    if R > 0:
        b = tl.where((rest < C)[None, :], b - mean[:, None], 0.0)
        square += tl.sum(b * b, 1)
    scale = 1.0 / tl.sqrt(square / C + eps)
    a *= scale[:, None]
    if R > 0:
        b *= scale[:, None]
    else:
        b = a
    return a, b, mean, scale


@triton.jit
def _scores(a, b, c, d, R: tl.constexpr):
    """Products of rows with rows: (rows of a, rows of c)."""
    t = tl.dot(a, tl.trans(c), input_precision="ieee")
    if R > 0:
        t = tl.dot(b, tl.trans(d), t, input_precision="ieee")
    return t


@triton.jit
def _finite(x, dtype: tl.constexpr):
    """In another type, clamped to the range of float16."""
    if dtype == tl.float16:
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    return x.to(dtype)


@triton.jit(do_not_specialize=SIZES)
def _pack_kernel(
    x_ptr, m_ptr, valid_ptr, max_ptr, sum_ptr, z_ptr, N, S, stretch, eps,
    C: tl.constexpr, A: tl.constexpr, R: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    split, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    s = tl.program_id(0) * BS + tl.arange(0, BS)
    is_slot = s < S
    first, rest = _columns(A, R)
    x_ptr += b * N * C
    m0, m1 = _load(m_ptr + b * S * C, s, is_slot, first, rest, C, R)
    dtype: tl.constexpr = m_ptr.dtype.element_ty
    maximum, total = tl.full((BS,), -1e30, tl.float32), tl.zeros((BS,), tl.float32)
    z0 = tl.zeros((BS, A), tl.float32)
    z1 = z0
    if R > 0:
        z1 = tl.zeros((BS, R), tl.float32)
    start = split * stretch
    end = tl.minimum(start + stretch, N)
    for n0 in range(start, end, BN):
        n = n0 + tl.arange(0, BN)
        use = n < end
        h0, h1 = _load(x_ptr, n, use, first, rest, C, R)
        if MASKED:
            use = use & (tl.load(valid_ptr + b * N + n, mask=use, other=0) != 0)
        h0, h1, _, _ = _norm(h0.to(tl.float32), h1.to(tl.float32), rest, eps, C, R)
        h0, h1 = h0.to(dtype), h1.to(dtype)
        t = tl.where(use[:, None], _scores(h0, h1, m0, m1, R), -1e30)
        new = tl.maximum(maximum, tl.max(t, 0))
        a = tl.where(use[:, None], tl.exp(t - new[None, :]), 0.0)
        rescale = tl.exp(maximum - new)
        total = total * rescale + tl.sum(a, 0)
        a = tl.trans(a.to(dtype))
        z0 = tl.dot(a, h0, z0 * rescale[:, None], input_precision="ieee")
        if R > 0:
            z1 = tl.dot(a, h1, z1 * rescale[:, None], input_precision="ieee")
        maximum = new
    if WHOLE:  # all of the image: the result, and the logarithm of the sum
        at = b * S + s
        tl.store(max_ptr + at, maximum + tl.log(total), mask=is_slot)
        z0 = _finite(z0 / total[:, None], z_ptr.dtype.element_ty)
        if R > 0:
            z1 = _finite(z1 / total[:, None], z_ptr.dtype.element_ty)
    else:
        at = (b * tl.num_programs(1) + split) * S + s
        tl.store(max_ptr + at, maximum, mask=is_slot)
        tl.store(sum_ptr + at, total, mask=is_slot)
    _store(z_ptr, at, is_slot, first, rest, z0, z1, C, R)


@triton.jit(do_not_specialize=SIZES)
def _merge_kernel(
    max_ptr, sum_ptr, z_ptr, lse_ptr, out_ptr, S, splits,
    C: tl.constexpr, CP: tl.constexpr, SP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    s, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    of = b * splits * S + s  # of the first stretch; that of the next is S further
    i = tl.arange(0, SP)
    maximum = tl.load(max_ptr + of + i * S, mask=i < splits, other=-1e30)
    top = tl.max(maximum, 0)
    total = tl.sum(tl.load(sum_ptr + of + i * S, mask=i < splits, other=0.0) * tl.exp(maximum - top), 0)
    cols = tl.arange(0, CP)
    z = tl.zeros((CP,), tl.float32)
    for j0 in range(0, splits, CHUNK):
        j = j0 + tl.arange(0, CHUNK)
        scale = tl.exp(tl.load(max_ptr + of + j * S, mask=j < splits, other=-1e30) - top)
        at = z_ptr + (of + j.to(tl.int64) * S)[:, None] * C + cols[None, :]
        z += tl.sum(tl.load(at, mask=(j < splits)[:, None] & (cols < C)[None, :], other=0.0) * scale[:, None], 0)
    tl.store(lse_ptr + b * S + s, top + tl.log(total))
    tl.store(out_ptr + (b * S + s) * C + cols, _finite(z / total, out_ptr.dtype.element_ty), mask=cols < C)


@triton.jit(do_not_specialize=SIZES)
def _pack_backward_kernel(
    x_ptr, m_ptr, valid_ptr, lse_ptr, dz_ptr, d_ptr, dx_ptr, ds_ptr, mean_ptr, scale_ptr, N, S, eps,
    C: tl.constexpr, A: tl.constexpr, R: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    is_patch = n < N
    use = is_patch
    if MASKED:
        use = use & (tl.load(valid_ptr + b * N + n, mask=use, other=0) != 0)
    first, rest = _columns(A, R)
    dtype: tl.constexpr = m_ptr.dtype.element_ty
    h0, h1 = _load(x_ptr + b * N * C, n, is_patch, first, rest, C, R)
    h0, h1, mean, scale = _norm(h0.to(tl.float32), h1.to(tl.float32), rest, eps, C, R)
    h0, h1 = h0.to(dtype), h1.to(dtype)
    d0 = tl.zeros((BN, A), tl.float32)
    d1 = d0
    if R > 0:
        d1 = tl.zeros((BN, R), tl.float32)
    for s0 in range(0, S, BS):
        s = s0 + tl.arange(0, BS)
        is_slot = s < S
        m0, m1 = _load(m_ptr + b * S * C, s, is_slot, first, rest, C, R)
        g0, g1 = _load(dz_ptr + b * S * C, s, is_slot, first, rest, C, R)
        lse = tl.load(lse_ptr + b * S + s, mask=is_slot, other=0.0)
        p = tl.exp(_scores(h0, h1, m0, m1, R) - lse[None, :])
        p = tl.where(use[:, None] & is_slot[None, :], p, 0.0)
        ds = p * (_scores(h0, h1, g0, g1, R) - tl.load(d_ptr + b * S + s, mask=is_slot, other=0.0)[None, :])
        p, ds = p.to(dtype), ds.to(dtype)
        at = ds_ptr + (b * N + n)[:, None] * S + s[None, :]
        tl.store(at, ds, mask=is_patch[:, None] & is_slot[None, :])
        d0 = tl.dot(p, g0, d0, input_precision="ieee")
        d0 = tl.dot(ds, m0, d0, input_precision="ieee")
        if R > 0:
            d1 = tl.dot(p, g1, d1, input_precision="ieee")
            d1 = tl.dot(ds, m1, d1, input_precision="ieee")
    x0, x1 = _load(x_ptr + b * N * C, n, is_patch, first, rest, C, R)  # again, rather than kept in float32
    d0, d1 = _norm_backward(d0, d1, x0, x1, rest, mean, scale, C, R)
    to: tl.constexpr = dx_ptr.dtype.element_ty
    _store(dx_ptr + b * N * C, n, is_patch, first, rest, d0.to(to), d1.to(to), C, R)
    tl.store(mean_ptr + b * N + n, mean, mask=is_patch)
    tl.store(scale_ptr + b * N + n, scale, mask=is_patch)


@triton.jit
def _norm_backward(d0, d1, x0, x1, rest, mean, scale, C: tl.constexpr, R: tl.constexpr):
    """The gradient of rows x, from that of the normed rows, d."""
    x0 = (x0.to(tl.float32) - mean[:, None]) * scale[:, None]
    sum_d, sum_dx = tl.sum(d0, 1), tl.sum(d0 * x0, 1)
    if R > 0:
        x1 = tl.where((rest < C)[None, :], (x1.to(tl.float32) - mean[:, None]) * scale[:, None], 0.0)
        sum_d += tl.sum(d1, 1)
        sum_dx += tl.sum(d1 * x1, 1)
    d0 = scale[:, None] * (d0 - (sum_d / C)[:, None] - x0 * (sum_dx / C)[:, None])
    if R > 0:
        d1 = scale[:, None] * (d1 - (sum_d / C)[:, None] - x1 * (sum_dx / C)[:, None])
    else:
        d1 = d0
    return d0, d1


@triton.jit
def _softmax(t, BN: tl.constexpr, BS: tl.constexpr, LP: tl.constexpr):
    """Over groups of LP columns."""
    t = tl.reshape(t, (BN, BS // LP, LP))
    t = tl.exp(t - tl.max(t, 2)[:, :, None])
    return tl.reshape(t / tl.sum(t, 2)[:, :, None], (BN, BS))


@triton.jit(do_not_specialize=SIZES)
def _unpack_kernel(
    x_ptr, k_ptr, shift_ptr, v_ptr, w_ptr, b_ptr, y_ptr, h_ptr, mean_ptr, scale_ptr, N, S, padded, eps, eps2,
    C: tl.constexpr, A: tl.constexpr, R: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr,
    L: tl.constexpr, LP: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    is_patch = n < N
    first, rest = _columns(A, R)
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    y0, y1 = _load(x_ptr + b * N * C, n, is_patch, first, rest, C, R)
    y0, y1 = y0.to(tl.float32), y1.to(tl.float32)
    h0, h1, _, _ = _norm(y0, y1, rest, eps, C, R)
    h0, h1 = h0.to(dtype), h1.to(dtype)
    for s0 in range(0, padded, BS):  # whole heads of LP slots, a power of two
        i = s0 + tl.arange(0, BS)
        s = i // LP * L + i % LP
        is_slot = (i % LP < L) & (s < S)
        k0, k1 = _load(k_ptr + b * S * C, s, is_slot, first, rest, C, R)
        shift = tl.load(shift_ptr + b * S + s, mask=is_slot, other=0.0)
        t = tl.where(is_slot[None, :], _scores(h0, h1, k0, k1, R) + shift[None, :], -1e30)
        w = _softmax(t, BN, BS, LP).to(dtype)
        v0, v1 = _load(v_ptr + b * S * C, s, is_slot, first, rest, C, R)
        y0 = tl.dot(w, v0, y0, input_precision="ieee")
        if R > 0:
            y1 = tl.dot(w, v1, y1, input_precision="ieee")
    y0, y1 = _finite(y0, y_ptr.dtype.element_ty), _finite(y1, y_ptr.dtype.element_ty)
    _store(y_ptr + b * N * C, n, is_patch, first, rest, y0, y1, C, R)
    if NORM:
        h0, h1, mean, scale = _norm(y0.to(tl.float32), y1.to(tl.float32), rest, eps2, C, R)
        to: tl.constexpr = h_ptr.dtype.element_ty
        w0, b0 = tl.load(w_ptr + first).to(tl.float32), tl.load(b_ptr + first).to(tl.float32)
        h0 = _finite(h0 * w0[None, :] + b0[None, :], to)
        if R > 0:
            w1 = tl.load(w_ptr + rest, mask=rest < C, other=0.0).to(tl.float32)
            b1 = tl.load(b_ptr + rest, mask=rest < C, other=0.0).to(tl.float32)
            h1 = _finite(h1 * w1[None, :] + b1[None, :], to)
        _store(h_ptr + b * N * C, n, is_patch, first, rest, h0, h1, C, R)
        tl.store(mean_ptr + b * N + n, mean, mask=is_patch)
        tl.store(scale_ptr + b * N + n, scale, mask=is_patch)


@triton.jit(do_not_specialize=SIZES)
def _unpack_backward_kernel(
    x_ptr, k_ptr, shift_ptr, v_ptr, dy_ptr, dx_ptr, w_ptr, dt_ptr, mean_ptr, scale_ptr, N, S, padded, eps,
    C: tl.constexpr, A: tl.constexpr, R: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr,
    L: tl.constexpr, LP: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    is_patch = n < N
    first, rest = _columns(A, R)
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    h0, h1 = _load(x_ptr + b * N * C, n, is_patch, first, rest, C, R)
    h0, h1, mean, scale = _norm(h0.to(tl.float32), h1.to(tl.float32), rest, eps, C, R)
    h0, h1 = h0.to(dtype), h1.to(dtype)
    g0, g1 = _load(dy_ptr + b * N * C, n, is_patch, first, rest, C, R)
    g0, g1 = g0.to(dtype), g1.to(dtype)
    d0 = tl.zeros((BN, A), tl.float32)
    d1 = d0
    if R > 0:
        d1 = tl.zeros((BN, R), tl.float32)
    for s0 in range(0, padded, BS):
        i = s0 + tl.arange(0, BS)
        s = i // LP * L + i % LP
        is_slot = (i % LP < L) & (s < S)
        k0, k1 = _load(k_ptr + b * S * C, s, is_slot, first, rest, C, R)
        shift = tl.load(shift_ptr + b * S + s, mask=is_slot, other=0.0)
        t = tl.where(is_slot[None, :], _scores(h0, h1, k0, k1, R) + shift[None, :], -1e30)
        w = _softmax(t, BN, BS, LP)
        v0, v1 = _load(v_ptr + b * S * C, s, is_slot, first, rest, C, R)
        dt = w * _scores(g0, g1, v0, v1, R)
        total = tl.sum(tl.reshape(dt, (BN, BS // LP, LP)), 2)
        total = tl.reshape(tl.broadcast_to(total[:, :, None], (BN, BS // LP, LP)), (BN, BS))
        dt = (dt - w * total).to(dtype)
        at, here = (b * N + n)[:, None] * S + s[None, :], is_patch[:, None] & is_slot[None, :]
        tl.store(w_ptr + at, w.to(dtype), mask=here)
        tl.store(dt_ptr + at, dt, mask=here)
        d0 = tl.dot(dt, k0, d0, input_precision="ieee")
        if R > 0:
            d1 = tl.dot(dt, k1, d1, input_precision="ieee")
    x0, x1 = _load(x_ptr + b * N * C, n, is_patch, first, rest, C, R)  # again, rather than kept in float32
    d0, d1 = _norm_backward(d0, d1, x0, x1, rest, mean, scale, C, R)
    e0, e1 = _load(dy_ptr + b * N * C, n, is_patch, first, rest, C, R)
    to: tl.constexpr = dx_ptr.dtype.element_ty
    d0, d1 = (d0 + e0.to(tl.float32)).to(to), (d1 + e1.to(tl.float32)).to(to)
    _store(dx_ptr + b * N * C, n, is_patch, first, rest, d0, d1, C, R)
    tl.store(mean_ptr + b * N + n, mean, mask=is_patch)
    tl.store(scale_ptr + b * N + n, scale, mask=is_patch)


@triton.jit(do_not_specialize=SIZES)
def _sums_kernel(
    g_ptr, x_ptr, mean_ptr, scale_ptr, out_ptr, total_ptr, N, S, stretch,
    C: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr, NORM: tl.constexpr, TOTAL: tl.constexpr,
):  # fmt: skip
    """Over N: sums of g (N, S) times x (N, C), normed or not; and of g alone."""
    block, split, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    column = block % (C // BC)
    s, cols = block // (C // BC) * BS + tl.arange(0, BS), column * BC + tl.arange(0, BC)
    is_slot = s < S
    out, total = tl.zeros((BS, BC), tl.float32), tl.zeros((BS,), tl.float32)
    start = split * stretch
    end = tl.minimum(start + stretch, N)
    for n0 in range(start, end, BN):
        n = n0 + tl.arange(0, BN)
        use = n < end
        row = (b * N + n)[:, None]
        g = tl.load(g_ptr + row * S + s[None, :], mask=use[:, None] & is_slot[None, :], other=0.0)
        x = tl.load(x_ptr + row * C + cols[None, :], mask=use[:, None], other=0.0)
        if NORM:
            mean = tl.load(mean_ptr + b * N + n, mask=use, other=0.0)
            scale = tl.load(scale_ptr + b * N + n, mask=use, other=0.0)
            x = (x.to(tl.float32) - mean[:, None]) * scale[:, None]
        out = tl.dot(tl.trans(g), x.to(g.dtype), out, input_precision="ieee")
        if TOTAL:
            total += tl.sum(g.to(tl.float32), 0)
    at = (b * tl.num_programs(1) + split) * S + s
    tl.store(out_ptr + at[:, None] * C + cols[None, :], _finite(out, out_ptr.dtype.element_ty), mask=is_slot[:, None])
    if TOTAL:
        tl.store(total_ptr + at, total, mask=is_slot & (column == 0))


def _blocks(C: int) -> dict[str, int]:
    """The two blocks of columns."""
    a = 1 << (C.bit_length() - 1)
    return {"C": C, "A": a, "R": max(16, triton.next_power_of_2(C - a)) if C > a else 0}


def _stretches(N: int, programs: int, tile: int, warps: int) -> tuple[int, int]:
    """How many stretches, and their length: eight warps for each multiprocessor, and 128 patches at least."""
    splits = max(1, min(MULTIPROCESSORS * 8 // warps // programs, N // 128))
    stretch = triton.cdiv(triton.cdiv(N, splits), tile) * tile
    return triton.cdiv(N, stretch), stretch


def _how(launch: Launch) -> dict[str, int]:
    limit = {} if launch.registers is None else {"maxnreg": launch.registers}
    return {"num_warps": launch.warps, "num_stages": launch.stages, **limit}


def _slots(S: int, most: int) -> int:
    return max(16, min(most, triton.next_power_of_2(S)))


def pack_forward(x: Tensor, m: Tensor, valid: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The sums z (B, S, C) in the type of m, and the logarithms of the softmax's sums (B, S), float32.

    Args:
        x: (B, N, C).
        m: (B, S, C).
        valid: Which patches count, (B, N) bool; at least one of an image.
        eps: Of the norm.
    """
    x, m = x.contiguous(), m.contiguous()
    (B, N, C), S = x.shape, m.shape[1]
    launch = default_launch(PACK, C, m.dtype)
    tile, slots = launch.tile, _slots(S, launch.slots)
    blocks = triton.cdiv(S, slots)
    splits, stretch = _stretches(N, B * blocks, tile, launch.warps)
    whole = splits == 1
    z, lse = torch.empty_like(m), x.new_empty(B, S, dtype=torch.float32)
    parts = (lse, lse, z)
    if not whole:
        parts = (*(x.new_empty(B, splits, S, dtype=torch.float32) for _ in range(2)),)
        parts = (*parts, x.new_empty(B, splits, S, C, dtype=torch.float32))
    mask = m if valid is None else valid.contiguous().view(torch.uint8)
    sizes = {**_blocks(C), "BS": slots, "BN": tile, "MASKED": valid is not None, "WHOLE": whole}
    _pack_kernel[(blocks, splits, B)](x, m, mask, *parts, N, S, stretch, eps, **sizes, **_how(launch))
    if not whole:
        sizes = {"C": C, "CP": triton.next_power_of_2(C), "SP": triton.next_power_of_2(splits), "CHUNK": 8}
        _merge_kernel[(S, B)](*parts, lse, z, S, splits, **sizes, num_warps=4)
    return z, lse


def pack_backward(
    dz: Tensor, x: Tensor, m: Tensor, valid: Tensor | None, z: Tensor, lse: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The gradients of x and m, from that of z. Arguments as in `pack_forward`, z and lse as it gave them."""
    x, m, dz = x.contiguous(), m.contiguous(), dz.contiguous().to(m.dtype)
    (B, N, C), S = x.shape, m.shape[1]
    launch = default_launch(PACK_BACKWARD, C, m.dtype)
    tile = launch.tile
    dx, ds = torch.empty_like(x), x.new_empty(B, N, S, dtype=m.dtype)
    mean, scale = (x.new_empty(B, N, dtype=torch.float32) for _ in range(2))
    d = (dz.float() * z.float()).sum(dim=2)
    mask = m if valid is None else valid.contiguous().view(torch.uint8)
    sizes = {**_blocks(C), "BS": _slots(S, launch.slots), "BN": tile, "MASKED": valid is not None}
    _pack_backward_kernel[(triton.cdiv(N, tile), B)](
        x, m, mask, lse, dz, d, dx, ds, mean, scale, N, S, eps, **sizes, **_how(launch)
    )
    return dx, _sums(ds, x, mean, scale)[0]


def unpack_forward(
    x: Tensor, k: Tensor, shift: Tensor, v: Tensor, slots: int, eps: float,
    norm: tuple[Tensor, Tensor] | None, eps2: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y (B, N, C) in the type of x; with a second norm its result in the type of k, and its means and 1 / deviations
    (B, N), float32, all three empty without.

    Args:
        x: (B, N, C).
        k, v: (B, S, C).
        shift: Added to the scores, (B, S), float32. At -1e30, a slot is not read.
        slots: L; S is H L, head by head.
        eps: Of the norm before the scores.
        norm: Weight and bias (C) of the second norm, if there is one.
        eps2: Its eps.
    """
    x, k, shift, v = x.contiguous(), k.contiguous(), shift.contiguous(), v.contiguous()
    (B, N, C), S = x.shape, k.shape[1]
    y = torch.empty_like(x)
    h = torch.empty_like(x, dtype=k.dtype) if norm else k.new_empty(0)
    mean, scale = (x.new_empty((B, N) if norm else 0, dtype=torch.float32) for _ in range(2))
    launch = default_launch(UNPACK, C, k.dtype)
    tile, heads = launch.tile, _heads(S, slots, launch.slots)
    sizes = {**_blocks(C), **heads[1], "BN": tile, "NORM": norm is not None}
    weight, bias = (k, k) if norm is None else norm
    _unpack_kernel[(triton.cdiv(N, tile), B)](
        x, k, shift, v, weight, bias, y, h, mean, scale, N, S, heads[0], eps, eps2, **sizes,
        **_how(launch),
    )  # fmt: skip
    return y, h, mean, scale


def unpack_backward(
    dy: Tensor, x: Tensor, k: Tensor, shift: Tensor, v: Tensor, slots: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, k, shift and v, from that of y. Arguments as in `unpack_forward`."""
    dy, x, k, shift, v = dy.contiguous(), x.contiguous(), k.contiguous(), shift.contiguous(), v.contiguous()
    (B, N, C), S = x.shape, k.shape[1]
    dx = torch.empty_like(x)
    w, dt = (x.new_empty(B, N, S, dtype=k.dtype) for _ in range(2))
    mean, scale = (x.new_empty(B, N, dtype=torch.float32) for _ in range(2))
    launch = default_launch(UNPACK_BACKWARD, C, k.dtype)
    tile, heads = launch.tile, _heads(S, slots, launch.slots)
    sizes = {**_blocks(C), **heads[1], "BN": tile}
    _unpack_backward_kernel[(triton.cdiv(N, tile), B)](
        x, k, shift, v, dy, dx, w, dt, mean, scale, N, S, heads[0], eps, **sizes, **_how(launch)
    )
    dk, dshift = _sums(dt, x, mean, scale)
    dv, _ = _sums(w, dy)
    return dx, dk, dshift, dv


def _heads(S: int, slots: int, most: int) -> tuple[int, dict[str, int]]:
    """Slots of all heads with each head padded to a power of two, and the sizes of a block of whole heads."""
    padded = triton.next_power_of_2(slots)
    total = S // slots * padded
    return total, {"L": slots, "LP": padded, "BS": max(_slots(total, most), padded)}


def _sums(g: Tensor, x: Tensor, mean: Tensor | None = None, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sums over N of g (B, N, S) times x (B, N, C), normed if its mean is given: (B, S, C), in the type of g; and of g
    alone: (B, S), float32, of no meaning if x is not normed."""
    (B, N, S), C = g.shape, x.shape[2]
    wide = g.dtype == torch.float32
    columns, tile = 64 if wide or C % 128 else 128, 32 if wide else 64
    slots = _slots(S, 32 if wide else 64)
    blocks = triton.cdiv(S, slots) * (C // columns)
    splits, stretch = _stretches(N, B * blocks, tile, 4)
    out = x.new_empty(B, splits, S, C, dtype=g.dtype if splits == 1 else torch.float32)
    total = x.new_empty(B, splits, S, dtype=torch.float32)
    normed = mean is not None
    sizes = {"C": C, "BC": columns, "BS": slots, "BN": tile, "NORM": normed, "TOTAL": normed}
    stats = (mean, scale) if normed else (total, total)
    _sums_kernel[(blocks, splits, B)](g, x, *stats, out, total, N, S, stretch, **sizes, num_warps=4, num_stages=2)
    if splits == 1:
        return out[:, 0], total[:, 0]
    return out.sum(dim=1).to(g.dtype), total.sum(dim=1)
