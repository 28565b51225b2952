"""A Luna ViT as a graph for images of any size: an ONNX file or a `torch.export` program.

Shapes: B batch, L memory slots, C width, H', W' patch grid.
"""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from timm.data import resolve_input_data_config
from timm.models._input import get_model_input_config
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..images.decode import MODES
from ..images.values import MASK
from ..models.factory import PIXEL_CFG
from ..models.luna_vit import LunaVit, join_tokens
from ..utils.checks import check_option
from ..utils.files import check_output, new_file
from .compare import Check, ExportError, check_model, compare, first_line

__all__ = ["export_onnx", "export_program", "onnx_libraries"]

OUTPUTS = ("logits", "embedding", "features")
METADATA = "metadata.json"  # the name of the metadata inside a .pt2 file
ONNX_BYTES = 2**31 - 2**27  # protobuf's limit of one file, less room for the graph


def export_onnx(
    model: LunaVit, path: str | Path, output: str | None = None, memory: bool = False, overwrite: bool = False
) -> list[Check]:
    """Write a model as an ONNX file with dynamic batch, height and width, once onnxruntime agrees with PyTorch.

    The input is "image", (batch, channels, height, width), normalised by "mean" and "std" of the file's metadata. The
    name of the output is the value of `output`.

    Args:
        model: A Luna ViT on the CPU, in float32. It is put into eval mode.
        path: The `.onnx` file.
        output: "logits" (B, classes), "embedding" (B, C), the input of the classifier, or "features" (B, C, H', W'),
            the patches after the final norm. None means logits if there is a classifier, else the embedding.
        memory: Carry the memory from one image to the next: the graph has a second input "memory" (B, L, C) and a
            second output "new_memory". The metadata have the first one, (1, L, C), as "initial_memory".
        overwrite: Replace an existing file.

    Returns:
        The comparisons that were made.

    Raises:
        ValueError: A model, path or option that does not fit, or onnx and onnxruntime are not installed.
        OSError: The file exists, or cannot be written.
        ExportError: The graph cannot be made, or differs from the model. Nothing is written then.
    """
    onnxruntime = onnx_libraries()
    path, output = Path(path), choose_output(model, output, memory)
    size = sum(x.numel() * x.element_size() for x in model.state_dict().values())
    if size > ONNX_BYTES:
        raise ValueError(f"an ONNX file holds less than 2 GiB, and this model has {size / 2**30:.1f} GiB of weights")
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise ValueError(f"the model must be on the CPU, where onnxruntime is compared with it, got {device}")
    check_output(path, [".onnx"], overwrite)
    outputs = [output, "new_memory"] if memory else [output]
    with new_file(path) as file:
        exported = trace(model.eval(), output, memory)
        try:
            program = torch.onnx.export(
                exported,
                dynamo=True,
                verbose=False,
                input_names=["image", "memory"] if memory else ["image"],
                output_names=outputs,
                # only names: the traced program has the dynamic dimensions
                dynamic_shapes=({0: "batch", 2: "height", 3: "width"}, *([None] if memory else [])),
            )
            for key, value in metadata(model, output, memory).items():
                program.model.metadata_props[key] = value if isinstance(value, str) else json.dumps(value)
            program.save(file.name, external_data=False)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            options.log_severity_level = 3
            session = onnxruntime.InferenceSession(file.name, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the libraries raise nearly anything
            raise ExportError(f"torch.onnx cannot translate this model: {first_line(error)}") from error

        def run(inputs: list[Tensor]) -> list[Tensor]:
            named = {name: x.numpy() for name, x in zip(("image", "memory"), inputs, strict=False)}
            return [torch.from_numpy(y) for y in session.run(outputs, named)]

        return compare(run, model, output, memory, f"onnxruntime {onnxruntime.__version__}")


def export_program(
    model: LunaVit, path: str | Path, output: str | None = None, memory: bool = False, overwrite: bool = False
) -> list[Check]:
    """Write a model as a `torch.export` program with dynamic batch, height and width, once it agrees with the model.

    `torch.export.load(path).module()` takes images (B, channels, height, width) on the model's device; both sides must
    be larger than one patch. Its `extra_files` have the metadata as `metadata.json`. Arguments, result and errors are
    those of `export_onnx`, except that the file is a `.pt2` and the device may be any.
    """
    path, output = Path(path), choose_output(model, output, memory)
    check_output(path, [".pt2"], overwrite)
    with new_file(path) as file:
        exported = trace(model.eval(), output, memory)
        torch.export.save(exported, file.name, extra_files={METADATA: json.dumps(metadata(model, output, memory))})
        program = torch.export.load(file.name).module()
        return compare(lambda inputs: _as_list(program(*inputs)), model, output, memory, "the loaded program")


def _as_list(result: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [result] if isinstance(result, Tensor) else result


def onnx_libraries() -> ModuleType:
    """Import onnxruntime; a ValueError names the library for ONNX that is not installed."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise ValueError(f'format onnx needs {name}: pip install "luna-vision[export]"') from error
    return module


class Exportable(nn.Module):
    """The forward pass to export: images, and a memory if it is carried, to the chosen output."""

    def __init__(self, model: LunaVit, output: str) -> None:
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, image: Tensor, memory: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Images (B, channels, height, width) and perhaps a memory (B, L, C) to the output and, with a memory, the next
        memory (B, L, C)."""
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


def choose_output(model: nn.Module, output: str | None, memory: bool) -> str:
    """The output to export; if None was chosen, "logits" of a classifier and else "embedding".

    Raises:
        ValueError: Not a Luna ViT in float32, or an output that the model does not have.
    """
    check_model(model)
    dtype = next(model.parameters()).dtype
    if dtype != torch.float32:
        raise ValueError(f"the model must be in float32, in which the check is made, got {dtype}")
    if output is None:
        output = "logits" if model.num_classes else "embedding"
    check_option("output", output, OUTPUTS)
    if output == "logits" and not model.num_classes:
        raise ValueError("the model has no classifier, so there are no logits: choose embedding or features")
    if memory and model.memory is None:
        raise ValueError("the model's mixer has no memory that could be carried from image to image")
    return output


def trace(model: LunaVit, output: str, memory: bool) -> ExportedProgram:
    """Trace `Exportable` for any batch, height and width. Sides must be larger than one patch.

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
    except Exception as error:  # PyTorch raises nearly anything
        raise ExportError(f"torch.export cannot trace this model for all sizes: {first_line(error)}") from error


def metadata(model: LunaVit, output: str, memory: bool) -> dict[str, Any]:
    """The metadata of the file, as plain data."""
    cfg = resolve_input_data_config(model)
    about = {
        "model": model.pretrained_cfg["architecture"],
        "license": model.pretrained_cfg.get("license", "apache-2.0"),
        "output": output,
        "num_classes": model.num_classes,
        "input_size": get_model_input_config(model)["input_size"],
        # mean and std are for pixels in [0, 1]
        **{name: cfg[name] for name in ("interpolation", "crop_pct", "crop_mode", "mean", "std")},
        "patch_size": model.patch_embed.patch_size,
        # of files of more than 8 bits, see docs/pixels.md
        **{name: model.pretrained_cfg[name] for name in PIXEL_CFG if name in model.pretrained_cfg},
    }
    if about.get("fill") == MASK:  # which the graph does not take
        about["fill"] = "mean"
    if model.in_chans in MODES:
        about["channels"] = MODES[model.in_chans]
    names = model.pretrained_cfg.get("label_names")
    if names and len(names) == model.num_classes:
        about["label_names"] = names
    if memory:
        about["initial_memory"] = model.learned_memory().detach().tolist()
    return about
