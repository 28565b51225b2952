"""The models. Importing this registers them with timm."""

from .luna_vit import AttentionMaps, LunaVit
from .vit_init import init_from_vit

__all__ = ["AttentionMaps", "LunaVit", "init_from_vit"]
