"""The models. Importing this registers them with timm."""

from .checkpoints import load_weights, unwrap_state_dict
from .luna_vit import AttentionMaps, LunaVit, prune_memory_update
from .vit_init import init_from_vit

__all__ = ["AttentionMaps", "LunaVit", "init_from_vit", "load_weights", "prune_memory_update", "unwrap_state_dict"]
