"""Attention by the formula, with every matrix built: the reference for the faster forms.

Shapes: B batch, H heads, Q queries, K keys, E head width, C = H E.
"""

from torch import Tensor

from .masks import readable


def attention_scores(q: Tensor, k: Tensor) -> Tensor:
    """What the softmax of `attention_weights` takes, (B, H, Q, K)."""
    return (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)


def attention_weights(q: Tensor, k: Tensor, valid: Tensor | None = None) -> Tensor:
    """The attention matrix, (B, H, Q, K), each row a distribution over the keys.

    Args:
        q: Queries (B, H, Q, E).
        k: Keys (B, H, K, E).
        valid: Which keys may be attended to, (B, K) bool.
    """
    scores = attention_scores(q, k)
    if valid is not None:
        scores = scores.masked_fill(~readable(valid)[:, None, None, :], float("-inf"))
    return scores.softmax(dim=-1)


def naive_attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
    """Multi-head attention, (B, Q, C) with the heads joined.

    Args:
        q, k, valid: As in `attention_weights`.
        v: Values (B, H, K, E).
        keep: Factors of dropout on the weights, (B, H, Q, K): 0 or 1 / (1 - p).
    """
    weights = attention_weights(q, k, valid)
    if keep is not None:
        weights = weights * keep
    return (weights @ v).transpose(1, 2).flatten(2)
