"""Pooling: the tokens of an image become one for the head, at once or from parts.

Shapes: B batch, N patches, n patches of a part, L memory slots, C width.
"""

import torch
from timm.layers import AttentionPoolLatent
from timm.models import register_notrace_function
from torch import Tensor

from ..functional import (
    PackState,
    Projections,
    autocast_input,
    fold_queries,
    no_autocast,
    readable,
    split_heads,
    tile_absorbed,
    tile_projected,
    upcast,
    zero_invalid,
)
from ..layers.plain import is_plain

# the values of `global_pool`
POOL_TYPES = ("", "avg", "max", "avgmax", "map", "token", "both")


@register_notrace_function
def key_mask(patch_valid: Tensor | None) -> Tensor | None:
    """Attention mask (B, 1, 1, N) of a validity mask (B, N); a row without any valid patch attends to all of them."""
    return readable(patch_valid)[:, None, None, :] if patch_valid is not None else None


@register_notrace_function
def pool_tokens(x: Tensor, pool_type: str, num_prefix_tokens: int, patch_valid: Tensor | None = None) -> Tensor:
    """Pool memory and patches (B, L + N, C) to (B, C); unchanged for "". Invalid patches (B, N) are left out."""
    if pool_type == "":
        return x
    patches = x[:, num_prefix_tokens:]
    slots = avg = largest = x[:, :num_prefix_tokens].mean(dim=1)
    if pool_type in ("avg", "avgmax", "both"):
        if patch_valid is None:
            avg = patches.mean(dim=1)
        else:
            count = patch_valid.sum(dim=1, keepdim=True).clamp(min=1)
            # sums of many tokens leave the range of float16 and the precision of bfloat16
            dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
            total = patches.masked_fill(~patch_valid[:, :, None], 0.0).sum(dim=1, dtype=dtype)
            avg = (total / count).to(x.dtype)
    if pool_type in ("max", "avgmax"):
        if patch_valid is not None:
            patches = patches.masked_fill(~patch_valid[:, :, None], -65504.0)
        largest = patches.amax(dim=1)
    return _join(pool_type, slots, avg, largest)


def _join(pool_type: str, slots: Tensor, avg: Tensor, largest: Tensor) -> Tensor:
    """The pooled token of the mean slot, the mean patch and the maximum over patches, (B, C) each."""
    if pool_type == "token":
        return slots
    if pool_type == "avg":
        return avg
    if pool_type == "max":
        return largest
    if pool_type == "avgmax":
        return 0.5 * (avg + largest)
    return 0.5 * (avg + slots)  # "both"


class Pool:
    """`LunaVit.pool` over patches that come in parts.

    Attributes:
        parts: The state so far, by name: the sum of the patches, their maximum, or a pack of them.
    """

    def __init__(
        self, pool_type: str, attn_pool: AttentionPoolLatent | None, parts: dict[str, Tensor] | None = None
    ) -> None:
        """
        Args:
            pool_type: One of `POOL_TYPES`.
            attn_pool: The attention pooling of "map".
            parts: The state of another pool, to continue from.
        """
        self.kind, self.attn_pool, self.parts = pool_type, attn_pool, dict(parts or {})

    @property
    def reads_patches(self) -> bool:
        """Whether the pooling needs the patches."""
        return self.kind not in ("", "token")

    def add(self, x: Tensor, patch_valid: Tensor | None = None) -> None:
        """Read patches (B, n, C), after the final norm; `patch_valid` (B, n) says which of them count."""
        if self.kind in ("avg", "avgmax", "both"):
            total = upcast(zero_invalid(x, patch_valid)).sum(dim=1).double()
            self.parts["sum"] = self.parts["sum"] + total if "sum" in self.parts else total
        if self.kind in ("max", "avgmax"):
            largest = (x if patch_valid is None else x.masked_fill(~patch_valid[:, :, None], -65504.0)).amax(dim=1)
            self.parts["max"] = torch.maximum(self.parts["max"], largest) if "max" in self.parts else largest
        if self.kind == "map":
            state = self._pack(x, patch_valid)
            self.parts |= (state.merge(PackState(**self.parts)) if self.parts else state)._asdict()

    def finish(self, memory: Tensor, count: int) -> Tensor | None:
        """The embedding (B, C), None for no pooling.

        Args:
            memory: (B, L, C), after the final norm.
            count: How many patches counted.
        """
        if self.kind == "":
            return None
        if self.kind == "map":
            pool, y = self.attn_pool, PackState(**self.parts).finish().to(memory.dtype)
            y = pool.proj_drop(pool.proj(y))  # timm's `AttentionPoolLatent.forward` after it has read the patches
            return (y + pool.mlp(pool.norm(y)))[:, 0]
        slots = memory.mean(dim=1)
        avg = (self.parts["sum"] / count).to(slots) if "sum" in self.parts else slots
        return _join(self.kind, slots, avg, self.parts.get("max", slots))

    def _pack(self, x: Tensor, patch_valid: Tensor | None) -> PackState:
        """Attention pooling is a pack into one learned slot; its key bias drops out of the softmax."""
        pool, C = self.attn_pool, x.shape[-1]
        if not (is_plain(pool.q) and is_plain(pool.kv)):
            q = split_heads(pool.q(pool.latent.expand(x.shape[0], -1, -1)), pool.num_heads)
            return tile_projected(q, *split_heads(pool.kv(x), 2 * pool.num_heads).chunk(2, 1), patch_valid)
        weight, bias = pool.kv.weight, pool.kv.bias
        w = Projections(pool.num_heads, pool.q.weight, pool.q.bias, weight[:C], weight[C:], bias[C:])
        latent = autocast_input(pool.latent.expand(x.shape[0], -1, -1))
        with no_autocast(x):
            queries = fold_queries(latent, w)
        return tile_absorbed(queries, x, w, patch_valid)
