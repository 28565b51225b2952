"""The blocks: local mixing, an attention and an MLP, with residuals. Luna's carries a memory; the others have none.

`LunaBlock` is written on *tiles*, contiguous rows of the patch grid, and `forward` is the case of one tile:

    x = mix_tile(x)                    what a block does before its attention
    h = norm_tile(x)                   what the attention sees of the patches
    packed = ...                       what the memory reads of all tiles
    memory, read = close_pack(...)     the memory after the block, and what of it the patches read
    x = unpack_tile(x, h, read)        what a block does after the pack

Whoever runs a block in pieces (`luna_vision.execution`) packs by `pack_query` and `pack_tile`, merges the states of
all tiles exactly, and gives `mix_tile` and `unpack_tile` as many rows more on each side as `mix_halo` and `unpack_halo`
say, whose results it throws away.

Shapes: B batch, N patches, n patches of a tile, L memory slots, C width, H', W' patch grid with N = H' * W'.
"""

from typing import Final

import torch
from timm.layers import DropPath, LayerScale, LayerType, get_act_layer, get_norm_layer
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..functional import PackState, add_residual, autocast_input, check_valid, clamp_fp16
from ..functional.kernels import Norm, kernels_pay
from ..utils.checks import check_option
from .local_mixing import LocalMixing
from .luna import LunaAttention
from .mlp import Mlp, SwiGlu, rows_of_parts
from .plain import has_hooks, is_plain_norm

__all__ = ["LOCAL_MIXING", "MEMORY_MLP", "MLPS", "READ", "LunaBlock", "MixerBlock"]

# where the depthwise convolution stands: nowhere, on the residual before the attention, added to the attention's
# output, or inside the MLP
LOCAL_MIXING = ("none", "before", "attn", "mlp")
# what the memory has for an MLP: none, one of its own, or that of the patches
MEMORY_MLP = ("none", "own", "shared")
# the MLP of the patches (and, shared, of the memory)
MLPS = {"gelu": Mlp, "swiglu": SwiGlu}
# what of a block's output is read; what is not read has no parameters, since they could not be learned
READ = ("patches", "memory", "both")


# Above this many numbers, a new tensor comes from the system page by page on a CPU, which takes longer than the sum.
LARGE = 2**18


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
        read: str = "both",
        mlp: str = "swiglu",
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
            act_layer: Activation of the MLP; if None, GELU, or SiLU for the gate of "swiglu".
            norm_layer: LayerNorm (eps 1e-6) if None.
            read: What of the block's output is read, one of `READ`. Where that is the memory alone, there is nothing
                after the attention.
            mlp: "swiglu", gated (see `SwiGlu`), or "gelu", timm's of as many parameters.

        Raises:
            ValueError: An unknown `local_mixing`, `read` or `mlp`.
        """
        super().__init__()
        check_option("mlp", mlp, MLPS)
        self.mlp_class = MLPS[mlp]
        check_option("local_mixing", local_mixing, LOCAL_MIXING)
        check_option("read", read, READ)
        self.dd = {"device": device, "dtype": dtype}
        self.dim = dim
        self.init_values = init_values
        self.act_layer = get_act_layer(act_layer)
        self.norm_layer = get_norm_layer(norm_layer) or get_norm_layer("layernorm")
        self.hidden = int(dim * mlp_ratio)
        self.proj_drop = proj_drop
        self.norm_first = norm_first
        self.local_after = local_mixing == "attn"
        self.updates_patches = read != "memory"

        local = local_mixing == "before" or (self.local_after and self.updates_patches)
        self.local = LocalMixing(dim, **self.dd) if local else None
        self.norm1 = self._norm(attn is not None and (norm_first or self.updates_patches))
        self.attn = attn
        self.ls1 = self._layer_scale(attn is not None and self.updates_patches)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.mlp = None
        if self.updates_patches:
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

    def _mlp(self, local_mixing: bool = False) -> nn.Module:
        act = {} if self.act_layer is None else {"act_layer": self.act_layer}
        return self.mlp_class(self.dim, self.hidden, local_mixing, drop=self.proj_drop, **act, **self.dd)

    def mix_tile(self, x: Tensor, grid_size: tuple[int, int] | None, patch_valid: Tensor | None = None) -> Tensor:
        """Local mixing on the residual stream, which comes first in a block. Arguments as in `forward`."""
        if self.local is not None and not self.local_after:
            x = self._add_residual(x, self.local(x, grid_size, patch_valid))
        return x

    def norm_tile(self, x: Tensor) -> Tensor:
        """What the attention sees of the patches; under autocast in its type, in which all read it."""
        return autocast_input(self.norm1(x) if self.norm_first else x)

    def _add_residual(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y, in y's memory where that saves time and no hook of the block can have kept y."""
        in_place = True
        if not torch.jit.is_scripting():
            in_place = self._adds_in_place(x)
        return add_residual(x, y, in_place)

    @torch.jit.ignore
    def _adds_in_place(self, x: Tensor) -> bool:
        if isinstance(x, torch.fx.Proxy):  # has no size to look at
            return True
        return (torch.compiler.is_compiling() or (x.is_cpu and x.numel() >= LARGE)) and not has_hooks(self)

    def _add_attention(
        self, x: Tensor, h: Tensor, y: Tensor, grid_size: tuple[int, int] | None, patch_valid: Tensor | None
    ) -> Tensor:
        """The patches after the attention, which saw h of them and gave y."""
        if self.local is not None and self.local_after:
            y = self._add_residual(self.local(h, grid_size, patch_valid), y)
        x = self._add_residual(x, self.drop_path1(self.ls1(y)))
        return x if self.norm_first else self.norm1(x)

    def _add_mlp(
        self,
        x: Tensor,
        grid_size: tuple[int, int] | None,
        patch_valid: Tensor | None,
        normed: Tensor | None = None,
    ) -> Tensor:
        if self.norm_first:
            h = self.norm2(x) if normed is None else normed
            return self._add_residual(x, self.drop_path2(self.ls2(self.mlp(h, grid_size, patch_valid))))
        return self.norm2(self._add_residual(x, self.drop_path2(self.ls2(self.mlp(x, grid_size, patch_valid)))))


class MixerBlock(Shell):
    """The block of a mixer without a memory (`luna_vision.mixers`). It takes and returns one, and leaves it alone."""

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
            ValueError: A shape does not fit, or a mask is not bool.
        """
        x = self.mix_tile(x, grid_size, patch_valid)
        if self.attn is not None:
            h = self.norm_tile(x)
            x = self._add_attention(x, h, self.attn(h, grid_size, patch_valid), grid_size, patch_valid)
        elif self.local is not None and self.local_after:  # no mixing but the local one
            x = self._add_residual(x, self.drop_path1(clamp_fp16(self.local(x, grid_size, patch_valid))))
        return self._add_mlp(x, grid_size, patch_valid), memory


@register_notrace_module  # a block is one node of an fx graph: masks and sizes are branches that fx cannot trace
class LunaBlock(Shell):
    """Luna attention in the shell, with a residual and a norm for the memory, which goes on to the next block.

    The paper's block is post-norm (`norm_first=False`), without local mixing and without an MLP on the memory.

    Attributes:
        mix_halo: Rows of the patch grid above and below a tile that `mix_tile` has to be given with it: 0 or 1, as
            `luna_vision.execution` keeps no more.
        unpack_halo: Likewise, for `unpack_tile`.
        pack_by_row: Whether the memory reads each row of the patch grid by itself, and packs the mean, weighted by the
            valid patches: see `LunaVit.set_pack_by_row`.
        drops_values: Whether activations or attention weights are dropped in training, one by one: a tile that is
            computed again would be another.
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
        read: str = "both",
        memory_len: int = 8,
        pack_form: str = "auto",
        unpack_form: str = "auto",
        query_gain: float = 1.0,
        mlp: str = "swiglu",
        use_kernels: bool | None = None,
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            dim, num_heads, pack_heads, tie_kv, qkv_bias, proj_bias, attn_drop: See `LunaAttention`.
            memory_len, pack_form, unpack_form, query_gain: See `LunaAttention`.
            mlp_ratio, norm_first, local_mixing, init_values, drop_path, act_layer, norm_layer, read, mlp: See `Shell`.
            memory_mlp: An MLP on the memory: "none", one of its "own", or "shared" with the patches.
            proj_drop: Dropout after projections, in the MLP, and on the memory's update.
            use_kernels: Run local mixing, norm, pack, unpack and residuals by fused kernels where there are some: on a
                GPU with Triton, at a width that is a multiple of 64, pre-norm, both attentions absorbed, and nothing
                dropped but whole paths; not in tiles and not in exported graphs. The result is the same up to
                rounding. If None, all but the local mixing where they were measured to be no slower (an H200, width
                384, bfloat16): without gradients, in half precision, from 1,024 patches on. Images a second with them
                over those without, compiled / eager: 1.27 / 1.19 with 4,096 patches, 1.00 / 1.21 with 1,024, and 0.67
                / 0.87 with 196. In training, compiled operations were faster than the kernels.

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
            pack_only=read == "memory",
            memory_len=memory_len,
            pack_form=pack_form,
            unpack_form=unpack_form,
            query_gain=query_gain,
            **dd,
        )
        shell = (mlp_ratio, norm_first, local_mixing, proj_drop, init_values, drop_path, act_layer, norm_layer)
        super().__init__(dim, attn, *shell, read, mlp, **dd)
        used = read != "patches"  # the memory after the block
        self.norm1_memory = self._norm()
        self.ls1_memory = self._layer_scale()
        self.drop_memory = nn.Dropout(proj_drop)

        self.share_mlp = memory_mlp == "shared" and self.updates_patches and used
        self.mlp_memory = self.norm2_memory = self.ls2_memory = None
        if memory_mlp != "none" and used:
            self.norm2_memory = self._norm()
            self.mlp_memory = None if self.share_mlp else self._mlp()
            self.ls2_memory = self._layer_scale()
        if not used:
            self.prune_memory_update()

        self.mix_halo = int(local_mixing == "before")
        self.unpack_halo = int(self.updates_patches and local_mixing in ("attn", "mlp"))
        self.drops_values = attn_drop > 0.0 or proj_drop > 0.0
        self.use_kernels = use_kernels
        self.pack_by_row = False

    @torch.jit.ignore
    def prune_memory_update(self) -> None:
        """Remove the parameters of the memory's update, in a last block whose memory nobody reads: they would get no
        gradient. The memory is still returned, but it is another one.
        """
        self.mlp_memory = self.norm2_memory = self.ls2_memory = None
        self.ls1_memory = nn.Identity()
        if not self.norm_first:
            self.norm1_memory = nn.LayerNorm(self.dim, elementwise_affine=False)

    @torch.jit.ignore
    def set_memory_len(self, memory_len: int) -> None:
        """Expect so many slots (see `LunaAttention.set_memory_len`)."""
        self.attn.set_memory_len(memory_len)

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
            ValueError: A shape does not fit, or a mask is not bool. Rows without a valid token are not looked for: a
                model does that once.
        """
        if patch_valid is not None:
            check_valid(patch_valid, x.shape[0], x.shape[1], "patch_valid", values=False)
        if not torch.jit.is_scripting():
            if self._takes_kernels(x, memory.shape[1]):
                return self._forward_kernels(x, memory, grid_size, patch_valid, memory_valid)
            if self.pack_by_row:
                return self._forward_by_row(x, memory, grid_size, patch_valid, memory_valid)
        elif self.pack_by_row:
            raise ValueError("TorchScript does not pack by row: set_pack_by_row(False), or use torch.export")
        x = self.mix_tile(x, grid_size, patch_valid)
        h = self.norm_tile(x)
        packed = self.attn.pack(h, self._norm_memory(memory), patch_valid)
        memory, read = self._update_memory(memory, packed)
        return self.unpack_tile(x, h, read, grid_size, patch_valid, memory_valid), memory

    @torch.jit.ignore
    def _forward_by_row(
        self,
        x: Tensor,
        memory: Tensor,
        grid_size: tuple[int, int] | None,
        patch_valid: Tensor | None,
        memory_valid: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """`forward` with `pack_by_row`. Attention weights of the pack are not dropped."""
        if grid_size is None:
            raise ValueError("pack_by_row needs grid_size")
        x = self.mix_tile(x, grid_size, patch_valid)
        h = self.norm_tile(x)
        state = self.pack_tile(h, self.pack_query(memory), patch_valid, grid_size[0])
        memory, read = self.close_pack(memory, state)
        return self.unpack_tile(x, h, read, grid_size, patch_valid, memory_valid), memory

    @torch.jit.ignore
    def _takes_kernels(self, x: Tensor, memory_len: int) -> bool:
        if self.pack_by_row or not self.norm_first or self.local_after or torch.compiler.is_exporting():
            return False
        if not (kernels_pay(x) if self.use_kernels is None else self.use_kernels):
            return False
        return is_plain_norm(self.norm1) and self.attn.takes_kernels(x, memory_len)

    @torch.jit.ignore
    def _forward_kernels(
        self,
        x: Tensor,
        memory: Tensor,
        grid_size: tuple[int, int] | None,
        patch_valid: Tensor | None,
        memory_valid: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """`forward`, by fused kernels."""
        if self.local is not None and self.use_kernels and self.local.takes_kernel():
            x = self.local.add_to(x, grid_size, patch_valid)
        else:
            x = self.mix_tile(x, grid_size, patch_valid)
        norm1 = Norm(self.norm1.weight, self.norm1.bias, self.norm1.eps)
        packed = self.attn.pack_normed(x, self._norm_memory(memory), norm1, patch_valid)
        memory, read = self._update_memory(memory, packed)
        if self.mlp is None:
            return x, memory
        norm2 = None
        if is_plain_norm(self.norm2):
            norm2 = Norm(self.norm2.weight, self.norm2.bias, self.norm2.eps)

        def branch(y: Tensor) -> Tensor:
            return self.drop_path1(self.ls1(y))

        x, normed = self.attn.unpack_normed(x, read, norm1, memory_valid, norm2, branch)
        return self._add_mlp(x, grid_size, patch_valid, normed), memory

    @torch.jit.ignore
    def pack_query(self, memory: Tensor) -> Tensor:
        """What the memory (B, L, C) asks of every tile, for `pack_tile`."""
        return self.attn.pack_query(self._norm_memory(memory))

    @torch.jit.ignore
    def pack_tile(
        self, h: Tensor, query: Tensor, patch_valid: Tensor | None = None, rows: int | list[int] = 1
    ) -> PackState:
        """What the memory reads of a tile (B, n, C), as `norm_tile` gives it; n is at least 1.

        Args:
            h, query, patch_valid: See `LunaAttention.pack_tile`.
            rows: How many the tile has or, without a mask, the patches of each.
        """
        return self.attn.pack_tile(h, query, patch_valid, rows if self.pack_by_row else None)

    @torch.jit.ignore
    def pack_scores(self, h: Tensor, memory: Tensor) -> Tensor:
        """The scores (B, pack heads, L, n) of a tile (B, n, C), as `norm_tile` gives it, for a memory (B, L, C)."""
        return self.attn.pack_scores(h, self._norm_memory(memory))

    @torch.jit.ignore
    def close_pack(self, memory: Tensor, packed: PackState) -> tuple[Tensor, Tensor]:
        """The memory's part of a block, once all patches were read.

        Args:
            memory: (B, L, C), as it entered the block.
            packed: What it read of all tiles, merged.

        Returns:
            The memory (B, L, C) for the next block, and what `unpack_tile` lets the patches read.
        """
        return self._update_memory(memory, clamp_fp16(packed.finish().to(memory.dtype)))

    def _update_memory(self, memory: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
        packed = packed.to(memory.dtype)
        memory = clamp_fp16(memory + self.drop_path1(self.ls1_memory(self.drop_memory(packed))))
        if not self.norm_first:
            memory = self.norm1_memory(memory)
        if self.norm2_memory is not None and self.ls2_memory is not None:
            y = self._memory_mlp(self.norm2_memory(memory) if self.norm_first else memory)
            memory = clamp_fp16(memory + self.ls2_memory(y))
            if not self.norm_first:
                memory = self.norm2_memory(memory)
        return memory, packed  # the paper's patches read the pack as it is, before residual and norm

    def unpack_tile(
        self,
        x: Tensor,
        h: Tensor,
        read: Tensor,
        grid_size: tuple[int, int] | None = None,
        patch_valid: Tensor | None = None,
        memory_valid: Tensor | None = None,
    ) -> Tensor:
        """A tile (B, n, C) after the block; n is `grid_size` of the tile.

        Args:
            x: The tile, as `mix_tile` gives it.
            h: The same, as `norm_tile` gives it.
            read: (B, L, C), from `close_pack`.
            grid_size, patch_valid, memory_valid: As in `forward`.
        """
        if self.mlp is None:
            return x
        x = self._add_attention(x, h, self.attn.unpack(h, read, memory_valid), grid_size, patch_valid)
        return self._add_mlp(x, grid_size, patch_valid)

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
        if self.pack_by_row:
            raise ValueError("attention maps show one softmax over all patches, and not pack_by_row")
        h, slots = self.norm_tile(self.mix_tile(x, grid_size, patch_valid)), self._norm_memory(memory)
        _, read = self._update_memory(memory, self.attn.pack(h, slots, patch_valid))
        return self.attn.pack_map(h, slots, patch_valid), self.attn.unpack_map(h, read, memory_valid)

    @torch.jit.ignore
    def tile_numbers(self, memory_len: int) -> int:
        """How many numbers a patch takes at most on its way through a block, for planning."""
        C, in_mlp = self.dim, 0
        unpack, pack = self.attn.num_heads * memory_len, self.attn.pack_heads * memory_len
        if self.mlp is not None:
            mixes = self.mlp.local is not None
            in_mlp = 2 * C if self._mlp_rows() else (4 if mixes else 2) * self.mlp.fc1.out_features
        return max(
            3 * C + 3 * unpack,
            6 * C,  # the projected form: queries, what was read, and its heads joined
            4 * C + in_mlp,  # x, what the attention sees, the residual, the norm; the MLP
            6 * C + 3 * pack,  # a band and its rows that waited, the convolution and its copy, the norm; scores
        )

    @torch.jit.ignore
    def small_numbers(self, memory_len: int) -> int:
        """How many numbers a block makes that do not depend on the patches: folded matrices, the state of a pack, and
        the hidden layer of an MLP that maps patches part by part."""
        slots = memory_len * max(self.attn.num_heads, self.attn.pack_heads)
        hidden = 0 if self.mlp is None else self.mlp.fc1.out_features
        return 8 * slots * self.dim + 8 * self.dim**2 + 2 * 2 * self._mlp_rows() * hidden

    @torch.jit.ignore
    def _mlp_rows(self) -> int:
        """How many patches the MLP maps at a time, without gradients; 0 for all."""
        return 0 if self.mlp is None or self.mlp.local is not None else rows_of_parts(self.mlp)

    def _norm_memory(self, memory: Tensor) -> Tensor:
        """What the attention sees of the memory."""
        return self.norm1_memory(memory) if self.norm_first else memory

    def _memory_mlp(self, memory: Tensor) -> Tensor:
        if self.mlp_memory is not None:
            return self.mlp_memory(memory)
        assert self.mlp is not None  # shared
        return self.mlp(memory, mix=False)
