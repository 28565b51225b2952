"""luna_vision: a linear-cost vision backbone. Importing the package registers its models with timm."""

from .loading import Loaded, load
from .models import AttentionMaps, LunaVit, init_from_vit

__version__ = "0.1.0"
__all__ = ["AttentionMaps", "Loaded", "LunaVit", "init_from_vit", "load"]
