"""External Attention: all images read the same learned memory, two matrices of S slots.

    Y = normalise(Q M_k^T) M_v,   normalise: softmax over the N patches, then L1 over the S slots

Source: Guo et al., "Beyond Self-attention: External Attention using Two Linear Layers for Visual Tasks", 2021 (arXiv
2105.02358), section 3.2.

The two normalisations are one softmax over the slots, of scores minus the logarithm of each slot's sum over the
patches. So this is Luna's absorbed unpack (`luna_vision.functional`) with a memory that no image writes; the logarithm
takes the place of the folded query bias.

Shapes: B batch, N patches, C width, S slots.
"""

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..functional import readable, slot_scores, upcast, weighted_slots, zero_invalid
from ..utils.checks import check_at_least


def double_normalise(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """External Attention's normalisation: softmax over the patches, then L1 over the slots, of scores (B, N, S).

    The softmax leaves out patches that are not valid (B, N). NOTE: computed as one softmax over the slots, in float32
    or wider. So it needs no small constant in the L1 norm, unlike the authors' code, and is right even for a patch
    whose share of every slot underflows.
    """
    scores = upcast(scores)
    counted = scores
    if valid is not None:
        counted = scores.masked_fill(~readable(valid)[:, :, None], float("-inf"))
    return (scores - counted.logsumexp(dim=1, keepdim=True)).softmax(dim=2)


@register_notrace_module
class ExternalMixer(nn.Module):
    """External Attention. Cost O(N C S).

    Parameters: input and output projection, 2 C^2; memory, 2 S C.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
        *,
        num_slots: int = 64,
    ) -> None:
        """
        Args:
            dim: Width C.
            num_heads: Without effect: there is one head.
            qkv_bias: Bias on the input projection.
            proj_bias: Bias on the output projection.
            attn_drop: Dropout of the normalised weights.
            proj_drop: Dropout after the output projection.
            num_slots: S.

        Raises:
            ValueError: No slots.
        """
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_at_least(1, num_slots=num_slots)
        self.query = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.m_key = nn.Parameter(torch.empty(num_slots, dim, **dd))
        self.m_value = nn.Parameter(torch.empty(num_slots, dim, **dd))
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal with variance 2 / C, and M_v as M_k transposed, as in the authors' code."""
        nn.init.normal_(self.m_key, std=(2.0 / self.m_key.shape[1]) ** 0.5)
        self.m_value.copy_(self.m_key)

    def forward(self, x: Tensor, grid_size: tuple[int, int], patch_valid: Tensor | None = None) -> Tensor:
        """See `SelfAttention.forward`."""
        q = self.query(zero_invalid(x, patch_valid))
        weights = double_normalise(slot_scores(q, self.m_key.expand(q.shape[0], -1, -1)), patch_valid)
        y = weighted_slots(self.attn_drop(weights).to(q.dtype), self.m_value.expand(q.shape[0], -1, -1))
        return self.proj_drop(self.proj(y))
