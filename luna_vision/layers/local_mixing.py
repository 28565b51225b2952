"""Local mixing over the patch grid.

Shapes: B batch, H', W' patch grid, N = H' * W' patches, C width.
"""

import torch
from timm.layers import trunc_normal_
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..functional import zero_invalid
from ..functional.kernels import mix_residual
from .plain import is_hooked, is_plain


@register_notrace_module
class LocalMixing(nn.Module):
    """Depthwise 3x3 convolution over the patch grid; Luna itself has no local mixing.

    Source: conditional position encoding, Chu et al. 2021 (arXiv 2102.10882), section 3.
    """

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def init_weights(self) -> None:
        """Start near zero, so that the block starts as plain Luna."""
        trunc_normal_(self.conv.weight, std=0.02)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor, grid_size: tuple[int, int] | None, patch_valid: Tensor | None = None) -> Tensor:
        """Map (B, N, C) to (B, N, C). Invalid patches count as zeros, like the border of the image.

        The caller adds a residual, and keeps the sum in the range of float16.

        Raises:
            ValueError: There is no grid, or it does not have N patches.
        """
        B, N, C = x.shape
        H, W = self._grid(grid_size, N)
        # a channels-last view, not a copy
        x = zero_invalid(x, patch_valid).reshape(B, H, W, C).permute(0, 3, 1, 2)
        if not torch.jit.is_scripting():
            if x.is_cuda and not torch.compiler.is_compiling():
                x = x.contiguous()  # for PyTorch's own kernel, which was measured, and not cuDNN's for channels last
        return self.conv(x).permute(0, 2, 3, 1).reshape(B, N, C)

    @torch.jit.ignore
    def add_to(self, x: Tensor, grid_size: tuple[int, int] | None, patch_valid: Tensor | None = None) -> Tensor:
        """x + `forward` of x, finite in float16, by a fused kernel. Arguments and errors as there."""
        H, W = self._grid(grid_size, x.shape[1])
        return mix_residual(x, self.conv.weight, self.conv.bias, patch_valid, H, W)

    @torch.jit.ignore
    def takes_kernel(self) -> bool:
        """Whether `add_to` does what `forward` would."""
        return not is_hooked(self) and is_plain(self.conv, nn.Conv2d)

    def _grid(self, grid_size: tuple[int, int] | None, N: int) -> tuple[int, int]:
        if grid_size is None:
            raise ValueError("local mixing needs grid_size, the (rows, columns) of the patch grid")
        H, W = grid_size
        if H * W != N:
            raise ValueError(f"grid_size {H} x {W} does not have the {N} patches of x")
        return H, W
