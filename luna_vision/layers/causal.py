"""Causal Luna attention for raster-order autoregressive models: token t reads what was packed from the tokens up to t.

A softmax over the tokens cannot be computed causally, because its denominator grows. The pack therefore weights each
token on its own, w = softplus(score) with beta ln 2 (1 at score 0), and takes running means instead of sums:

    K_t = (1 / t) sum over s <= t of w_s k_s^T        L x E for each head; V_t the same with the values v_s
    y_t = softmax over L of (K_t q_t / sqrt(E)), times V_t

No K_t is formed, except at the borders of chunks: inside a chunk of c tokens, K_t q_t is a masked product,
tril(Q K^T) W, and V_t is read by tril(A W^T) V; the chunks before it come in through their sum. A token costs
4 c (C + H L) + 8 L C FLOPs besides the projections, whatever N (tied; untied 2 L C more).

Sources: Ma et al., "Luna: Linear Unified Nested Attention", NeurIPS 2021 (arXiv 2106.01540), section 3.3, and the
authors' code, which fixes the activation, the scales, and that key and value are projected before they are packed.
Chunks, as in linear attention: Hua et al., "Transformer Quality in Linear Time", ICML 2022 (arXiv 2202.10447).

Shapes: B batch, N tokens, L memory slots, C width, H heads, E = C / H head width, c chunk, M = ceil(N / c) chunks.
"""

import math
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..functional import check_valid, clamp_fp16, no_autocast, split_heads, upcast

__all__ = ["CausalLunaAttention", "CausalState", "causal_attend", "naive_causal"]


def naive_causal(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, count: Tensor, keep: Tensor | None = None) -> Tensor:
    """Reference for `causal_attend`, written as the formula: the running means at every token are built, N x L x C.

    Args:
        q, k, v: Queries, keys, values (B, H, N, E).
        weights: Pack weights (B, H, N, L), 0 for a token that does not count.
        count: Tokens that count, up to and including each, at least 1: (B, N).
        keep: What dropout multiplies the weights of the slots with, (B, H, N, L): 0 or 1 / (1 - p).

    Returns:
        (B, H, N, E).
    """
    k, v = ((weights[..., None] * t[..., None, :]).cumsum(2) / count[:, None, :, None, None] for t in (k, v))
    slots = torch.einsum("bhne,bhnle->bhnl", q * q.shape[-1] ** -0.5, k).softmax(dim=-1)
    return torch.einsum("bhnl,bhnle->bhne", slots if keep is None else slots * keep, v)


def causal_attend(
    q: Tensor, kv: Tensor, weights: Tensor, count: Tensor, sums: Tensor, chunk: int, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`naive_causal` in linear time and memory, all chunks at once, continuing from earlier sums.

    Args:
        q: Queries (B, H, N, E).
        kv: Keys that are values too (B, H, N, E), or keys and values side by side (B, H, N, 2 E).
        weights, count: As in `naive_causal`; `count` includes the tokens before these.
        sums: Sum of w kv^T over the tokens before these, (B, H, L, E or 2 E).
        chunk: c; the result does not depend on it.
        dropout_p: Probability of dropping the weight of a slot.

    Returns:
        (B, H, N, E), and the sums after the last token.
    """
    B, H, N, E = q.shape
    L = weights.shape[-1]
    M, chunk = (1, N) if N <= chunk else (-(-N // chunk), chunk)
    pad = M * chunk - N
    q, kv, weights = (
        F.pad(t, (0, 0, 0, pad)).reshape(B * H * M, chunk, t.shape[-1]) for t in (q * E**-0.5, kv, weights)
    )
    count = F.pad(count, (0, pad), value=1)[:, None].expand(B, H, M * chunk).reshape(B * H * M, chunk, 1)
    k, v = kv[..., :E], kv[..., -E:]

    added = (weights.transpose(1, 2) @ kv).view(B * H, M, L, kv.shape[-1])
    sums = torch.cat([sums.flatten(0, 1)[:, None], added], dim=1).cumsum(dim=1)  # B * H, M + 1, L, E or 2 E
    before, after = sums[:, :-1].flatten(0, 1), sums[:, -1].unflatten(0, (B, H))
    scores = q @ before[..., :E].transpose(1, 2) + (q @ k.transpose(1, 2)).tril() @ weights
    slots = F.dropout((scores / count).softmax(dim=-1), dropout_p)  # B * H * M, c, L
    y = (slots @ before[..., -E:] + (slots @ weights.transpose(1, 2)).tril() @ v) / count
    return y.view(B, H, M * chunk, E)[:, :, :N], after


class CausalState(NamedTuple):
    """What is known after some tokens: of the same size whatever their number, and batch first in every field.

    States are values: reading returns a new one, and gradients pass through.
    """

    queries: Tensor
    """(B, H, L, E), the memory's queries, scaled."""
    sums: Tensor
    """(B, H, L, E or 2 E), the sum of pack weights times `kv` of `causal_attend`."""
    count: Tensor
    """(B,), int64, how many tokens were read."""


def _check(tokens: Tensor, name: str, *shape: int | None) -> None:
    if tokens.dim() != len(shape) or any(n not in (None, m) for n, m in zip(shape, tokens.shape, strict=True)):
        raise ValueError(f"{name} must have shape {list(shape)} (None: any), got {list(tokens.shape)}")


@register_notrace_module  # validity checks and masks are branches that fx cannot trace
class CausalLunaAttention(nn.Module):
    """Luna attention in which no token sees a later one. O(N) in time and memory, O(1) a generated token.

    Parameters are named and initialised as in `LunaAttention`, but a head unpacks what it packed itself, so there is
    one number of heads; `pack_k` gives pack weights only; and keys have biases, because pack weights do not sum to 1.
    """

    tie_kv: Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        tie_kv: bool = True,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        chunk: int = 64,
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            dim, num_heads, tie_kv, qkv_bias, proj_bias, attn_drop, proj_drop: See `LunaAttention`.
            chunk: Tokens that are read by masked products: speed and memory only, the result does not depend on it.

        Raises:
            ValueError: `dim` is not a multiple of `num_heads`, or `chunk` is not positive.
        """
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim ({dim}) must be a multiple of num_heads ({num_heads})")
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        self.dim = dim
        self.num_heads = num_heads
        self.tie_kv = tie_kv
        self.attn_drop = attn_drop
        self.chunk = chunk
        qkv = {"bias": qkv_bias, "device": device, "dtype": dtype}
        self.pack_q = nn.Linear(dim, dim, **qkv)
        self.pack_k = nn.Linear(dim, dim, **qkv)
        self.unpack_q = nn.Linear(dim, dim, **qkv)
        if tie_kv:
            self.unpack_kv = nn.Linear(dim, dim, **qkv)
        else:
            self.unpack_k = nn.Linear(dim, dim, **qkv)
            self.unpack_v = nn.Linear(dim, dim, **qkv)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def _heads(self, projected: Tensor) -> Tensor:
        """Heads of (B, K, C), in float32 or wider: running sums over many tokens need it, under autocast too."""
        return upcast(split_heads(clamp_fp16(projected), self.num_heads))

    def _project(self, x: Tensor, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unpack queries (B, H, N, E), pack weights (B, H, N, L), and `kv` of `causal_attend`."""
        if self.tie_kv:
            kv = self._heads(self.unpack_kv(x))
        else:
            kv = torch.cat([self._heads(self.unpack_k(x)), self._heads(self.unpack_v(x))], dim=-1)
        k = self._heads(self.pack_k(x))
        with no_autocast(x):
            weights = F.softplus(k @ queries.transpose(-2, -1), beta=math.log(2.0))
        return self._heads(self.unpack_q(x)), F.dropout(weights, self.attn_drop, self.training), kv

    def _output(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """Join the heads (B, H, N, E) and project them."""
        return self.proj_drop(clamp_fp16(self.proj(clamp_fp16(y.transpose(1, 2).flatten(2).to(dtype)))))

    def forward(self, x: Tensor, memory: Tensor, patch_valid: Tensor | None = None) -> Tensor:
        """
        Args:
            x: Tokens (B, N, C).
            memory: Memory (B, L, C); the layer is causal only if it does not depend on the tokens.
            patch_valid: (B, N) bool, True where a token is part of the image, anywhere in the row. A token that is not
                changes nothing, and what is returned for it means nothing. NOTE: the authors' code has no such mask.

        Returns:
            (B, N, C), what the tokens read, projected. The packed memory is another one for every token.

        Raises:
            ValueError: A shape does not fit, a mask is not bool, or (eager mode only) a row has no valid token.
        """
        if patch_valid is not None:
            check_valid(patch_valid, x.shape[0], x.shape[1], "patch_valid")
        return self.read(x, self.init_state(memory), patch_valid)[0]

    def init_state(self, memory: Tensor) -> CausalState:
        """The state of memory (B, L, C) before the first token; raises a ValueError if the shape does not fit."""
        _check(memory, "memory", None, None, self.dim)
        queries = self._heads(self.pack_q(memory)) * (self.num_heads / self.dim) ** 0.5
        sums = queries.new_zeros(*queries.shape[:-1], queries.shape[-1] * (1 if self.tie_kv else 2))
        return CausalState(queries, sums, torch.zeros(memory.shape[0], dtype=torch.long, device=memory.device))

    def read(self, x: Tensor, state: CausalState, patch_valid: Tensor | None = None) -> tuple[Tensor, CausalState]:
        """`forward` on the next tokens after a state, in parallel: a prompt, or one tile of many.

        Args:
            x: Tokens (B, N, C); N may be 0.
            state: From `init_state`, `read` or `step`.
            patch_valid: As in `forward`, but a row may be without any valid token.

        Returns:
            (B, N, C), and the state after the last valid token.

        Raises:
            ValueError: A shape does not fit, or a mask is not bool.
        """
        _check(x, "x", state.count.shape[0], None, self.dim)
        if patch_valid is not None:
            _check(patch_valid, "patch_valid", *x.shape[:2])
            if patch_valid.dtype != torch.bool:
                raise ValueError(f"patch_valid must be bool, got {patch_valid.dtype}")
            x = x.masked_fill(~patch_valid[:, :, None], 0.0)  # zero times what is not a number is not a number
        q, weights, kv = self._project(x, state.queries)
        read = torch.arange(1, x.shape[1] + 1, device=x.device).expand(x.shape[:2])
        total = state.count + x.shape[1]
        if patch_valid is not None:
            weights = weights.masked_fill(~patch_valid[:, None, :, None], 0.0)
            read = patch_valid.cumsum(dim=1)
            total = state.count + patch_valid.sum(dim=1)
        count = (state.count[:, None] + read).clamp(min=1)  # where nothing valid has been read, the sums are 0
        drop = self.attn_drop if self.training else 0.0
        with no_autocast(x):
            y, sums = causal_attend(q, kv, weights, count, state.sums, self.chunk, drop)
        return self._output(y, x.dtype), CausalState(state.queries, sums, total)

    def step(self, x: Tensor, state: CausalState) -> tuple[Tensor, CausalState]:
        """`read` for one token (B, C), as the recurrence: at the cost of the state's size, whatever was read.

        Returns (B, C) and the state after the token; raises a ValueError if a shape does not fit.
        """
        _check(x, "x", state.count.shape[0], self.dim)
        q, weights, kv = self._project(x[:, None], state.queries)
        E = q.shape[-1]
        count = state.count + 1
        with no_autocast(x):
            sums = state.sums + weights.transpose(-2, -1) @ kv
            means = sums / count[:, None, None, None]
            slots = (q * E**-0.5 @ means[..., :E].transpose(-2, -1)).softmax(dim=-1)
            y = F.dropout(slots, self.attn_drop, self.training) @ means[..., -E:]
        return self._output(y, x.dtype)[:, 0], CausalState(state.queries, sums, count)
