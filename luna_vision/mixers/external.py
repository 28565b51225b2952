"""External Attention: all images read the same learned memory, two matrices of S slots.

    Y = normalise(Q M_k^T) M_v,   normalise: softmax over the N patches, then L1 over the S slots

Source: Guo et al., "Beyond Self-attention: External Attention using Two Linear Layers for Visual Tasks", 2021 (arXiv
2105.02358), section 3.2; section 3.3 for more than one head.

Softmax over the patches and then L1 over the slots is a softmax over the slots of scores from which each slot's
logarithm of its sum over the patches was taken. So this is Luna's absorbed unpack (`luna_vision.functional`), in which
that shift takes the place of the folded query bias, and with a memory that no image writes.

Shapes: B batch, N patches, C width, H heads, E = C / H head width, S slots.
"""

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..functional import check_valid, readable, slot_scores, split_heads, upcast, weighted_slots

__all__ = ["ExternalMixer", "double_normalise", "external_read"]


def double_normalise(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """External Attention's normalisation: softmax over the patches, then L1 over the slots, of scores (B, N, S).

    Patches that are not valid (B, N) are left out of the first. NOTE: computed as one softmax over the slots, in
    float32 or wider. It needs no small constant in the L1 norm, as the authors' code does, and is right even for a
    patch whose share of every slot underflows.
    """
    scores = upcast(scores)
    counted = scores
    if valid is not None:
        counted = scores.masked_fill(~readable(valid)[:, :, None], float("-inf"))
    return (scores - counted.logsumexp(dim=1, keepdim=True)).softmax(dim=2)


def external_read(x: Tensor, m_key: Tensor, m_value: Tensor) -> Tensor:
    """Read a memory (S, C) that is the same for every image: softmax over the tokens, then L1 over the slots. Luna's
    absorbed unpack is this with a memory of the image's own and a softmax over each head's slots."""
    weights = double_normalise(slot_scores(x, m_key.expand(x.shape[0], -1, -1))).to(x.dtype)
    return weighted_slots(weights, m_value.expand(x.shape[0], -1, -1))


@register_notrace_module
class ExternalMixer(nn.Module):
    """External Attention. Cost O(N C S).

    Parameters: input and output projection, 2 C^2; memory, 2 S C, or 2 S E with `multi_head`.
    NOTE: the authors' code for many heads widens the input four times and has biases on the memory. This is the paper's
        formula, which has neither; one on the scores would drop out of the softmax over the patches anyway.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        num_slots: int = 64,
        multi_head: bool = False,
        value_init: str = "transposed",
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            dim: Width C.
            num_heads: H, with `multi_head`.
            qkv_bias: Bias on the input projection.
            proj_bias: Bias on the output projection.
            attn_drop: Dropout of the normalised weights.
            proj_drop: Dropout after the output projection.
            num_slots: S.
            multi_head: Cut the width into heads, which all read one memory of width E.
            value_init: "transposed" to start M_v as M_k transposed, as the authors do, or "free" for a draw of its own.
                It is a parameter of its own either way.

        Raises:
            ValueError: `dim` is not a multiple of `num_heads`, no slots, or an unknown `value_init`.
        """
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim ({dim}) must be a multiple of num_heads ({num_heads})")
        if num_slots < 1:
            raise ValueError(f"num_slots must be at least 1, got {num_slots}")
        if value_init not in ("transposed", "free"):
            raise ValueError(f"value_init must be 'transposed' or 'free', got {value_init!r}")
        self.num_heads = num_heads if multi_head else 1
        self.value_init = value_init
        self.query = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.m_key = nn.Parameter(torch.empty(num_slots, dim // self.num_heads, **dd))
        self.m_value = nn.Parameter(torch.empty(num_slots, dim // self.num_heads, **dd))
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.init_weights()

    def init_weights(self) -> None:
        """Normal with variance 2 / width, as in the authors' code."""
        std = (2.0 / self.m_key.shape[1]) ** 0.5
        nn.init.normal_(self.m_key, std=std)
        if self.value_init == "free":
            nn.init.normal_(self.m_value, std=std)
        else:
            with torch.no_grad():
                self.m_value.copy_(self.m_key)

    def forward(self, x: Tensor, grid_size: tuple[int, int], patch_valid: Tensor | None = None) -> Tensor:
        """
        Args:
            x: Patches (B, N, C).
            grid_size: Rows and columns of the patch grid.
            patch_valid: (B, N) bool, True where a patch is part of the image.

        Returns:
            (B, N, C).

        Raises:
            ValueError: The mask has another shape or type.
        """
        B, N, C = x.shape
        if patch_valid is not None:
            check_valid(patch_valid, B, N, "patch_valid", values=False)
            x = x.masked_fill(~patch_valid[:, :, None], 0.0)
            patch_valid = patch_valid.repeat_interleave(self.num_heads, dim=0)
        q = split_heads(self.query(x), self.num_heads).flatten(0, 1)  # (B * H, N, E)
        weights = double_normalise(slot_scores(q, self.m_key.expand(q.shape[0], -1, -1)), patch_valid)
        weights = self.attn_drop(weights).to(q.dtype)
        y = weighted_slots(weights, self.m_value.expand(q.shape[0], -1, -1))
        y = y.unflatten(0, (B, self.num_heads)).transpose(1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(y))
