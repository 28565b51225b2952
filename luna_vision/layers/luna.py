"""Luna attention: self-attention replaced by two cross-attentions through a short memory.

Source: Ma et al., "Luna: Linear Unified Nested Attention", NeurIPS 2021 (arXiv 2106.01540), and the authors' code,
which fixes what the text leaves open: unpack reads the packed memory as it is (before residual and norm), the output
projection exists for X only, the memory has a residual and a norm and no MLP, one projection serves as key and value.

Shapes: B batch, N patches, L memory slots, C width, H heads.
"""

from typing import Final

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..functional import (
    PACK_COST,
    UNPACK_COST,
    PackState,
    absorb_from,
    absorbs,
    attend,
    attention_weights,
    check_valid,
    key_value,
    pack_absorbed,
    pack_projected,
    split_heads,
    unpack_absorbed,
    unpack_projected,
)

__all__ = ["LunaAttention"]


@register_notrace_module  # validity checks and masks are branches that fx cannot trace
class LunaAttention(nn.Module):
    """Pack the patches into the memory, then let every patch read the packed memory. O(N L) in time and memory.

    Parameters: queries and keys/values of both attentions and the output projection, 5 C^2 if tied and 7 C^2 if not.
    """

    tie_kv: Final[bool]
    pack_only: Final[bool]
    absorb_pack_from: Final[float]
    absorb_unpack_from: Final[float]

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        pack_heads: int | None = None,
        tie_kv: bool = True,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        pack_only: bool = False,
        memory_len: int = 8,
        pack_form: str = "auto",
        unpack_form: str = "auto",
        query_gain: float = 1.0,
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            dim: Width C of patches and memory.
            num_heads: Heads of the unpack.
            pack_heads: Heads of the pack; as many as `num_heads` if None.
            tie_kv: One projection for key and value (the authors' default) instead of two.
            qkv_bias: Bias on queries and values. Untied keys never have one: a constant along the softmax drops out of
                it, so the bias could not be learned.
            proj_bias: Bias on the output projection.
            attn_drop: Dropout of attention weights, both attentions.
            proj_drop: Dropout after the output projection.
            pack_only: Leave out the unpack, for a last block whose patches nobody reads; `y` is then `x` itself.
            memory_len: Number of slots that is expected; only the choice of the forms depends on it.
            pack_form: "projected", "absorbed", or "auto" for the faster one (`luna_vision.functional.absorb_from`).
            unpack_form: The same for the unpack.
            query_gain: What the initial weights of both query projections are multiplied by.

        Raises:
            ValueError: `dim` is not a multiple of a head count, an unknown form, or a gain that is not positive.
        """
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        pack_heads = num_heads if pack_heads is None else pack_heads
        for name, heads in (("num_heads", num_heads), ("pack_heads", pack_heads)):
            if heads < 1 or dim % heads:
                raise ValueError(f"dim ({dim}) must be a multiple of {name} ({heads})")
        if not query_gain > 0.0:
            raise ValueError(f"query_gain must be above 0, got {query_gain}")
        self.dim = dim
        self.num_heads = num_heads
        self.pack_heads = pack_heads
        self.tie_kv = tie_kv
        self.pack_only = pack_only
        self.attn_drop = attn_drop
        self.query_gain = query_gain
        self.pack_form, self.unpack_form = pack_form, unpack_form
        self.expect_slots(memory_len)

        self.pack_q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        if tie_kv:
            self.pack_kv = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        else:
            self.pack_k = nn.Linear(dim, dim, bias=False, **dd)
            self.pack_v = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        if not pack_only:
            self.unpack_q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
            if tie_kv:
                self.unpack_kv = nn.Linear(dim, dim, bias=qkv_bias, **dd)
            else:
                self.unpack_k = nn.Linear(dim, dim, bias=False, **dd)
                self.unpack_v = nn.Linear(dim, dim, bias=qkv_bias, **dd)
            self.proj = nn.Linear(dim, dim, bias=proj_bias, **dd)
            self.proj_drop = nn.Dropout(proj_drop)
        self.init_weights()

    @torch.jit.ignore
    def expect_slots(self, memory_len: int) -> None:
        """Choose the forms for so many slots, where they are not forced."""
        projections = 1 if self.tie_kv else 2
        self.absorb_pack_from = absorb_from(
            self.pack_form, memory_len, self.pack_heads, self.dim, projections, PACK_COST
        )
        self.absorb_unpack_from = absorb_from(self.unpack_form, memory_len, self.num_heads, self.dim, 2, UNPACK_COST)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Multiply the query projections, as they have been initialised, by `query_gain`.

        NOTE: with the usual small weights all slots start as nearly the same average of the image, and the patches read
        nearly the same from it: the slots then take long to tell apart what they read.
        """
        with torch.no_grad():
            self.pack_q.weight.mul_(self.query_gain)
            if not self.pack_only:
                self.unpack_q.weight.mul_(self.query_gain)

    def _check(self, x: Tensor, memory: Tensor, patch_valid: Tensor | None, memory_valid: Tensor | None) -> None:
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x must have shape (batch, patches, {self.dim}), got {list(x.shape)}")
        if memory.dim() != 3 or memory.shape[-1] != self.dim or memory.shape[0] != x.shape[0]:
            raise ValueError(f"memory must have shape ({x.shape[0]}, slots, {self.dim}), got {list(memory.shape)}")
        if patch_valid is not None:
            check_valid(patch_valid, x.shape[0], x.shape[1], "patch_valid")
        if memory_valid is not None:
            check_valid(memory_valid, memory.shape[0], memory.shape[1], "memory_valid")

    def _pack_weights(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Weight of keys, of values (None if tied), and bias of values."""
        if self.tie_kv:
            return self.pack_kv.weight, None, self.pack_kv.bias
        return self.pack_k.weight, self.pack_v.weight, self.pack_v.bias

    def _unpack_weights(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if self.tie_kv:
            return self.unpack_kv.weight, None, self.unpack_kv.bias
        return self.unpack_k.weight, self.unpack_v.weight, self.unpack_v.bias

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        patch_valid: Tensor | None = None,
        memory_valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            x: Patches (B, N, C).
            memory: Memory (B, L, C).
            patch_valid: (B, N) bool, True where a patch is part of the image. A patch that is not changes nothing.
            memory_valid: (B, L) bool, True where a slot may be read.

        Returns:
            Y_X (B, N, C), what the patches read, projected; Y_P (B, L, C), the packed memory, raw.

        Raises:
            ValueError: A shape does not fit, a mask is not bool, or (eager mode only) a row has no valid token.
        """
        self._check(x, memory, patch_valid, memory_valid)
        drop = self.attn_drop if self.training else 0.0

        w_k, w_v, b_v = self._pack_weights()
        w_q, b_q = self.pack_q.weight, self.pack_q.bias
        if absorbs(x.shape[1], self.absorb_pack_from):
            packed = pack_absorbed(memory, x, w_q, b_q, w_k, w_v, b_v, self.pack_heads, patch_valid, drop)
        else:
            packed = pack_projected(memory, x, w_q, b_q, w_k, w_v, b_v, self.pack_heads, patch_valid, drop)
        if self.pack_only:
            return x, packed

        return self.unpack(x, packed, memory_valid), packed

    def unpack(self, x: Tensor, packed: Tensor, memory_valid: Tensor | None = None) -> Tensor:
        """What any part (B, n, C) of the patches reads from Y_P (B, L, C), projected: the second half of `forward`."""
        drop = self.attn_drop if self.training else 0.0
        w_k, w_v, b_v = self._unpack_weights()
        w_q, b_q, w_o, b_o = self.unpack_q.weight, self.unpack_q.bias, self.proj.weight, self.proj.bias
        heads = self.num_heads
        if absorbs(x.shape[1], self.absorb_unpack_from):
            y = unpack_absorbed(x, packed, w_q, b_q, w_k, w_v, b_v, w_o, b_o, heads, memory_valid, drop)
        else:
            y = unpack_projected(x, packed, w_q, b_q, w_k, w_v, b_v, w_o, b_o, heads, memory_valid, drop)
        return self.proj_drop(y)

    @torch.jit.ignore
    def pack_state(self, memory: Tensor) -> PackState:
        """The pack of memory (B, L, C) before it has read any patch, to be fed in parts."""
        w_k, w_v, b_v = self._pack_weights()
        return PackState.init(memory, self.pack_q.weight, self.pack_q.bias, w_k, w_v, b_v, self.pack_heads)

    @torch.jit.ignore
    def attention_maps(
        self, x: Tensor, memory: Tensor, patch_valid: Tensor | None = None, memory_valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The two attention matrices. Arguments and errors as in `forward`.

        Returns:
            pack (B, pack heads, L, N), each row a distribution over the patches; unpack (B, heads, N, L), each row a
            distribution over the slots (empty, 0 heads, when the layer is `pack_only`).
        """
        self._check(x, memory, patch_valid, memory_valid)
        k, v = key_value(x, *self._pack_weights(), self.pack_heads)
        q = split_heads(self.pack_q(memory), self.pack_heads)
        pack = attention_weights(q, k, patch_valid)
        if self.pack_only:
            return pack, pack.new_empty(x.shape[0], 0, x.shape[1], memory.shape[1])
        k, _ = key_value(attend(q, k, v, patch_valid), *self._unpack_weights(), self.num_heads)
        return pack, attention_weights(split_heads(self.unpack_q(x), self.num_heads), k, memory_valid)
