"""The patch embedding: timm's, with a way around slow half precision.

Shapes: B batch, C width, H', W' patch grid.
"""

import timm.layers
import torch
from timm.models import register_notrace_module
from torch import Tensor

from .._tensors import half_is_slow, run_in_float32

__all__ = ["PatchEmbed"]


@register_notrace_module
class PatchEmbed(timm.layers.PatchEmbed):
    """timm's patch embedding for images of whole patches. In bfloat16 or float16 on a CPU without instructions for them
    it runs in float32, many times faster, and returns the half-precision type."""

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, channels, height, width) to (B, H', W', C)."""
        if not torch.jit.is_scripting():
            if half_is_slow(x):
                return run_in_float32(self, x)
        return self.norm(self.proj(x).permute(0, 2, 3, 1))
