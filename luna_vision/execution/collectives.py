"""Exchanges between the processes of a group, with gradients.

All processes are one computation, whose loss is the *mean* of their losses, as in DistributedDataParallel. The backward
pass of an exchange is its exact transpose: for a sum over processes it is a sum over processes, for a row that was sent
to a neighbour it sends the gradient back. So a process has gradients of the *sum* of all losses, and averaging them
over the processes, as DDP does, gives those of the mean.

`torch.distributed.nn.functional`, which has the sum, is deprecated since PyTorch 2.14, and its successor does not exist
in older versions.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["from_all", "mean_gradient", "own_gradient", "shared_max", "shared_sum", "swap", "with_neighbours"]


def _reduce(x: Tensor, op: Any, group: dist.ProcessGroup) -> Tensor:
    y = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(y, op, group=group)
    return y


class _SharedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce(x, dist.ReduceOp.SUM, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduce(grad, dist.ReduceOp.SUM, ctx.group), None


def shared_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of all processes' x, the same bits on each of them."""
    return _SharedSum.apply(x, group)


def largest(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The maximum of all processes' x, without a gradient."""
    return _reduce(x, dist.ReduceOp.MAX, group)


class _Gradient(torch.autograd.Function):
    """x itself; its gradient is summed over the processes if `shared`, and divided by `divisor`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, shared: bool, divisor: int) -> Tensor:
        ctx.group, ctx.shared, ctx.divisor = group, shared, divisor
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        grad = _reduce(grad, dist.ReduceOp.SUM, ctx.group) if ctx.shared else grad
        return grad / ctx.divisor, None, None, None


def shared_max(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The maximum (B, C) over the tokens of all processes' x (B, n, C).

    Equally large tokens share the gradient, also on different processes, as in `Tensor.amax`.
    """
    mine = x.amax(dim=1)
    maximum = largest(mine, group)
    ties = (x.detach() == maximum[:, None]).sum(dim=1).to(x.dtype)
    share = ties / _reduce(ties, dist.ReduceOp.SUM, group)
    read = _Gradient.apply(mine * share, group, True, 1)
    return maximum + (read - read.detach())  # plus zero, which has the gradient


def swap(up: Tensor, down: Tensor, above: int, below: int, dim: int, group: dist.ProcessGroup) -> list[Tensor]:
    """Send `up` to the process before and `down` to the one after; receive `above` and `below` rows from them.

    At the ends of the group nothing is sent, and the tensor that would be received has no rows.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    received, operations = [], []
    for peer, out, rows in ((rank - 1, up, above), (rank + 1, down, below)):
        exists = 0 <= peer < size
        shape = list(out.shape)
        shape[dim] = rows if exists else 0
        received.append(out.new_empty(shape))
        other = dist.get_global_rank(group, peer) if exists else None
        if exists and out.shape[dim]:
            operations.append(dist.P2POp(dist.isend, out.contiguous(), other, group))
        if exists and rows:
            operations.append(dist.P2POp(dist.irecv, received[-1], other, group))
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    return received


class _WithNeighbours(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, above: int, below: int, group: dist.ProcessGroup) -> Tensor:
        rows = x.shape[dim]
        up, down = x.narrow(dim, 0, below), x.narrow(dim, rows - above, above)
        from_above, from_below = swap(up, down, above, below, dim, group)
        ctx.dim, ctx.above, ctx.below, ctx.group = dim, above, below, group
        ctx.sizes = from_above.shape[dim], rows, from_below.shape[dim]
        return torch.cat([from_above, x, from_below], dim=dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        up, own, down = grad.split(ctx.sizes, dim=ctx.dim)
        # the neighbours got `below` rows from the top of x and `above` rows from its bottom
        from_above, from_below = swap(up, down, ctx.below, ctx.above, ctx.dim, ctx.group)
        own = own.clone(memory_format=torch.contiguous_format)
        top, bottom = from_above.shape[ctx.dim], from_below.shape[ctx.dim]
        own.narrow(ctx.dim, 0, top).add_(from_above)
        own.narrow(ctx.dim, own.shape[ctx.dim] - bottom, bottom).add_(from_below)
        return own, None, None, None, None


def with_neighbours(x: Tensor, dim: int, above: int, below: int, group: dist.ProcessGroup) -> tuple[Tensor, int]:
    """x between the last rows of the process before and the first rows of the process after.

    Args:
        x: Its dimension `dim` is the rows; there must be at least `above` and `below` of them.
        dim: The dimension.
        above: Rows to get from the process before.
        below: Rows to get from the process after.
        group: The processes, in the order of their rows.

    Returns:
        The rows, and the number of rows that come before x: `above`, or 0 on the first process.
    """
    if not above and not below:
        return x, 0
    return _WithNeighbours.apply(x, dim, above, below, group), above if dist.get_rank(group) else 0


def own_gradient(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x, which only this process has; its gradient becomes that of the mean loss, as nothing else averages it."""
    return _Gradient.apply(x, group, False, dist.get_world_size(group))


def mean_gradient(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x, of which every process has a copy; the gradient of each copy becomes that of the mean loss."""
    return _Gradient.apply(x, group, True, dist.get_world_size(group))


def from_all(numbers: list[int], group: dist.ProcessGroup, device: torch.device) -> list[list[int]]:
    """The whole numbers of all processes, the same count from each, in the order of the group."""
    mine = torch.tensor(numbers, dtype=torch.int64, device=device)
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    return torch.stack(parts).tolist()
