"""Pack and unpack as functions on tensors, in two exact forms and as a formula.

    pack:    Y_P = Attn(query P,  key/value X)        reads the image into the memory
    unpack:  Y_X = Attn(query X,  key/value Y_P)      lets every patch read the memory

`naive` is the formula and the reference; `projected` forms queries, keys and values; `absorbed` folds the projections
into the short side; `pack_state` packs an image in parts. All are equal up to rounding.
"""

from .absorbed import (
    FORMS,
    GPU_COST,
    PACK_COST,
    UNPACK_COST,
    FormCost,
    Projections,
    absorbs,
    fold_queries,
    fold_slots,
    form_cost,
    pack_absorbed,
    slot_scores,
    unpack_absorbed,
    weighted_slots,
)
from .masks import check_valid, readable, zero_invalid
from .naive import attention_scores, attention_weights, naive_attend
from .pack_state import PackState, tile_absorbed, tile_projected
from .precision import add_residual, autocast_input, autocasts, clamp_fp16, no_autocast, upcast
from .projected import attend, split_heads

__all__ = [
    "FORMS",
    "FormCost",
    "GPU_COST",
    "PACK_COST",
    "PackState",
    "Projections",
    "UNPACK_COST",
    "absorbs",
    "add_residual",
    "attend",
    "attention_scores",
    "attention_weights",
    "autocast_input",
    "autocasts",
    "check_valid",
    "clamp_fp16",
    "fold_queries",
    "fold_slots",
    "form_cost",
    "naive_attend",
    "no_autocast",
    "pack_absorbed",
    "readable",
    "slot_scores",
    "split_heads",
    "tile_absorbed",
    "tile_projected",
    "unpack_absorbed",
    "upcast",
    "weighted_slots",
    "zero_invalid",
]
