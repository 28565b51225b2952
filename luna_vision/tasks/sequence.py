"""Classification of sequences of images by a Luna ViT that carries its memory from one image to the next.

Shapes: B batch, T images of a sequence, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luna_vision.models import LunaVit
from luna_vision.models.luna_vit import join_tokens
from luna_vision.utils.checks import check_at_least

from .classification import ClassificationTask

Sequences = tuple[Tensor, Tensor, Tensor]


class SequenceTask(ClassificationTask):
    """Train and evaluate a Luna ViT whose memory carries over: truncated backpropagation through time.

    Batches are (images (B, T, C, H, W) float, targets (B,) int64, known (B,) int64): the target of a sequence is known
    from image `known` on, counted from 0, and the loss is taken there. Accuracies and validation losses are those after
    the last image. Logged as by :class:`ClassificationTask`.

    The memory after the last block replaces the learned memory of the next image, as ``model.encode(image,
    memory=memory)`` takes it, and as streaming and exported graphs do. Gradients flow back along this residual stream.

    One backward pass covers all T images, and their activations are kept until then; ``grad_checkpointing`` saves
    memory. `bptt_steps` limits how far gradients reach.

    Args:
        bptt_steps: images over which gradients go back, 0 for the whole sequence: the memory is detached before images
            `bptt_steps`, twice `bptt_steps`, ... With 1 no gradient reaches an earlier image.
        carry: False begins every image with the learned memory, and takes the mean of the logits of the images so far:
            a baseline without memory.
        **kwargs: the arguments of :class:`ClassificationTask`, without MixUp, CutMix and ``compile``.

    Raises:
        ValueError: a negative ``bptt_steps``, MixUp, CutMix or ``compile``, a model that is no Luna ViT or has no
            memory, or as :class:`ClassificationTask`.
    """

    takes_masks = False
    outcome = None
    not_sharded = "sequences"

    def __init__(self, bptt_steps: int = 0, carry: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_at_least(0, bptt_steps=bptt_steps)
        if self.mix is not None:
            raise ValueError("mixup and cutmix mix single images: they must be 0 for sequences")
        if self.hparams.compile:
            raise ValueError("compile has no effect on model.encode, which sequences use: set it to false")
        if not isinstance(self.model, LunaVit) or self.model.memory is None:
            raise ValueError(f"sequences need a Luna ViT with a memory, and {self.hparams.model_name} has none")

    def forward(self, images: Tensor, memory: Tensor | None = None) -> Tensor:
        """Logits (B, T, K) after each image of sequences (B, T, C, H, W), from a memory (B, L, C) or the learned."""
        hp, model, logits = self.hparams, self.model, []
        for t, image in enumerate(images.unbind(1)):
            image = self.as_model_input(image)
            if t and not hp.carry:
                memory = None
            elif t and hp.bptt_steps and t % hp.bptt_steps == 0:
                memory = memory.detach()
            patches, memory = model.encode(image, memory=memory)
            logits.append(model.forward_head(model.norm(join_tokens(memory, patches))))
        stacked = torch.stack(logits, dim=1)
        if hp.carry:
            return stacked
        return stacked.cumsum(1) / torch.arange(1, len(logits) + 1, device=stacked.device)[:, None]

    def check_batch(self, images: Tensor, targets: Tensor, known: Tensor) -> None:
        if images.ndim != 5:
            raise ValueError(f"sequences must be (B, T, C, H, W), got {tuple(images.shape)}")
        super().check_batch(images[:, 0], targets)
        if known.shape != targets.shape or known.min() < 0 or known.max() >= images.shape[1]:
            raise ValueError(f"known must be ({len(targets)},) with values in [0, {images.shape[1]}), got {known}")

    def training_step(self, batch: Sequences, batch_idx: int) -> Tensor:
        images, targets, known = batch
        logits = self(images)
        steps = torch.arange(images.shape[1], device=known.device)
        told = steps >= known[:, None]  # (B, T), always with the last image
        loss = self.compute_loss(logits[told], targets[:, None].expand_as(told)[told])
        self._log_training(loss, logits[:, -1], targets)
        return loss

    def evaluate(self, split: str, images: Tensor, targets: Tensor, known: Tensor) -> None:
        self._log_evaluation(split, self(images)[:, -1].float(), targets)

    def predict_step(self, batch: tuple[Tensor, list[str]], batch_idx: int) -> dict[str, Any]:
        """As :class:`ClassificationTask`, of sequences (B, T, C, H, W), after their last image."""
        images, ids = batch
        return self._most_probable(self(images)[:, -1].float(), ids)
