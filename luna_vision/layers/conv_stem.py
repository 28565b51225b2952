"""A convolutional stem in the place of the patch embedding.

Shapes: B batch, C width, H', W' patch grid.
"""

import math
from functools import partial

from timm.layers import LayerNorm2d, to_2tuple
from timm.models import register_notrace_module
from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor, nn


@register_notrace_module
class ConvPatchEmbed(nn.Module):
    """3x3 convolutions of stride 2 down to the patch grid, with norm and GELU between them.

    Source: Xiao et al., "Early Convolutions Help Transformers See Better", NeurIPS 2021 (arXiv 2106.14881), section 4.
    NOTE: LayerNorm instead of BatchNorm, so that nothing depends on the batch; no 1x1 convolution at the end.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            img_size: Image size that the model is meant for, in pixels; any size runs.
            patch_size: Side of a patch, pixels: a power of two.
            in_chans: Image channels.
            embed_dim: Width C.

        Raises:
            ValueError: The patch is not a square whose side is a power of two.
        """
        super().__init__()
        self.patch_size = to_2tuple(patch_size)
        self.img_size = to_2tuple(img_size)
        depth = int(math.log2(self.patch_size[0]))
        if self.patch_size != (2**depth, 2**depth) or depth < 1:
            raise ValueError(f"a conv stem needs a square patch of 2, 4, 8, ... pixels, got {self.patch_size}")
        norm = partial(LayerNorm2d, eps=1e-6)
        self.stem = ConvStem(
            in_chans,
            depth,
            embed_dim,
            stride=(2,) * depth,
            norm_layer=norm,
            act_layer=nn.GELU,
            device=device,
            dtype=dtype,
        )

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels of a patch's side."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, patch_size: int | None = None) -> None:
        """Change the image size that the model is meant for; another patch size is a ValueError."""
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise ValueError(f"a conv stem cannot change its patch size, {self.patch_size}, to {patch_size}")
        if img_size is not None:
            self.img_size = to_2tuple(img_size)

    def forward(self, x: Tensor, patch_valid: Tensor | None = None) -> Tensor:
        """Map images (B, channels, height, width) to (B, H', W', C).

        Pixels of invalid patches (B, N) are zero before every convolution, like those beyond the border.
        """
        B, _, height, width = x.shape
        rows, columns = height // self.patch_size[0], width // self.patch_size[1]
        side = self.patch_size[0]
        for conv in self.stem:
            if patch_valid is not None:
                grid = patch_valid.reshape(B, 1, rows, 1, columns, 1).expand(-1, -1, -1, side, -1, side)
                x = x.masked_fill(~grid.reshape(B, 1, rows * side, columns * side), 0.0)
            x = conv(x)
            side = side // 2
        return x.permute(0, 2, 3, 1)
