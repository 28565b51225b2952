"""The layers of Luna, and positions for any grid."""

from .causal import CausalLunaAttention, CausalState
from .local_mixing import LocalMixing
from .luna import LunaAttention, LunaBlock
from .mlp import Mlp
from .pos_embed import POS_EMBEDS, FourierPosEmbed, LearnedPosEmbed

__all__ = [
    "POS_EMBEDS",
    "CausalLunaAttention",
    "CausalState",
    "FourierPosEmbed",
    "LearnedPosEmbed",
    "LocalMixing",
    "LunaAttention",
    "LunaBlock",
    "Mlp",
]
