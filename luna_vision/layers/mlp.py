"""The MLP of the blocks: timm's, with local mixing inside if asked.

Shapes: B batch, N patches, C width, H', W' patch grid with N = H' * W'.
"""

from typing import Any

import timm.layers
from torch import Tensor

from .local_mixing import LocalMixing


class Mlp(timm.layers.Mlp):
    """timm's MLP on patches of a grid."""

    def __init__(self, in_features: int, hidden_features: int, local_mixing: bool = False, **kwargs: Any) -> None:
        """
        Args:
            in_features: Width C.
            hidden_features: Width of the hidden layer.
            local_mixing: Local mixing of the hidden layer, with a residual, after the activation.
            kwargs: Other arguments of timm's `Mlp`.
        """
        super().__init__(in_features, hidden_features, **kwargs)
        dd = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        self.local = LocalMixing(hidden_features, **dd) if local_mixing else None

    def forward(self, x: Tensor, grid_size: tuple[int, int] | None = None, patch_valid: Tensor | None = None) -> Tensor:
        """Map (B, N, C) to (B, N, C). Without a grid, as for a memory, there is no local mixing."""
        x = self.act(self.fc1(x))
        if self.local is not None and grid_size is not None:
            x = x + self.local(x, grid_size, patch_valid)
        return self.drop2(self.fc2(self.norm(self.drop1(x))))
