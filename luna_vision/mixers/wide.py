"""Self-attention that is mixed in float32 or wider: sums over very many patches lose too much in half precision.

Shapes: B batch, H heads, N patches, E head width.
"""

import torch
from torch import Tensor

from ..functional import autocasts, clamp_fp16, upcast
from .base import SelfAttention

__all__ = ["WideAttention"]


class WideAttention(SelfAttention):
    """`SelfAttention` for a mixer that defines `mix_wide` in the place of `mix`."""

    def mix_wide(
        self, q: Tensor, k: Tensor, v: Tensor, grid_size: tuple[int, int], patch_valid: Tensor | None = None
    ) -> Tensor:
        """`mix` of float32 or float64 tensors, without autocast."""
        raise NotImplementedError

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, grid_size: tuple[int, int], patch_valid: Tensor | None = None
    ) -> Tensor:
        dtype = v.dtype
        q, k, v = upcast(q), upcast(k), upcast(v)
        if not torch.jit.is_scripting():
            if autocasts(v):
                with torch.autocast(v.device.type, enabled=False):
                    return clamp_fp16(self.mix_wide(q, k, v, grid_size, patch_valid).to(dtype))
        return clamp_fp16(self.mix_wide(q, k, v, grid_size, patch_valid).to(dtype))
