"""The layers of Luna, the blocks, and positions for any grid."""

from .block import LOCAL_MIXING, MEMORY_MLP, READ, LunaBlock, MixerBlock
from .conv_stem import ConvPatchEmbed
from .local_mixing import LocalMixing
from .luna import LunaAttention
from .mlp import Mlp
from .pos_embed import POS_EMBEDS, FourierPosEmbed, LearnedPosEmbed

__all__ = [
    "LOCAL_MIXING",
    "MEMORY_MLP",
    "POS_EMBEDS",
    "READ",
    "ConvPatchEmbed",
    "FourierPosEmbed",
    "LearnedPosEmbed",
    "LocalMixing",
    "LunaAttention",
    "LunaBlock",
    "MixerBlock",
    "Mlp",
]
