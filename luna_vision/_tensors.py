"""Small things that every layer shares: options, heads, masks, number types, residuals.

Shapes: B batch, K tokens, C width, H heads, E = C / H head width.
"""

import platform
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.models import register_notrace_function
from torch import Tensor, nn
from torch.func import functional_call

# Without AVX-512, PyTorch multiplies half-precision matrices on an x86 CPU by scalar loops, many times slower than
# float32 ones, so it pays to convert.
_X86 = platform.machine() in ("x86_64", "AMD64")
_SLOW_HALF_ON_CPU = _X86 and not torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def check_option(name: str, value: str, options: Iterable[str]) -> None:
    """
    Raises:
        ValueError: `value` is not among the options that the argument `name` has.
    """
    options = tuple(options)
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Cut the width into heads: (B, K, C) to (B, H, K, E)."""
    return x.unflatten(-1, (num_heads, x.shape[-1] // num_heads)).transpose(1, 2)


@register_notrace_function  # a branch on the type, which fx cannot trace
def saturate(x: Tensor) -> Tensor:
    """Clamp float16 to its finite range; every other type passes through.

    float16 ends at 65,504, so a projection of large but finite inputs can reach infinity, and the next softmax or norm
    would turn that into NaN. The other types have the range of float32 or more.
    """
    if x.dtype == torch.float16:
        x = x.clamp(-65504.0, 65504.0)
    return x


@register_notrace_function
def add_residual(x: Tensor, y: Tensor) -> Tensor:
    """x + y, written into y's memory where the types allow: one N x C tensor less to allocate.

    y must be the caller's own, as the result of a layer is: no view of x, and nothing that anyone reads later.
    """
    if y.dtype == x.dtype:
        return saturate(y.add_(x))
    return saturate(x + y)  # under autocast the residual stream is wider than what a layer gives


def check_valid(valid: Tensor, batch: int, length: int, name: str, values: bool = True) -> None:
    """Check a validity mask (True = valid) against the tokens that it describes.

    Args:
        valid: Mask of shape (batch, length), bool.
        batch: Batch size of the tokens.
        length: Number of tokens.
        name: How the caller knows the mask, for the message.
        values: Look for rows without a valid token, which a part of an image may well be.

    Raises:
        ValueError: The mask is not bool, has another shape, or (in eager mode only, where values can be looked at)
            leaves a row without a single valid token.
    """
    if valid.dim() != 2 or valid.shape[0] != batch or valid.shape[1] != length:
        raise ValueError(f"{name} must have shape ({batch}, {length}), got {list(valid.shape)}")
    if valid.dtype != torch.bool:
        raise ValueError(f"{name} must be a bool tensor with True for valid tokens, got {valid.dtype}")
    if not torch.jit.is_scripting():
        if not values or torch.jit.is_tracing() or torch.compiler.is_compiling() or valid.is_meta:
            return
        if not bool(valid.any(dim=1).all()):
            raise ValueError(f"{name} has a row without any valid token; every row needs at least one")


def readable(valid: Tensor) -> Tensor:
    """A mask (B, K) in which a row without any valid key is valid throughout.

    Such a row would be a softmax over nothing, which is NaN. Its output means nothing, but stays finite, which is what
    compiled and exported code needs.
    """
    return valid | ~valid.any(dim=1, keepdim=True)


def wide(x: Tensor) -> Tensor:
    """float32, or float64 as it is: the type in which the small matrices are folded."""
    return x if x.dtype == torch.float64 else x.float()


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x; never on the meta device, which does not know it."""
    if x.is_meta:
        return False
    return torch.is_autocast_enabled(x.device.type)


def autocast_input(x: Tensor) -> Tensor:
    """x in the type that autocast would give to a product with it; unchanged without autocast."""
    if not torch.jit.is_scripting():
        if autocasts(x) and x.dtype != torch.float64:
            return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Work on x in the types that are given, autocast or not."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext()


@register_notrace_function
def matmul_input(x: Tensor) -> Tensor:
    """x in the type in which products with it are fast here: float32 for bfloat16 and float16 on a CPU that has no
    instructions for them, else unchanged."""
    if not torch.jit.is_scripting():
        if _SLOW_HALF_ON_CPU and x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):
            return x.float()
    return x


def half_is_slow(x: Tensor) -> bool:
    """Whether a layer would work on x, under autocast if that is on, in half precision that is slow here."""
    half = autocast_input(x)
    return matmul_input(half).dtype != half.dtype


def run_in_float32(module: nn.Module, x: Tensor, *args: Any) -> Tensor:
    """Run a module in float32, and return what it would have returned, in the type in which it would have worked."""
    dtype = autocast_input(x).dtype
    params = {name: p.float() for name, p in module.named_parameters()}
    with torch.autocast("cpu", enabled=False):
        return functional_call(module, params, (x.float(), *args)).to(dtype)
