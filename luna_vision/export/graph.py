"""A Luna ViT as a graph for images of any size: traced once, and compared with the model at sizes it has not seen.

Shapes: B batch, N patches, L memory slots, C width, H', W' patch grid.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.data import resolve_input_data_config
from timm.models._input import get_model_input_config
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..images.decode import MODES
from ..models.factory import PIXEL_CFG
from ..models.luna_vit import LunaVit, join_tokens

OUTPUTS = ("logits", "embedding", "features")
TOLERANCE = 1e-4  # float32 leaves about 1e-6


class ExportError(RuntimeError):
    """A graph cannot be made, or does not compute what the model does. Nothing was written."""


class Check(NamedTuple):
    """A comparison of an exported model with the model."""

    size: tuple[int, int, int, int]
    """Of the images: (B, channels, height, width)."""
    error: float
    """The largest difference of any number, over the largest number of the model's output."""


class Exportable(nn.Module):
    """The forward pass that is exported: images, and a memory if it is to be carried, to the one output asked for."""

    def __init__(self, model: LunaVit, output: str) -> None:
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, image: Tensor, memory: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Map images (B, channels, height, width) and a memory (B, L, C) to the output and, if one came in, the memory
        (B, L, C) to go on with."""
        model = self.model
        x, new_memory = model.encode(image, memory=memory)
        if self.output == "features":
            rows, columns = (
                (side + patch - 1) // patch
                for side, patch in zip(image.shape[2:], model.patch_embed.patch_size, strict=True)
            )
            y = model.norm(x).transpose(1, 2).unflatten(2, (rows, columns))
        else:
            tokens = model.norm(join_tokens(new_memory, x))
            y = model.forward_head(tokens, pre_logits=self.output == "embedding")
        return y if memory is None else (y, new_memory)


def check_model(model: nn.Module) -> None:
    """
    Raises:
        ValueError: Not a Luna ViT.
    """
    if not isinstance(model, LunaVit):
        raise ValueError(f"this exports Luna ViTs, got {type(model).__name__}; timm has exports of its own for others")


def choose_output(model: nn.Module, output: str | None, memory: bool) -> str:
    """The output to export: "logits" of a classifier and else "embedding", if None was chosen.

    Raises:
        ValueError: Not a Luna ViT in float32, or an output that it has not.
    """
    check_model(model)
    dtype = next(model.parameters()).dtype
    if dtype != torch.float32:
        raise ValueError(f"the model must be in float32, in which the check is made, got {dtype}")
    if output is None:
        output = "logits" if model.num_classes else "embedding"
    if output not in OUTPUTS:
        raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
    if output == "logits" and not model.num_classes:
        raise ValueError("the model has no classifier, so there are no logits: choose embedding or features")
    if memory and model.memory is None:
        raise ValueError("the model's mixer has no memory that could be carried from image to image")
    return output


def trace(model: LunaVit, output: str, memory: bool) -> ExportedProgram:
    """The graph of `Exportable`, for any batch, height and width. Sides must be larger than one patch.

    Raises:
        ExportError: PyTorch cannot trace it, or only for some sizes.
    """
    rows, columns = model.patch_embed.patch_size
    batch = Dim("batch", min=1)
    image = {0: batch, 2: Dim("height", min=rows + 1), 3: Dim("width", min=columns + 1)}
    example = torch.randn(2, model.in_chans, 10 * rows, 6 * columns, device=next(model.parameters()).device)
    inputs, shapes = [example], [image]
    if memory:
        inputs.append(model.learned_memory().detach().repeat(2, 1, 1))
        shapes.append({0: batch})
    try:
        with torch.no_grad():
            return torch.export.export(Exportable(model, output).eval(), tuple(inputs), dynamic_shapes=tuple(shapes))
    except Exception as error:  # whatever PyTorch raises on the way
        raise ExportError(f"torch.export cannot trace this model for all sizes: {first_line(error)}") from error


def check_sizes(model: LunaVit) -> list[tuple[int, int, int, int]]:
    """Sizes to compare at, (B, channels, height, width): that of the model, and others with batches of 1 to 3, sides
    that are no multiples of the patch, just above one patch, and larger than the example that was traced."""
    rows, columns = model.patch_embed.patch_size
    height, width = get_model_input_config(model)["input_size"][1:]
    sizes = [
        (1, max(height, rows + 1), max(width, columns + 1)),
        (3, 3 * rows + 2, 6 * columns + 3),
        (2, 19 * rows - 4, 4 * columns + 1),
        (1, rows + 1, 14 * columns),
    ]
    return [(batch, model.in_chans, *sides) for batch, *sides in sizes]


@torch.no_grad()
def reference(model: LunaVit, output: str, image: Tensor, memory: Tensor | None) -> list[Tensor]:
    """What a graph must compute, through the model's own methods."""
    if output == "features":
        (y,) = model.forward_intermediates(image, indices=1, norm=True, intermediates_only=True, memory=memory)
    elif output == "logits":
        y = model(image, memory=memory)
    else:
        y = model.forward_head(model.forward_features(image, memory=memory), pre_logits=True)
    return [y] if memory is None else [y, model.encode(image, memory=memory)[1]]


def compare(
    run: Callable[[list[Tensor]], Sequence[Tensor]], model: LunaVit, output: str, memory: bool, where: str
) -> list[Check]:
    """Compare a graph with the model at `check_sizes`; with a memory, over two images that it is carried through.

    Args:
        run: Runs the graph on [images] or [images, memory].
        model, output, memory: What was exported.
        where: What runs it, for messages.

    Raises:
        ExportError: It does not run, or differs by more than `TOLERANCE`.
    """
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    checks = []
    for size in check_sizes(model):
        state = model.learned_memory().detach().repeat(size[0], 1, 1) if memory else None
        at = " x ".join(map(str, size))
        error = 0.0
        for _ in range(2 if memory else 1):
            image = torch.randn(size, generator=generator).to(device)
            wanted = reference(model, output, image, state)
            try:
                given = run([image] if state is None else [image, state])
            except Exception as failure:  # of the runtime, whatever it is
                raise ExportError(
                    f"{where} does not run the exported model at {at}: {first_line(failure)}"
                ) from failure
            error = max(error, *(_difference(a, b) for a, b in zip(given, wanted, strict=True)))
            state = wanted[1] if memory else None
        if error > TOLERANCE:
            raise ExportError(
                f"{where} differs from PyTorch by {error:.1e} of the largest value at {at}; {TOLERANCE:.0e} is allowed"
            )
        checks.append(Check(size, error))
    return checks


def compare_folder(model: LunaVit, folder: Path) -> list[Check]:
    """Compare what timm builds from a folder of `save_for_hf` with the model, bit by bit.

    Raises:
        ExportError: It cannot be built, or returns something else.
    """
    example = next(model.parameters())
    try:
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().to(example.device, example.dtype)
    except Exception as error:  # of timm and safetensors, whatever it is
        raise ExportError(f"timm cannot build the model from the folder: {first_line(error)}") from error
    checks = []
    for size in check_sizes(model):
        image = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(example)
        with torch.no_grad():
            if not torch.equal(loaded(image), model(image)):
                at = " x ".join(map(str, size))
                raise ExportError(f"the model that timm builds from the folder returns something else at {at}")
        checks.append(Check(size, 0.0))
    return checks


def _difference(given: Tensor, wanted: Tensor) -> float:
    """Of any number, over the largest one that is wanted; infinite where shapes differ or a number is not finite."""
    if given.shape != wanted.shape:
        return math.inf
    largest = wanted.abs().max().clamp(min=torch.finfo(wanted.dtype).tiny)
    error = float((given.to(wanted.device) - wanted).abs().max() / largest)
    return error if math.isfinite(error) else math.inf


def first_line(error: Exception) -> str:
    """The first line of an error."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def metadata(model: LunaVit, output: str, memory: bool) -> dict[str, Any]:
    """What goes into a file beside the graph, as plain data."""
    cfg = resolve_input_data_config(model)
    about = {
        "model": model.pretrained_cfg["architecture"],
        "license": model.pretrained_cfg.get("license", "apache-2.0"),
        "output": output,
        "num_classes": model.num_classes,
        "input_size": get_model_input_config(model)["input_size"],
        **{name: cfg[name] for name in ("interpolation", "crop_pct", "crop_mode")},
        "mean": cfg["mean"],  # of pixels in [0, 1]
        "std": cfg["std"],
        "patch_size": model.patch_embed.patch_size,
        # of files of more than 8 bits, see docs/pixels.md
        **{name: model.pretrained_cfg[name] for name in PIXEL_CFG if name in model.pretrained_cfg},
    }
    if model.in_chans in MODES:
        about["channels"] = MODES[model.in_chans]
    names = model.pretrained_cfg.get("label_names")
    if names and len(names) == model.num_classes:
        about["label_names"] = names
    if memory:
        about["initial_memory"] = model.learned_memory().detach().tolist()
    return about
