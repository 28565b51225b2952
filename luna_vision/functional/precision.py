"""Number types: sums in float32, autocast, and the finite range of float16."""

from contextlib import AbstractContextManager, nullcontext

import torch
from timm.models import register_notrace_function
from torch import Tensor


@register_notrace_function  # a branch on the type, which fx cannot trace
def clamp_fp16(x: Tensor, share: float = 1.0) -> Tensor:
    """Clamp float16 to a share of its finite range, which ends at 65,504; other types pass through.

    A projection of large inputs can reach infinity in float16, and the next softmax or norm would make it NaN.
    """
    if x.dtype == torch.float16:
        limit = 65504.0 if share == 1.0 else 65000.0 * share  # less, for the sum of the shares is rounded
        x = x.clamp(-limit, limit)
    return x


@register_notrace_function
def add_residual(x: Tensor, y: Tensor, in_place: bool = True) -> Tensor:
    """x + y, finite in float16, and in place written into y's memory if the types allow, which saves an N x C tensor.

    In place, y must be a new tensor, such as the result of a layer: no view of x, and not read by anyone later.
    """
    if y.dtype != x.dtype:  # under autocast the residual stream is wider than the output of a layer
        return x + clamp_fp16(y)
    return clamp_fp16(y.add_(x) if in_place else x + y)


def upcast(x: Tensor) -> Tensor:
    """x in float32; float64 stays as it is."""
    return x if x.dtype == torch.float64 else x.float()


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x; never on the meta device, which does not support it."""
    if x.is_meta:
        return False
    return torch.is_autocast_enabled(x.device.type)


@register_notrace_function
def autocast_input(x: Tensor) -> Tensor:
    """x in the type of a product under autocast; unchanged without autocast."""
    if not torch.jit.is_scripting():
        if autocasts(x) and x.dtype != torch.float64:
            return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def no_autocast(x: Tensor) -> AbstractContextManager:
    """A context without autocast for the device of x."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext()
