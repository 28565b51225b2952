"""The teacher of a distillation: a frozen timm classifier that is shown the student's images as it expects them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import get_pretrained_cfg
from timm.models._features import feature_take_indices
from timm.task.distillation import DistillationTeacher
from torch import Tensor, nn

from luna_vision.models import load_weights
from luna_vision.models.factory import build_model, check_model_name, image_cfg, training_checkpoint

LogitsAndLayers = tuple[Tensor, list[Tensor]]


class Teacher(DistillationTeacher):
    """timm's wrapper of a teacher, which adds the normalisation it expects, with its size, too.

    Frozen: in eval mode, so that running statistics stay, and without gradients.

    Args:
        model: a timm classifier with its weights.
        img_size: (H, W) that images are resized to, in pixels; None takes them as they are.
        mean: by channel, of pixels in [0, 1], that the model expects to be subtracted.
        std: likewise, to be divided by.

    Attributes:
        run: `logits_and_layers`, or its compiled form.
    """

    def __init__(
        self,
        model: nn.Module,
        img_size: tuple[int, int] | None,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        model.pretrained_cfg = model.pretrained_cfg | {"mean": tuple(mean), "std": tuple(std)}  # where timm looks
        super().__init__(model)
        self.eval().requires_grad_(False)
        self.img_size = img_size
        self.run: Callable[..., LogitsAndLayers] = logits_and_layers
        self.register_buffer("source_mean", None)
        self.register_buffer("source_std", None)

    def __deepcopy__(self, memo: dict) -> Teacher:
        return self  # nothing changes it: copies of a task, such as the EMA's, share it

    def set_source(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Say how the images that come are normalised. Until then they are taken as the model expects them."""
        device = self.mean_kd.device
        self.source_mean = torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self.source_std = torch.tensor(std, device=device).view(1, -1, 1, 1)

    def prepare(self, images: Tensor) -> Tensor:
        """The student's images (B, C, H, W) as the teacher expects them, (B, C', H', W').

        Grey images become three equal channels where the teacher has three. Resizing is bicubic with antialiasing, of
        floats that are not clipped.
        """
        images = self.normalize_input(images.to(self.mean_kd.dtype), self.source_mean, self.source_std)
        images = images.expand(-1, self.mean_kd.shape[1], -1, -1)  # where the source is not known
        if self.img_size is not None and self.img_size != tuple(images.shape[-2:]):
            images = F.interpolate(images, self.img_size, mode="bicubic", antialias=True)
        return images

    @torch.no_grad()
    def forward(self, images: Tensor, layers: Sequence[int] = ()) -> LogitsAndLayers:
        """Logits (B, K) and the outputs (B, C, h, w) of these layers, of images that are prepared here."""
        return self.run(self.model, self.prepare(images), layers)

    def check(self, channels: int, size: tuple[int, int]) -> None:
        """Raise ``ValueError`` unless a student's images of so many channels and pixels can be shown to the teacher."""
        try:
            self(torch.zeros(1, channels, *size, device=self.mean_kd.device))
        except (AssertionError, RuntimeError) as error:  # how timm's models say so
            height, width = self.img_size or size
            raise ValueError(
                f"the teacher does not take images of {height} x {width} pixels (teacher_img_size is "
                f"{list(self.img_size) if self.img_size else None}): {error}"
            ) from error


def logits_and_layers(model: nn.Module, images: Tensor, layers: Sequence[int] = ()) -> LogitsAndLayers:
    """Logits (B, K) of a timm classifier, and the outputs (B, C, h, w) of these of its layers, in ascending order."""
    if not layers:
        return model(images), []
    features, outputs = model.forward_intermediates(images, indices=list(layers))
    return model.forward_head(features), outputs


def logits_and_layers_of(compile: bool) -> Callable[..., LogitsAndLayers]:
    """`logits_and_layers`, compiled or not. ``model.compile()`` would leave ``forward_intermediates`` as it is."""
    return torch.compile(logits_and_layers) if compile else logits_and_layers


def layer_widths(model: nn.Module, name: str, layers: Sequence[int]) -> tuple[list[int], list[int]]:
    """Positions, not negative any more, and channels of these layers, which are the blocks or stages of a model.

    Args:
        model: a timm model.
        name: what errors call it.
        layers: negative ones count from the end.

    Raises:
        ValueError: the model has no such layer, or does not give out its layers.
    """
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"feature_layers: {name} has no forward_intermediates, which gives out its layers")
    count = len(model.feature_info)
    for layer in layers:
        if not -count <= layer < count:
            raise ValueError(f"feature_layers: {name} has layers 0 to {count - 1}, got {layer}")
    positions, _ = feature_take_indices(count, list(layers))
    return positions, [model.feature_info[position]["num_chs"] for position in positions]


def check_teacher(name: str, checkpoint: str | None, num_classes: int, kwargs: dict[str, Any]) -> None:
    """Find mistakes that show without weights.

    Raises:
        ValueError: no such model, no weights are named, or they are known to be for other classes.
    """
    check_model_name(name)
    fixed = {"num_classes", "in_chans", "pretrained"} & kwargs.keys()
    if fixed:
        raise ValueError(
            f"teacher_kwargs cannot have {fixed.pop()}: classes are the student's, and there is teacher_in_chans"
        )
    if checkpoint:
        return
    cfg = get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        raise ValueError(
            f"the teacher {name} has no pretrained weights, and random ones teach nothing: give teacher_checkpoint"
        )
    if cfg.num_classes != num_classes:
        raise ValueError(f"the teacher {name} has {cfg.num_classes} classes, the student num_classes={num_classes}")


def build_teacher_model(
    name: str, checkpoint: str | None, num_classes: int, in_chans: int, kwargs: dict[str, Any], say: Callable
) -> nn.Module:
    """The teacher's model with its weights and, as far as that is known, its normalisation in ``pretrained_cfg``.

    Args:
        name: name for ``timm.create_model``.
        checkpoint: a Lightning, timm or safetensors file; None takes timm's pretrained weights.
        num_classes: the student's number of classes.
        in_chans: channels of the teacher.
        kwargs: further arguments of the model.
        say: what notices go to.

    Raises:
        ValueError: an unknown model, a file that cannot be read or is another model's, or other classes.
        FileNotFoundError: there is no such file.
        OSError: pretrained weights cannot be fetched.
    """
    with torch.random.fork_rng(devices=[]):  # the teacher's initial weights take nothing from the student's randomness
        if checkpoint is None:
            return build_model(name, None, in_chans, pretrained=True, **kwargs)
        if not Path(checkpoint).is_file():
            raise FileNotFoundError(f"teacher_checkpoint {checkpoint!r} does not exist")
        run = training_checkpoint(Path(checkpoint))
        recorded = run.get("hyper_parameters", {})
        found = (recorded.get("model_name", name), recorded.get("model_kwargs", kwargs) or {})
        if found != (name, kwargs):  # not all that differs would show in the shapes of the weights
            raise ValueError(
                f"teacher_checkpoint {checkpoint!r} holds {found[0]} with teacher_kwargs {found[1]}, not {name} with "
                f"{kwargs}"
            )
        model = build_model(name, num_classes, in_chans, **kwargs)
        load_weights(model, checkpoint, say=say, fresh_head=False)
        model.pretrained_cfg = model.pretrained_cfg | image_cfg(run)
        return model
