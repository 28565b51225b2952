"""Random projections for estimated kernels, redrawn in training.

Shapes: H heads, F random vectors, E width of a head.
"""

import torch
from torch import Tensor, nn

from ..functional import upcast
from ..utils.checks import check_at_least


class RandomProjection(nn.Module):
    """Gaussian vectors (H, F, E), a buffer of the state dict, redrawn now and then in training, fixed in evaluation.

    NOTE: chance decides when to redraw, not a counter. Gradient checkpointing runs a block twice from one random state,
        and both runs must see the same vectors.
    """

    def __init__(
        self,
        num_heads: int,
        num_features: int,
        head_dim: int,
        redraw_interval: int | None = None,
        orthogonal: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            num_heads: H; each head has its own vectors.
            num_features: F.
            head_dim: E.
            redraw_interval: Mean number of training passes from one redraw to the next; None for never.
            orthogonal: Make the vectors of each group of E orthogonal to each other, with the lengths of independent
                Gaussian vectors (arXiv 2009.14794, section 2.4).

        Raises:
            ValueError: No features, or an interval below 1.
        """
        super().__init__()
        check_at_least(1, num_features=num_features)
        if redraw_interval is not None and redraw_interval < 1:
            raise ValueError(f"redraw_interval must be at least 1, or None for never, got {redraw_interval}")
        self.orthogonal = orthogonal
        self.redraw_rate = 1.0 / redraw_interval if redraw_interval is not None else 0.0
        self.register_buffer("weight", torch.empty(num_heads, num_features, head_dim, device=device, dtype=dtype))
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the first vectors."""
        self.weight.copy_(self._draw())

    def _draw(self) -> Tensor:
        H, F, E = self.weight.shape
        like = upcast(self.weight)  # QR knows no half precision
        vectors = torch.randn(H, F, E, device=like.device, dtype=like.dtype)
        if not self.orthogonal:
            return vectors
        blocks = (F + E - 1) // E
        q, r = torch.linalg.qr(torch.randn(H, blocks, E, E, device=like.device, dtype=like.dtype))
        # QR leaves the signs open; with those of r's diagonal, q is uniform over the orthogonal matrices
        q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
        return q.transpose(-2, -1).reshape(H, blocks * E, E)[:, :F] * vectors.norm(dim=-1, keepdim=True)

    def forward(self) -> Tensor:
        """The vectors of this pass, (H, F, E) in float32 or wider. TorchScript does not redraw."""
        if not torch.jit.is_scripting():
            if self.training and self.redraw_rate > 0.0:
                return self._redrawn()
        return upcast(self.weight)

    @torch.no_grad()
    def _redrawn(self) -> Tensor:
        if torch.compiler.is_compiling():  # a graph cannot branch on chance, so it draws every time
            redraw = torch.rand((), device=self.weight.device) < self.redraw_rate
            self.weight.copy_(torch.where(redraw, self._draw().to(self.weight.dtype), self.weight))
        elif float(torch.rand(())) < self.redraw_rate:  # on the CPU: no accelerator has to be waited for
            self.weight.copy_(self._draw())
        return upcast(self.weight.clone())  # the next redraw must not change what this pass keeps for its backward
