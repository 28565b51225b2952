"""Longformer: a sliding window over the patches in raster order, and global tokens.

Source: Beltagy et al., "Longformer: The Long-Document Transformer", 2020 (arXiv 2004.05150), section 3.1.

Shapes: B batch, H heads, N patches, C width, G global tokens, D dilation.
"""

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..functional import Projections, attend, check_valid, pack_absorbed, readable, split_heads
from ..layers.plain import is_plain
from ._blocks import attend_blocks, band
from .base import SelfAttention

__all__ = ["LongformerMixer"]


@register_notrace_module
class LongformerMixer(SelfAttention):
    """Patches attend to w / 2 others on either side in raster order, and to global tokens, which read all. Cost
    O(N (w + G) C).

    Parameters: qkv, output projection and the global tokens' own qkv, 7 C^2, and the G tokens.

    NOTE: in the paper, chosen tokens of the text are global, and what they read in one layer is read from them in the
    next. A mixer sees patches only, so the global tokens are learned, belong to the layer, and go first: they read all
    patches and themselves by their own projections, add it, through the common output projection, to what they are,
    and are then read by the patches, by the common projections.
    NOTE: one dilation for all heads; the paper dilates some heads of the upper layers.
    NOTE: invalid patches are taken out of the sequence, so that an image has the same neighbours in any batch.
    """

    # what a module runs when it is scripted is compiled for good
    __constants__ = ["absorb_read"]
    __jit_unused_properties__ = ["absorb_read"]

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        window_size: int = 256,
        dilation: int = 1,
        num_global_tokens: int = 1,
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            dim, num_heads, qkv_bias, proj_bias, attn_drop, proj_drop: See `SelfAttention`.
            window_size: w, patches in the window, half of them on either side; the patch itself comes on top.
            dilation: D, the step between the patches of a window.
            num_global_tokens: G.

        Raises:
            ValueError: `dim` is not a multiple of `num_heads`, `window_size` is odd or below 2, or another is below 1.
        """
        super().__init__(dim, num_heads, qkv_bias, proj_bias, attn_drop, proj_drop, device=device, dtype=dtype)
        if window_size < 2 or window_size % 2:
            raise ValueError(f"window_size must be an even number of at least 2, got {window_size}")
        for name, value in (("dilation", dilation), ("num_global_tokens", num_global_tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        dd = {"device": device, "dtype": dtype}
        self.reach = window_size // 2
        self.dilation = dilation
        self.global_tokens = nn.Parameter(torch.empty(1, num_global_tokens, dim, **dd))
        self.global_q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.global_k = nn.Linear(dim, dim, bias=False, **dd)  # a bias would drop out of the softmax
        self.global_v = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.init_weights()

    @property
    def absorb_read(self) -> bool:
        """Whether what the global tokens read is computed in the absorbed form."""
        return is_plain(self.global_q) and is_plain(self.global_k) and is_plain(self.global_v)

    def init_weights(self) -> None:
        """Start the global tokens at unit scale, at which they stay apart."""
        nn.init.normal_(self.global_tokens)

    def _read(self, x: Tensor, valid: Tensor, drop: float) -> Tensor:
        """The global tokens (B, G, C) when they have read the patches and themselves."""
        tokens = self.global_tokens.expand(x.shape[0], -1, -1)
        x = torch.cat([tokens, x], dim=1)
        valid = torch.cat([torch.ones_like(valid[:, :1]).expand(-1, tokens.shape[1]), valid], dim=1)
        if self.absorb_read:
            q, k, v = self.global_q, self.global_k, self.global_v
            w = Projections(self.num_heads, q.weight, q.bias, k.weight, v.weight, v.bias)
            y = pack_absorbed(tokens, x, w, valid, drop)
        else:
            q = split_heads(self.global_q(tokens), self.num_heads)
            k, v = split_heads(self.global_k(x), self.num_heads), split_heads(self.global_v(x), self.num_heads)
            y = attend(q, k, v, valid, drop)
        return tokens + self.proj(y)

    def forward(self, x: Tensor, grid_size: tuple[int, int], patch_valid: Tensor | None = None) -> Tensor:
        """See `SelfAttention.forward`."""
        B, N, C = x.shape
        drop = self.attn_drop if self.training else 0.0
        order: Tensor | None = None
        valid = torch.ones(B, N, dtype=torch.bool, device=x.device)
        if patch_valid is not None:
            check_valid(patch_valid, B, N, "patch_valid", values=False)
            x = x.masked_fill(~patch_valid[:, :, None], 0.0)
            valid, index = readable(patch_valid).sort(dim=1, descending=True, stable=True)
            order = index[:, :, None].expand(-1, -1, C)
            x = x.gather(1, order)
        rows = (N + self.dilation - 1) // self.dilation
        if self.dilation > 1:
            # windows run down the columns of a grid with D of them
            pad = rows * self.dilation - N
            x, valid = F.pad(x, (0, 0, 0, pad)), F.pad(valid, (0, pad))

        tokens = self._read(x, valid, drop)
        _, k_global, v_global = split_heads(self.qkv(tokens), 3 * self.num_heads).chunk(3, 1)
        q, k, v = split_heads(self.qkv(x), 3 * self.num_heads).chunk(3, 1)
        c = self.reach  # chunks of as many queries read three chunks of keys, two thirds of which are in the window
        grid, near = (rows, self.dilation), band(c, c, x.device)
        y = attend_blocks(q, k, v, valid, grid, (c, 1), (c, 0), near, k_global, v_global, drop)
        y = y.transpose(1, 2).flatten(2)
        if self.dilation > 1:
            # not y[:, :N], of which torch.export asks whether it is all of y: that depends on the image
            y = y.index_select(1, torch.arange(N, device=y.device))
        if order is not None:
            y = torch.zeros_like(y).scatter(1, order, y)
        return self.proj_drop(self.proj(y))
