"""The models. Importing this registers them with timm."""

from ._parts import unwrap_state_dict
from .luna_vit import AttentionMaps, LunaVit
from .vit_init import init_from_vit
from .weights import load_weights

__all__ = ["AttentionMaps", "LunaVit", "init_from_vit", "load_weights", "unwrap_state_dict"]
