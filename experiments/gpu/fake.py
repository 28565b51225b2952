"""CUDA without a GPU: fake tensors, which have shapes, types and a device but no numbers, and counts of what would run.

A fake tensor has no value to look at, so an operation that would wait for the device raises
`DataDependentOutputException`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

__all__ = ["Kernel", "Kernels", "fake_cuda", "on_fake_cuda"]


@contextmanager
def fake_cuda(dtype: torch.dtype | None = None) -> Iterator[None]:
    """A context in which tensors are fake and can be on "cuda", with autocast to a type if one is given."""
    # torch looks for a driver before it switches autocast on
    driver = mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False)
    known = mock.patch("torch.cuda.is_bf16_supported", return_value=True)
    with (
        driver,
        known,
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.autocast("cuda", dtype, enabled=dtype is not None),
    ):
        yield


def on_fake_cuda(model: nn.Module) -> nn.Module:
    """A model on the meta device, moved to a fake GPU, inside `fake_cuda`. It is changed in place."""
    return model.to_empty(device="cuda")


class Kernel(NamedTuple):
    """An operation that launches a kernel (or few)."""

    name: str
    flops: int
    bytes: int
    """Read and written, each tensor once."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    reads: tuple[tuple[int, int], ...] = ()
    """Pieces of memory, by a number, with the bytes that are read there."""
    writes: tuple[tuple[int, int], ...] = ()
    """Likewise."""


class Kernels(TorchDispatchMode):
    """Collects the kernels of an eager pass: all operations but views, allocations and what runs on the host.

    Attributes:
        ran: The kernels, in their order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[Kernel] = []
        self._kept: list[Any] = []  # memory that is freed would give its number to another

    def _pieces(self, tensors: list[Tensor]) -> tuple[tuple[int, int], ...]:
        storages = [x.untyped_storage() for x in tensors]
        self._kept += storages
        sizes: dict[int, int] = {}
        for x, storage in zip(tensors, storages, strict=True):
            sizes[storage._cdata] = max(sizes.get(storage._cdata, 0), stored(x))
        return tuple(sizes.items())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if launches(func) and results:
            inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            reads, writes = self._pieces(inputs), self._pieces(results)
            count = flop_registry.get(func.overloadpacket)
            flops = count(*args, **(kwargs or {}), out_val=out) if count is not None else 0
            if func.namespace == "luna_vision":
                flops = fused_flops(func.name(), *args)
            moved = sum(size for _, size in [*reads, *writes])
            about = results[0].dtype, tuple(results[0].shape)
            self.ran.append(Kernel(func.name().partition(".")[0], flops, moved, *about, reads, writes))
            bias = args[0] if func is torch.ops.aten.baddbmm.default else None
            if bias is not None and stored(bias) < stored(results[0]):  # which is copied into the result first
                self.ran.append(Kernel("aten::copy_", 0, stored(results[0]), *about, (), writes))
        return out


def fused_flops(name: str, x: Tensor, other: Tensor, *_: Any) -> int:
    """Operations of a fused kernel of the package, forward: two products of patches and slots, or nine taps."""
    return 18 * x.numel() if "mix" in name else 4 * x.numel() * other.shape[1]


def launches(func: Any) -> bool:
    """Whether an operation launches a kernel."""
    if func.namespace == "luna_vision":
        return True
    if func.namespace != "aten" or "empty" in func.name() or func.name() in ("aten::detach", "aten::lift_fresh"):
        return False
    views = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
    return not any(not alias.is_write for alias in views) and func is not torch.ops.aten._unsafe_view.default


def stored(x: Tensor) -> int:
    """Bytes of a tensor, an expanded one counted as it is stored."""
    sizes = [n for n, stride in zip(x.shape, x.stride(), strict=True) if stride or n == 0]
    count = 1
    for n in sizes:
        count *= n
    return count * x.element_size()
