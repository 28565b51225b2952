"""Fused kernels in Triton for a GPU. `pack_absorbed`, `unpack_absorbed` and `F.layer_norm` are their reference."""

from .ops import Norm, pack_normed, supports_kernels, unpack_normed

__all__ = ["Norm", "pack_normed", "supports_kernels", "unpack_normed"]
