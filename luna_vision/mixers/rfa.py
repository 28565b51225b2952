"""Random feature attention: softmax attention of unit vectors, estimated with sines and cosines.

    exp(-|s * (q - k)|^2 / 2) = E_w[cos(w.q) cos(w.k) + sin(w.q) sin(w.k)],   w = s * u,   u ~ N(0, I),   |q| = |k| = 1

which for s = 1 is exp(q.k) up to a constant. The scales s are learned.

Source: Peng et al., "Random Feature Attention", ICLR 2021 (arXiv 2103.02143), section 3.1.

Shapes: B batch, H heads, N patches, C width, E = C / H head width, F random vectors.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..functional import readable
from .base import WideAttention
from .linear import kernel_attend
from .random_features import RandomProjection


@register_notrace_module
class RfaMixer(WideAttention):
    """Random feature attention. Cost O(N C F).

    Parameters: qkv and output projection, 4 C^2; scales, C. The random vectors, F C numbers, are a buffer.
    NOTE: without the paper's gate (section 3.2), a recurrence along a sequence: patches have no such order.
    NOTE: sines can make a sum of weights zero or negative. The sum is taken as at least the standard error of one
        weight, 1 / sqrt(2 F) of the number of keys, where the authors' code has a constant.
    NOTE: the scales are kept as logarithms, so that weight decay draws them to 1 and not to 0.
    NOTE: there are no attention weights to drop.
    """

    def __init__(self, *args: Any, num_features: int = 64, redraw_interval: int | None = 1, **common: Any) -> None:
        """
        Args:
            args, common: See `SelfAttention`.
            num_features: F; each vector gives a sine and a cosine.
            redraw_interval: Mean number of training passes from one redraw to the next; 1 as in the paper, None for
                never.

        Raises:
            ValueError: As `SelfAttention` and `RandomProjection` do.
        """
        super().__init__(*args, **common)
        shape = (self.num_heads, num_features, self.dim // self.num_heads)
        self.features = RandomProjection(*shape, redraw_interval, **self.dd)
        self.log_scale = nn.Parameter(torch.empty(self.num_heads, self.dim // self.num_heads, **self.dd))
        self.init_weights()

    def init_weights(self) -> None:
        """Start as softmax of unit vectors."""
        nn.init.zeros_(self.log_scale)

    def _features(self, x: Tensor, w: Tensor) -> Tensor:
        angles = F.normalize(x, dim=-1, eps=1e-6) @ w
        return torch.cat([angles.sin(), angles.cos()], dim=-1) * w.shape[-1] ** -0.5

    def mix_wide(
        self, q: Tensor, k: Tensor, v: Tensor, grid_size: tuple[int, int], patch_valid: Tensor | None = None
    ) -> Tensor:
        w = (self.features() * self.log_scale.exp().unsqueeze(1)).to(q.dtype).transpose(-2, -1)
        phi_q, phi_k = self._features(q, w), self._features(k, w)
        valid = torch.ones_like(k[..., :1])
        if patch_valid is not None:
            invalid = ~readable(patch_valid)[:, None, :, None]
            phi_k, v, valid = (
                phi_k.masked_fill(invalid, 0.0),
                v.masked_fill(invalid, 0.0),
                valid.masked_fill(invalid, 0.0),
            )
        share = valid / valid.sum(dim=2, keepdim=True)
        return kernel_attend(phi_q, phi_k * share, v, floor=1.0 / math.sqrt(2 * w.shape[-1]))
