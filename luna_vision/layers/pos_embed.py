"""Positions for a patch grid of any size, with nothing in the state dict that depends on the size.

A position is the centre of a patch in the coordinates of its image, -1 to 1 from edge to edge. In a batch of images of
different sizes, these are the edges of each image's own valid patches.

Shapes: B batch, H', W' patch grid, N = H' * W' patches, C width.
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..functional import check_valid


def _axis_coords(used: Tensor, dtype: torch.dtype) -> Tensor:
    """Centres, -1 to 1 over the used cells of an axis, for a mask (B, length) of the cells in use."""
    index = (used.cumsum(dim=1) - 1).clamp(min=0).to(dtype)
    count = used.sum(dim=1, keepdim=True).clamp(min=1)
    return (index + 0.5) / count * 2.0 - 1.0


def axis_centres(length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Centres of all cells of an axis (length), -1 to 1 from edge to edge."""
    return (torch.arange(length, device=device, dtype=dtype) + 0.5) / length * 2.0 - 1.0


def grid_coords(grid_size: tuple[int, int], x: Tensor, patch_valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Row and column coordinates of the patches.

    Args:
        grid_size: H', W'.
        x: What they are for: they are on its device, and in float32, or float64 as it is.
        patch_valid: (B, N) bool, or None if every patch is valid.

    Returns:
        rows (H') and columns (W'), or (B, H') and (B, W') with a mask, -1 to 1 from edge to edge of each image's own
        valid grid.
    """
    H, W = grid_size
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if patch_valid is None:
        return axis_centres(H, x.device, dtype), axis_centres(W, x.device, dtype)
    B = patch_valid.shape[0]
    check_valid(patch_valid, B, H * W, "patch_valid", values=False)
    grid = patch_valid.reshape(B, H, W)
    return _axis_coords(grid.any(dim=2), dtype), _axis_coords(grid.any(dim=1), dtype)


@register_notrace_module  # sizes and masks are branches that fx cannot trace
class FourierPosEmbed(nn.Module):
    """Sines and cosines of the coordinates, projected to the width and added to the patches.

    Source: Fourier features as in Perceiver (Jaegle et al. 2021, arXiv 2103.03206, section 3.2).
    NOTE: rows and columns are embedded apart and summed, so the cost is H' + W' vectors rather than H' * W'.
    """

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.rows = nn.Linear(16, dim, bias=False, device=device, dtype=dtype)
        self.columns = nn.Linear(16, dim, bias=False, device=device, dtype=dtype)
        self.init_weights()

    def init_weights(self) -> None:
        for module in (self.rows, self.columns):
            nn.init.normal_(module.weight, std=0.2 * module.in_features**-0.5)

    def _features(self, coords: Tensor) -> Tensor:
        # computed here: `model.half()` would round a buffer
        k = torch.arange(8, device=coords.device, dtype=coords.dtype)
        # eight, spaced geometrically from 1/2 to 8 cycles an image side; a grid of 14 can show 7
        frequencies = math.pi * torch.exp2(k * (4 / 7) - 1.0)
        angles = coords.unsqueeze(-1) * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def forward(self, x: Tensor, patch_valid: Tensor | None = None) -> Tensor:
        """Add the positions to patches (B, H', W', C)."""
        rows, columns = grid_coords((x.shape[1], x.shape[2]), x, patch_valid)
        return self.add_at(x, rows, columns)

    def add_at(self, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """`forward` for patches that are part of an image, given the coordinates of their rows and columns."""
        y = self.rows(self._features(rows).to(x.dtype)).unsqueeze(-2)
        y = y + self.columns(self._features(columns).to(x.dtype)).unsqueeze(-3)
        return x + y.to(x.dtype)


@register_notrace_module
class LearnedPosEmbed(nn.Module):
    """A learned embedding on a reference grid of 14 x 14 cells, sampled at the patches and added to them."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.ref_grid = nn.Parameter(torch.empty(1, dim, 14, 14, device=device, dtype=dtype))
        self.init_weights()

    def init_weights(self) -> None:
        trunc_normal_(self.ref_grid, std=0.02)

    def forward(self, x: Tensor, patch_valid: Tensor | None = None) -> Tensor:
        """Add the positions to patches (B, H', W', C)."""
        rows, columns = grid_coords((x.shape[1], x.shape[2]), x, patch_valid)
        return self.add_at(x, rows, columns)

    def add_at(self, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """`forward` for patches that are part of an image, given the coordinates of their rows and columns."""
        if rows.dim() == 1:
            rows, columns = rows.unsqueeze(0), columns.unsqueeze(0)
        x_coords = columns.unsqueeze(1).expand(-1, rows.shape[1], -1)
        y_coords = rows.unsqueeze(2).expand(-1, -1, columns.shape[1])
        grid = torch.stack([x_coords, y_coords], dim=-1)
        ref = self.ref_grid.expand(grid.shape[0], -1, -1, -1)
        y = F.grid_sample(ref, grid.to(ref.dtype), mode="bilinear", padding_mode="border", align_corners=False)
        return x + y.permute(0, 2, 3, 1).to(x.dtype)


# the values of `pos_embed`; "none" adds nothing
POS_EMBEDS = {"fourier": FourierPosEmbed, "learn": LearnedPosEmbed, "none": None}
