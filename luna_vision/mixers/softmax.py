"""Softmax attention over all patches: O(N^2) in time.

Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017 (arXiv 1706.03762), section 3.2.

Shapes: B batch, H heads, N patches, E head width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor

from ..functional import readable
from .base import SelfAttention


@register_notrace_module
class SoftmaxMixer(SelfAttention):
    """Every patch attends to every patch, by `F.scaled_dot_product_attention`. Cost O(N^2 C).

    Parameters: qkv and output projection, 4 C^2.
    """

    def __init__(self, *args: Any, query_gain: float = 1.0, **common: Any) -> None:
        """
        Args:
            args, common: See `SelfAttention`.
            query_gain: Factor on the initial query projection.

        Raises:
            ValueError: As in `SelfAttention`, or a gain that is not positive.
        """
        super().__init__(*args, **common)
        if not query_gain > 0.0:
            raise ValueError(f"query_gain must be above 0, got {query_gain}")
        self.query_gain = query_gain
        self.scale_queries()

    @torch.jit.ignore
    def scale_queries(self) -> None:
        """Multiply the query projection, as it has been initialised, by `query_gain`."""
        with torch.no_grad():
            self.qkv.weight[: self.dim].mul_(self.query_gain)

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, grid_size: tuple[int, int], patch_valid: Tensor | None = None
    ) -> Tensor:
        mask = readable(patch_valid)[:, None, None, :] if patch_valid is not None else None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.dropout_p())
