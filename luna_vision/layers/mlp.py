"""The MLPs of the blocks: timm's and a gated one, with local mixing inside if asked.

Shapes: B batch, N patches, C width, H', W' patch grid with N = H' * W'.
"""

import math
from typing import Any

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..functional import clamp_fp16
from .local_mixing import LocalMixing
from .plain import is_hooked, is_plain

MANY = 2**13  # patches of all images, whose kernels take longer than their launches
ROWS = 256  # patches for each thread of a CPU, whose hidden layer stays in its caches


@torch.jit.ignore
def rows_of_parts(mlp: nn.Module) -> int:
    """How many patches an MLP on a CPU maps at a time where it maps many, without gradients; 0 for all.

    The hidden layers of many patches would be written to fresh pages of memory and read again: mapping them part by
    part is faster, and takes no memory that grows with the image. Not where hooks watch the layers, or others have
    replaced them, or the hidden layer is mixed.
    """
    plain = is_plain(mlp.fc1) and is_plain(mlp.fc2) and not is_hooked(mlp.act)
    return ROWS * max(2, torch.get_num_threads()) if plain and mlp.fc1.weight.is_cpu else 0


@torch.jit.ignore
def splits_rows(mlp: nn.Module, x: Tensor, mix: bool) -> bool:
    """Whether to map (B, N, C) part by part."""
    if isinstance(x, torch.fx.Proxy) or torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # a graph takes any number of patches
        return False
    return (mlp.local is None or not mix) and x.shape[:-1].numel() > 2 * (rows_of_parts(mlp) or math.inf)


def in_parts(mlp: nn.Module, x: Tensor) -> Tensor:
    """An MLP of (B, N, C), part by part."""
    parts = x.flatten(0, -2).split(rows_of_parts(mlp))
    return torch.cat([mlp.forward(part, mix=False) for part in parts]).view(x.shape)


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

    def forward(
        self,
        x: Tensor,
        grid_size: tuple[int, int] | None = None,
        patch_valid: Tensor | None = None,
        mix: bool = True,
    ) -> Tensor:
        """Map (B, N, C) to (B, N, C); without local mixing, as for a memory, if `mix` is False."""
        if not torch.jit.is_scripting():
            if splits_rows(self, x, mix):
                return in_parts(self, x)
        x = self.act(self.fc1(x))
        if self.local is not None and mix:
            x = clamp_fp16(x + self.local(x, grid_size, patch_valid))
        return self.drop2(self.fc2(self.norm(self.drop1(x))))


def linear_halves(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Both halves of the channels of a linear layer's output, each contiguous."""
    (a, b), (bias_a, bias_b) = weight.chunk(2), bias.chunk(2)
    return F.linear(x, a, bias_a), F.linear(x, b, bias_b)


class SwiGlu(nn.Module):
    """A gated MLP, act(A x) * (B x), with as many parameters as `Mlp` has for the same hidden width.

    Source: Shazeer 2020 (arXiv 2002.05202). With local mixing it is the Mix-FFN of SANA (Xie et al. 2024, arXiv
    2410.10629): the convolution stands before the gate, on both halves.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        local_mixing: bool = False,
        act_layer: type[nn.Module] = nn.SiLU,
        drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            in_features: Width C.
            hidden_features: Width of the hidden layer of an MLP of as many parameters; that of this one is two thirds.
            local_mixing: Local mixing of the hidden layer, with a residual, before the gate.
            act_layer: Activation of the gate.
            drop: Dropout after the gate and after the projection.
        """
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        hidden = round(hidden_features * 2 / 3)
        self.fc1 = nn.Linear(in_features, 2 * hidden, **dd)
        self.local = LocalMixing(2 * hidden, **dd) if local_mixing else None
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden, in_features, **dd)
        self.drop = nn.Dropout(drop)

    def forward(
        self,
        x: Tensor,
        grid_size: tuple[int, int] | None = None,
        patch_valid: Tensor | None = None,
        mix: bool = True,
    ) -> Tensor:
        """Map (B, N, C) to (B, N, C); without local mixing, as for a memory, if `mix` is False."""
        if not torch.jit.is_scripting():
            if splits_rows(self, x, mix):
                return in_parts(self, x)
            if self._splits(x, mix):
                gate, x = linear_halves(x, self.fc1.weight, self.fc1.bias)
                x = clamp_fp16(self.act(gate) * x)
                return self.drop(self.fc2(self.drop(x)))
        x = self.fc1(x)
        if torch.jit.is_scripting() or not self._recomputes():
            x = self._gate(x, grid_size, patch_valid, mix)
        else:
            x = checkpoint(self._gate, x, grid_size, patch_valid, mix, use_reentrant=False, preserve_rng_state=False)
        return self.drop(self.fc2(self.drop(x)))

    @torch.jit.ignore
    def _splits(self, x: Tensor, mix: bool) -> bool:
        """Whether to make both halves of the hidden layer apart: eager operations read the halves of one tensor at a
        third of a GPU's speed. A compiler fuses them, and few patches are bound by the number of kernels."""
        if isinstance(x, torch.fx.Proxy) or not x.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        mixes = self.local is not None and mix
        return not mixes and x.shape[:-1].numel() >= MANY and is_plain(self.fc1)

    @torch.jit.ignore
    def _recomputes(self) -> bool:
        """Whether the backward pass computes the gate again: the layer would keep twice as much for it as a plain MLP.
        A transform of `torch.func` does not let it."""
        return self.training and torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()

    def _gate(self, x: Tensor, grid_size: tuple[int, int] | None, patch_valid: Tensor | None, mix: bool) -> Tensor:
        """The hidden layer, (B, N, 2 * hidden), to (B, N, hidden)."""
        if self.local is not None and mix:
            x = clamp_fp16(x + self.local(x, grid_size, patch_valid))
        gate, x = x.chunk(2, dim=-1)
        return clamp_fp16(self.act(gate) * x)
