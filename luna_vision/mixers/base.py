"""What the mixers have in common: one signature, and the projections of self-attention.

A mixer is a module `Mixer(dim, num_heads, qkv_bias, proj_bias, attn_drop, proj_drop, ..., device, dtype)`, with its own
arguments in between and `forward(x, grid_size, patch_valid)`: patches (B, N, C), the patch grid (H', W') with
N = H' * W', row by row, and which patches are part of the image, (B, N) bool or None. It returns (B, N, C), output
projection included. Invalid patches must not change the others; what is returned for them means nothing, but is finite.

Shapes: B batch, N patches, C width, H heads, E = C / H head width.
"""

from torch import Tensor, nn

from ..functional import check_valid

__all__ = ["SelfAttention"]


class SelfAttention(nn.Module):
    """Queries, keys and values of all patches, `mix`, which a mixer defines, and the output projection."""

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
            attn_drop: Dropout of attention weights, where the mixer has them.
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
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, grid_size: tuple[int, int], patch_valid: Tensor | None = None
    ) -> Tensor:
        """Mix the patches: queries, keys and values (B, H, N, E) to (B, H, N, E)."""
        raise NotImplementedError

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
            x = x.masked_fill(~patch_valid[:, :, None], 0.0)  # zero times what is not a number is not a number
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = self.mix(q, k, v, grid_size, patch_valid)
        return self.proj_drop(self.proj(y.transpose(1, 2).reshape(B, N, C)))
