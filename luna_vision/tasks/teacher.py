"""The teacher of a distillation: a frozen timm model that sees the student's images in its own format.

Shapes: B batch, K classes, C channels, D width, H x W pixels, h x w positions of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from timm.layers import to_2tuple
from timm.models import get_pretrained_cfg
from timm.task.distillation import DistillationTeacher
from torch import Tensor, nn

from luna_vision.data.sizes import height_width
from luna_vision.images.transforms import per_channel
from luna_vision.models.checkpoints import read_weights
from luna_vision.models.factory import build_model, check_model_name, load_model, training_checkpoint
from luna_vision.utils.errors import one_line

from .base import TimmTask

LogitsAndLayers = tuple[Tensor, dict[int, Tensor]]


class Teacher(DistillationTeacher):
    """timm's wrapper of a teacher, which normalises images, and also resizes them. Without gradients, in eval mode.

    Args:
        model: a timm classifier with its weights.
        img_size: (H, W) that images are resized to, in pixels; None keeps their size.
        mean: by channel, of pixels in [0, 1], that the model expects to be subtracted.
        std: by channel, that the model expects pixels to be divided by.

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
        model.pretrained_cfg = model.pretrained_cfg | {"mean": tuple(mean), "std": tuple(std)}  # timm reads them here
        if not hasattr(model, "num_prefix_tokens"):  # a CNN, whose convolutions are faster so
            model.to(memory_format=torch.channels_last)
        super().__init__(model)
        self.eval().requires_grad_(False)
        self.img_size = img_size
        self.run: Callable[..., LogitsAndLayers] = logits_and_layers
        self.register_buffer("source_mean", None)
        self.register_buffer("source_std", None)

    def __deepcopy__(self, memo: dict) -> Teacher:
        return self  # it never changes: copies of a task, such as the EMA's, share it

    @property
    def channels(self) -> int:
        """Channels of the images that the model takes."""
        return self.mean_kd.shape[1]

    def set_source(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set how incoming images are normalised. By default, as the model expects."""
        device = self.mean_kd.device
        self.source_mean = torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self.source_std = torch.tensor(std, device=device).view(1, -1, 1, 1)

    def prepare(self, images: Tensor) -> Tensor:
        """Bring the student's images (B, C, H, W) into the teacher's format (B, C', H', W').

        Grey images become three equal channels where the teacher has three. Resizing is bicubic with antialiasing, of
        floats that are not clipped.
        """
        images = self.normalize_input(images.to(self.mean_kd.dtype), self.source_mean, self.source_std)
        images = images.expand(-1, self.mean_kd.shape[1], -1, -1)  # timm does so only where the source is known
        if self.img_size is not None and self.img_size != tuple(images.shape[-2:]):
            images = F.interpolate(images, self.img_size, mode="bicubic", antialias=True)
        return images

    @torch.no_grad()
    def forward(self, images: Tensor, layers: Sequence[int] = ()) -> LogitsAndLayers:
        """Logits (B, K) of the student's images (B, C, H, W), and outputs (B, C, h, w) of layers by their positions."""
        return self.run(self.model, self.prepare(images), layers)


class TeacherTask(TimmTask):
    """Base of the tasks with a teacher, beside a base that trains the student.

    The teacher is read when a run starts. It is frozen, in eval mode, and in no checkpoint.

    Args:
        teacher_model: name for ``timm.create_model``.
        teacher_checkpoint: the teacher's weights: a Lightning, timm or safetensors file; by default the pretrained
            weights of ``teacher_model``. A model without either is refused.
        teacher_kwargs: further arguments of the teacher.
        teacher_img_size: side in pixels, or [height, width], that images are resized to for the teacher.
        teacher_mean: mean by channel that the teacher expects to be subtracted from pixels in [0, 1]; by default that
            in a checkpoint of this package or, for other files and weights, in ``pretrained_cfg``.
        teacher_std: standard deviation, with the same default.
        **kwargs: the arguments of the other base, for the student.
    """

    teacher: Teacher  # a cached property of a subclass, which makes it no part of the module; the first access reads it

    def __init__(
        self,
        teacher_model: str,
        teacher_checkpoint: str | None = None,
        teacher_kwargs: dict[str, Any] | None = None,
        teacher_img_size: int | list[int] | None = None,
        teacher_mean: list[float] | None = None,
        teacher_std: list[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        size = teacher_img_size
        self.teacher_size = None if size is None else height_width("teacher_img_size", size)

    def check_start(self, optimizer: bool = True) -> None:
        super().check_start(optimizer)
        if optimizer:
            _ = self.teacher


def logits_and_layers(model: nn.Module, images: Tensor, layers: Sequence[int] = ()) -> LogitsAndLayers:
    """Logits (B, K) of a timm classifier, and outputs (B, C, h, w) of layers by their positions."""
    if not layers:
        return model(images), {}
    layers = sorted(set(layers))
    features, outputs = model.forward_intermediates(images, indices=layers)
    return model.forward_head(features), dict(zip(layers, outputs, strict=True))


def logits_and_layers_of(compile: bool) -> Callable[..., LogitsAndLayers]:
    """`logits_and_layers`, compiled (each size by itself) or not. ``model.compile()`` would not compile
    ``forward_intermediates``."""
    return torch.compile(logits_and_layers, dynamic=False) if compile else logits_and_layers


def layer_widths(model: nn.Module, name: str, layers: Sequence[int]) -> tuple[list[int], list[int]]:
    """Positions from 0, and numbers of channels, of layers (blocks or stages) of a timm model.

    Args:
        model: a timm model.
        name: of the model, for errors.
        layers: positions; negative ones count from the end.

    Raises:
        ValueError: the model has no such layer, or no ``forward_intermediates``.
    """
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"feature_layers: {name} has no forward_intermediates, which returns layers")
    count = len(model.feature_info)
    for layer in layers:
        if not -count <= layer < count:
            raise ValueError(f"feature_layers: {name} has layers 0 to {count - 1}, got {layer}")
    positions = [layer % count for layer in layers]
    return positions, [model.feature_info[position]["num_chs"] for position in positions]


def check_teacher(name: str, checkpoint: str | None, kwargs: dict[str, Any], num_classes: int | None = None) -> None:
    """Raise ``ValueError`` for an unknown model, one without weights, an argument that the task settles, or pretrained
    weights for another number of classes than ``num_classes``, if that is given."""
    check_model_name(name)
    if fixed := {"num_classes", "pretrained", *["in_chans"] * (num_classes is not None)} & kwargs.keys():
        raise ValueError(f"teacher_kwargs cannot have {fixed.pop()}, which the task settles")
    cfg = get_pretrained_cfg(name)
    if not checkpoint and not (cfg and cfg.has_weights):
        raise ValueError(
            f"the teacher {name} has no pretrained weights, and random ones teach nothing: give its weights as "
            "teacher_checkpoint"
        )
    if not checkpoint and num_classes not in (None, cfg.num_classes):
        raise ValueError(f"the teacher {name} has {cfg.num_classes} classes, the student num_classes={num_classes}")


def check_recorded(name: str, checkpoint: str, kwargs: dict[str, Any]) -> None:
    """Check that a file exists, and that it is of this model with these arguments, if it records them: not all
    differences show in the shapes of the weights.

    Raises:
        ValueError: it is of others, or cannot be read.
        FileNotFoundError: there is no such file.
    """
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f"teacher_checkpoint {checkpoint!r} does not exist")
    recorded = training_checkpoint(Path(checkpoint)).get("hyper_parameters", {})
    found = (recorded.get("model_name", name), recorded.get("model_kwargs", kwargs) or {})
    if found != (name, kwargs):
        raise ValueError(
            f"teacher_checkpoint {checkpoint!r} holds {found[0]} with teacher_kwargs {found[1]}, not {name} with "
            f"{kwargs}"
        )


def load_teacher_model(
    name: str, checkpoint: str | None, kwargs: dict[str, Any], num_classes: int | None = 0
) -> nn.Module:
    """A teacher's model with its weights and, where its file has it, its normalisation in ``pretrained_cfg``.

    Args:
        name: name for ``timm.create_model``.
        checkpoint: a Lightning, timm or safetensors file; None takes timm's pretrained weights.
        kwargs: further arguments of the model.
        num_classes: of its head, 0 for none; None for as many as the weights have.

    Raises:
        ValueError: a file that cannot be read or is another model's, or other classes.
        FileNotFoundError: there is no such file.
        OSError: pretrained weights cannot be fetched; the message says how to give a file.
    """
    arguments = kwargs if checkpoint else kwargs | {"pretrained": True}
    if num_classes is None and checkpoint:
        num_classes = _classes(name, checkpoint)
    head = {} if num_classes is None else {"num_classes": num_classes}
    with torch.random.fork_rng(devices=[]):  # initial weights of the teacher do not change the student's randomness
        try:
            return load_model(name, arguments, checkpoint, "cpu", say=rank_zero_info, **head)
        except OSError as error:
            if checkpoint:
                raise
            raise OSError(
                f"{one_line(error)} Give their file as teacher_checkpoint (--teacher-checkpoint, --vit-checkpoint)"
            ) from error


# ---- teachers of features


def features_of_teacher(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """The embedding (B, D) that a timm model's head reads, and its last feature map (B, D', h, w): of a ViT the
    patches, after the final norm, of a CNN the last stage."""
    norm = {"norm": True} if hasattr(model, "num_prefix_tokens") else {}  # hierarchical models may refuse it
    features, (last,) = model.forward_intermediates(images, indices=1, **norm)
    return model.forward_head(features, pre_logits=True).flatten(1), last


def recorded_kwargs(name: str, checkpoint: str | None) -> dict[str, Any]:
    """The arguments that a model had in the training that wrote its file; empty for other files."""
    recorded = training_checkpoint(checkpoint).get("hyper_parameters", {}) if checkpoint else {}
    if recorded.get("model_name") != name:
        return {}
    kwargs = {key: value for key, value in (recorded.get("model_kwargs") or {}).items() if key != "pretrained"}
    return kwargs | ({"in_chans": recorded["in_chans"]} if recorded.get("in_chans") else {})


def feature_widths(name: str, kwargs: dict[str, Any]) -> tuple[int, int]:
    """Widths of a teacher's embedding and of its feature map; no weights are made or read.

    Raises:
        ValueError: it has no features that a student could learn.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = build_model(name, 0, **kwargs).eval()
        if not hasattr(model, "forward_intermediates"):
            raise ValueError(f"the teacher {name} has no forward_intermediates, which returns its features")
        own = getattr(getattr(model, "patch_embed", None), "img_size", None)
        size = fit_to_size(model, tuple(own or model.pretrained_cfg["input_size"][1:]))
        with torch.no_grad():
            g, t = features_of_teacher(model, torch.zeros(1, kwargs.get("in_chans") or 3, *size))
    return g.shape[1], t.shape[1]


def load_feature_teacher(
    name: str,
    checkpoint: str | None,
    kwargs: dict[str, Any],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    head: bool = False,
) -> Teacher:
    """The teacher with its weights.

    Args:
        name, checkpoint, kwargs: as in `load_teacher_model`, whose errors it raises.
        mean: by channel, of pixels in [0, 1]; by default that of the checkpoint, or of ``pretrained_cfg``.
        std: likewise.
        head: keep its classifier, if it has one.
    """
    model = load_teacher_model(name, checkpoint, kwargs, None if head else 0)
    channels = kwargs.get("in_chans") or getattr(model, "in_chans", 3)
    stats = {"mean": mean or model.pretrained_cfg["mean"], "std": std or model.pretrained_cfg["std"]}
    return Teacher(model, None, **{which: per_channel(which, values, channels) for which, values in stats.items()})


def _classes(name: str, checkpoint: str) -> int:
    """The number of classes of the head in a file; 0 for none."""
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f"checkpoint {checkpoint!r} does not exist")
    cfg = get_pretrained_cfg(name)
    weight = read_weights(checkpoint).get(f"{cfg.classifier if cfg else 'head'}.weight")
    return 0 if weight is None else len(weight)


def fit_to_size(model: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
    """Have a teacher take images of about this (height, width); returns what it takes.

    A model that takes any size keeps it. Others are set to the nearest whole patches, and their positions resampled, or
    keep their own size if they have only one.

    Raises:
        ValueError: the model cannot be set to it.
    """
    if not model.pretrained_cfg.get("fixed_input_size"):
        return size
    stride = to_2tuple(model.feature_info[-1]["reduction"])
    nearest = tuple(max(1, round(side / step)) * step for side, step in zip(size, stride, strict=True))
    own = getattr(getattr(model, "patch_embed", None), "img_size", None) or model.pretrained_cfg["input_size"][1:]
    if nearest == tuple(own):
        return nearest
    if not hasattr(model, "set_input_size"):
        return tuple(own)
    try:
        model.set_input_size(img_size=nearest)
    except (AssertionError, RuntimeError, TypeError) as error:  # timm's models raise these
        raise ValueError(
            f"the teacher {type(model).__name__} cannot be set to {nearest[0]} x {nearest[1]} pixels; give "
            f"teacher_img_size: {one_line(error)}"
        ) from error
    return nearest
