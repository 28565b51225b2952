"""Star-Transformer: attention to the nearest neighbours and to one relay that reads all.

Source: Guo et al., "Star-Transformer", NAACL 2019 (arXiv 1902.09113), section 3.

Shapes: B batch, H heads, N patches, C width.
"""

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..functional import Projections, attend, check_valid, pack_absorbed, readable, split_heads
from ..layers.plain import is_plain
from ._blocks import attend_blocks, band, check_grid
from .base import SelfAttention

__all__ = ["StarMixer"]


@register_notrace_module
class StarMixer(SelfAttention):
    """Patches attend to themselves, their neighbours and a relay, which has read all of them. Cost O(N (2r + 1)^2 C)
    by the formula; gathered by blocks of 8 x 8, O(N (2r + 8)^2 C), which is faster for small r.

    Parameters: qkv, output projection and as much for the relay, 8 C^2, and its norm.

    NOTE: satellites lie on the grid of the image, not on a ring: the neighbours of the patch are those at most r
    rows and columns away, and the borders are not joined.
    NOTE: in the paper the relay starts as the mean of the input, goes on from layer to layer, and is read by
    satellites before it reads them. A mixer sees patches only, so that the relay starts in every layer, as the mean of
    the patches, reads first (itself and all patches, attention, ReLU, norm), and is then read.
    NOTE: the patch's input embedding, which the paper adds to the context in every layer, is left out: only the first
    layer sees it. ReLU and norm of the satellites are left to the block, which has a residual and norms.
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
        radius: int = 1,
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            dim, num_heads, qkv_bias, proj_bias, attn_drop, proj_drop: See `SelfAttention`.
            radius: r, how many rows and columns away a neighbour may be.

        Raises:
            ValueError: `dim` is not a multiple of `num_heads`, or `radius` is below 1.
        """
        super().__init__(dim, num_heads, qkv_bias, proj_bias, attn_drop, proj_drop, device=device, dtype=dtype)
        if radius < 1:
            raise ValueError(f"radius must be at least 1, got {radius}")
        dd = {"device": device, "dtype": dtype}
        self.radius = radius
        # Side of the blocks that gather their neighbours together; each patch alone would copy (2r + 1)^2 of them.
        # It changes the time, not the result.
        self.block_size = 8
        self.relay_q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.relay_k = nn.Linear(dim, dim, bias=False, **dd)  # a bias would drop out of the softmax
        self.relay_v = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.relay_proj = nn.Linear(dim, dim, bias=proj_bias, **dd)
        self.relay_norm = nn.LayerNorm(dim, **dd)

    @property
    def absorb_read(self) -> bool:
        """Whether what the relay reads is computed in the absorbed form."""
        return is_plain(self.relay_q) and is_plain(self.relay_k) and is_plain(self.relay_v)

    def _relay(self, x: Tensor, valid: Tensor, drop: float) -> Tensor:
        """The relay (B, 1, C) when it has read the patches and itself."""
        # sums of many patches leave the range of float16 and the precision of bfloat16
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        total = x.masked_fill(~valid[:, :, None], 0.0).sum(dim=1, keepdim=True, dtype=wide)
        relay = (total / valid.sum(dim=1)[:, None, None]).to(x.dtype)
        x = torch.cat([relay, x], dim=1)
        valid = torch.cat([torch.ones_like(valid[:, :1]), valid], dim=1)
        if self.absorb_read:
            q, k, v = self.relay_q, self.relay_k, self.relay_v
            w = Projections(self.num_heads, q.weight, q.bias, k.weight, v.weight, v.bias)
            y = pack_absorbed(relay, x, w, valid, drop)
        else:
            q = split_heads(self.relay_q(relay), self.num_heads)
            k, v = split_heads(self.relay_k(x), self.num_heads), split_heads(self.relay_v(x), self.num_heads)
            y = attend(q, k, v, valid, drop)
        return self.relay_norm(F.relu(self.relay_proj(y)))

    def forward(self, x: Tensor, grid_size: tuple[int, int], patch_valid: Tensor | None = None) -> Tensor:
        """See `SelfAttention.forward`."""
        B, N, C = x.shape
        check_grid(grid_size, N)
        drop = self.attn_drop if self.training else 0.0
        valid = torch.ones(B, N, dtype=torch.bool, device=x.device)
        if patch_valid is not None:
            check_valid(patch_valid, B, N, "patch_valid", values=False)
            valid = readable(patch_valid)
            x = x.masked_fill(~patch_valid[:, :, None], 0.0)

        relay = self._relay(x, valid, drop)
        _, k_relay, v_relay = split_heads(self.qkv(relay), 3 * self.num_heads).chunk(3, 1)
        q, k, v = split_heads(self.qkv(x), 3 * self.num_heads).chunk(3, 1)
        b, r = self.block_size, self.radius
        near = band(b, r, x.device)
        near = (near[:, None, :, None] & near[None, :, None, :]).flatten(2, 3).flatten(0, 1)  # in rows and in columns
        y = attend_blocks(q, k, v, valid, grid_size, (b, b), (r, r), near, k_relay, v_relay, drop)
        return self.proj_drop(self.proj(y.transpose(1, 2).reshape(B, N, C)))
