"""Softmax attention over all patches: O(N^2) in time.

Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017 (arXiv 1706.03762), section 3.2.

Shapes: B batch, H heads, N patches, E head width.
"""

import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor

from ..functional import readable
from .base import SelfAttention

__all__ = ["SoftmaxMixer"]


@register_notrace_module
class SoftmaxMixer(SelfAttention):
    """Every patch attends to every patch, by `F.scaled_dot_product_attention`. Cost O(N^2 C).

    Parameters: qkv and output projection, 4 C^2.
    """

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, grid_size: tuple[int, int], patch_valid: Tensor | None = None
    ) -> Tensor:
        mask = readable(patch_valid)[:, None, None, :] if patch_valid is not None else None
        drop = self.attn_drop if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop)
