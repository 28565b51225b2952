"""Luna ViT: a ViT shell in which a short memory, packed from the image and read by all patches, does the mixing.

The cost is linear in the number of patches. Any image size works: positions are computed for the grid at hand, and
sides that are not whole patches are padded up.

Source: Ma et al., "Luna: Linear Unified Nested Attention", NeurIPS 2021 (arXiv 2106.01540); the shell is that of the
Vision Transformer, Dosovitskiy et al., ICLR 2021 (arXiv 2010.11929), as timm builds it.

Shapes: B batch, N patches, L memory slots, C width, H', W' patch grid with N = H' * W'.
"""

import difflib
import inspect
import math
from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    AttentionPoolLatent,
    LayerType,
    calculate_drop_path_rates,
    get_act_layer,
    get_device_dtype,
    get_norm_layer,
    to_2tuple,
)
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    generate_default_cfgs,
    register_model,
    register_notrace_function,
    resolve_pretrained_cfg,
)
from timm.models._features import FeatureGetterNet, feature_take_indices
from timm.models._input import update_model_args, update_model_input_size
from torch import Tensor, nn

from ..functional import clamp_fp16
from ..layers import POS_EMBEDS, ConvPatchEmbed, LunaBlock, MixerBlock
from ..layers.patches import PatchEmbed, PatchMaskDrop, blank_invalid, check_image, pad_to_patches, residual_stream
from ..mixers import create_mixer
from ..utils.checks import check_at_least, check_option
from .checkpoints import checkpoint_filter_fn
from .pooling import POOL_TYPES, Pool, key_mask, pool_tokens
from .weights import SHIPPED, check_shipped, shipped_cfg

__all__ = ["AttentionMaps", "LunaVit", "checkpoint_filter_fn", "join_tokens", "prune_memory_update"]


class AttentionMaps(NamedTuple):
    """Where a block's memory slots look and what its patches read, shaped to lie over the image."""

    pack: Tensor
    """(B, pack heads, L, H', W'): the weight with which slot l reads each patch; sums to 1 over the grid."""
    unpack: Tensor
    """(B, heads, L, H', W'): the weight with which each patch reads slot l; sums to 1 over the slots."""


@register_notrace_function
def initial_memory(learned: Tensor | None, memory: Tensor | None, x: Tensor) -> Tensor:
    """The memory that enters the first block, (B, L, C): the caller's if given, else the learned one (1, L, C).

    Args:
        learned: None for a mixer without memory; what enters is then (B, 0, C).
        memory: The caller's.
        x: Patches (B, N, C).

    Raises:
        ValueError: The caller's has another shape than (B, L, C), or the model has no memory.
    """
    batch = x.shape[0]
    if learned is None:
        if memory is not None:
            raise ValueError("memory was given to a model whose mixer has none")
        return x.new_empty(batch, 0, x.shape[2])
    if memory is None:
        return learned.repeat(batch, 1, 1)  # no view, which would be a parameter's where there are no gradients, too
    if memory.dim() != 3 or memory.shape[0] != batch or memory.shape[1:] != learned.shape[1:]:
        want = [batch, learned.shape[1], learned.shape[2]]
        raise ValueError(f"memory must have shape {want}, got {list(memory.shape)}")
    return memory.to(learned.dtype)


@register_notrace_function
def join_tokens(memory: Tensor, x: Tensor) -> Tensor:
    """Memory (B, L, C), then patches (B, N, C): (B, L + N, C); without a memory, the patches as they are."""
    return torch.cat([memory, x], dim=1) if memory.shape[1] else x


class LunaVit(nn.Module):
    """Luna ViT backbone, with the contract of timm's `VisionTransformer`; the memory is its prefix tokens."""

    mask_stem: Final[bool]

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["", "avg", "max", "avgmax", "map", "token", "both"] | None = None,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        memory_len: int = 8,
        pack_heads: int | None = None,
        mlp_ratio: float = 4.0,
        tie_kv: bool = True,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        norm_first: bool = True,
        local_mixing: Literal["none", "before", "attn", "mlp"] = "before",
        mlp: Literal["swiglu", "gelu"] = "swiglu",
        memory_mlp: Literal["none", "own", "shared"] = "none",
        stem: Literal["patch", "conv"] = "patch",
        mixer: str = "luna",
        mixer_args: dict[str, Any] | None = None,
        pos_embed: Literal["fourier", "learn", "none"] = "fourier",
        init_values: float | None = None,
        final_norm: bool | None = None,
        last_block: Literal["auto", "final_pack", "patches", "both"] = "auto",
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: LayerType | None = None,
        act_layer: LayerType | None = None,
        pack_form: Literal["auto", "projected", "absorbed"] = "auto",
        unpack_form: Literal["auto", "projected", "absorbed"] = "auto",
        query_gain: float = 8.0,
        pack_by_row: bool = False,
        use_kernels: bool | None = None,
        device=None,
        dtype=None,
        **of_vit: Any,
    ) -> None:
        """
        Args:
            img_size: Image size that the model is meant for, pixels. Nothing depends on it: any size runs.
            patch_size: Side of a patch, pixels.
            in_chans: Image channels.
            num_classes: Classes of the head; 0 for none.
            global_pool: What the head reads: the patches ("avg", "max", "avgmax", or "map" for attention pooling), the
                mean memory slot ("token", timm's word for prefix tokens), the mean of both means ("both"), or "" for
                all tokens. None is "both" with a memory, and "avg" without one.
            embed_dim: Width C.
            depth: Number of blocks.
            num_heads: Heads of the unpack.
            memory_len: L, the number of memory slots.
            pack_heads: Heads of the pack; as many as `num_heads` if None.
            mlp_ratio: Hidden width of the MLP over `embed_dim`.
            tie_kv: One projection for key and value.
            qkv_bias: Bias on queries, keys and values where it can be learned.
            proj_bias: Bias on the attention's output projection.
            norm_first: Pre-norm blocks; post-norm as in the paper if False.
            local_mixing: Where a depthwise 3x3 convolution stands in every block, if anywhere: see
                `luna_vision.layers.block.Shell`.
            mlp: The MLP of the blocks, see `luna_vision.layers.block.Shell`.
            memory_mlp: An MLP on the memory in every block: none, one of its own, or that of the patches.
            stem: "patch", one linear map of each patch, or "conv", 3x3 convolutions of stride 2.
            mixer: What mixes the patches, a name in `luna_vision.mixers.MIXERS`. All but "luna" have no memory: no
                prefix tokens, and `memory_len`, `pack_heads`, `tie_kv`, `memory_mlp`, `query_gain`, `use_kernels` and
                the forms mean nothing. `pack_by_row` is refused.
            mixer_args: Arguments of that mixer alone.
            pos_embed: "fourier" (computed), "learn" (a reference grid, resampled) or "none".
            init_values: Initial LayerScale; none if None.
            final_norm: Norm after the last block; if None, only with `norm_first`.
            last_block: How the network ends. "final_pack": after the last block, the memory packs the finished patches
                once more. "patches": with a block that has no parts for a memory that nobody reads. "both": with a
                block like any other. "auto" is "final_pack" where `global_pool` reads the memory, and "patches"
                elsewhere. A model whose pooling or depth was changed later keeps here how it was made.
            drop_rate: Dropout before the head.
            pos_drop_rate: Dropout after the position embedding.
            patch_drop_rate: Share of patches whose content is hidden in training.
            proj_drop_rate: Dropout after projections and in the MLPs.
            attn_drop_rate: Dropout of attention weights.
            drop_path_rate: Stochastic depth, rising to this rate in the last block.
            norm_layer: LayerNorm (eps 1e-6) if None.
            act_layer: Activation of the MLPs; if None, GELU, or SiLU for the gate of "swiglu".
            pack_form: How the pack is computed; the result is the same, see `luna_vision.functional`.
            unpack_form: The same for the unpack.
            query_gain: What the initial query projections are multiplied by, see `LunaAttention.scale_queries`.
            pack_by_row: See `set_pack_by_row`.
            use_kernels: Run parts of the blocks by fused kernels on a GPU; if None, where they were measured to be no
                slower. See `LunaBlock`.
            **of_vit: Arguments of timm's `VisionTransformer` that say what holds here anyway.

        Raises:
            ValueError: An unknown name or argument, no blocks or slots, or a width that the heads do not divide.
        """
        super().__init__()
        _check_arguments(type(self).__name__, of_vit, set())
        dd = {"device": device, "dtype": dtype}
        if global_pool is None:
            global_pool = "both" if mixer == "luna" else "avg"
        for name, value, options in (
            ("global_pool", global_pool, POOL_TYPES),
            ("pos_embed", pos_embed, POS_EMBEDS),
            ("stem", stem, ("patch", "conv")),
        ):
            check_option(name, value, options)
        sizes = dict(memory_len=memory_len, depth=depth, patch_size=min(to_2tuple(patch_size)))
        check_at_least(1, **sizes, in_chans=in_chans, embed_dim=embed_dim)
        check_at_least(0, num_classes=num_classes)
        if mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio must be above 0, got {mlp_ratio}")
        for name, rate in (
            ("drop_rate", drop_rate),
            ("pos_drop_rate", pos_drop_rate),
            ("patch_drop_rate", patch_drop_rate),
            ("proj_drop_rate", proj_drop_rate),
            ("attn_drop_rate", attn_drop_rate),
            ("drop_path_rate", drop_path_rate),
        ):
            if not 0.0 <= rate < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {rate}")
        norm_layer = get_norm_layer(norm_layer) or get_norm_layer("layernorm")
        final_norm = norm_first if final_norm is None else final_norm
        if mixer != "luna":
            memory_len = 0
            if global_pool in ("token", "both"):
                raise ValueError(f"global_pool={global_pool!r} reads the memory, and mixer={mixer!r} has none")
        check_option("last_block", last_block, ("auto", "final_pack", "patches", "both"))
        last_block = _end_for(global_pool) if last_block == "auto" else last_block
        if memory_len == 0 and last_block != "patches":
            raise ValueError(f"last_block={last_block!r} has its memory read, and this model's mixer has none")

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.last_block = last_block
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = self.memory_len = memory_len
        self.grad_checkpointing = False
        # how blocks run in eager mode, `block_runner(block, x, memory, grid_size, patch_valid)`, in the place of a call
        self.block_runner: Callable[..., tuple[Tensor, Tensor]] | None = None

        if stem == "conv":
            self.patch_embed = ConvPatchEmbed(img_size, patch_size, in_chans, embed_dim, **dd)
            self._traits = {"first_conv": "patch_embed.stem.0.conv"}  # what timm adapts to other channels
        else:
            any_size = dict(strict_img_size=False, dynamic_img_pad=True, flatten=False, output_fmt="NHWC")
            self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, **any_size, **dd)
        self.mask_stem = stem == "conv"
        # Rows of patches above a tile whose pixels `embed_tile` takes, too: a convolutional stem sees less than a patch
        # above each patch, and nothing below, since its convolutions have stride 2.
        self.embed_halo = int(self.mask_stem)
        self.pos_embed = POS_EMBEDS[pos_embed](embed_dim, **dd) if pos_embed != "none" else None
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.patch_drop = PatchMaskDrop(patch_drop_rate) if patch_drop_rate > 0.0 else None
        self.memory = nn.Parameter(torch.empty(1, memory_len, embed_dim, **dd)) if memory_len else None

        drop_paths = calculate_drop_path_rates(drop_path_rate, depth)
        shell = dict(mlp_ratio=mlp_ratio, norm_first=norm_first, local_mixing=local_mixing, init_values=init_values)
        shell.update(mlp=mlp, proj_drop=proj_drop_rate, act_layer=act_layer, norm_layer=norm_layer, **dd)
        attention = dict(num_heads=num_heads, qkv_bias=qkv_bias, proj_bias=proj_bias, attn_drop=attn_drop_rate)

        def block(drop_path: float, read: str, **shell: Any) -> nn.Module:
            mixing = create_mixer(mixer, mixer_args, dim=embed_dim, proj_drop=proj_drop_rate, **attention, **dd)
            if mixer != "luna":
                return MixerBlock(embed_dim, mixing, drop_path=drop_path, **shell)
            return LunaBlock(
                embed_dim,
                pack_heads=pack_heads,
                tie_kv=tie_kv,
                memory_mlp=memory_mlp,
                drop_path=drop_path,
                read=read,
                memory_len=memory_len,
                pack_form=pack_form,
                unpack_form=unpack_form,
                query_gain=query_gain,
                use_kernels=use_kernels,
                **attention,
                **shell,
            )

        reads = ["both"] * (depth - 1) + ["patches" if last_block == "patches" else "both"]
        self.blocks = nn.ModuleList(block(*args, **shell) for args in zip(drop_paths, reads, strict=True))
        self.final_pack = None
        if last_block == "final_pack":
            self.final_pack = block(0.0, "memory", **shell | {"local_mixing": "none"})
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [dict(module=f"blocks.{i}", num_chs=embed_dim, reduction=reduction) for i in range(depth)]
        self.norm = norm_layer(embed_dim, **dd) if final_norm else nn.Identity()

        self.attn_pool = None
        if global_pool == "map":
            heads = dict(num_heads=num_heads, mlp_ratio=mlp_ratio)
            layers = dict(norm_layer=norm_layer, act_layer=get_act_layer(act_layer) or nn.GELU)
            self.attn_pool = AttentionPoolLatent(embed_dim, **heads, **layers, **dd)
        if pack_by_row:
            self.set_pack_by_row()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise linear layers to a scale that suits the width, and the memory to unit scale.

        The scale is sqrt(2 / (5 C)), Nguyen and Salazar 2019 (arXiv 1910.05895), section 2.2. It is about the 0.02 of
        timm's ViT at width 768 to 1024, and keeps narrow models from starting far too small. Slots of unit scale
        stay apart once what they pack, which they have in common, is added to them.

        Args:
            needs_reset: Reset what else has parameters, such as norms and convolutions. They come reset; those of a
                model that was built on the device "meta" do not.
        """
        for module in self.modules():
            if needs_reset and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        std = math.sqrt(2.0 / (5.0 * self.embed_dim))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if hasattr(module, "scale_queries"):
                module.scale_queries()
            elif module is not self and hasattr(module, "init_weights"):
                module.init_weights()
        if self.memory is not None:
            nn.init.normal_(self.memory, std=1.0)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay should leave alone: the memory, the positions, and a mixer's global tokens."""
        tokens = {name for name, _ in self.named_parameters() if name.endswith("global_tokens")}
        return tokens | {"memory", "pos_embed.rows.weight", "pos_embed.columns.weight", "pos_embed.ref_grid"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer decay; the initial memory belongs to the stem."""
        return dict(
            stem=r"^(?:memory|pos_embed|patch_embed)",
            blocks=[(r"^blocks\.(\d+)", None), (r"^(?:final_pack|norm|attn_pool)", (99999,))],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def set_pack_by_row(self, enable: bool = True) -> None:
        """Let the memory read each row of the patch grid by itself, and pack the mean over the rows.

        A softmax over many more patches than in training picks rarer ones than it ever met. Rows grow with the side of
        the image, not with its area. This is for dense features of scenes that are much larger than the images of
        training and show more of the same. Where one small thing decides, the mean over rows hides it.

        Raises:
            ValueError: The mixer has no memory, or attention weights are dropped, which a pack by row does not know.
        """
        if self.memory is None:
            raise ValueError("pack_by_row needs a memory, and this model's mixer has none")
        if enable and any(block.attn.attn_drop for block in self.stages()):
            raise ValueError("pack_by_row drops no attention weights: leave out attn_drop_rate")
        for block in self.stages():
            block.pack_by_row = enable
        update_model_args(self, pack_by_row=enable)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head.

        Args:
            num_classes: Classes of the new head; 0 for none.
            global_pool: As in the constructor; unchanged if None. The last block keeps the parts that it was built
                with.

        Raises:
            ValueError: An unknown pooling, "map" for a model that was built without it, or one that reads the memory
                for a model without one.
        """
        if global_pool is not None:
            self._check_pool("global_pool", global_pool)
            if global_pool != "map":
                self.attn_pool = None
            self.global_pool = global_pool
            update_model_args(self, global_pool=global_pool)
            self._record_last_block()
        self.num_classes = num_classes
        dd = get_device_dtype(self)
        self.head = nn.Linear(self.embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    def _check_pool(self, name: str, pool_type: str) -> None:
        """Raise a ValueError unless this model can pool as the argument `name` says."""
        check_option(name, pool_type, POOL_TYPES)
        if pool_type == "map" and self.attn_pool is None:
            raise ValueError(f"{name}='map' has weights of its own: choose it when the model is created")
        if pool_type in ("token", "both") and self.memory is None:
            raise ValueError(f"{name}={pool_type!r} reads the memory, and this model's mixer has none")

    def _record_last_block(self) -> None:
        """Have the last block built as it is, wherever the model is built again from its arguments."""
        if self.last_block != _end_for(self.global_pool):
            update_model_args(self, last_block=self.last_block)

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Change the image size that the model is meant for (any runs anyway), or resample to another patch size."""
        self.patch_embed.set_input_size(img_size=img_size, patch_size=patch_size)
        for info in self.feature_info:
            info["reduction"] = self.patch_embed.feat_ratio()
        update_model_input_size(self, self.patch_embed.img_size, patch_size=patch_size)

    @torch.jit.ignore
    def set_memory_len(self, memory_len: int) -> None:
        """Run with the first slots of the memory only, as a model that was built with so many would.

        Nothing is lost: the parameter and the state dict keep all slots, and the number can be raised again. Prefix
        tokens, a memory that is handed in or comes out, streaming and exported graphs have this many. Good for models
        that were trained so (`luna_vision.tasks.NestedMemory`); of another, any prefix is an accident.

        Args:
            memory_len: 1 to the number of slots that the model was built with.

        Raises:
            ValueError: It is not that, or the model's mixer has no memory.
        """
        if self.memory is None:
            raise ValueError("set_memory_len shortens a memory, and this model's mixer has none")
        if not 1 <= memory_len <= self.memory.shape[1]:
            raise ValueError(f"memory_len must be 1 to {self.memory.shape[1]}, as built, got {memory_len}")
        self.num_prefix_tokens = self.memory_len = memory_len
        for block in self.stages():
            block.set_memory_len(memory_len)

    @torch.jit.ignore
    def stages(self) -> list[nn.Module]:
        """All blocks, and the final pack if there is one: a `LunaBlock` that leaves the patches alone."""
        return [*self.blocks, *([] if self.final_pack is None else [self.final_pack])]

    def learned_memory(self) -> Tensor | None:
        """The slots in use of the learned initial memory, (1, L, C); None for a mixer without memory."""
        return None if self.memory is None else self.memory[:, : self.memory_len]

    @torch.jit.ignore
    def embed_tile(
        self, x: Tensor, rows: Tensor, columns: Tensor, above: int = 0, patch_valid: Tensor | None = None
    ) -> Tensor:
        """Patches (B, n, m, C) of a rectangle of n x m patches of an image, beside which nothing is valid.

        Args:
            x: Its pixels (B, in_chans, height, width), with those of `above` rows of patches more.
            rows, columns: Coordinates of the n rows and the m columns, from `grid_coords` of the image's grid.
            above: Rows of patches to leave out of the result: `embed_halo`, or fewer where the image begins.
            patch_valid: (B, (above + n) m) bool, of the rectangle and the rows above it.
        """
        x = pad_to_patches(x, self.patch_embed.patch_size)
        x = blank_invalid(x, patch_valid, self.patch_embed.patch_size, values=False)
        x = self.patch_embed(x, patch_valid) if self.mask_stem else self.patch_embed(x)
        x = clamp_fp16(x)[:, above:]
        if self.pos_embed is not None:
            x = self.pos_embed.add_at(x, rows, columns)
        return residual_stream(x)

    @torch.jit.ignore
    def new_pool(self, parts: dict[str, Tensor] | None = None) -> Pool:
        """`pool` over patches that come in parts; `parts` is where another one was."""
        return Pool("map" if self.attn_pool is not None else self.global_pool, self.attn_pool, parts)

    def _embed(
        self, x: Tensor, patch_valid: Tensor | None, memory: Tensor | None
    ) -> tuple[Tensor, Tensor, tuple[int, int], Tensor | None]:
        """Images to patches (B, N, C), memory (B, L, C), grid size, and the mask of the patches that are to be read."""
        x = check_image(x, self.in_chans)
        x = pad_to_patches(x, self.patch_embed.patch_size)
        x = blank_invalid(x, patch_valid, self.patch_embed.patch_size)
        x = clamp_fp16(self.patch_embed(x, patch_valid) if self.mask_stem else self.patch_embed(x))
        B, H, W, C = x.shape
        if self.pos_embed is not None:
            x = self.pos_embed(x, patch_valid)
        x = self.pos_drop(residual_stream(x).reshape(B, H * W, C))
        if self.patch_drop is not None:
            x, patch_valid = self.patch_drop(x, patch_valid)
        return x, initial_memory(self.learned_memory(), memory, x), (H, W), patch_valid

    def _run_blocks(
        self, x: Tensor, memory: Tensor, grid_size: tuple[int, int], patch_valid: Tensor | None, keep: list[int]
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Run the blocks.

        Args:
            x, memory, grid_size, patch_valid: From `_embed`.
            keep: Blocks of which the input is wanted; the number of blocks means the output of the last. Blocks after
                the last of these do not run, unless it is empty.

        Returns:
            Patches and memory, and those that enter the blocks of `keep`.
        """
        kept: list[tuple[Tensor, Tensor]] = []
        last = max(keep) if len(keep) > 0 else len(self.blocks)
        for i, block in enumerate(self.blocks):
            if i in keep:
                kept.append((x, memory))
            if i < last:
                if torch.jit.is_scripting():
                    x, memory = block(x, memory, grid_size, patch_valid)
                else:
                    x, memory = self._run_block(block, x, memory, grid_size, patch_valid)
        if len(self.blocks) in keep:
            kept.append((x, memory))
        return x, memory, kept

    @torch.jit.unused
    def _run_block(
        self, block: nn.Module, x: Tensor, memory: Tensor, grid_size: tuple[int, int], patch_valid: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.block_runner is not None:
            return self.block_runner(block, x, memory, grid_size, patch_valid)
        if self.grad_checkpointing:
            return checkpoint(block, x, memory, grid_size, patch_valid)
        return block(x, memory, grid_size, patch_valid)

    def _run_final_pack(
        self, x: Tensor, memory: Tensor, grid_size: tuple[int, int], patch_valid: Tensor | None
    ) -> Tensor:
        """The memory (B, L, C) that leaves the network, from what leaves the last block."""
        if self.final_pack is None:
            return memory
        if torch.jit.is_scripting():
            return self.final_pack(x, memory, grid_size, patch_valid)[1]
        return self._run_block(self.final_pack, x, memory, grid_size, patch_valid)[1]

    def encode(
        self, x: Tensor, patch_valid: Tensor | None = None, memory: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run all blocks, and stop before the final norm.

        Args:
            x: Images (B, in_chans, height, width) of any size; sides are padded with zeros to whole patches.
            patch_valid: (B, N) bool, True where a patch is part of the image, for images of different sizes in one
                batch.
            memory: (B, L, C), takes the place of the learned initial memory; that of an earlier call carries over.

        Returns:
            Patches (B, N, C) and memory (B, L, C). This memory is the one to hand in again.

        Raises:
            ValueError: A shape does not fit, or (eager mode, a mask on the CPU only) an image has no valid patch.
        """
        x, memory, grid_size, patch_valid = self._embed(x, patch_valid, memory)
        keep: list[int] = []
        x, memory, _ = self._run_blocks(x, memory, grid_size, patch_valid, keep)
        return x, self._run_final_pack(x, memory, grid_size, patch_valid)

    def forward_features(self, x: Tensor, patch_valid: Tensor | None = None, memory: Tensor | None = None) -> Tensor:
        """Memory, then patches, after the final norm: (B, L + N, C). Arguments and errors as in `encode`."""
        x, memory = self.encode(x, patch_valid, memory)
        return self.norm(join_tokens(memory, x))

    def pool(self, x: Tensor, pool_type: str | None = None, patch_valid: Tensor | None = None) -> Tensor:
        """Pool (B, L + N, C) to (B, C); `pool_type` overrides the model's `global_pool`, unless that is "map".

        Raises:
            ValueError: `pool_type` is unknown, or the model lacks what it reads (not in TorchScript).
        """
        if not torch.jit.is_scripting():
            if pool_type is not None:
                self._check_pool("pool_type", pool_type)
        if self.attn_pool is not None:
            return self.attn_pool(x[:, self.num_prefix_tokens :], attn_mask=key_mask(patch_valid))
        pool_type = self.global_pool if pool_type is None else pool_type
        return pool_tokens(x, pool_type, self.num_prefix_tokens, patch_valid)

    def forward_head(self, x: Tensor, pre_logits: bool = False, patch_valid: Tensor | None = None) -> Tensor:
        """Features (B, L + N, C) to logits (B, num_classes), or to the embedding (B, C) with `pre_logits`."""
        x = self.pool(x, patch_valid=patch_valid)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor, patch_valid: Tensor | None = None, memory: Tensor | None = None) -> Tensor:
        """Images to logits (B, num_classes). Arguments and errors as in `encode`."""
        x = self.forward_features(x, patch_valid, memory)
        return self.forward_head(x, patch_valid=patch_valid)

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        patch_valid: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> Any:
        """Features and the outputs of chosen blocks, as timm's models return them.

        Args:
            x, patch_valid, memory: As in `encode`.
            indices: The last n blocks if an int, all if None, else these blocks.
            return_prefix_tokens: Return (patches, memory) for each block instead of patches alone. With the last block
                comes the memory after the final pack, if there is one.
            norm: Apply the final norm to the intermediates.
            stop_early: Stop after the last block that is wanted.
            output_fmt: "NCHW", (B, C, H', W'), or "NLC", (B, N, C).
            intermediates_only: Leave out the final features.
            output_dict: Return a dict with "image_features", "image_intermediates", "image_intermediates_prefix".

        Returns:
            (features (B, L + N, C), list of intermediates), the list alone, or the dict.

        Raises:
            ValueError: An unknown `output_fmt`, or as in `encode`.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        take_indices, _ = feature_take_indices(len(self.blocks), indices)
        x, memory, (H, W), patch_valid = self._embed(x, patch_valid, memory)
        keep = sorted({i + 1 for i in take_indices})
        stop = [] if stop_early else [len(self.blocks)]
        x, memory, kept = self._run_blocks(x, memory, (H, W), patch_valid, [*keep, *stop])
        if not intermediates_only or (return_prefix_tokens and len(self.blocks) in keep):
            memory = self._run_final_pack(x, memory, (H, W), patch_valid)
        if len(self.blocks) in keep:
            kept[len(keep) - 1] = (x, memory)
        spatial, prefix = [], []
        for y, slots in kept[: len(keep)]:
            y = self.norm(y) if norm else y
            if output_fmt == "NCHW":
                y = y.reshape(y.shape[0], H, W, -1).permute(0, 3, 1, 2).contiguous()
            spatial.append(y)
            prefix.append(self.norm(slots) if norm else slots)
        features = None
        if not intermediates_only:
            features = self.norm(join_tokens(memory, x))
        if output_dict:
            out = {"image_intermediates": spatial}
            if return_prefix_tokens:
                out["image_intermediates_prefix"] = prefix
            return out if intermediates_only else {**out, "image_features": features}
        intermediates = list(zip(spatial, prefix, strict=True)) if return_prefix_tokens else spatial
        return intermediates if intermediates_only else (features, intermediates)

    @torch.jit.ignore
    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | list[int] | tuple[int, ...] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        patch_valid: Tensor | None = None,
    ) -> list[Tensor] | list[tuple[Tensor, Tensor]]:
        """The outputs of chosen blocks, as DINO's models and timm's ViT return them.

        Args:
            x, patch_valid: As in `encode`.
            n: The last n blocks if an int, else these blocks.
            reshape: (B, C, H', W') instead of (B, N, C).
            return_prefix_tokens: Return (patches, memory) for each block instead of patches alone.
            norm: Apply the final norm.
        """
        return self.forward_intermediates(
            x,
            n if isinstance(n, int) else list(n),
            return_prefix_tokens,
            norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
            patch_valid=patch_valid,
        )

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last wanted one. What the others return stays as it is, the memory included.

        Args:
            indices: The last n blocks if an int, else these blocks.
            prune_norm: Drop the final norm.
            prune_head: Drop the head.

        Returns:
            The indices of the wanted blocks.
        """
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        if max_index + 1 < len(self.blocks):
            self.blocks = self.blocks[: max_index + 1]
            self._end_with_last_block()
            update_model_args(self, depth=len(self.blocks))
        if prune_norm:
            self.norm = nn.Identity()
            update_model_args(self, final_norm=False)
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def _end_with_last_block(self) -> None:
        """End with a last block that is as every block but the last."""
        self.final_pack = None
        self.last_block = "both" if self.memory is not None else "patches"
        self._record_last_block()

    @torch.jit.ignore
    def get_attention_maps(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        patch_valid: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> list[AttentionMaps]:
        """The attention maps of chosen blocks, to lie over the image (each patch is `patch_size` pixels).

        Args:
            x, patch_valid, memory: As in `encode`.
            indices: The last n blocks if an int, all if None, else these blocks.

        Returns:
            `AttentionMaps` for each chosen block, in the order of depth.

        Raises:
            ValueError: As in `encode`, or the model has no memory.
        """
        if self.memory is None:
            raise ValueError("get_attention_maps shows where a memory looks, and this model's mixer has none")
        take_indices = sorted(feature_take_indices(len(self.blocks), indices)[0])
        x, memory, (H, W), patch_valid = self._embed(x, patch_valid, memory)
        _, _, kept = self._run_blocks(x, memory, (H, W), patch_valid, take_indices)
        maps = []
        for i, (x, memory) in zip(take_indices, kept, strict=True):
            pack, unpack = self.blocks[i].attention_maps(x, memory, (H, W), patch_valid)
            maps.append(AttentionMaps(pack.unflatten(-1, (H, W)), unpack.transpose(2, 3).unflatten(-1, (H, W))))
        return maps


def _end_for(global_pool: str) -> str:
    """How a network ends that ends as its pooling needs it, a value of `last_block`."""
    return "final_pack" if global_pool in ("token", "both") else "patches"


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        **kwargs,
    }


# where there are no weights, the tag says so
_UNTRAINED = {
    "luna_vit_nano_patch8": _cfg(input_size=(3, 64, 64), crop_pct=1.0),
    "luna_vit_tiny": _cfg(),
    "luna_vit_small": _cfg(),
    "luna_vit_base": _cfg(),
    "luna_vit_large": _cfg(),
    "luna_vit_tiny_patch8": _cfg(),
    "luna_vit_small_patch8": _cfg(),
    "luna_vit_base_patch8": _cfg(),
    "luna_vit_small_paper": _cfg(),
    "test_luna_vit": _cfg(input_size=(3, 160, 160)),
}
_SHIPPED = {name: _cfg(**shipped_cfg(name)) for name in SHIPPED}
default_cfgs = generate_default_cfgs(_SHIPPED | {f"{name}.untrained": cfg for name, cfg in _UNTRAINED.items()})


def _no_weights(variant: str) -> str:
    there = f"there are some for {' and '.join(SHIPPED)}. " if SHIPPED else ""
    return (
        f"There are no pretrained weights for {variant}; {there}Train it (configs/imagenet_small_224.yaml is the "
        "ImageNet recipe; any other data set works the same way), or load a checkpoint of your own: "
        f"timm.create_model({variant!r}, checkpoint_path='best.safetensors') or "
        "timm.create_model('local-dir:FOLDER', pretrained=True)"
    )


def prune_memory_update(model: LunaVit) -> None:
    """Remove what only updates the memory of the last block, in a model of which nothing but patches is read: it would
    get no gradient."""
    if model.memory is None:
        return
    model.final_pack = None
    model.blocks[-1].prune_memory_update()


# what timm takes beside the arguments of a model
_OF_TIMM = {*inspect.signature(build_model_with_cfg).parameters, "features_only", "out_indices", "feature_cls"}

# Arguments of timm's `VisionTransformer` that are none of `LunaVit`: the values that say what holds here anyway, and
# what to do instead of asking for another.
_OF_VIT: dict[str, tuple[tuple[Any, ...], str]] = {
    "dynamic_img_size": ((True, False), "any image size runs"),
    "dynamic_img_pad": ((True, False), "sides are padded to whole patches"),
    "class_token": ((False,), "the memory has its place: global_pool='token' reads it"),
    "reg_tokens": ((0,), "the slots of the memory have their place: memory_len is their number"),
    "no_embed_class": ((True, False), "only patches have positions"),
    "pool_include_prefix": ((False,), "global_pool='both' reads the memory and the patches"),
    "qk_norm": ((False,), "a norm on every patch's query cannot be folded into the memory; query_gain scales queries"),
    "scale_attn_norm": ((False,), "there is no norm before the attention's output projection"),
    "scale_mlp_norm": ((False,), "there is no norm in the MLP"),
    "pre_norm": ((False,), "there is no norm before the first block; norm_first places the norms inside the blocks"),
    "fc_norm": ((None, False), "the final norm stands before the pooling; final_norm=False leaves it out"),
    "weight_init": (("", "reset", "skip"), "LunaVit.init_weights draws weights at a scale that suits the width"),
    "fix_init": ((False,), "init_values gives the layers of a deep model a small scale to start with"),
    "embed_layer": ((), "stem chooses between 'patch' and 'conv'"),
    "embed_norm_layer": ((None,), "stem='conv' has norms of its own"),
    "block_fn": ((), "norm_first, local_mixing and mixer change the block"),
    "attn_layer": ((), "mixer chooses the attention"),
    "mlp_layer": ((), "mlp, mlp_ratio, act_layer and local_mixing change the MLP"),
}


def _check_arguments(variant: str, arguments: dict[str, Any], others: set[str]) -> dict[str, Any]:
    """The arguments, of a model and `others`, without those of timm's ViT that say what holds here anyway.

    Raises:
        ValueError: A `LunaVit` has no such argument; the message names the most similar one, or for an argument of
            timm's ViT says what to do instead.
    """
    known = inspect.signature(LunaVit.__init__).parameters.keys() - {"self", "of_vit"}
    taken = {}
    for name, value in arguments.items():
        if name in known or name in others:
            taken[name] = value
        elif name in _OF_VIT:
            holds, instead = _OF_VIT[name]
            if not any(value is v or value == v for v in holds):
                raise ValueError(f"{variant} does not take {name}={value!r}: {instead}")
        else:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "help(luna_vision.LunaVit) lists them"
            raise ValueError(f"{variant} has no argument {name!r}; {hint}")
    return taken


def _create_luna_vit(variant: str, pretrained: bool = False, **kwargs: Any) -> LunaVit:
    kwargs = _check_arguments(variant, kwargs, _OF_TIMM)
    if pretrained:
        cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        if not (cfg.has_weights or cfg.state_dict):
            raise RuntimeError(_no_weights(variant))
        check_shipped(cfg.file)
    model = build_model_with_cfg(
        LunaVit,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=kwargs.pop("out_indices", 3), feature_cls="getter"),
        **kwargs,
    )
    if isinstance(model, FeatureGetterNet):
        if len(model.model.blocks) == max(model.out_indices, default=-1) + 1:
            prune_memory_update(model.model)
    return model


@register_model
def luna_vit_nano_patch8(pretrained: bool = False, **kwargs: Any) -> LunaVit:
    """Luna ViT-Nano, patch 8: for small images and small machines."""
    model_args = dict(patch_size=8, embed_dim=128, depth=8, num_heads=4)
    return _create_luna_vit("luna_vit_nano_patch8", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def luna_vit_tiny(pretrained: bool = False, **kwargs: Any) -> LunaVit:
    """Luna ViT-Tiny, patch 16."""
    model_args = dict(patch_size=16, embed_dim=192, depth=12, num_heads=3)
    return _create_luna_vit("luna_vit_tiny", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def luna_vit_small(pretrained: bool = False, **kwargs: Any) -> LunaVit:
    """Luna ViT-Small, patch 16."""
    model_args = dict(patch_size=16, embed_dim=384, depth=12, num_heads=6)
    return _create_luna_vit("luna_vit_small", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def luna_vit_base(pretrained: bool = False, **kwargs: Any) -> LunaVit:
    """Luna ViT-Base, patch 16."""
    model_args = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12)
    return _create_luna_vit("luna_vit_base", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def luna_vit_large(pretrained: bool = False, **kwargs: Any) -> LunaVit:
    """Luna ViT-Large, patch 16."""
    model_args = dict(patch_size=16, embed_dim=1024, depth=24, num_heads=16)
    return _create_luna_vit("luna_vit_large", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def luna_vit_tiny_patch8(pretrained: bool = False, **kwargs: Any) -> LunaVit:
    """Luna ViT-Tiny, patch 8."""
    model_args = dict(patch_size=8, embed_dim=192, depth=12, num_heads=3)
    return _create_luna_vit("luna_vit_tiny_patch8", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def luna_vit_small_patch8(pretrained: bool = False, **kwargs: Any) -> LunaVit:
    """Luna ViT-Small, patch 8."""
    model_args = dict(patch_size=8, embed_dim=384, depth=12, num_heads=6)
    return _create_luna_vit("luna_vit_small_patch8", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def luna_vit_base_patch8(pretrained: bool = False, **kwargs: Any) -> LunaVit:
    """Luna ViT-Base, patch 8."""
    model_args = dict(patch_size=8, embed_dim=768, depth=12, num_heads=12)
    return _create_luna_vit("luna_vit_base_patch8", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def luna_vit_small_paper(pretrained: bool = False, **kwargs: Any) -> LunaVit:
    """Luna ViT-Small with the paper's block as it is: post-norm, no local mixing, no MLP on the memory."""
    model_args = dict(
        patch_size=16,
        embed_dim=384,
        depth=12,
        num_heads=6,
        memory_len=16,
        global_pool="avg",
        norm_first=False,
        local_mixing="none",
        mlp="gelu",
        query_gain=1.0,
    )
    return _create_luna_vit("luna_vit_small_paper", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def test_luna_vit(pretrained: bool = False, **kwargs: Any) -> LunaVit:
    """A model for tests."""
    model_args = dict(patch_size=16, embed_dim=64, depth=4, num_heads=2, mlp_ratio=3.0, memory_len=8)
    return _create_luna_vit("test_luna_vit", pretrained=pretrained, **dict(model_args, **kwargs))
