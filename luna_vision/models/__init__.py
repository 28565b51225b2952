"""The models. Importing this registers them with timm."""

from . import luna_vit as _luna_vit  # registers the entry points
from .luna_vit import AttentionMaps, LunaVit
from .vit_init import init_from_vit

__all__ = ["AttentionMaps", "LunaVit", "init_from_vit"]
