"""Sparse Transformer: attention along the row and along the column of a patch.

Source: Child et al., "Generating Long Sequences with Sparse Transformers", 2019 (arXiv 1904.10509), section 4.3, the
strided pattern, and section 5.2, different patterns in different heads.

Shapes: B batch, H heads, N patches, E head width, R, S rows and columns of the patch grid.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor

from ..functional import readable
from ._blocks import check_grid
from .base import SelfAttention


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

    That is O(N sqrt(N) C) for grids of one aspect ratio. Two layers connect any two patches. Of an odd number of heads,
    rows get one more. Parameters: qkv and output projection, 4 C^2.

    NOTE: the stride is the width of the grid, as in the paper for images, so every stride-th patch is the column. The
    paper's other pattern, the last `stride` patches in raster order, is the whole row without causality.
    NOTE: the paper combines the two patterns in three ways; this is the third. The first alternates between layers, of
    which a mixer knows nothing. The second, a softmax over the union, needs separate keys for every patch.
    """

    def __init__(self, dim: int, num_heads: int = 8, *args: Any, **common: Any) -> None:
        """Arguments as in `SelfAttention`; a ValueError where there are fewer than 2 heads."""
        super().__init__(dim, num_heads, *args, **common)
        if num_heads < 2:
            raise ValueError(f"num_heads must be at least 2, for rows and for columns, got {num_heads}")

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, grid_size: tuple[int, int], patch_valid: Tensor | None = None
    ) -> Tensor:
        check_grid(grid_size, q.shape[2])
        q, k, v = q.unflatten(2, grid_size), k.unflatten(2, grid_size), v.unflatten(2, grid_size)
        valid = patch_valid.unflatten(1, grid_size) if patch_valid is not None else None
        drop, n = self.dropout_p(), (self.num_heads + 1) // 2
        rows = attend_rows(q[:, :n], k[:, :n], v[:, :n], valid, drop)
        q, k, v = q[:, n:].transpose(2, 3), k[:, n:].transpose(2, 3), v[:, n:].transpose(2, 3)
        valid = valid.transpose(1, 2) if valid is not None else None
        columns = attend_rows(q, k, v, valid, drop).transpose(2, 3)
        return torch.cat([rows, columns], dim=1).flatten(2, 3)
