"""Image Transformer: attention within blocks of the image.

Source: Parmar et al., "Image Transformer", ICML 2018 (arXiv 1802.05751), section 3.3, "2D Local Attention".

Shapes: B batch, H heads, N patches, E head width.
"""

import torch
from timm.models import register_notrace_module
from torch import Tensor

from ._blocks import attend_blocks, check_grid
from .base import SelfAttention

__all__ = ["LocalMixer"]


@register_notrace_module
class LocalMixer(SelfAttention):
    """Blocks of b x b patches attend to a memory block, themselves and a margin m. Cost O(N (b + 2m)^2 C).

    All queries of a block share its keys, so a patch at the edge of its block sees less on that side. Nothing passes
    further than the margin in one layer. Parameters: qkv and output projection, 4 C^2.

    NOTE: the paper generates the image in raster order, so its margin leaves out what lies below, and the block's own
    patches are masked to the earlier ones. Here the whole image is known: the margin is on all four sides.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        block_size: int = 8,
        margin: int = 4,
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            dim, num_heads, qkv_bias, proj_bias, attn_drop, proj_drop: See `SelfAttention`.
            block_size: b, side of a query block, in patches.
            margin: m, how far the memory block reaches beyond it on each side, in patches.

        Raises:
            ValueError: `dim` is not a multiple of `num_heads`, `block_size` is below 1 or `margin` below 0.
        """
        super().__init__(dim, num_heads, qkv_bias, proj_bias, attn_drop, proj_drop, device=device, dtype=dtype)
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        if margin < 0:
            raise ValueError(f"margin must be at least 0, got {margin}")
        self.block_size = block_size
        self.margin = margin

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, grid_size: tuple[int, int], patch_valid: Tensor | None = None
    ) -> Tensor:
        B, _, N, _ = q.shape
        check_grid(grid_size, N)
        if patch_valid is None:
            patch_valid = torch.ones(B, N, dtype=torch.bool, device=q.device)
        block, margin = (self.block_size, self.block_size), (self.margin, self.margin)
        drop = self.attn_drop if self.training else 0.0
        return attend_blocks(q, k, v, patch_valid, grid_size, block, margin, dropout_p=drop)
