"""Sparse Transformer: attention along the row and along the column of a patch.

Source: Child et al., "Generating Long Sequences with Sparse Transformers", 2019 (arXiv 1904.10509), section 4.3, the
strided pattern, and section 5.2, different patterns in different heads.

Shapes: B batch, H heads, N patches, E head width, R, S rows and columns of the patch grid.
"""

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor

from ..functional import readable
from ._blocks import check_grid
from .base import SelfAttention

__all__ = ["StridedMixer"]


def attend_rows(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, dropout_p: float) -> Tensor:
    """Every patch of a grid (B, H, R, S, E) attends to the valid ones, (B, R, S) bool, of its row."""
    B, H, R, S, E = q.shape
    q, k, v = q.transpose(1, 2).flatten(0, 1), k.transpose(1, 2).flatten(0, 1), v.transpose(1, 2).flatten(0, 1)
    mask = readable(valid.reshape(B * R, S))[:, None, None, :] if valid is not None else None
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)
    return y.view(B, R, H, S, E).transpose(1, 2)


@register_notrace_module
class StridedMixer(SelfAttention):
    """The first half of the heads attends along rows, the other along columns. Cost O(N (R + S) C).

    That is O(N sqrt(N) C) for grids of one aspect ratio. Two layers connect any two patches. Parameters: qkv and output
    projection, 4 C^2.

    NOTE: the stride is the width of the grid, as in the paper for images, so that every stride-th patch is the
    column. The paper's other pattern, the last `stride` patches in raster order, is the row up to the patch and the
    rest of the row above; without causality it is the whole row.
    NOTE: of the paper's three ways to combine the two patterns this is the third. The first alternates between layers,
    of which a mixer knows nothing; the second, a softmax over the union, needs keys of its own for every patch.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            dim, num_heads, qkv_bias, proj_bias, attn_drop, proj_drop: See `SelfAttention`. Of an odd number of heads,
                rows get one more.

        Raises:
            ValueError: `dim` is not a multiple of `num_heads`, or there are fewer than 2 heads.
        """
        super().__init__(dim, num_heads, qkv_bias, proj_bias, attn_drop, proj_drop, device=device, dtype=dtype)
        if num_heads < 2:
            raise ValueError(f"num_heads must be at least 2, for rows and for columns, got {num_heads}")

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, grid_size: tuple[int, int], patch_valid: Tensor | None = None
    ) -> Tensor:
        B, H, N, E = q.shape
        R, S = grid_size
        check_grid(grid_size, N)
        q, k, v = q.view(B, H, R, S, E), k.view(B, H, R, S, E), v.view(B, H, R, S, E)
        row_valid: Tensor | None = None
        column_valid: Tensor | None = None
        if patch_valid is not None:
            row_valid = patch_valid.view(B, R, S)
            column_valid = row_valid.transpose(1, 2)
        drop = self.attn_drop if self.training else 0.0
        n = (H + 1) // 2
        rows = attend_rows(q[:, :n], k[:, :n], v[:, :n], row_valid, drop)
        q, k, v = q[:, n:].transpose(2, 3), k[:, n:].transpose(2, 3), v[:, n:].transpose(2, 3)
        columns = attend_rows(q, k, v, column_valid, drop).transpose(2, 3)
        return torch.cat([rows, columns], dim=1).flatten(2, 3)
