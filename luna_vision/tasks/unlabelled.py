"""What tasks without labels share: a model without a head, held-out images, and how many directions it uses.

Shapes: B batch, C channels or width, H x W pixels, L memory slots, N patches.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torchmetrics import Metric

from luna_vision.models import LunaVit
from luna_vision.models.factory import build_model, sized

from .base import TimmTask


class UnlabelledTask(TimmTask):
    """Base of the tasks that train a Luna ViT on images alone. A subclass defines `loss_of` and `training_step`.

    Batches are tuples of images (B, C, H, W), or of views (B, V, C, H, W) for each size.

    Logged: ``train_loss`` and ``train_loss_epoch``, ``lr``, ``val_loss``, and of held-out images ``val_rank``, the
    `EffectiveRank` of their embeddings, and ``val_rank_slots``, that of the slots within an image (1 to L - 1),
    averaged over images. Ranks that fall during training are a sign of collapse.

    The model has no head. Unless ``model_kwargs`` say otherwise, its embedding is the mean of the mean slot and the
    mean patch (``global_pool: both``), so that its last block updates both.

    Args:
        img_size: side of the images in pixels, or [height, width]; by default that of the data.
        compile: run the model through ``torch.compile``; ``auto`` compiles on CUDA only.
        **kwargs: the arguments of `TimmTask`; ``num_classes`` is ignored.

    Raises:
        ValueError: an unknown model, or one whose last block does not update both memory and patches.
    """

    headline = ("val_loss", "validation loss")
    not_sharded = "tasks without labels"
    reads_both: ClassVar[bool] = True  # whether the loss reads memory and patches of the last block

    def __init__(
        self,
        *args: Any,
        img_size: int | list[int] | None = None,
        compile: bool | Literal["auto"] = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        hp = self.hparams
        hp.model_kwargs = sized(hp.model_name, hp.model_kwargs, img_size)
        hp.num_classes = 0
        self.model = build_model(hp.model_name, 0, hp.in_chans, **hp.model_kwargs)
        hp.in_chans = hp.in_chans or 3
        if not isinstance(self.model, LunaVit):
            raise ValueError(f"{type(self).__name__} trains Luna ViTs, and {hp.model_name} is none")
        if self.reads_both and self.model.memory is not None and self.model.last_block == "patches":
            raise ValueError(
                "the last block of the model updates its patches alone, and both are trained: give model_kwargs "
                "global_pool=both or last_block=both"
            )
        self.rank = EffectiveRank(self.model.embed_dim)
        self._features = features_of

    # ---- start of a run

    def check_data(self, data: LightningDataModule | None, stage: str) -> None:
        if stage == "predict":
            raise ValueError("a model that was trained without labels has no classes to predict: use luna-vision embed")
        super().check_data(data, stage)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.compiles() and not self.trainer._detect_anomaly:
            self._features = torch.compile(features_of, dynamic=False)  # see `ClassificationTask.setup`

    # ---- batches

    def check_batch(self, *views: Tensor) -> None:
        for images in views:
            if images.ndim not in (4, 5) or images.shape[-3] != self.hparams.in_chans:
                shape = tuple(images.shape)
                raise ValueError(f"images must be (B, {self.hparams.in_chans}, H, W), or views of them, got {shape}")

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Memory (B, L, C) and patches (B, N, C) of images (B, C, H, W), after the final norm."""
        features = self._features(self.model, images)
        slots = self.model.num_prefix_tokens
        return features[:, :slots], features[:, slots:]

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (B, C) of images (B, C, H, W)."""
        return self.model.pool(self._features(self.model, images))

    def loss_of(self, *views: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of a batch of held-out images, their memory (B, L, C) and patches (B, N, C)."""
        raise NotImplementedError

    def evaluate(self, split: str, *views: Tensor) -> None:
        loss, memory, patches = self.loss_of(*views)
        count = len(views[0])
        self.log_evaluation_mean(f"{split}_loss", loss, count)
        self.rank.update(self.model.pool(torch.cat([memory, patches], dim=1)))
        self.log(f"{split}_rank", self.rank, batch_size=count)
        if memory.shape[1] > 1:
            self.log_evaluation_mean(f"{split}_rank_slots", slot_ranks(memory).mean(), count)


def features_of(model: nn.Module, images: Tensor) -> Tensor:
    """Memory, then patches. ``model.compile()`` would not compile ``forward_features``."""
    return model.forward_features(images)


class EffectiveRank(Metric):
    """How many directions embeddings (n, C) use: exp of the entropy of the singular values, after their mean is taken
    off. C for white noise, 1 on a line.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """

    full_state_update = False

    def __init__(self, dim: int) -> None:
        super().__init__()
        for name, shape in (("count", ()), ("total", (dim,)), ("products", (dim, dim))):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x: Tensor) -> None:
        x = x.detach().double()
        self.count += len(x)
        self.total += x.sum(0)
        self.products += x.T @ x

    def compute(self) -> Tensor:
        centred = self.products - torch.outer(self.total, self.total) / self.count.clamp(min=1)
        return _exp_entropy(torch.linalg.eigvalsh(centred).clamp(min=0).sqrt()).float()


def slot_ranks(memory: Tensor) -> Tensor:
    """The effective rank (B,) of the slots (B, L, C) of each image, after the mean slot is taken off: 1 to L - 1."""
    memory = memory.detach().float()
    return _exp_entropy(torch.linalg.svdvals(memory - memory.mean(1, keepdim=True)))


def _exp_entropy(values: Tensor) -> Tensor:
    """exp of the entropy of values (..., n) of at least 0, as shares of their sum."""
    shares = values / values.sum(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    return torch.special.entr(shares).sum(-1).exp()
