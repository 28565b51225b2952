"""Longformer: a sliding window over the patches in raster order, and global tokens.

Source: Beltagy et al., "Longformer: The Long-Document Transformer", 2020 (arXiv 2004.05150), section 3.1.

Shapes: B batch, H heads, N patches, C width, E = C / H head width, G global tokens.
"""

from typing import Any

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..functional import Projections, attend, pack_absorbed, split_heads
from ..layers.plain import is_plain
from ..utils.checks import check_at_least
from ._blocks import attend_blocks, band, with_tokens
from .base import SelfAttention, readable_patches


@register_notrace_module
class LongformerMixer(SelfAttention):
    """Patches attend to w / 2 others on either side in raster order, and to global tokens, which read all patches.

    Cost O(N (w + G) C). Parameters: qkv, output projection and the global tokens' own qkv, 7 C^2, and the G tokens.

    NOTE: in the paper, chosen tokens of the text are global. A mixer sees patches only, so here the global tokens are
    learned and belong to the layer. They go first: they read all patches and themselves by their own projections, add
    what they read, through the common output projection, to themselves, and the patches then read them by the common
    projections.
    NOTE: no dilation. The paper dilates some heads of the upper layers.
    NOTE: invalid patches are taken out of the sequence, so an image has the same neighbours in any batch.
    """

    # what a module runs when it is scripted is compiled for good
    __constants__ = ["absorb_read"]
    __jit_unused_properties__ = ["absorb_read"]

    def __init__(self, *args: Any, window_size: int = 256, num_global_tokens: int = 1, **common: Any) -> None:
        """
        Args:
            args, common: See `SelfAttention`.
            window_size: w, patches in the window, half of them on either side; the patch itself comes on top.
            num_global_tokens: G.

        Raises:
            ValueError: As in `SelfAttention`, `window_size` is odd or below 2, or there is no global token.
        """
        super().__init__(*args, **common)
        if window_size < 2 or window_size % 2:
            raise ValueError(f"window_size must be an even number of at least 2, got {window_size}")
        check_at_least(1, num_global_tokens=num_global_tokens)
        self.reach = window_size // 2
        self.global_tokens = nn.Parameter(torch.empty(1, num_global_tokens, self.dim, **self.dd))
        bias = self.qkv.bias is not None
        self.global_q = nn.Linear(self.dim, self.dim, bias=bias, **self.dd)
        self.global_k = nn.Linear(self.dim, self.dim, bias=False, **self.dd)  # a bias would drop out of the softmax
        self.global_v = nn.Linear(self.dim, self.dim, bias=bias, **self.dd)
        self.init_weights()

    @property
    def absorb_read(self) -> bool:
        """Whether what the global tokens read is computed in the absorbed form."""
        return is_plain(self.global_q) and is_plain(self.global_k) and is_plain(self.global_v)

    def init_weights(self) -> None:
        """Start the global tokens at unit scale, at which they stay apart."""
        nn.init.normal_(self.global_tokens)

    def _read(self, x: Tensor, valid: Tensor) -> Tensor:
        """The global tokens (B, G, C) after they have read the patches and themselves."""
        tokens = self.global_tokens.expand(x.shape[0], -1, -1)
        x, valid = with_tokens(tokens, x, valid)
        if self.absorb_read:
            q, k, v = self.global_q, self.global_k, self.global_v
            w = Projections(self.num_heads, q.weight, q.bias, k.weight, v.weight, v.bias)
            y = pack_absorbed(tokens, x, w, valid, self.dropout_p())
        else:
            q = split_heads(self.global_q(tokens), self.num_heads)
            k, v = split_heads(self.global_k(x), self.num_heads), split_heads(self.global_v(x), self.num_heads)
            y = attend(q, k, v, valid, self.dropout_p())
        return tokens + self.proj(y)

    def attend(self, x: Tensor, grid_size: tuple[int, int], patch_valid: Tensor | None) -> Tensor:
        B, N, C = x.shape
        valid = readable_patches(x, patch_valid)
        order: Tensor | None = None
        if patch_valid is not None:
            valid, index = valid.sort(dim=1, descending=True, stable=True)
            order = index[:, :, None].expand(-1, -1, C)
            x = x.gather(1, order)
        _, k_global, v_global = split_heads(self.qkv(self._read(x, valid)), 3 * self.num_heads).chunk(3, 1)
        q, k, v = split_heads(self.qkv(x), 3 * self.num_heads).chunk(3, 1)
        c = self.reach  # chunks of as many queries read three chunks of keys, two thirds of which are in the window
        y = attend_blocks(
            q, k, v, valid, (N, 1), (c, 1), (c, 0), band(c, c, x.device), k_global, v_global, self.dropout_p()
        )
        if order is not None:
            order = order.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            y = torch.zeros_like(y).scatter(2, order, y)
        return y
