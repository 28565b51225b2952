"""The cost of a model: multiply-adds, and the memory that training keeps."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_macs", "saved_bytes"]


def count_macs(model: nn.Module, height: int, width: int) -> int:
    """Multiply-adds of one image, with those of attention.

    Args:
        model: A model on the meta device, where the counter sees attention; it counts fused CPU kernels as zero.
        height, width: Image size, pixels.
    """
    dtype = next(model.parameters()).dtype
    x = torch.empty(1, model.in_chans, height, width, device="meta", dtype=dtype)
    with FlopCounterMode(display=False) as counter:
        model.eval()(x)
    return counter.get_total_flops() // 2


def saved_bytes(step: Callable[[], Any], model: nn.Module) -> int:
    """Bytes that autograd saves for the backward pass in `step`, each storage once, without the model's own parameters
    and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes: dict[int, tuple[int, Tensor]] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = (storage.nbytes(), x)  # x is kept so that its address is not reused
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        step()
    return sum(size for size, _ in sizes.values())
