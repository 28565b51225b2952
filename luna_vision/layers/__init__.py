"""The layers of Luna, and positions for any grid."""

from .local_mixing import LocalMixing
from .luna import LunaAttention, LunaBlock
from .pos_embed import POS_EMBEDS, FourierPosEmbed, LearnedPosEmbed

__all__ = ["POS_EMBEDS", "FourierPosEmbed", "LearnedPosEmbed", "LocalMixing", "LunaAttention", "LunaBlock"]
