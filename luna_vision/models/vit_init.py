"""Start a Luna ViT from the weights of a plain ViT of the same width and depth."""

import os
import re
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention, Mlp, resample_patch_embed
from timm.models import adapt_input_conv
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ..layers import POS_EMBEDS
from ..layers.mlp import SwiGlu
from .checkpoints import read_weights, unwrap_state_dict
from .luna_vit import LunaVit

# names, for a config, of the activations that a ViT may have
ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "ReLU": "relu", "SiLU": "silu"}
# what a ViT may have that is not converted, and the norms, which have to be LayerNorm
OTHER_PARTS = ("patch_embed.norm", "patch_embed.backbone", "norm_pre", "attn_pool")
OTHER_PARTS += tuple(f"blocks.0.{name}" for name in ("attn.q_norm", "attn.norm", "mlp.norm"))
NORMS = ("blocks.0.norm1", "blocks.0.norm2", "norm", "fc_norm")


class VitInit(NamedTuple):
    """The result of `init_from_vit`, as lists of parameter names."""

    loaded: list[str]
    """Parameters of the Luna ViT that now hold ViT weights."""
    new: list[str]
    """Parameters of the Luna ViT without a counterpart, left as they were."""
    unused: list[str]
    """Parameters of the ViT without a counterpart."""


def _vit_state_dict(source: str | os.PathLike | dict) -> dict[str, Tensor]:
    if not isinstance(source, (str, os.PathLike, dict)):
        raise ValueError(f"source must be a timm model name, a file or a state dict, got {type(source).__name__}")
    if isinstance(source, dict):
        state = source
    elif Path(source).is_file():
        return read_weights(source)
    elif timm.is_model(str(source).split(".")[0]):
        try:
            state = timm.create_model(str(source), pretrained=True).state_dict()
        except Exception as error:  # no such weights, or no network: there is a type for each part of it
            reason = shorten(str(error), 300, placeholder=" ...")
            raise ValueError(f"no weights of {str(source)!r}; give a file or a state dict instead: {reason}") from error
    else:
        raise ValueError(
            f"{str(source)!r} is neither a file nor the name of a timm model; give a state dict, a file or a name"
        )
    return unwrap_state_dict(state)


def _candidates(vit: dict[str, Tensor], tied: bool) -> dict[str, tuple[str, Tensor]]:
    """ViT parameters under their names in a Luna ViT: {luna name: (ViT name, value)}.

    Queries become those of patches and memory, keys and values those of the patches. Nothing in a ViT projects a packed
    memory, so the unpack's keys and values stay new. A tied projection of the pack takes the ViT's values, which the
    output projection expects.
    """
    qkv = {"q": ["unpack_q"], "k": [], "v": ["pack_kv"]} if tied else {"q": ["pack_q", "unpack_q"], "k": ["pack_k"]}
    qkv.setdefault("v", ["pack_v"])
    out = {}
    for key, value in vit.items():
        match = re.fullmatch(r"(blocks\.\d+\.attn\.)qkv\.(weight|bias)", key)
        if match:
            for part, chunk in zip("qkv", value.chunk(3, dim=0), strict=True):
                for name in qkv[part]:
                    out[f"{match[1]}{name}.{match[2]}"] = (key, chunk)
        else:
            out[re.sub(r"^fc_norm\.", "norm.", key)] = (key, value)
    return out


def _fit_patch_embed(weight: Tensor, own: Tensor) -> Tensor:
    """Adapt a patch embedding to the patch size and, from RGB, to the image channels of another."""
    if weight.shape[2:] != own.shape[2:]:
        weight = resample_patch_embed(weight, list(own.shape[2:]))
    if weight.shape[1] == 3 and own.shape[1] != 3:
        weight = adapt_input_conv(own.shape[1], weight)
    return weight


@torch.no_grad()
def init_from_vit(model: LunaVit, source: str | os.PathLike | dict[str, Tensor], verbose: bool = True) -> VitInit:
    """Load the weights of a plain ViT into the parameters of `model` that have a counterpart in it.

    These are the patch embedding (adapted to the model's patch size and channels), MLPs, norms, LayerScale, the head
    if it has as many classes, and the attention projections that play the same part in both.

    Args:
        model: The Luna ViT, changed in place.
        source: Name of a timm model (`vit_*_patch16_*`; its pretrained weights are used), a state dict, or a file.
        verbose: Print what was loaded and what was left new.

    Returns:
        The names of the parameters that were loaded, left new, and not used.

    Raises:
        ValueError: `model` is no Luna ViT or its mixer has no memory, `source` is not a ViT, or its width, depth or MLP
            is not the model's; the model is unchanged. The MLPs of a plain ViT are those of `mlp="gelu"`.
    """
    if not isinstance(model, LunaVit):
        raise ValueError(f"model must be a Luna ViT, got {type(model).__name__}")
    if model.memory is None:
        raise ValueError("init_from_vit loads the projections of a memory, and this model's mixer has none")
    vit = _vit_state_dict(source)
    if "patch_embed.proj.weight" not in vit or "blocks.0.attn.qkv.weight" not in vit:
        raise ValueError("source is not a plain ViT: it lacks patch_embed.proj.weight or blocks.0.attn.qkv.weight")
    width = vit["patch_embed.proj.weight"].shape[0]
    depth = 1 + max(int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", k) for k in vit) if m)
    if (width, depth) != (model.embed_dim, len(model.blocks)):
        raise ValueError(
            f"the ViT has width {width} and depth {depth}, the model {model.embed_dim} and {len(model.blocks)}; "
            "both must be equal"
        )
    own = model.state_dict()
    matched = {}  # everything is checked before anything is written
    for name, (key, value) in _candidates(vit, tied=model.blocks[0].attn.tie_kv).items():
        if name not in own:
            continue
        if name == "patch_embed.proj.weight":
            value = _fit_patch_embed(value, own[name])
        if own[name].shape == value.shape:
            matched[name] = (key, value)
        elif not name.startswith("head."):
            want, got = list(own[name].shape), list(value.shape)
            hint = "; a ViT's MLP needs a model with mlp='gelu'" if isinstance(model.blocks[0].mlp, SwiGlu) else ""
            raise ValueError(
                f"the ViT's {key} has shape {got} where the model's {name} has {want}; both must be equal{hint}"
            )
    for name, (_, value) in matched.items():
        own[name].copy_(value)
    loaded, used = list(matched), {key for key, _ in matched.values()}
    result = VitInit(loaded, [n for n in own if n not in set(loaded)], [k for k in vit if k not in used])
    if verbose:
        kinds = sorted({re.sub(r"blocks\.\d+\.", "blocks.*.", n) for n in result.new})
        print(f"init_from_vit: loaded {len(loaded)} of {len(own)} tensors; left new: {', '.join(kinds)}")
    return result


def luna_arguments(vit: nn.Module, memory_len: int = 32) -> dict[str, Any]:
    """The arguments of a Luna ViT of the width, depth and heads of a ViT, for `luna_from_vit`.

    Args:
        vit: A plain `VisionTransformer` of timm (class tokens, registers and LayerScale may be there), or a `LunaVit`
            with the mixer "softmax".
        memory_len: Slots of the memory.

    Raises:
        ValueError: It is none, or has parts that a Luna ViT lacks.
    """
    ours = isinstance(vit, LunaVit) and type(getattr(vit.blocks[0], "attn", None)).__name__ == "SoftmaxMixer"
    if not (ours or type(vit) is VisionTransformer):
        raise ValueError(
            f"{type(vit).__name__} is no plain ViT of timm: conversion knows the block of VisionTransformer"
        )
    block = vit.blocks[0]
    known = block.norm_first if ours else type(block) is Block and type(block.attn) is Attention
    if not (known and isinstance(block.mlp, Mlp | SwiGlu)):
        raise ValueError("the ViT has other blocks: conversion knows pre-norm ones of plain attention and a plain MLP")
    parts = {name: part for name, part in vit.named_modules() if not isinstance(part, nn.Identity)}
    lacking = [name for name in OTHER_PARTS if name in parts]
    norms = {name: parts[name] for name in NORMS if name in parts}
    lacking += [f"{name} ({type(norm).__name__})" for name, norm in norms.items() if not isinstance(norm, nn.LayerNorm)]
    act = type(block.mlp.act).__name__
    lacking += [] if act in ACTIVATIONS else [f"the activation {act}"]
    if lacking:
        raise ValueError(f"the ViT has parts that a converted Luna ViT lacks: {', '.join(lacking)}")
    scale, local = block.ls1, getattr(block, "local", None)
    average = vit.global_pool == "avg"
    arguments = {
        "img_size": list(vit.patch_embed.img_size),
        "patch_size": list(vit.patch_embed.patch_size),
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": block.attn.num_heads,
        "memory_len": memory_len,
        "mlp_ratio": (block.hidden if ours else block.mlp.fc1.out_features) / vit.embed_dim,
        "mlp": "swiglu" if isinstance(block.mlp, SwiGlu) else "gelu",
        "act_layer": ACTIVATIONS[act],
        "final_norm": "norm" in norms or "fc_norm" in norms,
        "local_mixing": "before",
        "tie_kv": False,
        "query_gain": 1.0,
        "qkv_bias": block.attn.qkv.bias is not None,
        "init_values": None if isinstance(scale, nn.Identity) else 1.0,  # the ViT's own are loaded
        "global_pool": "avg" if average else "both",
    }
    if ours:
        outside = "none" if local is None else "attn" if block.local_after else "before"
        where = outside if block.mlp.local is None else "mlp"
        kind = next(name for name, cls in POS_EMBEDS.items() if type(vit.pos_embed) is (cls or type(None)))
        return arguments | {"local_mixing": where, "pos_embed": kind}
    return arguments | {"pos_embed": "learn"}


@torch.no_grad()
def load_vit(model: LunaVit, vit: nn.Module) -> VitInit:
    """Load a ViT into a Luna ViT of `luna_arguments`: `init_from_vit`, its positions, and values that pass the unpack.

    What a slot has packed are values already, so the unpack's own values begin as they are.

    Raises:
        ValueError: As in `init_from_vit`, or the ViT has more weights than class tokens, registers and a head that a
            Luna ViT has no place for.
    """
    state = dict(vit.state_dict())
    positions = state.pop("pos_embed", None)
    result = init_from_vit(model, state, verbose=False)
    lost = [name for name in result.unused if not name.startswith(("cls_token", "reg_token", "head."))]
    if lost:
        raise ValueError(f"the ViT has weights that a Luna ViT lacks: {', '.join(lost[:5])}")
    if positions is not None:
        rows, columns = vit.patch_embed.grid_size
        grid = positions[:, -rows * columns :].unflatten(1, (rows, columns)).permute(0, 3, 1, 2).float()
        own = model.pos_embed.ref_grid
        own.copy_(F.interpolate(grid, own.shape[2:], mode="bicubic", antialias=True))
    for block in model.blocks:
        nn.init.eye_(block.attn.unpack_v.weight)
    return result
