"""Fused kernels in Triton for a GPU. `pack_absorbed`, `unpack_absorbed`, `F.layer_norm` and `F.conv2d` are their
reference."""

from .ops import Norm, kernels_pay, mix_residual, pack_normed, supports_kernels, unpack_normed

__all__ = ["Norm", "kernels_pay", "mix_residual", "pack_normed", "supports_kernels", "unpack_normed"]
