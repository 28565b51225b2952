"""Linformer: softmax attention to K projections of all keys and values, E k and F v with E, F in R^(K x N).

Source: Wang et al., "Linformer: Self-Attention with Linear Complexity", 2020 (arXiv 2006.04768), section 4.

Shapes: B batch, H heads, N patches on a grid H' x W', C width, D = C / H head width, R side of the reference grid,
K projections.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..functional import readable, upcast
from ..utils.checks import check_at_least
from .base import WideAttention


def _used(used: Tensor) -> tuple[Tensor, Tensor]:
    """Place of each row (or column) among those in use, (B, length), and their number, (B), of a mask (B, length)."""
    return (used.cumsum(dim=1) - 1).clamp(min=0), used.sum(dim=1).clamp(min=1)


def _overlap(index: Tensor, count: Tensor, cells: int, dtype: torch.dtype) -> Tensor:
    """Share of each of R cells that each row (or column) of a grid covers, (B, R, length), of the result of `_used`.

    Rows divide the image evenly, and so do cells; shares in a cell sum to 1.
    """
    index, count = index[:, None, :], count[:, None, None]
    cell = torch.arange(cells, device=index.device)[:, None]
    # in whole numbers, with an edge of 1 / (R count): then a row that just touches a cell covers nothing of it
    start = torch.maximum(index * cells, cell * count)
    end = torch.minimum((index + 1) * cells, (cell + 1) * count)
    return (end - start).clamp(min=0).to(dtype) / count


def _pool(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Sum patches (B, H, H', W', D) into cells (B, H, R * R, D) by the shares (B, R, H') and (B, R, W')."""
    B, heads, height, width, D = x.shape
    # heads beside D and by way of one dimension, as torch.export can follow it, a single head included
    x = x.movedim(1, 3).flatten(1).unflatten(1, (height, width * heads * D))
    x = columns[:, None] @ (rows @ x).view(B, rows.shape[1], width, heads * D)
    return x.flatten(1, 2).unflatten(2, (heads, D)).transpose(1, 2)


@register_notrace_module
class LinformerMixer(WideAttention):
    """Linformer, for grids of any size. Cost O(N C (K + R)), and O(K R^2 C) an image.

    Parameters: qkv and output projection, 4 C^2; projections, 2 K R^2, the same for all heads.
    NOTE: the paper's E has a column for each of a fixed number of tokens. Here it has one for each cell of a reference
        grid, and is resampled to the grid at hand by area, which is linear: (E A) x = E (A x). So the patches are
        averaged into the cells, each by the area that it covers of the image's own valid grid, and no K x N matrix is
        formed. On a grid of the reference size the two are the paper's.
    NOTE: invalid patches are left out of the averages. Where a cell has no valid patch, each projection is scaled up to
        the L1 norm that it has over all cells. A projection that has only such cells is not read.
    """

    def __init__(self, *args: Any, proj_len: int = 64, ref_size: int = 14, **common: Any) -> None:
        """
        Args:
            args, common: See `SelfAttention`.
            proj_len: K.
            ref_size: R, the side of the reference grid; 14 is that of an image of 224 pixels in patches of 16.

        Raises:
            ValueError: As `SelfAttention` does, or a size below 1.
        """
        super().__init__(*args, **common)
        check_at_least(1, proj_len=proj_len, ref_size=ref_size)
        self.ref_size = ref_size
        self.proj_k = nn.Parameter(torch.empty(proj_len, ref_size**2, **self.dd))
        self.proj_v = nn.Parameter(torch.empty(proj_len, ref_size**2, **self.dd))
        self.init_weights()

    def init_weights(self) -> None:
        """A scale that keeps that of keys and values."""
        nn.init.normal_(self.proj_k, std=1.0 / self.ref_size)
        nn.init.normal_(self.proj_v, std=1.0 / self.ref_size)

    def _project(
        self, k: Tensor, v: Tensor, grid_size: tuple[int, int], patch_valid: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """K projections of keys and values (B, H, N, D), each (B, H, K, D), and which may be read, (B, K)."""
        height, width = grid_size
        w_k, w_v = upcast(self.proj_k), upcast(self.proj_v)
        k, v = k.unflatten(2, (height, width)), v.unflatten(2, (height, width))
        if patch_valid is None:  # a sum along an axis of unknown length would keep torch.export from proving its shape
            row, column = torch.arange(height, device=k.device)[None], torch.arange(width, device=k.device)[None]
            rows = _overlap(row, torch.full_like(row[:, 0], height), self.ref_size, k.dtype)
            columns = _overlap(column, torch.full_like(column[:, 0], width), self.ref_size, k.dtype)
            return w_k @ _pool(k, rows, columns), w_v @ _pool(v, rows, columns), None

        grid = readable(patch_valid).view(-1, height, width)
        row, count = _used(grid.any(dim=2))
        rows = _overlap(row, count, self.ref_size, k.dtype)
        column, count = _used(grid.any(dim=1))
        columns = _overlap(column, count, self.ref_size, k.dtype)
        grid = grid[:, None, :, :, None]
        area = _pool(grid.to(k.dtype), rows, columns)  # of the valid patches in each cell, (B, 1, R * R, 1)
        filled = (area > 0).to(k.dtype)
        area = area + (1 - filled)
        k = _pool(k.masked_fill(~grid, 0.0), rows, columns) / area
        v = _pool(v.masked_fill(~grid, 0.0), rows, columns) / area
        norm_k, norm_v = w_k.abs() @ filled, w_v.abs() @ filled  # over the filled cells, (B, 1, K, 1)
        k = (w_k @ k) * (w_k.abs().sum(dim=1, keepdim=True) / norm_k.clamp(min=1e-9))
        v = (w_v @ v) * (w_v.abs().sum(dim=1, keepdim=True) / norm_v.clamp(min=1e-9))
        return k, v, readable((norm_k > 0).flatten(1))

    def mix_wide(
        self, q: Tensor, k: Tensor, v: Tensor, grid_size: tuple[int, int], patch_valid: Tensor | None = None
    ) -> Tensor:
        k, v, covered = self._project(k, v, grid_size, patch_valid)
        mask = covered[:, None, None, :] if covered is not None else None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.dropout_p())
