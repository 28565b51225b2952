"""Linear attention: weights that are products of features, so that keys and values are summed once for all queries.

    y_i = phi(q_i)^T S / phi(q_i)^T z,   S = sum_j phi(k_j) v_j^T,   z = sum_j phi(k_j),   phi(x) = elu(x) + 1

Source: Katharopoulos et al., "Transformers are RNNs", ICML 2020 (arXiv 2006.16236), section 3.2.

Shapes: B batch, H heads, N patches, C width, E = C / H head width, F features.
"""

from timm.models import register_notrace_module
from torch import Tensor

from ..functional import readable
from .base import WideAttention


def kernel_attend(q: Tensor, k: Tensor, v: Tensor, floor: float) -> Tensor:
    """Attention in which the weight of a key is the product of its features with the query's. Cost O(N F E) a head.

    Args:
        q: Features of the queries (B, H, N, F).
        k: Features of the keys (B, H, N, F); zero for a key that is not to be read.
        v: Values (B, H, N, E), finite throughout.
        floor: Least sum of weights to divide by.

    Returns:
        (B, H, N, E).
    """
    read = q @ (k.transpose(-2, -1) @ v)
    total = q @ k.sum(dim=2).unsqueeze(-1)
    return read / total.clamp(min=floor)


def _elu_features(x: Tensor) -> Tensor:
    """elu(x) + 1, without the loss of precision where elu is close to -1."""
    return x.relu() + x.clamp(max=0.0).exp()


@register_notrace_module
class LinearMixer(WideAttention):
    """Linear attention with elu + 1 features. Cost O(N C E).

    Parameters: qkv and output projection, 4 C^2. NOTE: there are no attention weights to drop.
    """

    def mix_wide(
        self, q: Tensor, k: Tensor, v: Tensor, grid_size: tuple[int, int], patch_valid: Tensor | None = None
    ) -> Tensor:
        q, k = _elu_features(q), _elu_features(k)
        if patch_valid is not None:
            invalid = ~readable(patch_valid)[:, None, :, None]
            k, v = k.masked_fill(invalid, 0.0), v.masked_fill(invalid, 0.0)
        # features vanish where every component is far below zero; the inverse of the floor is still finite
        return kernel_attend(q, k, v, floor=1e-18)
