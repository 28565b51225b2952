"""The kernels as operators of PyTorch, so that autograd, compilation and export see them, and what is around them.

    torch.ops.luna_vision.normed_pack      z = softmax over N of (M n(X)^T), times n(X)
    torch.ops.luna_vision.normed_unpack    Y = X + softmax over each head's slots of (n(X) K^T + shift), times V;  LN(Y)

n is a norm without weight and bias. `pack_normed` and `unpack_normed` have the interface of `pack_absorbed` and
`unpack_absorbed`: they fold weight and bias of the norm into the projections.

Shapes: B batch, N patches, L memory slots, H heads, S = H L, C width.
"""

import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..absorbed import Projections, fold_queries, fold_slots, project_values
from ..masks import readable
from ..precision import autocasts, clamp_fp16

MAX_SLOTS = 64  # L
MAX_HEADS = 16
MAX_BLOCK = 2**16  # bytes of the slots of a head, of which a kernel holds several such blocks in shared memory
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton itself reads it once
TYPES = (torch.bfloat16, torch.float16, torch.float32)
MANY = 1024  # patches, from which on the kernels were no slower


class Norm(NamedTuple):
    """A LayerNorm over C."""

    weight: Tensor
    bias: Tensor
    eps: float


def supports_kernels(x: Tensor, heads: int, slots: int) -> bool:
    """Whether the kernels take patches (B, N, C) on their device, with L slots of H heads: on a GPU, or in Triton's
    interpreter (TRITON_INTERPRET=1) on a CPU, where Triton is installed; in bfloat16, float16 and float32; where the
    slots of a head fit shared memory; and where there is an image, as a kernel of no programs cannot start."""
    here = HAS_TRITON and (x.is_cuda or (INTERPRETED and x.is_cpu)) and x.shape[0] > 0
    fits = x.shape[-1] % 64 == 0 and slots <= MAX_SLOTS and heads <= MAX_HEADS and x.dtype in TYPES
    block = 2 ** (slots - 1).bit_length() * x.shape[-1] * _product_type(x).itemsize
    return here and fits and block <= MAX_BLOCK


def kernels_pay(x: Tensor) -> bool:
    """Whether the pack and the unpack of patches (B, N, C) were measured to be no slower by kernels: on a GPU, without
    gradients, in half precision, for 1,024 patches or more (docs/gpu.md: an H200, width 384)."""
    if not x.is_cuda or torch.is_grad_enabled():
        return False
    return x.shape[1] >= MANY and _product_type(x) != torch.float32


def fold_norm(norm: Norm, w: Projections, pack: bool) -> Projections:
    """Projections of n(X) that equal those of LN(X): weight and bias of the norm move into what reads the patches.

    Args:
        norm: The norm.
        w: The projections.
        pack: Whether the patches are keys and values, else queries.
    """

    def bias(of: Tensor, old: Tensor | None) -> Tensor:
        new = of @ norm.bias.to(of.dtype)
        return new if old is None else old + new

    if not pack:
        return w._replace(w_query=w.w_query * norm.weight, b_query=bias(w.w_query, w.b_query))
    values = w.w_key if w.w_value is None else w.w_value
    # the bias of the keys drops out of the softmax
    return w._replace(
        w_key=w.w_key * norm.weight,
        w_value=None if w.w_value is None else w.w_value * norm.weight,
        b_value=bias(values, w.b_value),
    )


def pack_normed(memory: Tensor, x: Tensor, norm: Norm, w: Projections, valid: Tensor | None = None) -> Tensor:
    """`pack_absorbed` of LN(x), by a kernel: the packed memory (B, L, C), in the type of products.

    Args:
        memory: Queries (B, L, C).
        x: Patches (B, N, C), before the norm.
        norm: The norm.
        w: The projections.
        valid: Which patches count, (B, N) bool.
    """
    memory = memory.to(_product_type(x))
    if autocasts(x):
        with torch.autocast(x.device.type, enabled=False):
            return _pack_normed(memory, x, norm, w, valid)
    return _pack_normed(memory, x, norm, w, valid)


def _product_type(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def _pack_normed(memory: Tensor, x: Tensor, norm: Norm, w: Projections, valid: Tensor | None) -> Tensor:
    w = fold_norm(norm, w, pack=True)
    m = fold_queries(memory, w)
    z, _ = normed_pack(x, m, None if valid is None else readable(valid), norm.eps)
    return clamp_fp16(project_values(z, None, w).transpose(1, 2).flatten(2))


def unpack_normed(
    x: Tensor,
    packed: Tensor,
    norm: Norm,
    w: Projections,
    valid: Tensor | None = None,
    norm2: Norm | None = None,
    branch: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """x + `unpack_absorbed` of LN(x), by a kernel: (B, N, C), in the type of x; and LN2 of that, in the type of
    products, or None without a second norm.

    Args:
        x: Patches (B, N, C), before the norm.
        packed: Keys and values (B, L, C).
        norm: The norm.
        w: The projections, with that of the output.
        valid: Which slots may be read, (B, L) bool.
        norm2: The second norm.
        branch: What is done to that which is added to x: a factor for each channel or image, such as LayerScale and
            stochastic depth. It is done to the values of the slots (B, S, C), which are fewer.
    """
    packed = packed.to(_product_type(x))
    if autocasts(x):
        with torch.autocast(x.device.type, enabled=False):
            return _unpack_normed(x, packed, norm, w, valid, norm2, branch)
    return _unpack_normed(x, packed, norm, w, valid, norm2, branch)


def _unpack_normed(
    x: Tensor,
    packed: Tensor,
    norm: Norm,
    w: Projections,
    valid: Tensor | None,
    norm2: Norm | None,
    branch: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor | None]:
    L = packed.shape[1]
    k, shift, v = fold_slots(packed, fold_norm(norm, w, pack=False))
    assert shift is not None  # the norm has a bias
    if branch is not None:
        v = branch(v).to(v.dtype)
    shift = shift.float()
    if valid is not None:
        shift = shift.masked_fill(~readable(valid).repeat(1, w.heads), -1e30)
    weight, bias, eps2 = (None, None, 0.0) if norm2 is None else norm2
    y, h, _, _ = normed_unpack(x, k, shift, v, L, norm.eps, weight, bias, eps2)
    return y, None if norm2 is None else h


@torch.library.custom_op("luna_vision::normed_pack", mutates_args=())
def normed_pack(x: Tensor, m: Tensor, valid: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """z (B, S, C), in the type of m, and the logarithms of the sums of its softmax (B, S), float32, without gradient.

    Args:
        x: (B, N, C).
        m: (B, S, C).
        valid: Which patches count, (B, N) bool; at least one of an image.
        eps: Of the norm.
    """
    from .triton_kernels import pack_forward

    return pack_forward(x, m, valid, eps)


@normed_pack.register_fake
def _(x: Tensor, m: Tensor, valid: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return m.new_empty(m.shape), x.new_empty(m.shape[:2], dtype=torch.float32)


@torch.library.custom_op("luna_vision::normed_pack_backward", mutates_args=())
def normed_pack_backward(
    dz: Tensor, x: Tensor, m: Tensor, valid: Tensor | None, z: Tensor, lse: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The gradients of x and m."""
    from .triton_kernels import pack_backward

    return pack_backward(dz, x, m, valid, z, lse, eps)


@normed_pack_backward.register_fake
def _(dz: Tensor, x: Tensor, m: Tensor, valid: Tensor | None, z: Tensor, lse: Tensor, eps: float):
    return x.new_empty(x.shape), m.new_empty(m.shape)


def _keep_pack(ctx, inputs, output) -> None:
    x, m, valid, ctx.eps = inputs
    ctx.save_for_backward(x, m, valid, *output)


def _differentiate_pack(ctx, dz: Tensor, _):
    x, m, valid, z, lse = ctx.saved_tensors
    return *normed_pack_backward(dz, x, m, valid, z, lse, ctx.eps), None, None


normed_pack.register_autograd(_differentiate_pack, setup_context=_keep_pack)


@torch.library.custom_op("luna_vision::normed_unpack", mutates_args=())
def normed_unpack(
    x: Tensor,
    k: Tensor,
    shift: Tensor,
    v: Tensor,
    slots: int,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    eps2: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (B, N, C), in the type of x; LN2(y) in the type of k, its means and 1 / deviations (B, N), float32, without
    gradient: these three are empty without a second norm.

    Args:
        x: (B, N, C).
        k, v: (B, S, C).
        shift: (B, S), float32; -1e30 where a slot is not read.
        slots: L.
        eps: Of the first norm.
        weight, bias, eps2: Of the second norm, if there is one.
    """
    from .triton_kernels import unpack_forward

    norm2 = None if weight is None or bias is None else (weight, bias)
    return unpack_forward(x, k, shift, v, slots, eps, norm2, eps2)


@normed_unpack.register_fake
def _(x, k, shift, v, slots, eps, weight, bias, eps2):
    stats = x.new_empty(x.shape[:2] if weight is not None else 0, dtype=torch.float32)
    h = x.new_empty(x.shape if weight is not None else 0, dtype=k.dtype)
    return x.new_empty(x.shape), h, stats, torch.empty_like(stats)


@torch.library.custom_op("luna_vision::normed_unpack_backward", mutates_args=())
def normed_unpack_backward(
    dy: Tensor, x: Tensor, k: Tensor, shift: Tensor, v: Tensor, slots: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, k, shift and v."""
    from .triton_kernels import unpack_backward

    return unpack_backward(dy, x, k, shift, v, slots, eps)


@normed_unpack_backward.register_fake
def _(dy, x, k, shift, v, slots, eps):
    return x.new_empty(x.shape), k.new_empty(k.shape), shift.new_empty(shift.shape), v.new_empty(v.shape)


def _keep_unpack(ctx, inputs, output) -> None:
    x, k, shift, v, ctx.slots, ctx.eps, weight, bias, _ = inputs
    y, _, mean, scale = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, k, shift, v, weight, bias, *((y, mean, scale) if weight is not None else ()))


def _differentiate_unpack(ctx, dy: Tensor | None, dh: Tensor | None, *_):
    x, k, shift, v, weight, bias, *kept = ctx.saved_tensors
    d_weight = d_bias = None
    if dh is not None and weight is not None:
        y, mean, scale = kept
        # a CPU, which only the interpreter uses, wants all of it in one type
        mean, scale = (t[..., None] if y.is_cuda else t[..., None].to(y.dtype) for t in (mean, scale))
        through, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
            dh.to(y.dtype),
            y,
            y.shape[-1:],
            mean,
            scale,
            weight.to(y.dtype),
            bias.to(y.dtype),
            [True, True, True],
        )
        d_weight, d_bias = d_weight.to(weight.dtype), d_bias.to(bias.dtype)
        dy = through if dy is None else dy + through
    assert dy is not None
    gradients = normed_unpack_backward(dy, x, k, shift, v, ctx.slots, ctx.eps)
    return *gradients, None, None, d_weight, d_bias, None


normed_unpack.register_autograd(_differentiate_unpack, setup_context=_keep_unpack)


@torch.library.custom_op("luna_vision::mix_residual", mutates_args=())
def mix_residual(x: Tensor, weight: Tensor, bias: Tensor, valid: Tensor | None, H: int, W: int) -> Tensor:
    """x plus its depthwise 3x3 convolution over the patch grid, for which patches that do not count are zeros: (B, N,
    C), in the type of x, and finite in float16.

    Args:
        x: (B, N, C), N = H W.
        weight: (C, 1, 3, 3).
        bias: (C).
        valid: Which patches count, (B, N) bool.
        H, W: The patch grid.
    """
    from .depthwise import mix_forward

    return mix_forward(x, weight, bias, valid, H, W)


@mix_residual.register_fake
def _(x, weight, bias, valid, H, W):
    return x.new_empty(x.shape)


@torch.library.custom_op("luna_vision::mix_residual_backward", mutates_args=())
def mix_residual_backward(
    dy: Tensor, x: Tensor, weight: Tensor, valid: Tensor | None, H: int, W: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias."""
    from .depthwise import mix_backward

    return mix_backward(dy, x, weight, valid, H, W)


@mix_residual_backward.register_fake
def _(dy, x, weight, valid, H, W):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:1])


def _keep_mix(ctx, inputs, output) -> None:
    x, weight, _, valid, ctx.H, ctx.W = inputs
    ctx.save_for_backward(x, weight, valid)


def _differentiate_mix(ctx, dy: Tensor):
    x, weight, valid = ctx.saved_tensors
    return *mix_residual_backward(dy, x, weight, valid, ctx.H, ctx.W), None, None, None


mix_residual.register_autograd(_differentiate_mix, setup_context=_keep_mix)
