"""The absorbed form: projections are folded into the short side, so that no N x C query, key or value is ever formed.

For each head h, with queries Wq, keys Wk, values Wv and output projection Wo:

    pack    M_h = (P Wq_h + bq_h) Wk_h^T / sqrt(E)          folded once an image
            Y_h = softmax over N of (M_h X^T), times X, times Wv_h, plus bv_h
    unpack  K_h, V_h = keys, values of Y_P
            Y_X = sum over h of softmax over L of ((X Wq_h + bq_h) K_h^T / sqrt(E)), times (V_h Wo_h), plus bo
                  with Wq_h K_h^T and V_h Wo_h folded: two products with X and a softmax between them

The pack's key bias drops out of its softmax. Its value bias passes through, since attention's rows sum to 1. Small
matrices are folded in the type of the data, which under autocast is that of its products.

This unpack is the read of External Attention, `normalise(X M_k^T) M_v` (Guo et al. 2021, arXiv 2105.02358, section
3.2), by `slot_scores` and `weighted_slots`, with a memory that is written anew for each image.

Sources: Ma et al., "Luna: Linear Unified Nested Attention", NeurIPS 2021 (arXiv 2106.01540), section 3; absorbed
projections: DeepSeek-V2 (arXiv 2405.04434), section 2.1.

Shapes: B batch, N patches, L memory slots, C width, H heads, E = C / H head width, S = H L.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..utils.checks import check_option
from .masks import readable
from .precision import autocast_input, autocasts, clamp_fp16

FORMS = ("auto", "projected", "absorbed")


class FormCost(NamedTuple):
    """Cost of a multiply-add, relative to one in the projection of the patches."""

    absorbed: float
    """In the products of the patches with the folded matrices."""
    attention: float
    """In the attention of the projected form."""


# fitted to images of 1,024 patches and more in docs/results/benchmark/forms.json, by
# `python -m experiments.benchmarks.forms --fit-only`
PACK_COST = FormCost(1.1, 1.0)
UNPACK_COST = FormCost(0.5, 0.0)
# Counted, not measured: the passes over the patches and the multiply-adds break even at the same number of slots. See
# docs/gpu.md; `forms --device cuda` measures it, eager or compiled.
GPU_COST = FormCost(1.0, 0.0)


def form_cost(part: str, device: str) -> FormCost:
    """What decides between the forms of the "pack" or the "unpack" on a device type, such as "cuda"."""
    if device in ("cpu", "meta"):
        return PACK_COST if part == "pack" else UNPACK_COST
    return GPU_COST


def absorbs(form: str, memory_len: int, heads: int, dim: int, projections: int, cost: FormCost) -> bool:
    """Whether a layer runs in the absorbed form. This does not depend on the image.

    Multiply-adds of a patch: projected p C^2 + 2 L C, absorbed 2 H L C.

    Args:
        form: "projected" or "absorbed" forces that form; "auto" takes the faster one for many patches.
        memory_len: L.
        heads: H.
        dim: C.
        projections: p, the projections of the patches that the absorbed form saves: 1 for a tied pack, else 2.
        cost: From `form_cost`.

    Raises:
        ValueError: An unknown form.
    """
    check_option("the form", form, FORMS)
    if form != "auto":
        return form == "absorbed"
    L, H, C = memory_len, heads, dim
    return cost.absorbed * 2 * H * L * C < projections * C * C + cost.attention * 2 * L * C


class Projections(NamedTuple):
    """The weights of an attention, as `nn.Linear` has them: (C out, C in) and (C)."""

    heads: int
    w_query: Tensor
    b_query: Tensor | None
    w_key: Tensor
    """Keys have no bias of their own; tied ones have that of the values."""
    w_value: Tensor | None
    """None if tied: the keys are the values."""
    b_value: Tensor | None
    w_out: Tensor | None = None
    """Output projection, of an unpack."""
    b_out: Tensor | None = None


def _project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear map of (B, L, C), in its type."""
    return clamp_fp16(F.linear(x, weight.to(x.dtype), bias.to(x.dtype) if bias is not None else None))


def _per_head(x: Tensor, heads: int) -> Tensor:
    """(B, L, C) to (H, B * L, E), a view for products of all heads."""
    B, L, C = x.shape
    return x.reshape(B * L, heads, C // heads).transpose(0, 1)


def _slots(y: Tensor, B: int, L: int) -> Tensor:
    """(H, B * L, C) to (B, S, C): the row of head h and slot l is y[h, l]."""
    H, _, C = y.shape
    return y.view(H, B, L, C).transpose(0, 1).reshape(B, H * L, C)


def fold_queries(memory: Tensor, w: Projections) -> Tensor:
    """The queries of a memory (B, L, C), with the keys' projection and the scale folded in: (B, S, C), in its type."""
    B, L, C = memory.shape
    q = _project(memory, w.w_query, w.b_query) * math.sqrt(w.heads / C)
    return clamp_fp16(_slots(torch.bmm(_per_head(q, w.heads), w.w_key.to(q.dtype).view(w.heads, -1, C)), B, L))


def project_values(z: Tensor, total: Tensor | None, w: Projections) -> Tensor:
    """Weighted sums of patches to weighted sums of their values: (B, S, C) to (B, H, L, E), in their type.

    Args:
        z: The sums.
        total: Sums of the weights, (B, S); 1 if None. The bias of the values is multiplied by it.
        w: The projections.
    """
    B, S, C = z.shape
    H, L, E = w.heads, S // w.heads, C // w.heads
    w_value, b_value = w.w_value, w.b_value
    weight = (w.w_key if w_value is None else w_value).to(z.dtype).view(H, E, C).transpose(1, 2)
    z = z.view(B, H, L, C).transpose(0, 1).reshape(H, B * L, C)
    if b_value is None:
        y = torch.bmm(z, weight)
    elif total is None:
        y = torch.baddbmm(b_value.to(z.dtype).view(H, 1, E), z, weight)
    else:
        total = total.to(z.dtype).view(B, H, L).transpose(0, 1).reshape(H, B * L, 1)
        y = torch.bmm(z, weight) + total * b_value.to(z.dtype).view(H, 1, E)
    return y.view(H, B, L, E).transpose(0, 1)


def _rows_of_slots(x: Tensor) -> bool:
    """Whether the scores of a pack are (B, S, N): a GPU's softmax wants its rows whole; on a CPU (B, N, S) makes both
    products faster. An exported graph, which may run anywhere, has the latter, wherever it is made."""
    if not torch.jit.is_scripting():
        if torch.compiler.is_exporting():
            return False
    return x.is_cuda


def pack_absorbed(
    memory: Tensor, x: Tensor, w: Projections, valid: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    """Pack patches (B, N, C) into the memory (B, L, C): 4 H L C FLOPs a patch.

    Args:
        memory: Queries.
        x: Keys and values.
        w: The projections.
        valid: Which patches count, (B, N) bool.
        dropout_p: Probability of dropping an attention weight.

    Returns:
        The packed memory (B, L, C).
    """
    x = autocast_input(x)
    if not torch.jit.is_scripting():
        if autocasts(x):
            with torch.autocast(x.device.type, enabled=False):
                return pack_absorbed(memory, x, w, valid, dropout_p)
    m = fold_queries(memory.to(x.dtype), w)
    axis = 2 if _rows_of_slots(x) else 1
    scores = clamp_fp16(torch.bmm(x, m.transpose(1, 2)) if axis == 1 else torch.bmm(m, x.transpose(1, 2)))
    if valid is not None:
        scores = scores.masked_fill(~readable(valid).unsqueeze(3 - axis), float("-inf"))
    weights = scores.softmax(dim=axis)
    row_sum: Tensor | None = None
    total: Tensor | None = None
    if axis == 1 and weights.dtype == torch.float32:
        # along this axis, softmax adds one by one: over 262,144 patches its rows sum to 1 only within 2e-5
        total = weights.detach().sum(dim=1)
    if dropout_p > 0.0:
        weights = F.dropout(weights, dropout_p)
        row_sum = weights.sum(dim=axis)
    z = torch.bmm(weights.transpose(1, 2) if axis == 1 else weights, x)
    if total is not None:
        z = z / total.unsqueeze(2)
        row_sum = None if row_sum is None else row_sum / total
    return clamp_fp16(project_values(z, row_sum, w).transpose(1, 2).flatten(2))


def _slots_first(x: Tensor, slots: int) -> bool:
    """Whether the scores of an unpack are (B, S, N) instead of (B, N, S): a CPU's softmax over a last axis of fewer
    than 16 numbers takes as long as both products."""
    return slots < 16 and not _rows_of_slots(x)


def slot_scores(x: Tensor, m_key: Tensor, shift: Tensor | None = None, slots_first: bool = False) -> Tensor:
    """X M_k^T, (B, N, S), of tokens (B, N, C) and the keys of S slots (B, S, C); `shift` (B, S) is added. With
    `slots_first`, (B, S, N)."""
    a, b, axis = (m_key, x, 2) if slots_first else (x, m_key, 1)
    if shift is None:
        return torch.bmm(a, b.transpose(1, 2))
    return torch.baddbmm(shift.unsqueeze(axis), a, b.transpose(1, 2))


def weighted_slots(weights: Tensor, m_value: Tensor, bias: Tensor | None = None) -> Tensor:
    """A M_v, (B, N, C), of weights (B, N, S) and the values of S slots (B, S, C); `bias` (C) is added."""
    if bias is None:
        return torch.bmm(weights, m_value)
    return torch.baddbmm(bias[None, None, :], weights, m_value)


def fold_slots(packed: Tensor, w: Projections, fold_bias: bool = True) -> tuple[Tensor, Tensor | None, Tensor]:
    """What the patches read of a packed memory (B, L, C), with their projections folded in: keys (B, S, C), what is
    added to their scores (B, S), if the queries have a bias, and values (B, S, C), in its type.

    Args:
        packed: The memory.
        w: The projections, with that of the output.
        fold_bias: Whether the values hold the bias of the output.
    """
    B, L, C = packed.shape
    H, E = w.heads, C // w.heads
    b_query, w_value, w_out, b_out = w.b_query, w.w_value, w.w_out, w.b_out  # TorchScript refines only locals
    assert w_out is not None
    k = _project(packed, w.w_key, w.b_value if w_value is None else None)
    v = _per_head(k if w_value is None else _project(packed, w_value, w.b_value), H)
    k = _per_head(k * math.sqrt(H / C), H)
    m_key = clamp_fp16(_slots(torch.bmm(k, w.w_query.to(k.dtype).view(H, E, C)), B, L))
    w_out = w_out.to(k.dtype).view(C, H, E).permute(1, 2, 0)
    if b_out is not None and fold_bias:
        # each head's weights sum to 1: 1 / H of the bias in every slot adds up to the bias, without a pass over N x C
        m_value = torch.baddbmm(b_out.to(k.dtype).view(1, 1, C), v, w_out, beta=1.0 / H)
    else:
        m_value = torch.bmm(v, w_out)
    # for the same reason, a sum over the heads cannot leave the range of float16 where no slot is above 1 / H of it
    m_value = clamp_fp16(_slots(m_value, B, L), 1.0 / H)
    shift: Tensor | None = None
    if b_query is not None:
        shift = torch.bmm(k, b_query.to(k.dtype).view(H, E, 1)).view(H, B, L)
        shift = clamp_fp16(shift.transpose(0, 1).reshape(B, H * L))
    return m_key, shift, m_value


def unpack_absorbed(
    x: Tensor, packed: Tensor, w: Projections, valid: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    """Let every patch (B, N, C) read the packed memory (B, L, C), and project the result: 4 H L C FLOPs a patch.

    Args:
        x: Queries.
        packed: Keys and values.
        w: The projections, with that of the output.
        valid: Which slots may be read, (B, L) bool.
        dropout_p: Probability of dropping an attention weight.

    Returns:
        (B, N, C).
    """
    x = autocast_input(x)
    if not torch.jit.is_scripting():
        if autocasts(x):
            with torch.autocast(x.device.type, enabled=False):
                return unpack_absorbed(x, packed, w, valid, dropout_p)
    H, L, b_out = w.heads, packed.shape[1], w.b_out
    m_key, shift, m_value = fold_slots(packed.to(x.dtype), w, dropout_p == 0.0)
    slots_first = _slots_first(x, L)
    axis = 1 if slots_first else 2
    scores = clamp_fp16(slot_scores(x, m_key, shift, slots_first)).unflatten(axis, (H, L))
    if valid is not None:
        hidden = ~readable(valid).unsqueeze(1)
        scores = scores.masked_fill(hidden.unsqueeze(3 if slots_first else 1), float("-inf"))
    weights = scores.softmax(dim=axis + 1).flatten(axis, axis + 1)
    if slots_first:
        weights = weights.transpose(1, 2)
    if dropout_p == 0.0:
        return weighted_slots(weights, m_value)
    y = weighted_slots(F.dropout(weights, dropout_p), m_value)
    return clamp_fp16(y if b_out is None else y + b_out.to(x.dtype))
