"""Images that do not fit into memory, exactly: `encode`, and the command `python -m luna_vision.streaming`."""

from ..execution import Encoded, encode
from ..images import open_image

__all__ = ["Encoded", "encode", "open_image"]
