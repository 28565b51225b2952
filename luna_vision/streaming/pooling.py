"""The pooling of a model over patches that come in parts.

Shapes: B images, n patches of a part, N of the image, C width.
"""

import dataclasses

import torch
from torch import Tensor

from .._tensors import wide
from ..functional import PackState
from ..models import LunaVit
from ..models._parts import join_pools

__all__ = ["Pool"]


class Pool:
    """What `LunaVit.pool` needs of the patches: their sum, their maximum, or a pack of them.

    Attributes:
        parts: By name, all that is known so far.
    """

    def __init__(self, model: LunaVit, parts: dict[str, Tensor] | None = None) -> None:
        """
        Args:
            model: The model.
            parts: Where another pool was.
        """
        self.model = model
        self.kind = "map" if model.attn_pool is not None else model.global_pool
        self.parts = dict(parts or {})

    @property
    def reads_patches(self) -> bool:
        """Whether the pooling needs to be told the patches."""
        return self.kind not in ("", "token")

    def add(self, x: Tensor) -> None:
        """Read patches (B, n, C), after the final norm."""
        if self.kind in ("avg", "avgmax", "both"):
            total = wide(x).sum(dim=1).double()
            self.parts["sum"] = self.parts["sum"] + total if "sum" in self.parts else total
        if self.kind in ("max", "avgmax"):
            largest = x.amax(dim=1)
            self.parts["max"] = torch.maximum(self.parts["max"], largest) if "max" in self.parts else largest
        if self.kind == "map":
            state = self._latent(x.shape[0]).update(x)
            self.parts |= {name: getattr(state, name) for name in ("maximum", "total", "weighted")}

    def _latent(self, batch: int) -> PackState:
        """Attention pooling is a pack into one learned slot; its key bias drops out of the softmax."""
        pool, C = self.model.attn_pool, self.model.embed_dim
        weight, bias = pool.kv.weight, pool.kv.bias
        latent = pool.latent.expand(batch, -1, -1)
        state = PackState.init(latent, pool.q.weight, pool.q.bias, weight[:C], weight[C:], bias[C:], pool.num_heads)
        known = {name: self.parts[name] for name in ("maximum", "total", "weighted") if name in self.parts}
        return dataclasses.replace(state, **known)

    def finish(self, memory: Tensor, count: int) -> Tensor | None:
        """The embedding (B, C) of `count` patches and a memory (B, L, C) after the final norm; None for no pooling."""
        if self.kind == "":
            return None
        slots = memory.mean(dim=1)
        if self.kind == "map":
            return self._after_map(self._packed().to(memory.dtype))
        avg = (self.parts["sum"] / count).to(slots) if "sum" in self.parts else slots
        return join_pools(self.kind, slots, avg, self.parts.get("max", slots))

    def _packed(self) -> Tensor:
        return self._latent(len(self.parts["total"])).finish()

    def _after_map(self, x: Tensor) -> Tensor:
        """timm's `AttentionPoolLatent.forward` from where it has read the patches."""
        pool = self.model.attn_pool
        x = pool.proj_drop(pool.proj(x))
        return (x + pool.mlp(pool.norm(x)))[:, 0]
