"""Pixels and patches before the first block: whole patches, blank ones, hidden ones.

Shapes: B batch, N patches, C width.
"""

import timm.layers
import torch
import torch.nn.functional as F
from timm.models import register_notrace_function, register_notrace_module
from torch import Tensor, nn

from ..functional import autocasts, check_valid
from .plain import is_plain


@register_notrace_function
def check_image(x: Tensor, in_chans: int) -> Tensor:
    """Return `x`; a ValueError unless it is a batch of images (B, in_chans, height, width) with at least a pixel."""
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(f"images must have shape (batch, {in_chans}, height, width), got {list(x.shape)}")
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"images must have at least one pixel a side, got {x.shape[2]} x {x.shape[3]}")
    return x


@register_notrace_function
def pad_to_patches(x: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Pad images (B, C, height, width) with zeros, below and to the right, to whole patches.

    NOTE: like `dynamic_img_pad` of timm's PatchEmbed, but without a copy where there is nothing to pad, and with bounds
    that torch.export can prove.
    """
    rows, columns = patch_size
    pad_h = (x.shape[2] + rows - 1) // rows * rows - x.shape[2]
    pad_w = (x.shape[3] + columns - 1) // columns * columns - x.shape[3]
    return F.pad(x, (0, pad_w, 0, pad_h))


def project_patches(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution of images (B, channels, height, width) of whole patches, whose kernel (C, channels, rows, columns)
    is a patch and whose stride is its size, as a matrix product: (B, H', W', C), contiguous."""
    B, channels, height, width = x.shape
    C, _, rows, columns = weight.shape
    x = x.reshape(B, channels, height // rows, rows, width // columns, columns).permute(0, 2, 4, 1, 3, 5)
    return F.linear(x.reshape(B, height // rows, width // columns, channels * rows * columns), weight.flatten(1), bias)


class PatchEmbed(timm.layers.PatchEmbed):
    """timm's, on images of whole patches, whatever their size.

    timm's own `forward` checks the size, and its message has the size in it: a compiler then makes a graph for each.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, channels, height, width) to (B, H', W', C)."""
        if not torch.jit.is_scripting():
            if self._is_product(x):
                return self.norm(project_patches(x, self.proj.weight, self.proj.bias))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))

    @torch.jit.ignore
    def _is_product(self, x: Tensor) -> bool:
        """Whether to run as a matrix product: a GPU's convolution takes over 30 times as long, and leaves the patches
        channel by channel, which all norms after it would copy."""
        if isinstance(x, torch.fx.Proxy) or torch.compiler.is_exporting():
            return False
        return x.is_cuda and is_plain(self.proj, nn.Conv2d)


@register_notrace_function
def blank_invalid(x: Tensor, patch_valid: Tensor | None, patch_size: tuple[int, int], values: bool = True) -> Tensor:
    """Set the pixels of invalid patches to zero, in images (B, C, height, width) of whole patches.

    Their weight in the attention is zero, but zero times NaN, which uninitialised memory may hold, is NaN, also in the
    gradient of the patch embedding. A model checks the values of a mask here, once, unless `values` is False: a tile of
    an image may have no valid patch.

    Raises:
        ValueError: `patch_valid` is not (B, N) bool, or (eager mode, a mask on the CPU only) an image has no valid
            patch.
    """
    if patch_valid is None:
        return x
    B, _, height, width = x.shape
    rows, columns = height // patch_size[0], width // patch_size[1]
    check_valid(patch_valid, B, rows * columns, "patch_valid", values)
    grid = patch_valid.reshape(B, 1, rows, 1, columns, 1)
    pixels = grid.expand(-1, -1, -1, patch_size[0], -1, patch_size[1]).reshape(B, 1, height, width)
    return x.masked_fill(~pixels, 0.0)


@register_notrace_function
def residual_stream(x: Tensor) -> Tensor:
    """Patches in the type of the residual stream: float32 under autocast, as in timm's ViT."""
    if not torch.jit.is_scripting():
        if autocasts(x) and x.dtype != torch.float64:
            return x.float()
    return x


@register_notrace_module
class PatchMaskDrop(nn.Module):
    """Hide a random share of the patches in training: their content is zero, the pack and local mixing skip them.

    NOTE: timm's PatchDropout shortens the sequence. Here the grid has to stay whole for local mixing, so no work is
        saved.
    """

    def __init__(self, prob: float) -> None:
        """
        Args:
            prob: Share of patches to hide, in [0, 1).
        """
        super().__init__()
        self.prob = prob

    def forward(self, x: Tensor, patch_valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Map (B, N, C) to itself with hidden patches at zero, and the mask (B, N) of those still to be read."""
        if not self.training or self.prob == 0.0:
            return x, patch_valid
        score = torch.rand(x.shape[0], x.shape[1], device=x.device)
        if patch_valid is not None:
            score = score.masked_fill(~patch_valid, -1.0)
        # the patch with the highest score always stays, so that no row is left empty
        keep = (score >= self.prob) | (score == score.amax(dim=1, keepdim=True))
        return x * keep[:, :, None].to(x.dtype), keep
