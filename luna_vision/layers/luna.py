"""Luna attention: self-attention replaced by two cross-attentions through a short memory.

    pack:    Y_P = Attn(query P,  key/value X)        L x C    reads the image into the memory
    unpack:  Y_X = Attn(query X,  key/value Y_P)      N x C    lets every patch read the memory

Source: Ma et al., "Luna: Linear Unified Nested Attention", NeurIPS 2021 (arXiv 2106.01540), and the authors' code,
which fixes what the text leaves open: unpack reads the packed memory as it is (before residual and norm), the output
projection exists for X only, one projection serves as key and value.

Both attentions run in one of two exact forms (`luna_vision.functional`). The projected form calls the linear layers.
The absorbed form reads their weights, and runs only where these say all that the layers do.

Shapes: B batch, N patches, L memory slots, C width, H heads.
"""

from collections.abc import Callable
from typing import Final

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..functional import (
    PackState,
    Projections,
    absorbs,
    attend,
    attention_scores,
    attention_weights,
    autocast_input,
    check_valid,
    clamp_fp16,
    fold_queries,
    form_cost,
    no_autocast,
    pack_absorbed,
    split_heads,
    tile_absorbed,
    tile_projected,
    unpack_absorbed,
)
from ..functional.kernels import Norm, pack_normed, supports_kernels, unpack_normed
from .plain import is_hooked, is_plain

__all__ = ["LunaAttention"]


@register_notrace_module  # validity checks and masks are branches that fx cannot trace
class LunaAttention(nn.Module):
    """Pack the patches into the memory, then let every patch read the packed memory. O(N L) in time and memory.

    Parameters: queries and keys/values of both attentions and the output projection, 5 C^2 if tied and 7 C^2 if not.
    """

    tie_kv: Final[bool]
    pack_only: Final[bool]
    # what a module runs when it is scripted is compiled for good
    __constants__ = ["absorb_pack", "absorb_unpack"]
    __jit_unused_properties__ = ["absorb_pack", "absorb_unpack"]

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
            pack_form: "projected", "absorbed", or "auto" for the faster one (`luna_vision.functional.absorbs`).
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
        self.set_memory_len(memory_len)

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
        self.scale_queries()

    @torch.jit.ignore
    def set_memory_len(self, memory_len: int) -> None:
        """Choose the forms for so many slots, where they are not forced."""
        pack = (self.pack_form, memory_len, self.pack_heads, self.dim, 1 if self.tie_kv else 2)
        unpack = (self.unpack_form, memory_len, self.num_heads, self.dim, 2)
        # by device, to which a module may move later
        self.prefers_absorbed_pack = {of: absorbs(*pack, form_cost("pack", of)) for of in ("cpu", "cuda")}
        self.prefers_absorbed_unpack = {of: absorbs(*unpack, form_cost("unpack", of)) for of in ("cpu", "cuda")}

    @property
    def absorb_pack(self) -> bool:
        """Whether the pack runs in the absorbed form."""
        return self.prefers_absorbed_pack[self._kind()] and self._all_plain("pack_q", "pack_kv", "pack_k", "pack_v")

    @property
    def absorb_unpack(self) -> bool:
        """The same of the unpack."""
        plain = ("unpack_q", "unpack_kv", "unpack_k", "unpack_v", "proj")
        return self.prefers_absorbed_unpack[self._kind()] and self._all_plain(*plain)

    @torch.jit.ignore
    def _kind(self) -> str:
        """Whose choice counts: "cpu", or "cuda" for any accelerator; an exported graph, which may run anywhere, always
        has the first."""
        if torch.compiler.is_exporting():
            return "cpu"
        weight = next(self.pack_q.parameters(), None)
        return "cpu" if weight is None or weight.device.type in ("cpu", "meta") else "cuda"

    @torch.jit.ignore
    def _all_plain(self, *names: str) -> bool:
        return all(is_plain(self._modules[name]) for name in names if name in self._modules)

    @torch.jit.ignore
    def scale_queries(self) -> None:
        """Multiply the query projections, as they have been initialised, by `query_gain`.

        NOTE: with the usual small weights all slots start as nearly the same average of the image, and the patches read
        nearly the same from it: the slots then take long to tell apart what they read.
        """
        with torch.no_grad():
            for linear in (self.pack_q,) if self.pack_only else (self.pack_q, self.unpack_q):
                linear.weight.mul_(self.query_gain)

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
            ValueError: A shape does not fit, a mask is not bool, or (eager mode, masks on the CPU only) a row has no
                valid token.
        """
        self._check(x, memory, patch_valid, memory_valid)
        packed = self.pack(x, memory, patch_valid)
        return self.unpack(x, packed, memory_valid), packed

    def pack(self, x: Tensor, memory: Tensor, patch_valid: Tensor | None = None) -> Tensor:
        """Y_P (B, L, C), what the memory (B, L, C) reads of the patches (B, N, C)."""
        drop = self.attn_drop if self.training else 0.0
        if self.absorb_pack:
            return pack_absorbed(memory, x, self._pack_weights(), patch_valid, drop)
        k, v = self._pack_kv(x)
        return attend(self._heads(self.pack_q(memory), self.pack_heads), k, v, patch_valid, drop)

    def unpack(self, x: Tensor, packed: Tensor, memory_valid: Tensor | None = None) -> Tensor:
        """Y_X (B, n, C), what any part (B, n, C) of the patches reads from Y_P (B, L, C), projected."""
        if self.pack_only:
            return x
        drop = self.attn_drop if self.training else 0.0
        if self.absorb_unpack:
            return self.proj_drop(unpack_absorbed(x, packed, self._unpack_weights(), memory_valid, drop))
        k, v = self._unpack_kv(packed)
        y = attend(self._heads(self.unpack_q(x), self.num_heads), k, v, memory_valid, drop)
        return self.proj_drop(clamp_fp16(self.proj(y)))

    # with the norm of the patches inside, by fused kernels

    @torch.jit.ignore
    def takes_kernels(self, x: Tensor, memory_len: int) -> bool:
        """Whether `pack_normed` and `unpack_normed` give what `pack` and `unpack` do, for patches (B, N, C)."""
        drops = self.training and (self.attn_drop > 0.0 or (not self.pack_only and self.proj_drop.p > 0.0))
        if drops or not self.absorb_pack or not (self.pack_only or self.absorb_unpack) or is_hooked(self):
            return False
        return supports_kernels(x, max(self.num_heads, self.pack_heads), memory_len)

    @torch.jit.ignore
    def pack_normed(self, x: Tensor, memory: Tensor, norm: Norm, patch_valid: Tensor | None = None) -> Tensor:
        """`pack` of the normed patches, from the patches as they are."""
        return pack_normed(memory, x, norm, self._pack_weights(), patch_valid)

    @torch.jit.ignore
    def unpack_normed(
        self,
        x: Tensor,
        packed: Tensor,
        norm: Norm,
        memory_valid: Tensor | None = None,
        norm2: Norm | None = None,
        branch: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The patches after the attention: x + `unpack` of the normed patches, through `branch`; and their second norm.

        Arguments and result are those of `luna_vision.functional.kernels.unpack_normed`.
        """
        return unpack_normed(x, packed, norm, self._unpack_weights(), memory_valid, norm2, branch)

    # `pack` in parts

    @torch.jit.ignore
    def pack_query(self, memory: Tensor) -> Tensor:
        """What a memory (B, L, C) asks of every tile: folded (B, H * L, C), or projected (B, H, L, C / H)."""
        if self.absorb_pack:
            memory = autocast_input(memory)
            with no_autocast(memory):
                return fold_queries(memory, self._pack_weights())
        return self._heads(self.pack_q(memory), self.pack_heads)

    @torch.jit.ignore
    def pack_tile(
        self, x: Tensor, query: Tensor, patch_valid: Tensor | None = None, rows: int | list[int] | None = None
    ) -> PackState:
        """What a query of `pack_query` reads of a part (B, n, C) of the patches. Attention weights are not dropped.

        `rows` is that of `luna_vision.functional.tile_absorbed`.
        """
        if self.absorb_pack:
            return tile_absorbed(query, x, self._pack_weights(), patch_valid, rows)
        return tile_projected(query, *self._pack_kv(x), patch_valid, rows)

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
        packed = self.pack(x, memory, patch_valid)
        return self.pack_map(x, memory, patch_valid), self.unpack_map(x, packed, memory_valid)

    @torch.jit.ignore
    def pack_map(self, x: Tensor, memory: Tensor, patch_valid: Tensor | None = None) -> Tensor:
        """The weights (B, pack heads, L, N) of `pack`, without dropout."""
        k, _ = self._pack_kv(x)
        return attention_weights(self._heads(self.pack_q(memory), self.pack_heads), k, patch_valid)

    @torch.jit.ignore
    def pack_scores(self, x: Tensor, memory: Tensor) -> Tensor:
        """What the softmax of `pack_map` over the patches takes, (B, pack heads, L, n), of a part (B, n, C) of them."""
        k, _ = self._pack_kv(x)
        return attention_scores(self._heads(self.pack_q(memory), self.pack_heads), k)

    @torch.jit.ignore
    def unpack_map(self, x: Tensor, packed: Tensor, memory_valid: Tensor | None = None) -> Tensor:
        """The weights (B, heads, n, L) of `unpack`, without dropout; of 0 heads when the layer is `pack_only`."""
        if self.pack_only:
            return x.new_empty(x.shape[0], 0, x.shape[1], packed.shape[1])
        k, _ = self._unpack_kv(packed)
        return attention_weights(self._heads(self.unpack_q(x), self.num_heads), k, memory_valid)

    def _check(self, x: Tensor, memory: Tensor, patch_valid: Tensor | None, memory_valid: Tensor | None) -> None:
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x must have shape (batch, patches, {self.dim}), got {list(x.shape)}")
        if memory.dim() != 3 or memory.shape[-1] != self.dim or memory.shape[0] != x.shape[0]:
            raise ValueError(f"memory must have shape ({x.shape[0]}, slots, {self.dim}), got {list(memory.shape)}")
        if patch_valid is not None:
            check_valid(patch_valid, x.shape[0], x.shape[1], "patch_valid")
        if memory_valid is not None:
            check_valid(memory_valid, memory.shape[0], memory.shape[1], "memory_valid")

    def _heads(self, x: Tensor, num_heads: int) -> Tensor:
        return split_heads(clamp_fp16(x), num_heads)

    def _pack_kv(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, K, C / H) of tokens (B, K, C)."""
        if self.tie_kv:
            k = self._heads(self.pack_kv(x), self.pack_heads)
            return k, k
        return self._heads(self.pack_k(x), self.pack_heads), self._heads(self.pack_v(x), self.pack_heads)

    def _unpack_kv(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.tie_kv:
            k = self._heads(self.unpack_kv(x), self.num_heads)
            return k, k
        return self._heads(self.unpack_k(x), self.num_heads), self._heads(self.unpack_v(x), self.num_heads)

    def _pack_weights(self) -> Projections:
        q = self.pack_q
        if self.tie_kv:
            return Projections(self.pack_heads, q.weight, q.bias, self.pack_kv.weight, None, self.pack_kv.bias)
        k, v = self.pack_k, self.pack_v
        return Projections(self.pack_heads, q.weight, q.bias, k.weight, v.weight, v.bias)

    def _unpack_weights(self) -> Projections:
        q, out = self.unpack_q, (self.proj.weight, self.proj.bias)
        if self.tie_kv:
            kv = self.unpack_kv
            return Projections(self.num_heads, q.weight, q.bias, kv.weight, None, kv.bias, out[0], out[1])
        k, v = self.unpack_k, self.unpack_v
        return Projections(self.num_heads, q.weight, q.bias, k.weight, v.weight, v.bias, out[0], out[1])
