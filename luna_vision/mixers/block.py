"""The block of every mixer other than Luna: that of Luna without a memory.

Shapes: B batch, N patches, C width, H', W' patch grid with N = H' * W'.
"""

from typing import Final

import torch
from timm.layers import DropPath, LayerScale, LayerType, get_act_layer, get_norm_layer
from torch import Tensor, nn

from ..functional import add_residual
from ..layers import LocalMixing, Mlp

__all__ = ["MixerBlock"]


class MixerBlock(nn.Module):
    """Local mixing, a mixer and an MLP, with residuals; pre-norm (`norm_first`) or post-norm.

    It takes and returns a memory like `LunaBlock`, and leaves it alone.
    """

    norm_first: Final[bool]

    def __init__(
        self,
        dim: int,
        mixer: nn.Module | None,
        mlp_ratio: float = 4.0,
        norm_first: bool = True,
        local_mixing: bool = True,
        proj_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: LayerType | None = None,
        norm_layer: LayerType | None = None,
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            dim: Width C.
            mixer: A mixer (`luna_vision.mixers.base`), or None for no mixing at all: no norm and residual for it,
                either.
            mlp_ratio, norm_first, local_mixing, proj_drop, init_values: See `luna_vision.layers.LunaBlock`.
            drop_path, act_layer, norm_layer: See `luna_vision.layers.LunaBlock`.
        """
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        act_layer = get_act_layer(act_layer) or nn.GELU
        norm_layer = get_norm_layer(norm_layer) or get_norm_layer("layernorm")
        self.norm_first = norm_first
        self.updates_patches = True

        def layer_scale() -> nn.Module:
            return LayerScale(dim, init_values=init_values, **dd) if init_values else nn.Identity()

        def stochastic_depth() -> nn.Module:
            return DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

        self.local = LocalMixing(dim, **dd) if local_mixing else None
        self.attn = None
        if mixer is not None:
            self.norm1 = norm_layer(dim, **dd)
            self.attn = mixer
            self.ls1 = layer_scale()
            self.drop_path1 = stochastic_depth()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.ls2 = layer_scale()
        self.drop_path2 = stochastic_depth()

    @torch.jit.ignore
    def prune_memory_update(self) -> None:
        """Nothing: there is no memory (see `LunaBlock`)."""

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        grid_size: tuple[int, int],
        patch_valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            x: Patches (B, N, C).
            memory: (B, 0, C), returned as it is.
            grid_size: Rows and columns of the patch grid, row by row in N.
            patch_valid: (B, N) bool, True where a patch is part of the image. A patch that is not changes nothing.

        Returns:
            Patches (B, N, C) and the memory.

        Raises:
            ValueError: A shape does not fit, a mask is not bool, or (eager mode only) a row has no valid token.
        """
        if self.local is not None:
            x = add_residual(x, self.local(x, grid_size, patch_valid))
        if self.norm_first:
            if self.attn is not None:
                x = add_residual(x, self.drop_path1(self.ls1(self.attn(self.norm1(x), grid_size, patch_valid))))
            x = add_residual(x, self.drop_path2(self.ls2(self.mlp(self.norm2(x)))))
        else:
            if self.attn is not None:
                x = self.norm1(add_residual(x, self.drop_path1(self.ls1(self.attn(x, grid_size, patch_valid)))))
            x = self.norm2(add_residual(x, self.drop_path2(self.ls2(self.mlp(x)))))
        return x, memory
