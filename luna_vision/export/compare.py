"""Compare an exported model with the model itself, at image sizes that were not seen when it was exported.

Shapes: B batch, L memory slots, C width, H' x W' patch grid.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from timm.models._input import get_model_input_config
from torch import Tensor, nn

from ..models.luna_vit import LunaVit

TOLERANCE = 1e-4  # float32 rounding makes about 1e-6


class ExportError(RuntimeError):
    """A model cannot be exported, or the export does not compute the same. Nothing was written."""


class Check(NamedTuple):
    """One comparison of an export with the model."""

    size: tuple[int, int, int, int]
    """Of the images: (B, channels, height, width)."""
    error: float
    """The largest difference of any number, divided by the largest number of the model's output."""


def check_model(model: nn.Module) -> None:
    """Raise a ValueError unless the model is a Luna ViT that timm has built."""
    if not isinstance(model, LunaVit):
        raise ValueError(
            f"this exports Luna ViTs, got {type(model).__name__}; timm has its own exports for other models"
        )
    if not hasattr(model, "pretrained_cfg"):
        raise ValueError(
            "an export records the model's name and the preprocessing of its images, which a LunaVit(...) does not "
            "know: build it by timm.create_model"
        )


def check_sizes(model: LunaVit) -> list[tuple[int, int, int, int]]:
    """Image sizes (B, channels, height, width) to compare at: the model's own, and others with batches of 1 to 3 whose
    sides are no multiples of the patch, just above one patch, or larger than those of the traced example."""
    rows, columns = model.patch_embed.patch_size
    height, width = get_model_input_config(model)["input_size"][1:]
    sizes = [
        (1, max(height, rows + 1), max(width, columns + 1)),
        (3, 3 * rows + 2, 6 * columns + 3),
        (2, 19 * rows - 4, 4 * columns + 1),
        (1, rows + 1, 14 * columns),
    ]
    return [(batch, model.in_chans, *sides) for batch, *sides in sizes]


def reference(model: LunaVit, output: str, image: Tensor, memory: Tensor | None) -> list[Tensor]:
    """The outputs that an export must reproduce, through the model's own methods."""
    if output == "features":
        (y,) = model.forward_intermediates(image, indices=1, norm=True, intermediates_only=True, memory=memory)
    elif output == "logits":
        y = model(image, memory=memory)
    else:
        y = model.forward_head(model.forward_features(image, memory=memory), pre_logits=True)
    return [y] if memory is None else [y, model.encode(image, memory=memory)[1]]


@torch.no_grad()
def compare(
    run: Callable[[list[Tensor]], Sequence[Tensor]],
    model: LunaVit,
    output: str,
    memory: bool,
    where: str,
    tolerance: float = TOLERANCE,
) -> list[Check]:
    """Compare an export with the model at `check_sizes`; with a memory, on two images in a row.

    Args:
        run: Runs the export on [images] or [images, memory].
        model, output, memory: The model, and the arguments of the export.
        where: The runtime's name in messages.
        tolerance: The largest relative error that is allowed.

    Raises:
        ExportError: It does not run, or the error is larger.
    """
    generator = torch.Generator().manual_seed(0)
    example = next(model.parameters())
    checks = []
    for size in check_sizes(model):
        state = model.learned_memory().repeat(size[0], 1, 1) if memory else None
        at = " x ".join(map(str, size))
        error = 0.0
        for _ in range(2 if memory else 1):
            image = torch.randn(size, generator=generator).to(example)
            wanted = reference(model, output, image, state)
            try:
                given = run([image] if state is None else [image, state])
            except Exception as failure:  # depends on the runtime
                raise ExportError(f"{where} does not run at {at}: {first_line(failure)}") from failure
            error = max(error, *(_difference(a, b) for a, b in zip(given, wanted, strict=True)))
            state = wanted[1] if memory else None
        if error > tolerance:
            raise ExportError(
                f"{where} differs from PyTorch by {error:.1e} of the largest value at {at}; {tolerance:.0e} is allowed"
            )
        checks.append(Check(size, error))
    return checks


def _difference(given: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest wanted number; infinite for another shape or a non-finite number."""
    if given.shape != wanted.shape:
        return math.inf
    largest = wanted.abs().max().clamp(min=torch.finfo(wanted.dtype).tiny)
    error = float((given.to(wanted.device) - wanted).abs().max() / largest)
    return error if math.isfinite(error) else math.inf


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
