"""The MLP of the blocks: timm's, with a way around slow half precision.

Shapes: B batch, N patches, C width.
"""

import timm.layers
import torch
from timm.models import register_notrace_module
from torch import Tensor
from torch.func import functional_call

from .._tensors import autocast_input, matmul_input

__all__ = ["Mlp"]


@register_notrace_module
class Mlp(timm.layers.Mlp):
    """timm's MLP. In bfloat16 or float16 on a CPU without instructions for them it runs in float32, many times faster,
    and returns the half-precision type."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, C) to (B, N, C)."""
        if not torch.jit.is_scripting():
            half = autocast_input(x)
            if matmul_input(half).dtype != half.dtype:
                params = {name: p.float() for name, p in self.named_parameters()}
                with torch.autocast("cpu", enabled=False):
                    return functional_call(self, params, (x.float(),)).to(half.dtype)
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(self.norm(x)))
