"""Other systems in the place of Luna attention, behind one signature (`luna_vision.mixers.base`).

`timm.create_model("luna_vit_small", mixer="softmax")` swaps the mixer and changes nothing else.
"""

import inspect
from typing import Any

from torch import nn

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
    "SoftmaxMixer",
    "StarMixer",
    "StridedMixer",
    "create_mixer",
    "mixer_defaults",
]

# Two names need no class here. "luna" is `luna_vision.layers.LunaAttention` in a block of its own (cost O(N L C), or
# O(N C^2) in the projected form; 5 C^2 parameters, 7 C^2 with tie_kv=False). "identity" mixes nothing.
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


def mixer_defaults(name: str) -> dict[str, Any]:
    """The arguments that a mixer of `MIXERS` takes in `mixer_args`, with their defaults."""
    cls = MIXERS[name]
    parameters = inspect.signature(cls.__init__).parameters.values() if cls is not None else ()
    return {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY}


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
    allowed, mixer_args, cls = mixer_defaults(name), mixer_args or {}, MIXERS[name]
    for argument in mixer_args:
        if argument not in allowed:
            options = ", ".join(map(repr, allowed)) or "no arguments"
            raise ValueError(f"mixer {name!r} takes {options} in mixer_args, got {argument!r}")
    return cls(**common, **mixer_args) if cls is not None else None
