"""Pack and unpack as functions on tensors, in two exact forms and as a formula.

    pack:    Y_P = Attn(query P,  key/value X)        reads the image into the memory
    unpack:  Y_X = Attn(query X,  key/value Y_P)      lets every patch read the memory

*Projected*: project X to queries, keys and values, and call `F.scaled_dot_product_attention`. *Absorbed*: fold the
projections into the short side, so that no N x C query, key or value is ever formed; then both attentions are two GEMMs
with X and a softmax between them. The two are equal up to rounding. `naive_attend` is the reference for both.

Absorbed, Luna's unpack is the read of External Attention, `normalise(X M_k^T) M_v`, with a memory that is written anew
for each image (`slot_scores` and `weighted_slots` are that read; `external_read` is External Attention's own).

Sources: Ma et al., "Luna: Linear Unified Nested Attention", NeurIPS 2021 (arXiv 2106.01540), section 3; Guo et al.,
"External Attention", 2021 (arXiv 2105.02358), section 3.2; absorbed projections: DeepSeek-V2 (arXiv 2405.04434), 2.1.

Shapes: B batch, N patches, L memory slots, C width, H heads, E = C / H head width, Q queries, K keys. Weights are those
of `nn.Linear`, (C out, C in).
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._tensors import (
    add_residual,
    autocast_input,
    autocasts,
    check_option,
    check_valid,
    matmul_input,
    no_autocast,
    readable,
    saturate,
    split_heads,
    wide,
)

__all__ = [
    "FormCost",
    "PACK_COST",
    "PackState",
    "UNPACK_COST",
    "absorb_from",
    "absorbs",
    "add_residual",
    "attend",
    "attention_weights",
    "check_valid",
    "double_normalise",
    "external_read",
    "fold_heads",
    "key_value",
    "naive_attend",
    "pack_absorbed",
    "pack_projected",
    "pack_queries",
    "project_by_head",
    "readable",
    "saturate",
    "slot_scores",
    "split_heads",
    "unpack_absorbed",
    "unpack_projected",
    "weighted_slots",
]


# ---------------------------------------------------------------- projected


def attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """Multi-head attention by `F.scaled_dot_product_attention`.

    Args:
        q: Queries (B, H, Q, E).
        k: Keys (B, H, K, E).
        v: Values (B, H, K, E).
        valid: Which keys may be attended to, (B, K) bool.
        dropout_p: Probability of dropping an attention weight.

    Returns:
        (B, Q, C), heads joined.
    """
    attn_mask = readable(valid)[:, None, None, :] if valid is not None else None
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p)
    return y.transpose(1, 2).flatten(2)


def attention_weights(q: Tensor, k: Tensor, valid: Tensor | None = None) -> Tensor:
    """The attention matrix itself, (B, H, Q, K), each row a distribution over the keys. Arguments as in `attend`."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if valid is not None:
        scores = scores.masked_fill(~readable(valid)[:, None, None, :], float("-inf"))
    return scores.softmax(dim=-1)


def naive_attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
    """Reference for both forms, written as the formula: every matrix is built.

    Args:
        q, k, v, valid: As in `attend`.
        keep: What dropout multiplies the weights with, (B, H, Q, K): 0 or 1 / (1 - p).

    Returns:
        (B, Q, C), heads joined.
    """
    weights = attention_weights(q, k, valid)
    if keep is not None:
        weights = weights * keep
    return (weights @ v).transpose(1, 2).flatten(2)


def key_value(
    x: Tensor, w_key: Tensor, w_value: Tensor | None, bias: Tensor | None, heads: int
) -> tuple[Tensor, Tensor]:
    """Keys and values (B, H, K, E) of tokens (B, K, C).

    Args:
        x: Tokens.
        w_key: Weight of the keys, and of the values too where `w_value` is None (tied).
        w_value: Weight of the values.
        bias: Bias of the values (C). Keys need none: a constant along the softmax drops out of it.
        heads: H.
    """
    if w_value is None:
        k = split_heads(saturate(F.linear(x, w_key, bias)), heads)
        return k, k
    return split_heads(saturate(F.linear(x, w_key)), heads), split_heads(saturate(F.linear(x, w_value, bias)), heads)


def pack_projected(
    memory: Tensor,
    x: Tensor,
    w_query: Tensor,
    b_query: Tensor | None,
    w_key: Tensor,
    w_value: Tensor | None,
    bias: Tensor | None,
    heads: int,
    valid: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Pack patches (B, N, C) into the memory (B, L, C).

    Args:
        memory, x: What asks and what is read.
        w_query, b_query: Projection of the memory to queries.
        w_key, w_value, bias: As in `key_value`.
        heads: H.
        valid: Which patches count, (B, N) bool.
        dropout_p: Probability of dropping an attention weight.

    Returns:
        The packed memory (B, L, C).
    """
    q = split_heads(saturate(F.linear(memory, w_query, b_query)), heads)
    k, v = key_value(x, w_key, w_value, bias, heads)
    return attend(q, k, v, valid, dropout_p)


def unpack_projected(
    x: Tensor,
    packed: Tensor,
    w_query: Tensor,
    b_query: Tensor | None,
    w_key: Tensor,
    w_value: Tensor | None,
    bias: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    heads: int,
    valid: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Let every patch (B, N, C) read the packed memory (B, L, C), and project what it read.

    Args:
        x, packed: What asks and what is read.
        w_query, b_query: Projection of the patches to queries.
        w_key, w_value, bias: As in `key_value`.
        w_out, b_out: Output projection.
        heads: H.
        valid: Which slots may be read, (B, L) bool.
        dropout_p: Probability of dropping an attention weight.

    Returns:
        (B, N, C).
    """
    q = split_heads(saturate(F.linear(x, w_query, b_query)), heads)
    k, v = key_value(packed, w_key, w_value, bias, heads)
    return saturate(F.linear(attend(q, k, v, valid, dropout_p), w_out, b_out))


# ---------------------------------------------------------------- absorbed

FORMS = ("auto", "projected", "absorbed")


class FormCost(NamedTuple):
    """What a multiply-add of a form's parts costs, in multiply-adds of the projection of the patches."""

    absorbed: float
    """Of the products of the patches with the folded matrices."""
    folding: float
    """Of folding, which happens once an image."""
    attention: float
    """Of the projected form's attention."""


# fitted to docs/results/benchmark/forms.json by `python -m luna_vision.benchmarks.forms --fit-only`
PACK_COST = FormCost(1.1, 2.0, 1.0)
UNPACK_COST = FormCost(0.5, 2.0, 0.0)


def absorb_from(
    form: str, memory_len: int, heads: int, dim: int, projections: int, cost: FormCost = PACK_COST
) -> float:
    """The number of patches from which on the absorbed form runs: 0 for always, infinity for never.

    Multiply-adds: projected p C^2 + 2 L C a patch; absorbed 2 H L C a patch, and 2 L C^2 an image for folding.

    Args:
        form: "projected" or "absorbed" forces it, "auto" takes the one that should be faster.
        memory_len: L.
        heads: H.
        dim: C.
        projections: p, the projections of the patches that absorbing saves: 1 for a tied pack, else 2.
        cost: `PACK_COST` or `UNPACK_COST`.

    Raises:
        ValueError: An unknown form.
    """
    check_option("the form", form, FORMS)
    if form != "auto":
        return 0.0 if form == "absorbed" else math.inf
    L, H, C = memory_len, heads, dim
    gain = projections * C * C + cost.attention * 2 * L * C - cost.absorbed * 2 * H * L * C
    return cost.folding * 2 * L * C * C / gain if gain > 0 else math.inf


def absorbs(patches: int, start: float) -> bool:
    """Whether to run the absorbed form for so many patches, given what `absorb_from` said.

    Compiled and exported code serves any number of patches, and takes the form that is right for many.
    """
    if not torch.jit.is_scripting():
        if not torch.jit.is_tracing() and not torch.compiler.is_compiling():
            return patches >= start
    return start < float("inf")


def project_by_head(x: Tensor, weight: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """A linear map of (B, L, C) to (H, B * L, E), in `wide` type.

    One batched product over heads serves the whole batch, is faster than a linear layer for so few rows, and gives
    what `fold_heads` takes.
    """
    B, L, C = x.shape
    x = wide(x).reshape(1, B * L, C).expand(heads, -1, -1)
    weight = wide(weight).view(heads, C // heads, C).transpose(1, 2)
    if bias is None:
        return torch.bmm(x, weight)
    return torch.baddbmm(wide(bias).view(heads, 1, C // heads), x, weight)


def fold_heads(x: Tensor, weight: Tensor, batch: int) -> Tensor:
    """Multiply each head's part of x by that head's part of a weight.

    Args:
        x: (H, B * L, E).
        weight: (H, E, C).
        batch: B.

    Returns:
        (B, H * L, C): for head h and slot l the row x[h, l] @ weight[h].
    """
    heads, rows, _ = x.shape
    y = torch.bmm(x, weight).view(heads, batch, rows // batch, -1)
    return y.transpose(0, 1).reshape(batch, heads * (rows // batch), -1)


def pack_queries(memory: Tensor, w_query: Tensor, b_query: Tensor | None, w_key: Tensor, heads: int) -> Tensor:
    """The memory's queries with the keys' projection and the scale folded in, (B, H * L, C), in `wide` type."""
    B, _, C = memory.shape
    q = project_by_head(memory, w_query, b_query, heads) * math.sqrt(heads / C)
    return fold_heads(q, wide(w_key).view(heads, C // heads, C), B)


def project_packed(z: Tensor, w_value: Tensor, heads: int) -> Tensor:
    """Project weighted sums of patches (B, H * L, C) to values: (B, L, H, E), in `wide` type, without the bias."""
    B, S, C = z.shape
    L = S // heads
    z = wide(z).view(B, heads, L, C).transpose(0, 1).reshape(heads, B * L, C)
    y = torch.bmm(z, wide(w_value).view(heads, C // heads, C).transpose(1, 2))
    return y.view(heads, B, L, C // heads).permute(1, 2, 0, 3)


def pack_values(z: Tensor, w_value: Tensor, bias: Tensor | None, row_sum: Tensor | None, heads: int) -> Tensor:
    """What was packed, (B, H * L, C) weighted sums of patches, as values with their bias, (B, L, C), in `wide` type.

    Rows of attention sum to 1, so the bias passes through; under dropout it is multiplied by `row_sum` (B, H * L).
    """
    B, S, C = z.shape
    y = project_packed(z, w_value, heads)
    if bias is not None:
        shift = wide(bias).view(heads, C // heads)
        y = y + (shift if row_sum is None else wide(row_sum).view(B, heads, S // heads, 1).transpose(1, 2) * shift)
    return y.reshape(B, S // heads, C)


def _pack_absorbed(
    memory: Tensor,
    x: Tensor,
    w_query: Tensor,
    b_query: Tensor | None,
    w_key: Tensor,
    w_value: Tensor | None,
    bias: Tensor | None,
    heads: int,
    valid: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    dtype = x.dtype
    x = matmul_input(x)
    m = saturate(pack_queries(memory, w_query, b_query, w_key, heads).to(x.dtype))
    # a GPU's softmax wants its rows whole; on a CPU (B, N, S) makes both products faster
    axis = 2 if x.is_cuda else 1
    scores = saturate(torch.bmm(x, m.transpose(1, 2)) if axis == 1 else torch.bmm(m, x.transpose(1, 2)))
    if valid is not None:
        scores = scores.masked_fill(~readable(valid).unsqueeze(3 - axis), float("-inf"))
    weights = scores.softmax(dim=axis)
    row_sum: Tensor | None = None
    total: Tensor | None = None
    if axis == 1 and weights.dtype == torch.float32:
        # along this axis, softmax adds up one after the other: over 262,144 patches its rows sum to 1 within 2e-5 only
        total = weights.detach().sum(dim=1)
    if dropout_p > 0.0:
        weights = F.dropout(weights, dropout_p)
        row_sum = weights.sum(dim=axis)
    z = torch.bmm(weights.transpose(1, 2) if axis == 1 else weights, x)
    if total is not None:
        z = z / total.unsqueeze(2)
        row_sum = None if row_sum is None else row_sum / total
    y = pack_values(z, w_key if w_value is None else w_value, bias, row_sum, heads)
    return saturate(y.to(dtype))


def pack_absorbed(
    memory: Tensor,
    x: Tensor,
    w_query: Tensor,
    b_query: Tensor | None,
    w_key: Tensor,
    w_value: Tensor | None,
    bias: Tensor | None,
    heads: int,
    valid: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """`pack_projected` without keys and values of the patches: 4 H L C FLOPs a patch. Arguments and result are the
    same.

    Small matrices are folded in float32, under autocast too.
    """
    x = autocast_input(x)
    if not torch.jit.is_scripting():
        if autocasts(x):
            with torch.autocast(x.device.type, enabled=False):
                return _pack_absorbed(memory, x, w_query, b_query, w_key, w_value, bias, heads, valid, dropout_p)
    return _pack_absorbed(memory, x, w_query, b_query, w_key, w_value, bias, heads, valid, dropout_p)


def slot_scores(x: Tensor, m_key: Tensor, shift: Tensor | None = None) -> Tensor:
    """X M_k^T, (B, N, S), of tokens (B, N, C) and the keys of S slots (B, S, C); `shift` (B, S) is added."""
    if shift is None:
        return torch.bmm(x, m_key.transpose(1, 2))
    return torch.baddbmm(shift[:, None, :], x, m_key.transpose(1, 2))


def weighted_slots(weights: Tensor, m_value: Tensor, bias: Tensor | None = None) -> Tensor:
    """A M_v, (B, N, C), of weights (B, N, S) and the values of S slots (B, S, C); `bias` (C) is added."""
    if bias is None:
        return torch.bmm(weights, m_value)
    return torch.baddbmm(bias[None, None, :], weights, m_value)


def double_normalise(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """External Attention's normalisation: softmax over the patches, then L1 over the slots, of scores (B, N, S).

    Patches that are not valid (B, N) are left out of the first. NOTE: computed as one softmax over the slots, in
    float32 or wider. It needs no small constant in the L1 norm, as the authors' code does, and is right even for a
    patch whose share of every slot underflows.
    """
    scores = wide(scores)
    counted = scores
    if valid is not None:
        counted = scores.masked_fill(~readable(valid)[:, :, None], float("-inf"))
    return (scores - counted.logsumexp(dim=1, keepdim=True)).softmax(dim=2)


def external_read(x: Tensor, m_key: Tensor, m_value: Tensor) -> Tensor:
    """External Attention: read a memory (S, C) that is the same for every image, with its double normalisation.

    Softmax over the tokens, then L1 over the slots (arXiv 2105.02358, section 3.2). Luna's absorbed unpack is this
    with a memory of the image's own and a softmax over each head's slots.
    """
    weights = double_normalise(slot_scores(x, m_key.expand(x.shape[0], -1, -1))).to(x.dtype)
    return weighted_slots(weights, m_value.expand(x.shape[0], -1, -1))


def _unpack_absorbed(
    x: Tensor,
    packed: Tensor,
    w_query: Tensor,
    b_query: Tensor | None,
    w_key: Tensor,
    w_value: Tensor | None,
    bias: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    heads: int,
    valid: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    B, L, C = packed.shape
    E = C // heads
    dtype = x.dtype
    x = matmul_input(x)
    k = project_by_head(packed, w_key, bias if w_value is None else None, heads)
    v = k if w_value is None else project_by_head(packed, w_value, bias, heads)
    k = k * math.sqrt(heads / C)
    m_key = saturate(fold_heads(k, wide(w_query).view(heads, E, C), B).to(x.dtype))
    m_value = fold_heads(v, wide(w_out).view(C, heads, E).permute(1, 2, 0), B)
    if b_out is not None and dropout_p == 0.0:
        # each head's weights sum to 1, so a share of the bias in every slot is the bias, and costs no pass over N x C
        m_value = m_value + wide(b_out) / heads
        b_out = None
    m_value = saturate(m_value.to(x.dtype))
    shift: Tensor | None = None
    if b_query is not None:
        shift = torch.bmm(k, wide(b_query).view(heads, E, 1)).view(heads, B, L)
        shift = saturate(shift.transpose(0, 1).reshape(B, heads * L).to(x.dtype))

    scores = saturate(slot_scores(x, m_key, shift)).unflatten(2, (heads, L))
    if valid is not None:
        scores = scores.masked_fill(~readable(valid)[:, None, None, :], float("-inf"))
    weights = scores.softmax(dim=-1)
    if dropout_p > 0.0:
        weights = F.dropout(weights, dropout_p)
    y = weighted_slots(weights.flatten(2), m_value, b_out.to(x.dtype) if b_out is not None else None)
    return saturate(y.to(dtype))


def unpack_absorbed(
    x: Tensor,
    packed: Tensor,
    w_query: Tensor,
    b_query: Tensor | None,
    w_key: Tensor,
    w_value: Tensor | None,
    bias: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    heads: int,
    valid: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """`unpack_projected` without queries of the patches: 4 H L C FLOPs a patch. Arguments and result are the same.

    Small matrices are folded in float32, under autocast too.
    """
    x = autocast_input(x)
    if not torch.jit.is_scripting():
        if autocasts(x):
            with torch.autocast(x.device.type, enabled=False):
                return _unpack_absorbed(
                    x, packed, w_query, b_query, w_key, w_value, bias, w_out, b_out, heads, valid, dropout_p
                )
    return _unpack_absorbed(x, packed, w_query, b_query, w_key, w_value, bias, w_out, b_out, heads, valid, dropout_p)


# ---------------------------------------------------------------- the pack in parts


@dataclass(frozen=True)
class PackState:
    """A pack of which only some of the patches have been read: a softmax over N in parts that merge exactly.

    `init(...).update(tile).update(tile).finish()` equals `pack_absorbed` of all tiles together, and so does any order
    and any tree of `merge`. Tiles of an image that fits in no memory, or strips of it on several machines, are packed
    so. States are values: every method returns a new one, and gradients pass through all of them. After `project`, a
    state is L x (C + 2 H) numbers an image, whatever was read.

    Source: online normalizer calculation for softmax, Milakov and Gimelshein 2018 (arXiv 1805.02867), section 3.1.
    """

    maximum: Tensor
    """(B, H, L), the largest score so far; -inf where nothing valid has been read. Carries no gradient."""
    total: Tensor
    """(B, H, L), the sum of exp(score - maximum)."""
    weighted: Tensor
    """(B, H, L, C), the sum of exp(score - maximum) times the patch; (B, H, L, E) after `project`."""
    queries: Tensor
    """(B, H * L, C), from `pack_queries`."""
    w_value: Tensor
    bias: Tensor | None
    projected: bool = False

    @classmethod
    def init(
        cls,
        memory: Tensor,
        w_query: Tensor,
        b_query: Tensor | None,
        w_key: Tensor,
        w_value: Tensor | None,
        bias: Tensor | None,
        heads: int,
    ) -> "PackState":
        """The state before anything is read. Arguments as in `pack_projected`."""
        with no_autocast(memory):
            queries = pack_queries(memory, w_query, b_query, w_key, heads)
        B, L, C = memory.shape
        return cls(
            maximum=queries.new_full((B, heads, L), float("-inf"), requires_grad=False),
            total=queries.new_zeros(B, heads, L),
            weighted=queries.new_zeros(B, heads, L, C),
            queries=queries,
            w_value=w_key if w_value is None else w_value,
            bias=bias,
        )

    def update(self, x: Tensor, valid: Tensor | None = None) -> "PackState":
        """Read more patches.

        Args:
            x: Patches (B, n, C); n may be 0.
            valid: Which of them count, (B, n) bool. A tile without any valid patch changes nothing.

        Raises:
            ValueError: The state was projected already.
        """
        if self.projected:
            raise ValueError("a projected PackState reads no more patches: update first, then project and merge")
        B, H, L, C = self.weighted.shape
        x = matmul_input(autocast_input(x))
        with no_autocast(x):
            scores = wide(saturate(torch.bmm(self.queries.to(x.dtype), x.transpose(1, 2))))
        if valid is not None:
            scores = scores.masked_fill(~valid[:, None, :], float("-inf"))
        scores = scores.view(B, H, L, -1)
        tile_max = scores.detach().amax(dim=-1) if x.shape[1] else torch.full_like(self.maximum, float("-inf"))
        weights = (scores - _finite(tile_max)[..., None]).exp()
        with no_autocast(x):
            weighted = torch.bmm(weights.view(B, H * L, -1).to(x.dtype), x).view(B, H, L, C)
        tile = dataclasses.replace(self, maximum=tile_max, total=weights.sum(dim=-1), weighted=wide(weighted))
        return self.merge(tile)

    def merge(self, other: "PackState") -> "PackState":
        """Both states' patches in one state. Associative and commutative, up to rounding.

        Raises:
            ValueError: One state is projected and the other is not.
        """
        if self.projected != other.projected:
            raise ValueError("a projected PackState merges with projected ones only")
        maximum = torch.maximum(self.maximum, other.maximum)
        mine, theirs = ((s.maximum - _finite(maximum)).exp() for s in (self, other))
        return dataclasses.replace(
            self,
            maximum=maximum,
            total=self.total * mine + other.total * theirs,
            weighted=self.weighted * mine[..., None] + other.weighted * theirs[..., None],
        )

    def project(self) -> "PackState":
        """Apply the value projection, which makes the state H times smaller; it can still be merged."""
        if self.projected:
            return self
        B, H, L, C = self.weighted.shape
        with no_autocast(self.weighted):
            values = project_packed(self.weighted.view(B, H * L, C), self.w_value, H)
        return dataclasses.replace(self, weighted=values.transpose(1, 2), projected=True)

    def finish(self) -> Tensor:
        """The packed memory (B, L, C), in `wide` type. Of an image without any valid patch it is the bias alone."""
        state = self.project()
        y = state.weighted / state.total.clamp(min=torch.finfo(state.total.dtype).tiny)[..., None]
        y = y.transpose(1, 2).flatten(2)
        return y if self.bias is None else y + wide(self.bias)


def _finite(maximum: Tensor) -> Tensor:
    """0 in the place of the -inf of a slot that has read nothing: exp(-inf - 0) is 0, where exp(-inf + inf) is NaN."""
    return maximum.masked_fill(maximum == float("-inf"), 0.0)
