"""Random feature attention: softmax attention of unit vectors, estimated with sines and cosines.

    exp(-|s * (q - k)|^2 / 2) = E_w[cos(w.q) cos(w.k) + sin(w.q) sin(w.k)],   w = s * u,   u ~ N(0, I),   |q| = |k| = 1

which for s = 1 is exp(q.k) up to a constant. The scales s are learned.

Source: Peng et al., "Random Feature Attention", ICLR 2021 (arXiv 2103.02143), sections 3.1 and 3.2.

Shapes: B batch, H heads, N patches, C width, E = C / H head width, F random vectors.
"""

import math

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..functional import readable
from .linear import kernel_attend
from .random_features import RandomProjection
from .wide import WideAttention

__all__ = ["RfaMixer"]


@register_notrace_module
class RfaMixer(WideAttention):
    """Random feature attention. Cost O(N C F).

    Parameters: qkv and output projection, 4 C^2; scales, C; the gate, C + H. The random vectors, F C numbers, are a
    buffer.
    NOTE: the paper's gate is a recurrence along a sequence, S_t = g_t S_(t-1) + (1 - g_t) phi(k_t) v_t^T. Patches have
        no such order. What can stay of it is that a patch decides how much it writes: a gate weighs its key in both
        sums. It is computed from the head's key, not from the whole patch.
    NOTE: sines can make a sum of weights zero or negative. Sums are not taken smaller than the standard error of one
        weight, 1 / sqrt(2 F) of the number of keys, where the authors' code has a constant.
    NOTE: the scales are kept as logarithms, so that weight decay draws them to 1 and not to 0.
    NOTE: there are no attention weights to drop: `attn_drop` does nothing.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        num_features: int = 64,
        redraw_interval: int | None = 1,
        gate: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            dim, num_heads, qkv_bias, proj_bias, attn_drop, proj_drop: See `SelfAttention`.
            num_features: F; each vector gives a sine and a cosine.
            redraw_interval: Mean number of training passes from one redraw to the next, each pass as in the paper if 1;
                None for never.
            gate: Let each patch weigh what it writes.

        Raises:
            ValueError: As `SelfAttention` and `RandomProjection` do.
        """
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, qkv_bias, proj_bias, attn_drop, proj_drop, **dd)
        head_dim = dim // num_heads
        self.features = RandomProjection(num_heads, num_features, head_dim, redraw_interval, **dd)
        self.log_scale = nn.Parameter(torch.empty(num_heads, head_dim, **dd))
        self.gate_weight = nn.Parameter(torch.empty(num_heads, head_dim, **dd)) if gate else None
        self.gate_bias = nn.Parameter(torch.empty(num_heads, **dd)) if gate else None
        self.init_weights()

    def init_weights(self) -> None:
        """Start as softmax of unit vectors, and with a gate that is nearly the same everywhere."""
        nn.init.zeros_(self.log_scale)
        if self.gate_weight is not None:
            nn.init.normal_(self.gate_weight, std=0.02)
            nn.init.zeros_(self.gate_bias)

    def _log_gate(self, k: Tensor) -> Tensor:
        """Logarithm of each key's weight, (B, H, N, 1), of keys (B, H, N, E)."""
        if self.gate_weight is None or self.gate_bias is None:
            return torch.zeros_like(k[..., :1])
        score = k @ self.gate_weight.to(k.dtype).unsqueeze(-1) + self.gate_bias.to(k.dtype)[:, None, None]
        return F.logsigmoid(score)

    def _features(self, x: Tensor, w: Tensor) -> Tensor:
        angles = F.normalize(x, dim=-1, eps=1e-6) @ w
        return torch.cat([angles.sin(), angles.cos()], dim=-1) * w.shape[-1] ** -0.5

    def mix_wide(
        self, q: Tensor, k: Tensor, v: Tensor, grid_size: tuple[int, int], patch_valid: Tensor | None = None
    ) -> Tensor:
        w = (self.features() * self.log_scale.exp().unsqueeze(1)).to(q.dtype).transpose(-2, -1)
        log_gate = self._log_gate(k)
        phi_q, phi_k = self._features(q, w), self._features(k, w)
        if patch_valid is not None:
            invalid = ~readable(patch_valid)[:, None, :, None]
            log_gate = log_gate.masked_fill(invalid, float("-inf"))
            phi_k, v = phi_k.masked_fill(invalid, 0.0), v.masked_fill(invalid, 0.0)
        # a softmax over the keys: weights that sum to 1, however small all the gates are
        return kernel_attend(phi_q, phi_k * log_gate.softmax(dim=2), v, floor=1.0 / math.sqrt(2 * w.shape[-1]))
