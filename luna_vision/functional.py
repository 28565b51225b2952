"""The two attentions of Luna as functions on tensors.

    pack:    Y_P = Attn(query P,  key/value X)        reads the image into the memory
    unpack:  Y_X = Attn(query X,  key/value Y_P)      lets every patch read the memory

Both are the same operation, a softmax over the keys; they differ only in which side is short. Source: Ma et al., "Luna:
Linear Unified Nested Attention", NeurIPS 2021 (arXiv 2106.01540), section 3.

Shapes: B batch, Q queries, K keys, H heads, C width, E = C / H head width.
"""

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor

__all__ = ["attend", "attention_weights", "check_valid", "naive_attend", "saturate", "split_heads"]


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Cut the width into heads: (B, K, C) to (B, H, K, E)."""
    return x.unflatten(-1, (num_heads, x.shape[-1] // num_heads)).transpose(1, 2)


@register_notrace_function  # a branch on the type, which fx cannot trace
def saturate(x: Tensor) -> Tensor:
    """Clamp float16 to its finite range; every other type passes through.

    float16 ends at 65,504, so a projection of large but finite inputs can reach infinity, and the next softmax or norm
    would turn that into NaN. The other types have the range of float32 or more.
    """
    if x.dtype == torch.float16:
        x = x.clamp(-65504.0, 65504.0)
    return x


def check_valid(valid: Tensor, batch: int, length: int, name: str) -> None:
    """Check a validity mask (True = valid) against the tokens that it describes.

    Args:
        valid: Mask of shape (batch, length), bool.
        batch: Batch size of the tokens.
        length: Number of tokens.
        name: How the caller knows the mask, for the message.

    Raises:
        ValueError: The mask is not bool, has another shape, or (in eager mode only, where values can be looked at)
            leaves a row without a single valid token.
    """
    if valid.dim() != 2 or valid.shape[0] != batch or valid.shape[1] != length:
        raise ValueError(f"{name} must have shape ({batch}, {length}), got {list(valid.shape)}")
    if valid.dtype != torch.bool:
        raise ValueError(f"{name} must be a bool tensor with True for valid tokens, got {valid.dtype}")
    if not torch.jit.is_scripting():
        if torch.jit.is_tracing() or torch.compiler.is_compiling() or valid.is_meta:
            return
        if not bool(valid.any(dim=1).all()):
            raise ValueError(f"{name} has a row without any valid token; every row needs at least one")


def _key_mask(valid: Tensor) -> Tensor:
    """Attention mask (B, 1, 1, K) of a key validity mask (B, K).

    A row without any valid key would be a softmax over nothing, which is NaN. Such a row attends to everything instead:
    its output means nothing but stays finite, which is what compiled and exported code needs.
    """
    return (valid | ~valid.any(dim=1, keepdim=True))[:, None, None, :]


def attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """Multi-head attention in the projected form, by `F.scaled_dot_product_attention`.

    Args:
        q: Queries (B, H, Q, E).
        k: Keys (B, H, K, E).
        v: Values (B, H, K, E).
        valid: Which keys may be attended to, (B, K) bool.
        dropout_p: Probability of dropping an attention weight.

    Returns:
        (B, Q, C), heads joined.
    """
    attn_mask = _key_mask(valid) if valid is not None else None
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p)
    return y.transpose(1, 2).flatten(2)


def attention_weights(q: Tensor, k: Tensor, valid: Tensor | None = None) -> Tensor:
    """The attention matrix itself, (B, H, Q, K), each row a distribution over the keys. Arguments as in `attend`."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if valid is not None:
        scores = scores.masked_fill(~_key_mask(valid), float("-inf"))
    return scores.softmax(dim=-1)


def naive_attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> Tensor:
    """Reference for `attend`, written as the formula: every matrix is built. Arguments and result as in `attend`."""
    return (attention_weights(q, k, valid) @ v).transpose(1, 2).flatten(2)
