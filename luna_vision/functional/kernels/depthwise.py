"""Triton kernels of local mixing with its residual: y = x + a depthwise 3x3 convolution over the patch grid.

A program takes a tile of TH rows and TW columns of the patch grid and a block of BC channels, and reads the tile nine
times, moved by a row and a column: from memory once, and then from the caches. Sums are in float32. Patches that do not
count, and those outside the grid, are zeros for the convolution. The gradient of x is the same kernel with the weights
turned around; that of the weights is summed over stretches of tiles, whose results are added.

Shapes: B images, H, W patch grid, N = H W patches, C width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_kernels import MULTIPROCESSORS, _finite

SIZES = ["H", "W", "tiles", "stretch"]  # change from image to image: nothing is compiled for their values
# of a program: what registers of Hopper allow for 16 warps of a multiprocessor, found by compiling for it, not measured
CHANNELS, ROWS, COLUMNS, WARPS = 64, 4, 16, 8
SUM_ROWS, SUM_WARPS = 2, 4  # of one that sums, which keeps four sums for each number of a tile


@triton.jit
def _tile(tile, H, W, TH: tl.constexpr, TW: tl.constexpr):
    """Rows and columns of the patches of a tile, and which of them are in the grid."""
    across = tl.cdiv(W, TW)
    i = tl.arange(0, TH * TW)
    row, column = tile // across * TH + i // TW, tile % across * TW + i % TW
    return row, column, (row < H) & (column < W)


@triton.jit
def _moved(x_ptr, valid_ptr, row, column, use, H, W, c, C: tl.constexpr, MASKED: tl.constexpr):
    """Patches at these rows and columns, (TH TW, BC) in float32: zeros where they do not count."""
    n = row * W + column
    use = use & (row >= 0) & (row < H) & (column >= 0) & (column < W)
    if MASKED:
        use = use & (tl.load(valid_ptr + n, mask=use, other=0) != 0)
    return tl.load(x_ptr + n.to(tl.int64)[:, None] * C + c[None, :], mask=use[:, None], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def _mix_kernel(
    x_ptr, w_ptr, b_ptr, valid_ptr, y_ptr, H, W,
    C: tl.constexpr, BC: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, MASKED: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(2).to(tl.int64) * H * W
    x_ptr, y_ptr, valid_ptr = x_ptr + image * C, y_ptr + image * C, valid_ptr + image
    row, column, use = _tile(tl.program_id(0), H, W, TH, TW)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    y = tl.zeros((TH * TW, BC), tl.float32)
    for tap in tl.static_range(9):
        x = _moved(x_ptr, valid_ptr, row + tap // 3 - 1, column + tap % 3 - 1, use, H, W, c, C, MASKED and not BACK)
        w = tl.load(w_ptr + c * 9 + (8 - tap if BACK else tap)).to(tl.float32)
        y += x * w[None, :]
    n = row * W + column
    if BACK:
        if MASKED:
            y = tl.where((tl.load(valid_ptr + n, mask=use, other=0) != 0)[:, None], y, 0.0)
    else:
        y += tl.load(b_ptr + c).to(tl.float32)[None, :]
    at = n.to(tl.int64)[:, None] * C + c[None, :]
    y += tl.load(x_ptr + at, mask=use[:, None], other=0.0).to(tl.float32)
    tl.store(y_ptr + at, _finite(y, y_ptr.dtype.element_ty), mask=use[:, None])


@triton.jit(do_not_specialize=SIZES)
def _mix_sums_kernel(
    x_ptr, dy_ptr, valid_ptr, out_ptr, H, W, tiles, stretch,
    C: tl.constexpr, BC: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Of the three weights of a row: sums of dy times the patches that they meet; and of dy alone."""
    up, split = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    left = tl.zeros((TH * TW, BC), tl.float32)
    middle, right, total = left, left, left
    of_image = tl.cdiv(H, TH) * tl.cdiv(W, TW)
    for t in range(split * stretch, tl.minimum((split + 1) * stretch, tiles)):
        image = (t // of_image).to(tl.int64) * H * W
        x, valid = x_ptr + image * C, valid_ptr + image
        row, column, use = _tile(t % of_image, H, W, TH, TW)
        at = (row * W + column).to(tl.int64)[:, None] * C + c[None, :]
        dy = tl.load(dy_ptr + image * C + at, mask=use[:, None], other=0.0).to(tl.float32)
        left += dy * _moved(x, valid, row + up - 1, column - 1, use, H, W, c, C, MASKED)
        middle += dy * _moved(x, valid, row + up - 1, column, use, H, W, c, C, MASKED)
        right += dy * _moved(x, valid, row + up - 1, column + 1, use, H, W, c, C, MASKED)
        total += dy
    out_ptr += split * 10 * C + c
    tl.store(out_ptr + 3 * up * C, tl.sum(left, 0))
    tl.store(out_ptr + (3 * up + 1) * C, tl.sum(middle, 0))
    tl.store(out_ptr + (3 * up + 2) * C, tl.sum(right, 0))
    if up == 0:
        tl.store(out_ptr + 9 * C, tl.sum(total, 0))


def _mix(x: Tensor, weight: Tensor, bias: Tensor | None, valid: Tensor | None, H: int, W: int) -> Tensor:
    x, weight = x.contiguous(), weight.contiguous()
    B, _, C = x.shape
    y = torch.empty_like(x)
    mask = x if valid is None else valid.contiguous().view(torch.uint8)
    sizes = {"C": C, "BC": CHANNELS, "TH": ROWS, "TW": COLUMNS, "MASKED": valid is not None, "BACK": bias is None}
    grid = triton.cdiv(H, ROWS) * triton.cdiv(W, COLUMNS), C // CHANNELS, B
    _mix_kernel[grid](x, weight, weight if bias is None else bias, mask, y, H, W, **sizes, num_warps=WARPS)
    return y


def mix_forward(x: Tensor, weight: Tensor, bias: Tensor, valid: Tensor | None, H: int, W: int) -> Tensor:
    """y (B, N, C), in the type of x.

    Args:
        x: (B, N, C), C a multiple of 64.
        weight: (C, 1, 3, 3).
        bias: (C).
        valid: Which patches count, (B, N) bool.
        H, W: The patch grid.
    """
    return _mix(x, weight, bias, valid, H, W)


def mix_backward(
    dy: Tensor, x: Tensor, weight: Tensor, valid: Tensor | None, H: int, W: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, and of weight and bias in the type of the weight. Arguments as in `mix_forward`."""
    dx = _mix(dy, weight, None, valid, H, W)
    dy, x = dy.contiguous(), x.contiguous()
    B, _, C = x.shape
    blocks, tiles = C // CHANNELS, B * triton.cdiv(H, SUM_ROWS) * triton.cdiv(W, COLUMNS)
    # 32 warps for each multiprocessor
    stretch = triton.cdiv(tiles, max(1, MULTIPROCESSORS * 32 // SUM_WARPS // (3 * blocks)))
    splits = triton.cdiv(tiles, stretch)
    out = x.new_empty(splits, 10, C, dtype=torch.float32)
    mask = x if valid is None else valid.contiguous().view(torch.uint8)
    sizes = {"C": C, "BC": CHANNELS, "TH": SUM_ROWS, "TW": COLUMNS, "MASKED": valid is not None}
    _mix_sums_kernel[(3, blocks, splits)](x, dy, mask, out, H, W, tiles, stretch, **sizes, num_warps=SUM_WARPS)
    sums = out.sum(dim=0).to(weight.dtype)
    return dx, sums[:9].t().reshape(weight.shape), sums[9].clone()
