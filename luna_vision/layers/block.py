"""The blocks: local mixing, an attention and an MLP, with residuals. Luna's carries a memory; the others have none.

Shapes: B batch, N patches, L memory slots, C width, H', W' patch grid with N = H' * W'.
"""

from typing import Final

import torch
from timm.layers import DropPath, LayerScale, LayerType, get_act_layer, get_norm_layer
from torch import Tensor, nn

from .._tensors import add_residual, check_option, saturate
from .local_mixing import LocalMixing
from .luna import LunaAttention
from .mlp import Mlp

__all__ = ["LOCAL_MIXING", "MEMORY_MLP", "LunaBlock", "MixerBlock"]

# where the depthwise convolution stands: nowhere, on the residual before the attention, added to the attention's
# output, or inside the MLP
LOCAL_MIXING = ("none", "before", "attn", "mlp")
# what the memory has for an MLP: none, one of its own, or that of the patches
MEMORY_MLP = ("none", "own", "shared")


class Shell(nn.Module):
    """What all blocks have in common: everything but the attention."""

    norm_first: Final[bool]
    local_after: Final[bool]
    updates_patches: Final[bool]

    def __init__(
        self,
        dim: int,
        attn: nn.Module | None,
        mlp_ratio: float = 4.0,
        norm_first: bool = True,
        local_mixing: str = "before",
        proj_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: LayerType | None = None,
        norm_layer: LayerType | None = None,
        patches_read: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            dim: Width C.
            attn: The attention; None for no mixing at all: no norm and residual for it, either.
            mlp_ratio: Hidden width of the MLP over `dim`.
            norm_first: Norm before attention and MLP (pre-norm) instead of after the residual (post-norm).
            local_mixing: Where a depthwise 3x3 convolution over the patch grid stands: "none"; "before", with a
                residual of its own, before the attention; "attn", added to the attention's output; "mlp", in the
                hidden layer of the MLP.
            proj_drop: Dropout after projections and in the MLP.
            init_values: Initial LayerScale; none if None.
            drop_path: Stochastic depth rate.
            act_layer: Activation of the MLP, GELU if None.
            norm_layer: LayerNorm (eps 1e-6) if None.
            patches_read: Whether anything reads the patches after this block. If not, there is nothing after the
                attention.

        Raises:
            ValueError: An unknown `local_mixing`.
        """
        super().__init__()
        check_option("local_mixing", local_mixing, LOCAL_MIXING)
        self.dd = {"device": device, "dtype": dtype}
        self.dim = dim
        self.init_values = init_values
        self.act_layer = get_act_layer(act_layer) or nn.GELU
        self.norm_layer = get_norm_layer(norm_layer) or get_norm_layer("layernorm")
        self.hidden = int(dim * mlp_ratio)
        self.proj_drop = proj_drop
        self.norm_first = norm_first
        self.local_after = local_mixing == "attn"
        self.updates_patches = patches_read

        local = local_mixing == "before" or (self.local_after and patches_read)
        self.local = LocalMixing(dim, **self.dd) if local else None
        self.norm1 = self._norm(attn is not None and (norm_first or patches_read))
        self.attn = attn
        self.ls1 = self._layer_scale(attn is not None and patches_read)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.mlp = None
        if patches_read:
            self.norm2 = self._norm()
            self.mlp = self._mlp(local_mixing == "mlp")
            self.ls2 = self._layer_scale()
            self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def _norm(self, used: bool = True) -> nn.Module:
        return self.norm_layer(self.dim, **self.dd) if used else nn.Identity()

    def _layer_scale(self, used: bool = True) -> nn.Module:
        return (
            LayerScale(self.dim, init_values=self.init_values, **self.dd)
            if self.init_values and used
            else nn.Identity()
        )

    def _mlp(self, local_mixing: bool = False) -> Mlp:
        return Mlp(self.dim, self.hidden, local_mixing, act_layer=self.act_layer, drop=self.proj_drop, **self.dd)

    def before(self, x: Tensor, grid_size: tuple[int, int] | None, patch_valid: Tensor | None) -> Tensor:
        """Local mixing on the residual stream, which comes first in a block. Arguments as in `forward`."""
        if self.local is not None and not self.local_after:
            x = add_residual(x, self.local(x, grid_size, patch_valid))
        return x

    def _beside(self, h: Tensor, y: Tensor, grid_size: tuple[int, int] | None, patch_valid: Tensor | None) -> Tensor:
        """Local mixing of what the attention read, h, added to its output y."""
        if self.local is not None and self.local_after:
            y = add_residual(self.local(h, grid_size, patch_valid), y)
        return y


class MixerBlock(Shell):
    """The block of a mixer without a memory (`luna_vision.mixers`). It takes and returns one, and leaves it alone."""

    @torch.jit.ignore
    def prune_memory_update(self) -> None:
        """Nothing: there is no memory (see `LunaBlock`)."""

    def forward(
        self, x: Tensor, memory: Tensor, grid_size: tuple[int, int], patch_valid: Tensor | None = None
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
        x = self.before(x, grid_size, patch_valid)
        if self.attn is not None:
            h = self.norm1(x) if self.norm_first else x
            y = self._beside(h, self.attn(h, grid_size, patch_valid), grid_size, patch_valid)
            x = add_residual(x, self.drop_path1(self.ls1(y)))
            if not self.norm_first:
                x = self.norm1(x)
        elif self.local is not None and self.local_after:  # no mixing but the local one
            x = add_residual(x, self.drop_path1(self.local(x, grid_size, patch_valid)))
        if self.norm_first:
            x = add_residual(x, self.drop_path2(self.ls2(self.mlp(self.norm2(x), grid_size, patch_valid))))
        else:
            x = self.norm2(add_residual(x, self.drop_path2(self.ls2(self.mlp(x, grid_size, patch_valid)))))
        return x, memory


class LunaBlock(Shell):
    """Luna attention in the shell, with a residual and a norm for the memory, which goes on to the next block.

    The paper's block is post-norm (`norm_first=False`), without local mixing and without an MLP on the memory.
    """

    share_mlp: Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        pack_heads: int | None = None,
        mlp_ratio: float = 4.0,
        tie_kv: bool = True,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        norm_first: bool = True,
        local_mixing: str = "before",
        memory_mlp: str = "none",
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: LayerType | None = None,
        norm_layer: LayerType | None = None,
        memory_read: bool = True,
        patches_read: bool = True,
        memory_len: int = 8,
        pack_form: str = "auto",
        unpack_form: str = "auto",
        query_gain: float = 1.0,
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            dim, num_heads, pack_heads, tie_kv, qkv_bias, proj_bias, attn_drop: See `LunaAttention`.
            memory_len, pack_form, unpack_form, query_gain: See `LunaAttention`.
            mlp_ratio, norm_first, local_mixing, init_values, drop_path, act_layer, norm_layer: See `Shell`.
            memory_mlp: An MLP on the memory: "none", one of its "own", or "shared" with the patches.
            proj_drop: Dropout after projections, in the MLP, and on the memory's update.
            memory_read: Whether anything reads the memory after this block. If not, its update gets no parameters of
                its own: they could not be learned.
            patches_read: Whether anything reads the patches after this block. If not, they are only packed.

        Raises:
            ValueError: `dim` is not a multiple of a head count, or an unknown option.
        """
        dd = {"device": device, "dtype": dtype}
        check_option("memory_mlp", memory_mlp, MEMORY_MLP)
        attn = LunaAttention(
            dim,
            num_heads,
            pack_heads,
            tie_kv,
            qkv_bias,
            proj_bias,
            attn_drop,
            proj_drop,
            pack_only=not patches_read,
            memory_len=memory_len,
            pack_form=pack_form,
            unpack_form=unpack_form,
            query_gain=query_gain,
            **dd,
        )
        shell = (mlp_ratio, norm_first, local_mixing, proj_drop, init_values, drop_path, act_layer, norm_layer)
        super().__init__(dim, attn, *shell, patches_read, **dd)
        self.norm1_memory = self._norm()
        self.ls1_memory = self._layer_scale()
        self.drop_memory = nn.Dropout(proj_drop)

        self.share_mlp = memory_mlp == "shared" and memory_read and patches_read
        self.mlp_memory = self.norm2_memory = self.ls2_memory = None
        if memory_mlp != "none" and memory_read:
            self.norm2_memory = self._norm()
            self.mlp_memory = None if self.share_mlp else self._mlp()
            self.ls2_memory = self._layer_scale()
        if not memory_read:
            self.prune_memory_update()

    @torch.jit.ignore
    def prune_memory_update(self) -> None:
        """Remove the parameters of the memory's update, in a last block whose memory nobody reads: they would get no
        gradient. The memory is still returned, but it is another one.
        """
        self.mlp_memory = self.norm2_memory = self.ls2_memory = None
        self.ls1_memory = nn.Identity()
        if not self.norm_first:
            self.norm1_memory = nn.LayerNorm(self.attn.dim, elementwise_affine=False)

    def _memory_mlp(self, memory: Tensor) -> Tensor:
        if self.mlp_memory is not None:
            return self.mlp_memory(memory)
        assert self.mlp is not None  # shared
        return self.mlp(memory)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        grid_size: tuple[int, int] | None = None,
        patch_valid: Tensor | None = None,
        memory_valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            x: Patches (B, N, C).
            memory: Memory (B, L, C).
            grid_size: Rows and columns of the patch grid, row by row in N; needed by local mixing.
            patch_valid: (B, N) bool, True where a patch is part of the image. A patch that is not changes nothing.
            memory_valid: (B, L) bool, True where a slot may be read.

        Returns:
            Patches (B, N, C) and memory (B, L, C) for the next block.

        Raises:
            ValueError: A shape does not fit, a mask is not bool, or (eager mode only) a row has no valid token.
        """
        x = self.before(x, grid_size, patch_valid)
        h = self.norm_patches(x)
        y, packed = self.attn(h, self.norm_memory(memory), patch_valid, memory_valid)
        memory = self.add_packed(memory, packed)
        if self.mlp is not None:
            x = self.update_patches(x, h, y, grid_size, patch_valid)
        return x, self.mix_memory(memory)

    # The parts of `forward`, for whoever runs a block on parts of an image (`luna_vision.streaming`).

    @torch.jit.ignore
    def halo(self) -> int:
        """Rows of the patch grid above and below a part of it that `update_patches` has to be given for that part."""
        mixes = self.mlp is not None and ((self.local_after and self.local is not None) or self.mlp.local is not None)
        return int(mixes)

    def norm_patches(self, x: Tensor) -> Tensor:
        """What the attention sees of the patches."""
        return self.norm1(x) if self.norm_first else x

    def norm_memory(self, memory: Tensor) -> Tensor:
        """What the attention sees of the memory."""
        return self.norm1_memory(memory) if self.norm_first else memory

    def add_packed(self, memory: Tensor, packed: Tensor) -> Tensor:
        """The memory's residual and norm, given what was packed (B, L, C)."""
        memory = saturate(memory + self.drop_path1(self.ls1_memory(self.drop_memory(packed))))
        return memory if self.norm_first else self.norm1_memory(memory)

    def update_patches(
        self, x: Tensor, h: Tensor, y: Tensor, grid_size: tuple[int, int] | None, patch_valid: Tensor | None = None
    ) -> Tensor:
        """The patches after attention and MLP; h is what the attention saw of them, y what it gave, used up here."""
        x = add_residual(x, self.drop_path1(self.ls1(self._beside(h, y, grid_size, patch_valid))))
        if self.norm_first:
            return add_residual(x, self.drop_path2(self.ls2(self.mlp(self.norm2(x), grid_size, patch_valid))))
        x = self.norm1(x)
        return self.norm2(add_residual(x, self.drop_path2(self.ls2(self.mlp(x, grid_size, patch_valid)))))

    def mix_memory(self, memory: Tensor) -> Tensor:
        """The memory's MLP, if it has one."""
        if self.ls2_memory is not None and self.norm2_memory is not None:
            if self.norm_first:
                return saturate(memory + self.ls2_memory(self._memory_mlp(self.norm2_memory(memory))))
            return self.norm2_memory(saturate(memory + self.ls2_memory(self._memory_mlp(memory))))
        return memory

    @torch.jit.ignore
    def attention_maps(
        self,
        x: Tensor,
        memory: Tensor,
        grid_size: tuple[int, int] | None = None,
        patch_valid: Tensor | None = None,
        memory_valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The attention matrices of this block for its inputs. Arguments as in `forward`, result as in
        `LunaAttention`."""
        x = self.before(x, grid_size, patch_valid)
        return self.attn.attention_maps(self.norm_patches(x), self.norm_memory(memory), patch_valid, memory_valid)
