"""luna_vision: a linear-cost vision backbone. Importing the package registers its models with timm."""

from .models import AttentionMaps, LunaVit, init_from_vit

__version__ = "0.1.0"
__all__ = ["AttentionMaps", "LunaVit", "init_from_vit"]
