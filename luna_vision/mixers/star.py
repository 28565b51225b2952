"""Star-Transformer: attention to the nearest neighbours and to one relay that reads all patches.

Source: Guo et al., "Star-Transformer", NAACL 2019 (arXiv 1902.09113), section 3.

Shapes: B batch, H heads, N patches, C width, E = C / H head width.
"""

from typing import Any

import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..functional import Projections, attend, pack_absorbed, split_heads, upcast
from ..layers.plain import is_plain
from ..utils.checks import check_at_least
from ._blocks import attend_blocks, band, check_grid, with_tokens
from .base import SelfAttention, readable_patches


@register_notrace_module
class StarMixer(SelfAttention):
    """Patches attend to themselves, their neighbours and a relay, which has read all patches.

    Cost O(N (2r + 1)^2 C) by the formula; gathered by blocks of 8 x 8, O(N (2r + 8)^2 C), which is faster for small r.
    Parameters: qkv, output projection and as much for the relay, 8 C^2, and its norm.

    NOTE: neighbours are at most r rows and columns away on the image's grid. The paper's lie on a ring.
    NOTE: the paper's relay passes from layer to layer and is read before it reads. A mixer sees patches only, so here
    the relay starts in every layer as the mean of the patches, reads (attention, ReLU, norm), and is then read.
    NOTE: the paper adds the input embedding to the context in every layer; that is left out. ReLU and norm of the
    patches are left to the block, which has a residual and norms.
    """

    # what a module runs when it is scripted is compiled for good
    __constants__ = ["absorb_read"]
    __jit_unused_properties__ = ["absorb_read"]

    def __init__(self, *args: Any, radius: int = 1, **common: Any) -> None:
        """
        Args:
            args, common: See `SelfAttention`.
            radius: r, how many rows and columns away a neighbour may be.

        Raises:
            ValueError: As in `SelfAttention`, or `radius` is below 1.
        """
        super().__init__(*args, **common)
        check_at_least(1, radius=radius)
        self.radius = radius
        self.block_size = 8  # blocks gather their neighbours together: the side changes the time, not the result
        bias = self.qkv.bias is not None
        self.relay_q = nn.Linear(self.dim, self.dim, bias=bias, **self.dd)
        self.relay_k = nn.Linear(self.dim, self.dim, bias=False, **self.dd)  # a bias would drop out of the softmax
        self.relay_v = nn.Linear(self.dim, self.dim, bias=bias, **self.dd)
        self.relay_proj = nn.Linear(self.dim, self.dim, bias=self.proj.bias is not None, **self.dd)
        self.relay_norm = nn.LayerNorm(self.dim, **self.dd)

    @property
    def absorb_read(self) -> bool:
        """Whether what the relay reads is computed in the absorbed form."""
        return is_plain(self.relay_q) and is_plain(self.relay_k) and is_plain(self.relay_v)

    def _relay(self, x: Tensor, valid: Tensor) -> Tensor:
        """The relay (B, 1, C) after it has read the patches and itself."""
        # the sum of many patches leaves the range of float16 and the precision of bfloat16
        total = upcast(x).masked_fill(~valid[:, :, None], 0.0).sum(dim=1, keepdim=True)
        relay = (total / valid.sum(dim=1)[:, None, None]).to(x.dtype)
        x, valid = with_tokens(relay, x, valid)
        if self.absorb_read:
            q, k, v = self.relay_q, self.relay_k, self.relay_v
            w = Projections(self.num_heads, q.weight, q.bias, k.weight, v.weight, v.bias)
            y = pack_absorbed(relay, x, w, valid, self.dropout_p())
        else:
            q = split_heads(self.relay_q(relay), self.num_heads)
            k, v = split_heads(self.relay_k(x), self.num_heads), split_heads(self.relay_v(x), self.num_heads)
            y = attend(q, k, v, valid, self.dropout_p())
        return self.relay_norm(F.relu(self.relay_proj(y)))

    def attend(self, x: Tensor, grid_size: tuple[int, int], patch_valid: Tensor | None) -> Tensor:
        check_grid(grid_size, x.shape[1])
        valid = readable_patches(x, patch_valid)
        _, k_relay, v_relay = split_heads(self.qkv(self._relay(x, valid)), 3 * self.num_heads).chunk(3, 1)
        q, k, v = split_heads(self.qkv(x), 3 * self.num_heads).chunk(3, 1)
        b, r = self.block_size, self.radius
        near = band(b, r, x.device)
        near = (near[:, None, :, None] & near[None, :, None, :]).flatten(2, 3).flatten(0, 1)  # in rows and in columns
        return attend_blocks(q, k, v, valid, grid_size, (b, b), (r, r), near, k_relay, v_relay, self.dropout_p())
