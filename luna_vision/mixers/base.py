"""The common parts of the mixers: one signature, and the projections of self-attention.

A mixer is a module `Mixer(dim, num_heads, qkv_bias, proj_bias, attn_drop, proj_drop, device, dtype, *, ...)`, with its
own arguments after the star, and `forward(x, grid_size, patch_valid)`:

- x: patches (B, N, C),
- grid_size: rows H' and columns W' of the patch grid, with N = H' * W', row by row,
- patch_valid: (B, N) bool, True where a patch is part of the image; None if all are.

It returns (B, N, C) after the output projection. Invalid patches do not change the others; their own output is finite
and has no meaning.

Shapes: B batch, N patches, C width, H heads, E = C / H head width.
"""

import torch
from torch import Tensor, nn

from ..functional import autocasts, clamp_fp16, readable, split_heads, upcast, zero_invalid


def readable_patches(x: Tensor, patch_valid: Tensor | None) -> Tensor:
    """Which patches of x (B, ..., N, C or E) may be read, (B, N): all without a mask, else `readable` of the mask."""
    if patch_valid is None:
        return torch.ones(x.shape[0], x.shape[-2], dtype=torch.bool, device=x.device)
    return readable(patch_valid)


class SelfAttention(nn.Module):
    """Base of the mixers with a query, a key and a value for each patch. A subclass defines `mix`, or `attend`."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            dim: Width C.
            num_heads: H.
            qkv_bias: Bias on queries, keys and values.
            proj_bias: Bias on the output projection.
            attn_drop: Dropout of attention weights; without effect in mixers that have none.
            proj_drop: Dropout after the output projection.

        Raises:
            ValueError: `dim` is not a multiple of `num_heads`.
        """
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim ({dim}) must be a multiple of num_heads ({num_heads})")
        self.dim = dim
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.dd = {"device": device, "dtype": dtype}
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **self.dd)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **self.dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def dropout_p(self) -> float:
        """Probability of dropping an attention weight in this pass."""
        return self.attn_drop if self.training else 0.0

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, grid_size: tuple[int, int], patch_valid: Tensor | None = None
    ) -> Tensor:
        """Mix the patches: queries, keys and values (B, H, N, E) to (B, H, N, E)."""
        raise NotImplementedError

    def attend(self, x: Tensor, grid_size: tuple[int, int], patch_valid: Tensor | None) -> Tensor:
        """Patches (B, N, C) to (B, H, N, E), before the output projection."""
        q, k, v = split_heads(self.qkv(x), 3 * self.num_heads).chunk(3, 1)
        return self.mix(q, k, v, grid_size, patch_valid)

    def forward(self, x: Tensor, grid_size: tuple[int, int], patch_valid: Tensor | None = None) -> Tensor:
        """Map (B, N, C) to (B, N, C); arguments as at the top of this file.

        Raises:
            ValueError: The mask has another shape or type.
        """
        y = self.attend(zero_invalid(x, patch_valid), grid_size, patch_valid)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))


class WideAttention(SelfAttention):
    """`SelfAttention` mixed in float32 or wider: sums over very many patches lose too much in half precision.

    A subclass defines `mix_wide` in the place of `mix`.
    """

    def mix_wide(
        self, q: Tensor, k: Tensor, v: Tensor, grid_size: tuple[int, int], patch_valid: Tensor | None = None
    ) -> Tensor:
        """`mix` of float32 or float64 tensors, without autocast."""
        raise NotImplementedError

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, grid_size: tuple[int, int], patch_valid: Tensor | None = None
    ) -> Tensor:
        dtype = v.dtype
        q, k, v = upcast(q), upcast(k), upcast(v)
        if not torch.jit.is_scripting():
            if autocasts(v):
                with torch.autocast(v.device.type, enabled=False):
                    return clamp_fp16(self.mix_wide(q, k, v, grid_size, patch_valid).to(dtype))
        return clamp_fp16(self.mix_wide(q, k, v, grid_size, patch_valid).to(dtype))
