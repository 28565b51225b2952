"""Performer (FAVOR+): softmax attention estimated with positive orthogonal random features.

    exp(q.k / sqrt(E)) = E_w[phi_w(q) phi_w(k)],   phi_w(x) = exp(w.x' - |x'|^2 / 2),   x' = x / E^(1/4),   w ~ N(0, I)

Source: Choromanski et al., "Rethinking Attention with Performers", ICLR 2021 (arXiv 2009.14794), sections 2.3 and 2.4.

Computed in logarithms. With a = w.q' and b = w.k' - |k'|^2 / 2, and with log z_f = logsumexp over the keys of b_f,

    y_i = sum_f softmax_f(a_if + log z_f) sum_j softmax_j(b_jf) v_j

which is a pack into F slots and an unpack from them, as Luna's, but with slots that are drawn and not learned.

Shapes: B batch, H heads, N patches, C width, E = C / H head width, F random features.
"""

from typing import Any

from timm.models import register_notrace_module
from torch import Tensor

from ..functional import readable
from .base import WideAttention
from .random_features import RandomProjection


@register_notrace_module
class PerformerMixer(WideAttention):
    """FAVOR+ attention. Cost O(N C F).

    Parameters: qkv and output projection, 4 C^2; the random vectors, F C numbers, are a buffer.
    NOTE: the authors' code subtracts maxima before the exponentials and adds a small constant to the features. The
        softmaxes above need no constant, and never divide by less than 1.
    NOTE: there are no attention weights to drop.
    """

    def __init__(self, *args: Any, num_features: int = 256, redraw_interval: int | None = 1000, **common: Any) -> None:
        """
        Args:
            args, common: See `SelfAttention`.
            num_features: F.
            redraw_interval: Mean number of training passes from one redraw to the next; None for never.

        Raises:
            ValueError: As `SelfAttention` and `RandomProjection` do.
        """
        super().__init__(*args, **common)
        shape = (self.num_heads, num_features, self.dim // self.num_heads)
        self.features = RandomProjection(*shape, redraw_interval, orthogonal=True, **self.dd)

    def mix_wide(
        self, q: Tensor, k: Tensor, v: Tensor, grid_size: tuple[int, int], patch_valid: Tensor | None = None
    ) -> Tensor:
        scale = q.shape[-1] ** -0.25
        w = self.features().transpose(-2, -1)
        q, k = q * scale, k * scale
        a = q @ w
        b = k @ w - 0.5 * k.square().sum(dim=-1, keepdim=True)
        if patch_valid is not None:
            invalid = ~readable(patch_valid)[:, None, :, None]
            b, v = b.masked_fill(invalid, float("-inf")), v.masked_fill(invalid, 0.0)
        log_z = b.logsumexp(dim=2, keepdim=True)
        packed = (b - log_z).exp().transpose(-2, -1) @ v  # (B, H, F, E)
        return (a + log_z).softmax(dim=-1) @ packed
