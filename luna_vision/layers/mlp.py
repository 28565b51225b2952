"""The MLPs of the blocks: timm's and a gated one, with local mixing inside if asked.

Shapes: B batch, N patches, C width, H', W' patch grid with N = H' * W'.
"""

from typing import Any

import timm.layers
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import clamp_fp16
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
            x = clamp_fp16(x + self.local(x, grid_size, patch_valid))
        return self.drop2(self.fc2(self.norm(self.drop1(x))))


class SwiGlu(nn.Module):
    """A gated MLP, SiLU(A x) * (B x), with as many parameters as `Mlp` has for the same hidden width.

    Source: Shazeer 2020 (arXiv 2002.05202). With local mixing it is the Mix-FFN of SANA (Xie et al. 2024, arXiv
    2410.10629): the convolution stands before the gate, on both halves.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        local_mixing: bool = False,
        act_layer: type[nn.Module] = nn.GELU,
        drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            in_features: Width C.
            hidden_features: Width of the hidden layer of an MLP of as many parameters; that of this one is two thirds.
            local_mixing: Local mixing of the hidden layer, with a residual, before the gate.
            act_layer: Of no meaning here: the gate is a SiLU.
            drop: Dropout after the gate and after the projection.
        """
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        hidden = round(hidden_features * 2 / 3)
        self.fc1 = nn.Linear(in_features, 2 * hidden, **dd)
        self.local = LocalMixing(2 * hidden, **dd) if local_mixing else None
        self.fc2 = nn.Linear(hidden, in_features, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, grid_size: tuple[int, int] | None = None, patch_valid: Tensor | None = None) -> Tensor:
        """Map (B, N, C) to (B, N, C). Without a grid, as for a memory, there is no local mixing."""
        x = self.fc1(x)
        if self.local is not None and grid_size is not None:
            x = clamp_fp16(x + self.local(x, grid_size, patch_valid))
        gate, x = x.chunk(2, dim=-1)
        return self.drop(self.fc2(self.drop(F.silu(gate) * x)))
