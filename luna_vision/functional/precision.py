"""Number types: what is summed in float32, what autocast would do, and the finite range of float16."""

from contextlib import AbstractContextManager, nullcontext

import torch
from timm.models import register_notrace_function
from torch import Tensor

__all__ = ["add_residual", "autocast_input", "autocasts", "clamp_fp16", "no_autocast", "upcast"]


@register_notrace_function  # a branch on the type, which fx cannot trace
def clamp_fp16(x: Tensor) -> Tensor:
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
        return clamp_fp16(y.add_(x))
    return clamp_fp16(x + y)  # under autocast the residual stream is wider than what a layer gives


def upcast(x: Tensor) -> Tensor:
    """x in float32; float64 stays as it is."""
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
