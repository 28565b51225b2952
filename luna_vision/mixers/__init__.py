"""Other systems in the place of Luna attention, behind one signature (`luna_vision.mixers.base`).

`timm.create_model("luna_vit_small", mixer="softmax")` swaps the mixer and changes nothing else.
"""

import inspect
from typing import Any

from torch import nn

from .base import SelfAttention
from .external import ExternalMixer
from .linear import LinearMixer
from .linformer import LinformerMixer
from .local import LocalMixer
from .longformer import LongformerMixer
from .performer import PerformerMixer
from .rfa import RfaMixer
from .routing import RoutingMixer
from .softmax import SoftmaxMixer
from .star import StarMixer
from .strided import StridedMixer

__all__ = [
    "MIXERS",
    "ExternalMixer",
    "LinearMixer",
    "LinformerMixer",
    "LocalMixer",
    "LongformerMixer",
    "PerformerMixer",
    "RfaMixer",
    "RoutingMixer",
    "SelfAttention",
    "SoftmaxMixer",
    "StarMixer",
    "StridedMixer",
    "create_mixer",
    "mixer_defaults",
]

# name: class, or None for what needs no class here. "luna" is `luna_vision.layers.LunaAttention` in a block of its own
# (Ma et al. 2021; cost O(N L C), or O(N C^2) where its projections are not absorbed; parameters: 5 C^2, or 7 C^2 with
# tie_kv=False). "identity" is no mixing at all: cost and parameters 0, the limit for all others.
MIXERS: dict[str, type[nn.Module] | None] = {
    "luna": None,
    "softmax": SoftmaxMixer,
    "local": LocalMixer,
    "strided": StridedMixer,
    "longformer": LongformerMixer,
    "star": StarMixer,
    "routing": RoutingMixer,
    "external": ExternalMixer,
    "linformer": LinformerMixer,
    "linear": LinearMixer,
    "performer": PerformerMixer,
    "rfa": RfaMixer,
    "identity": None,
}

# what the shell sets for every mixer
_COMMON = ("self", "dim", "num_heads", "qkv_bias", "proj_bias", "attn_drop", "proj_drop", "device", "dtype")


def mixer_defaults(name: str) -> dict[str, Any]:
    """What a mixer of `MIXERS` takes in `mixer_args`, with the defaults."""
    cls = MIXERS[name]
    parameters = inspect.signature(cls.__init__).parameters if cls is not None else {}
    return {argument: p.default for argument, p in parameters.items() if argument not in _COMMON}


def create_mixer(name: str, mixer_args: dict[str, Any] | None = None, **common: Any) -> nn.Module | None:
    """Build a mixer by its name.

    Args:
        name: A key of `MIXERS`.
        mixer_args: Arguments of that mixer alone.
        common: Arguments that all mixers take (`luna_vision.mixers.base`).

    Returns:
        The mixer; None for "luna" and "identity".

    Raises:
        ValueError: An unknown name or argument.
    """
    if name not in MIXERS:
        raise ValueError(f"mixer must be one of {', '.join(map(repr, MIXERS))}, got {name!r}")
    mixer_args = mixer_args or {}
    cls = MIXERS[name]
    allowed = mixer_defaults(name)
    for argument in mixer_args:
        if argument not in allowed:
            options = ", ".join(map(repr, allowed)) or "no arguments"
            raise ValueError(f"mixer {name!r} takes {options} in mixer_args, got {argument!r}")
    return cls(**common, **mixer_args) if cls is not None else None
