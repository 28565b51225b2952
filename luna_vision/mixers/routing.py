"""Routing Transformer: attention within clusters of patches, found by online k-means.

Source: Roy et al., "Efficient Content-Based Sparse Attention with Routing Transformers", TACL 2021 (arXiv 2003.05997),
section 4 and algorithm 1, without its causal branch; the authors' code for what the text leaves open.

Shapes: B batch, H heads, N patches, E head width, K clusters, S = ceil(N / K) patches in a cluster.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..functional import upcast
from ..utils.checks import check_at_least
from ._blocks import at_least_two
from .base import WideAttention, readable_patches


def _recomputing() -> bool:
    """Whether this forward pass is part of a backward pass, as gradient checkpointing runs it a second time."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@register_notrace_module
class RoutingMixer(WideAttention):
    """Each of K centroids takes the S = ceil(N / K) queries nearest to it and as many keys; these queries attend to
    these keys. Cost O((N^2 / K + N K) C).

    That is O(N sqrt(N) C) for K near sqrt(N), the paper's choice. K is fixed when the layer is made, so the centroids,
    H x K x E, fit any image. Queries and keys are normalised (LayerNorm without weights) and lie on a sphere, as the
    centroids do. A query in several clusters gets the mean of its results there, a query in none gets zeros. With one
    cluster this is softmax attention with normalised queries and keys. Parameters: qkv and output projection, 4 C^2.

    In training the centroids move, by a moving average, towards the mean of the queries and keys that are nearest to
    each, over the valid patches of the batch (of each rank: DistributedDataParallel then spreads those of rank 0). A
    forward pass moves them for the next one, so gradient checkpointing, which runs it twice, sees the same clusters
    twice. The step is too small for a bfloat16 buffer: train in mixed precision.

    NOTE: queries and keys are two projections, and each cluster takes its own set of either, as in the paper without
    causality. With causality the paper makes them one.
    NOTE: centroids move towards the mean. Algorithm 1 adds the sum, which would depend on the image's size. Then they
    are put back onto the sphere, where a larger inner product is a smaller distance. A centroid that is nearest to
    nothing stays.
    NOTE: all heads are routed. The paper leaves half of them to local attention, and the block has local mixing. The
    authors' code also has a loss that pulls queries and keys to their centroids, which is not in the paper.
    """

    centroids: Tensor
    next_centroids: Tensor

    def __init__(self, *args: Any, num_clusters: int = 16, decay: float = 0.999, **common: Any) -> None:
        """
        Args:
            args, common: See `SelfAttention`.
            num_clusters: K.
            decay: Share of a centroid that one training step leaves.

        Raises:
            ValueError: As in `SelfAttention`, `num_clusters` is below 1 or `decay` not in [0, 1].
        """
        super().__init__(*args, **common)
        check_at_least(1, num_clusters=num_clusters)
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must be in [0, 1], got {decay}")
        self.num_clusters = num_clusters
        self.decay = decay
        shape = (self.num_heads, num_clusters, self.dim // self.num_heads)
        for name in ("centroids", "next_centroids"):
            self.register_buffer(name, torch.empty(shape, **self.dd))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Spread the centroids over the sphere."""
        nn.init.normal_(self.centroids)
        self.centroids.copy_(F.layer_norm(self.centroids, self.centroids.shape[-1:]))
        self.next_centroids.copy_(self.centroids)

    def _scores(self, x: Tensor, valid: Tensor) -> Tensor:
        """Nearness of queries or keys (B, H, N, E) to the centroids, (B, H, K, N); -inf where invalid (B, N)."""
        scores = upcast(self.centroids) @ x.transpose(2, 3)
        return scores.masked_fill(~valid[:, None, None, :], float("-inf"))

    def _observe(self, q: Tensor, k: Tensor, q_scores: Tensor, k_scores: Tensor, valid: Tensor) -> None:
        """Set the centroids of the next pass."""
        total = torch.zeros_like(upcast(self.centroids))
        count = torch.zeros_like(total[:, :, :1])
        for x, scores in ((q, q_scores), (k, k_scores)):
            nearest = (scores == scores.amax(dim=2, keepdim=True)) & valid[:, None, None, :]
            total += (nearest.to(total.dtype) @ x).sum(dim=0)
            count += nearest.sum(dim=(0, 3))[:, :, None]
        centroids = upcast(self.centroids)
        moved = self.decay * centroids + (1.0 - self.decay) * total / count.clamp(min=1.0)
        moved = F.layer_norm(moved, moved.shape[-1:])
        self.next_centroids.copy_(torch.where(count > 0.0, moved, centroids))

    def mix_wide(
        self, q: Tensor, k: Tensor, v: Tensor, grid_size: tuple[int, int], patch_valid: Tensor | None = None
    ) -> Tensor:
        B, H, N, E = q.shape
        K = self.num_clusters
        S = min(at_least_two((N + K - 1) // K), N)
        q, k = F.layer_norm(q, (E,)), F.layer_norm(k, (E,))
        valid = readable_patches(q, patch_valid)
        with torch.no_grad():
            if self.training:
                recomputing = False
                if not torch.jit.is_scripting():
                    recomputing = _recomputing()
                if not recomputing:
                    self.centroids.copy_(self.next_centroids)
            q_scores, k_scores = self._scores(q, valid), self._scores(k, valid)
            if self.training:
                self._observe(q, k, q_scores, k_scores, valid)
            # the nearest come first; an image takes as many of them as it would alone, without the batch's padding
            q_index = q_scores.topk(S, dim=3).indices.flatten(2)[..., None].expand(-1, -1, -1, E)
            k_index = k_scores.topk(S, dim=3).indices.flatten(2)[..., None].expand(-1, -1, -1, E)
            size = (valid.sum(dim=1, keepdim=True) + K - 1) // K
            member = (torch.arange(S, device=q.device) < size)[:, None, :]  # (B, 1, S)

        # clusters of all heads side by side: (B, H * K, S, E)
        q, k, v = (
            q.gather(2, q_index).view(B, H * K, S, E),
            k.gather(2, k_index).view(B, H * K, S, E),
            v.gather(2, k_index).view(B, H * K, S, E),
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=member[:, :, None, :], dropout_p=self.dropout_p())
        y = y.masked_fill(~member[..., None], 0.0).reshape(B, H, K * S, E)
        y = torch.zeros(B, H, N, E, dtype=y.dtype, device=y.device).scatter_add(2, q_index, y)
        times = member[:, :, None, :].expand(-1, H, K, -1).flatten(2).to(y.dtype)
        times = torch.zeros(B, H, N, dtype=y.dtype, device=y.device).scatter_add(2, q_index[..., 0], times)
        return y / times.clamp(min=1.0)[..., None]
