"""A pack in parts: a softmax over N whose partial results merge exactly.

Source: online normalizer calculation for softmax, Milakov and Gimelshein 2018 (arXiv 1805.02867), section 3.1.

Shapes: B batch, n patches of a part, L memory slots, C width, H heads, E = C / H head width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .absorbed import Projections, project_values
from .precision import autocast_input, clamp_fp16, no_autocast, upcast


class PackState(NamedTuple):
    """The result of a pack over some of the patches: L x (C + 2 H) numbers an image, for any number of patches.

    Parts of an image merge, in any order and any tree of `merge`, to the state of the whole. So tiles of an image that
    does not fit in memory, or strips of it on several machines, combine exactly. Gradients pass through all of it.
    """

    maximum: Tensor
    """(B, H, L), the largest score so far; -inf if no valid patch was read. Carries no gradient."""
    total: Tensor
    """(B, H, L), the sum of exp(score - maximum)."""
    weighted: Tensor
    """(B, H, L, E), the sum of exp(score - maximum) times the value of the patch."""

    def rebased(self, maximum: Tensor) -> "PackState":
        """The same state relative to another maximum, which may be a little below its own."""
        # a slot that has read nothing stays empty: exp(-inf - 0) is 0, but exp(-inf + inf) is NaN
        scale = (self.maximum - maximum.masked_fill(maximum == float("-inf"), 0.0)).exp()
        return PackState(maximum, self.total * scale, self.weighted * scale[..., None])

    def merge(self, other: "PackState") -> "PackState":
        """The state of the patches of both. Associative and commutative, up to rounding."""
        maximum = torch.maximum(self.maximum, other.maximum)
        mine, theirs = self.rebased(maximum), other.rebased(maximum)
        return PackState(maximum, mine.total + theirs.total, mine.weighted + theirs.weighted)

    def finish(self) -> Tensor:
        """The packed memory (B, L, C), in float32 or wider; zero for an image without a valid patch."""
        y = self.weighted / self.total.clamp(min=torch.finfo(self.total.dtype).tiny)[..., None]
        return y.transpose(1, 2).flatten(2)


Rows = int | list[int] | None


def _weights(scores: Tensor, valid: Tensor | None, rows: Rows = None) -> tuple[Tensor, Tensor]:
    """Maximum (B, H, L) of scores (B, H, L, n), and exp(score - maximum); by row, zeros, and weights that sum up to the
    valid patches of each row."""
    scores = upcast(clamp_fp16(scores))
    if rows is not None:
        return torch.zeros_like(scores[..., 0]), _weights_by_row(scores, valid, rows)
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None, None, :], float("-inf"))
    maximum = scores.detach().amax(dim=-1)
    return maximum, (scores - maximum.masked_fill(maximum == float("-inf"), 0.0)[..., None]).exp()


def _weights_by_row(scores: Tensor, valid: Tensor | None, rows: int | list[int]) -> Tensor:
    if isinstance(rows, list):
        parts = scores.split(rows, dim=-1)
        return torch.cat([part.softmax(dim=-1) * part.shape[-1] for part in parts], dim=-1)
    scores = scores.unflatten(-1, (rows, -1))
    if valid is None:
        return (scores.softmax(dim=-1) * scores.shape[-1]).flatten(-2)
    valid = valid[:, None, None, :].unflatten(-1, (rows, -1))
    count = valid.sum(dim=-1, keepdim=True)
    scores = scores.masked_fill(~valid & (count > 0), float("-inf"))  # a row without any weighs nothing
    return (scores.softmax(dim=-1) * count).flatten(-2)


def _sums(weights: Tensor, x: Tensor) -> Tensor:
    """Sums of x (..., n, D) with weights (..., S, n) from 0 to n that sum to n at most, in float32 or wider."""
    shrink = 1.0
    if x.dtype == torch.float16:  # whose range ends at 65,504: sum as many numbers as fit, by a power of two
        shrink = 2.0 ** -max(0, x.shape[-2].bit_length() - 10)
    return upcast((weights * shrink).to(x.dtype) @ x) / shrink


def tile_absorbed(
    queries: Tensor, x: Tensor, w: Projections, valid: Tensor | None = None, rows: Rows = None
) -> PackState:
    """Read a tile of patches (B, n, C), n at least 1, in the absorbed form.

    Args:
        queries: (B, H * L, C), from `fold_queries`.
        x: The patches.
        w: The projections.
        valid: Which of them count, (B, n) bool. A tile without any valid patch changes nothing.
        rows: With a number of rows of equal length, or the patches of each row, all of them valid: the softmax is over
            each row by itself, and the state is that of the mean over rows, weighted by their valid patches. It merges
            with others of its kind.
    """
    B, S, _ = queries.shape
    x = autocast_input(x)
    with no_autocast(x):
        scores = torch.bmm(queries.to(x.dtype), x.transpose(1, 2))
        maximum, weights = _weights(scores.view(B, w.heads, S // w.heads, x.shape[1]), valid, rows)
        total = weights.sum(dim=-1)
        return PackState(maximum, total, project_values(_sums(weights.flatten(1, 2), x), total.flatten(1), w))


def tile_projected(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None, rows: Rows = None) -> PackState:
    """`tile_absorbed` in the projected form: queries (B, H, L, E), keys and values (B, H, n, E), n at least 1."""
    with no_autocast(q):
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        maximum, weights = _weights(scores, valid, rows)
        return PackState(maximum, weights.sum(dim=-1), _sums(weights, v))
