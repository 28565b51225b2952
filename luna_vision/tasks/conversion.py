"""Conversion of a softmax ViT: a Luna ViT of the same width and depth takes over its work.

Shapes: B batch, N patches, C width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from luna_vision.models import LunaVit
from luna_vision.utils.checks import check_at_least

from .distillation import logit_loss
from .feature_distillation import FeatureDistillationTask, feature_losses, grid_of, to_grid
from .teacher import Teacher, features_of_teacher

# parts of a block whose weights the first stage trains, beside the memory
LEARNED = ("attn", "local", "norm1_memory", "ls1_memory")


class ConversionTask(FeatureDistillationTask):
    """Train a Luna ViT to do what a softmax ViT of its width and depth does, on images alone.

    The student starts from the ViT's own weights: ``checkpoint``, as ``luna-vision convert --vit`` makes it. Stages:

    - ``attention``: every block is given the ViT's own patches x, and imitates what its attention adds to them,
      whatever the blocks before have done. The loss is the mean over blocks of the `relative_error`. Trained are the
      attentions, the memory and the local mixing.
    - ``features``: the student runs on its own, and learns the ViT's embedding and patches with the loss of
      `FeatureDistillationTask`, without linear layers, and with ``logit_weight`` its predictions. All weights are
      trained. With several ``train_sizes`` of the data, it learns to do so at all of them.

    Logged besides: ``train_error`` in the first stage; in the second the parts of the loss, with
    ``train_logit_loss``. In validation ``val_cosine``, between the embeddings of both, and where the ViT has a head
    ``val_agreement``, the share of images of which both predict the same class.

    Source: ViT-AdaLA (arXiv 2603.16063), LoLCATs (arXiv 2410.10254).

    Args:
        stage: see above.
        logit_weight: weight of the loss on the logits.
        num_classes: of the ViT's head; 0 for none.
        **kwargs: the arguments of `FeatureDistillationTask`. The teacher is the ViT.

    Raises:
        ValueError: an argument out of its range, or a teacher of another width, depth or patch size.
    """

    reads_both, teacher_has_head = False, True

    def __init__(
        self,
        stage: Literal["attention", "features"] = "attention",
        logit_weight: float = 1.0,
        num_classes: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_at_least(0, logit_weight=logit_weight)
        width = self.model.embed_dim
        if self.widths != (width, width):
            raise ValueError(f"the ViT has width {self.widths[1]}, the model {width}; both must be equal")
        self.heads = nn.ModuleList()  # both have the same features
        self.hparams.num_classes = num_classes or 0
        self.model.reset_classifier(self.hparams.num_classes)

    def check_data(self, data: LightningDataModule | None, stage: str) -> None:
        super().check_data(data, stage)
        vit = self.teacher.model
        ours, theirs = ((len(m.blocks), tuple(m.patch_embed.patch_size)) for m in (self.model, vit))
        if ours != theirs:
            raise ValueError(f"the ViT has depth and patches {theirs}, the model {ours}; both must be equal")

    # ---- what is trained

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.hparams.stage == "attention":
            kept = {id(p) for p in self.trained_module().parameters()}
            for parameter in self.parameters():
                parameter.requires_grad_(id(parameter) in kept)

    def trained_module(self) -> nn.Module:
        if self.hparams.stage == "features":
            return nn.ModuleList([self.model])
        return _AttentionParts(self.model)

    # ---- batches

    def training_parts(self, images: Tensor) -> dict[str, Tensor]:
        if self.hparams.stage == "attention":
            return {"error": self.block_errors(images).mean()}
        return super().training_parts(images)

    def block_errors(self, images: Tensor) -> Tensor:
        """The `relative_error` of each block, given the ViT's own patches; (depth,)."""
        with torch.no_grad():
            theirs = attention_residuals(self.teacher.model, self.teacher.prepare(images))
        return teacher_forced_errors(self.model, theirs, grid_of(self.model, images))

    def loss_of(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        g, t = self.targets(images)
        losses, memory, patches = self._losses(images, g, t)
        embeddings = self.model.pool(torch.cat([memory, patches], dim=1))
        cosine = F.cosine_similarity(embeddings.float(), g.float()).mean()
        self.log_evaluation_mean("val_cosine", cosine, len(images))
        if self.hparams.num_classes:
            same = self.model.head(embeddings).argmax(1) == self._logits(g).argmax(1)
            self.log_evaluation_mean("val_agreement", same.float().mean(), len(images))
        if self.hparams.stage == "attention":
            return self.block_errors(images).mean(), memory, patches
        return sum(losses.values()), memory, patches

    def _losses(self, images: Tensor, g: Tensor, t: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        memory, patches = self.tokens(images)
        embeddings = self.model.pool(torch.cat([memory, patches], dim=1))
        to_global, to_patch = self.statistics
        t = to_patch(to_grid(t, grid_of(self.model, images)))
        losses = feature_losses(to_global(embeddings), to_patch(patches), to_global(g), t)
        if self.hparams.num_classes and self.hparams.logit_weight:
            loss = logit_loss(self.model.head(embeddings).float(), self._logits(g).float(), 1.0)
            losses["logit_loss"] = self.hparams.logit_weight * loss
        return losses, memory, patches

    @torch.no_grad()
    def _logits(self, g: Tensor) -> Tensor:
        """The ViT's logits of its embeddings."""
        head = self.teacher.model.get_classifier()
        return head(g.to(next(head.parameters()).dtype))

    def data_record(self, data: LightningDataModule) -> dict[str, Any]:
        record = super().data_record(data)
        names = self.teacher.model.pretrained_cfg.get("label_names") if self.hparams.num_classes else None
        if names is not None:
            record["cfg"] |= {"num_classes": len(names), "label_names": list(names)}
        return record


class _AttentionParts(nn.Module):
    """What the first stage trains, by timm's rules for weight decay."""

    def __init__(self, model: LunaVit) -> None:
        super().__init__()
        self.memory = model.memory
        blocks = [[getattr(block, name) for name in LEARNED] for block in model.blocks]
        # nobody reads the memory that the last block leaves
        blocks[-1] = blocks[-1][:-1]
        found = [[part for part in parts if part is not None] for parts in blocks]
        self.blocks = nn.ModuleList(nn.ModuleList(parts) for parts in found)

    def no_weight_decay(self) -> set[str]:
        return {"memory"}


def relative_error(ours: Tensor, theirs: Tensor) -> Tensor:
    """|ours - theirs|^2 / |theirs|^2 over a batch: 1 for an attention that does nothing."""
    ours, theirs = ours.float(), theirs.float()
    return (ours - theirs).square().sum() / theirs.square().sum().clamp(min=1e-12)


@contextmanager
def _inputs(*modules: nn.Module) -> Iterator[list[Tensor]]:
    """The first inputs of calls of these modules, in the order of the calls."""
    found: list[Tensor] = []
    handles = [m.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0])) for m in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def attention_residuals(vit: nn.Module, images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each block of a pre-norm ViT, the patches (B, N, C) that enter it, and what its attention adds to them."""
    modules = [module for block in vit.blocks for module in (block, block.norm2)]
    with _inputs(*modules) as found:
        vit.forward_features(images)
    prefix = vit.num_prefix_tokens
    pairs = zip(found[::2], found[1::2], strict=True)
    return [(before[:, prefix:], (after - before)[:, prefix:]) for before, after in pairs]


def teacher_forced_errors(model: LunaVit, theirs: list[tuple[Tensor, Tensor]], grid: tuple[int, int]) -> Tensor:
    """The `relative_error` of each block that is given the ViT's patches; the memory is the student's own."""
    memory, errors = model.learned_memory().repeat(len(theirs[0][0]), 1, 1), []
    for block, (x, added) in zip(model.blocks, theirs, strict=True):
        x = x.to(model.memory.dtype)
        with _inputs(block.norm2) as found:
            _, memory = block(x, memory, grid)
        errors.append(relative_error(found[0] - x, added))
    return torch.stack(errors)


@torch.no_grad()
def report(model: LunaVit, teacher: Teacher, batches: Iterable[Tensor], labelled: bool) -> dict[str, Any]:
    """How far a student is from its ViT, on images (B, C, H, W).

    Returns:
        ``block_errors``: the relative error of each block's attention, given the ViT's patches. ``cosine``: between the
        embeddings of both. ``agreement``, if labelled: share of images with the same predicted class.
    """
    model.eval()
    count, errors, cosine, same = 0, 0.0, 0.0, 0.0
    for images in batches:
        prepared = teacher.prepare(images)
        g, _ = features_of_teacher(teacher.model, prepared)
        own = teacher_forced_errors(model, attention_residuals(teacher.model, prepared), grid_of(model, images))
        embeddings = model.pool(model.forward_features(images))
        errors += own * len(images)
        cosine += F.cosine_similarity(embeddings, g).sum()
        if labelled:
            same += (model.head(embeddings).argmax(1) == teacher.model.get_classifier()(g).argmax(1)).sum()
        count += len(images)
    found = {"images": count, "block_errors": (errors / count).tolist(), "cosine": float(cosine / count)}
    return found | ({"agreement": float(same / count)} if labelled else {})
