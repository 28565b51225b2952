"""What a model costs: multiply-adds, and what training keeps in memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_macs", "saved_bytes"]


def count_macs(model: nn.Module, height: int, width: int) -> int:
    """Multiply-adds of one image, those of attention included.

    Args:
        model: A model on the meta device. There the counter sees attention; fused CPU kernels count as nothing.
        height, width: Image size, pixels.
    """
    x = torch.empty(1, model.in_chans, height, width, device="meta")
    with FlopCounterMode(display=False) as counter:
        model.eval()(x)
    return counter.get_total_flops() // 2


def saved_bytes(step: Callable[[], Any], model: nn.Module) -> int:
    """Bytes that autograd saves for the backward pass in `step`, each storage once, those of the model's own
    parameters and buffers not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes: dict[int, tuple[int, Tensor]] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = (storage.nbytes(), x)  # keeping x keeps its address from being given again
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        step()
    return sum(size for size, _ in sizes.values())
