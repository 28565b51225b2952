"""The projected form: queries, keys and values are formed, and `F.scaled_dot_product_attention` does the rest.

Shapes: B batch, H heads, Q queries, K keys, C width, E = C / H head width.
"""

import torch.nn.functional as F
from torch import Tensor

from .masks import readable


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Cut the width into heads: (B, K, C) to (B, H, K, E)."""
    return x.unflatten(-1, (num_heads, x.shape[-1] // num_heads)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """Multi-head attention by `F.scaled_dot_product_attention`, (B, Q, C) with the heads joined.

    Args:
        q: Queries (B, H, Q, E).
        k: Keys (B, H, K, E).
        v: Values (B, H, K, E).
        valid: Which keys may be attended to, (B, K) bool.
        dropout_p: Probability of dropping an attention weight.
    """
    attn_mask = readable(valid)[:, None, None, :] if valid is not None else None
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p)
    return y.transpose(1, 2).flatten(2)
