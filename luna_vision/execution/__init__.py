"""A model run in pieces, exactly: images that fit in no memory, training by bands, one image over many processes.

All three are clients of the tiles that `luna_vision.layers.LunaBlock` and `luna_vision.models.LunaVit` run on, and know
nothing of what is inside of a block.
"""

from .bands import set_band_checkpointing
from .encode import Encoded, encode

__all__ = ["Encoded", "encode", "set_band_checkpointing"]
