"""Run a model in pieces, exactly: images larger than memory, training in bands, one image over many processes.

All three use the tiles of `luna_vision.layers.LunaBlock` and `luna_vision.models.LunaVit`, and do not depend on the
inside of a block.
"""

from .bands import set_band_checkpointing
from .encode import Encoded, encode

__all__ = ["Encoded", "encode", "set_band_checkpointing"]
