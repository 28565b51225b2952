"""Image Transformer: attention within blocks of the image.

Source: Parmar et al., "Image Transformer", ICML 2018 (arXiv 1802.05751), section 3.3, "2D Local Attention".

Shapes: B batch, H heads, N patches, E head width.
"""

from typing import Any

from timm.models import register_notrace_module
from torch import Tensor

from ..utils.checks import check_at_least
from ._blocks import attend_blocks, check_grid
from .base import SelfAttention, readable_patches


@register_notrace_module
class LocalMixer(SelfAttention):
    """Blocks of b x b patches attend to themselves and a margin m around them. Cost O(N (b + 2m)^2 C).

    All queries of a block share its keys, so a patch at the edge of its block sees less on that side. Parameters: qkv
    and output projection, 4 C^2.

    NOTE: the paper generates the image in raster order and masks what comes later. Here the whole image is known, so
    the margin is on all four sides and the block sees all of itself.
    """

    def __init__(self, *args: Any, block_size: int = 8, margin: int = 4, **common: Any) -> None:
        """
        Args:
            args, common: See `SelfAttention`.
            block_size: b, side of a block in patches.
            margin: m, how far the keys reach beyond the block on each side, in patches.

        Raises:
            ValueError: As in `SelfAttention`, or `block_size` is below 1 or `margin` below 0.
        """
        super().__init__(*args, **common)
        check_at_least(1, block_size=block_size)
        check_at_least(0, margin=margin)
        self.block_size = block_size
        self.margin = margin

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, grid_size: tuple[int, int], patch_valid: Tensor | None = None
    ) -> Tensor:
        check_grid(grid_size, q.shape[2])
        block, margin = (self.block_size, self.block_size), (self.margin, self.margin)
        valid = readable_patches(q, patch_valid)
        return attend_blocks(q, k, v, valid, grid_size, block, margin, dropout_p=self.dropout_p())
