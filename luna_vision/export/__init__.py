"""Export a Luna ViT for use without this package, or for the Hugging Face hub.

- `onnx`: one `.onnx` file, which onnxruntime and others run.
- `torch-export`: one `.pt2` file, which `torch.export.load` reads.
- `hf`: a folder with weights, configuration and a model card, which `timm.create_model("local-dir:FOLDER",
  pretrained=True)` reads, after `import luna_vision`.

The graphs take any batch, height and width. What was written is loaded back and compared with the model before it gets
its name, so that a file of that name is always complete and right.
"""

import importlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import timm.models
import torch
from timm.models._input import get_model_input_config
from torch import Tensor

from ..models.factory import PIXEL_CFG, PIXELS, RANDOM_WEIGHTS
from ..models.luna_vit import LunaVit
from ..utils.files import new_file, new_folder, write_text
from .files import check_target
from .graph import (
    Check,
    ExportError,
    check_model,
    choose_output,
    compare,
    compare_folder,
    first_line,
    metadata,
    trace,
)
from .model_card import model_card

__all__ = ["Check", "ExportError", "export_onnx", "export_program", "onnx_libraries", "save_for_hf"]

METADATA = "metadata.json"  # the name of the metadata inside a .pt2 file
HF_FILES = ("config.json", "model.safetensors", "README.md")
ONNX_BYTES = 2**31 - 2**27  # protobuf's limit of one file, less room for the graph


def export_onnx(
    model: LunaVit, path: str | Path, output: str | None = None, memory: bool = False, overwrite: bool = False
) -> list[Check]:
    """Write a model as an ONNX file with dynamic batch, height and width, once onnxruntime agrees with PyTorch.

    The input is "image", (batch, channels, height, width), normalised by "mean" and "std" of the file's metadata; the
    output has the name that `output` says.

    Args:
        model: A Luna ViT on the CPU, in float32. It is put into eval mode.
        path: The `.onnx` file.
        output: "logits" (B, classes), "embedding" (B, C), what the classifier reads, or "features" (B, C, H', W'), the
            patches after the final norm. None is logits if there is a classifier, else the embedding.
        memory: Carry the memory from one image to the next: a second input "memory" (B, L, C), and a second output
            "new_memory". The one to start from, (1, L, C), is "initial_memory" of the metadata, as JSON.
        overwrite: Replace an existing file.

    Returns:
        The comparisons that were made.

    Raises:
        ValueError: A model, path or option that does not fit, or onnx and onnxruntime are not installed.
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
    check_target(path, "onnx", overwrite)
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
                # only to name what the trace left open
                dynamic_shapes=({0: "batch", 2: "height", 3: "width"}, *([None] if memory else [])),
            )
            for key, value in metadata(model, output, memory).items():
                program.model.metadata_props[key] = value if isinstance(value, str) else json.dumps(value)
            program.save(file.name, external_data=False)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            options.log_severity_level = 3
            session = onnxruntime.InferenceSession(file.name, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # whatever the libraries raise on the way
            raise ExportError(f"torch.onnx cannot translate this model: {first_line(error)}") from error

        def run(inputs: list[Tensor]) -> list[Tensor]:
            named = {name: x.numpy() for name, x in zip(("image", "memory"), inputs, strict=False)}
            return [torch.from_numpy(y) for y in session.run(outputs, named)]

        return compare(run, model, output, memory, f"onnxruntime {onnxruntime.__version__}")


def export_program(
    model: LunaVit, path: str | Path, output: str | None = None, memory: bool = False, overwrite: bool = False
) -> list[Check]:
    """Write a model as a `torch.export` program with dynamic batch, height and width, once it agrees with the model.

    `torch.export.load(path).module()` maps images (B, channels, height, width), both sides larger than one patch, on
    the device of the model. The metadata is `metadata.json` of its `extra_files`. Arguments, result and errors are
    those of `export_onnx`, but for the file, which is a `.pt2`, and the device, which may be any.
    """
    path, output = Path(path), choose_output(model, output, memory)
    check_target(path, "torch-export", overwrite)
    with new_file(path) as file:
        exported = trace(model.eval(), output, memory)
        torch.export.save(exported, file.name, extra_files={METADATA: json.dumps(metadata(model, output, memory))})
        program = torch.export.load(file.name).module()

        def run(inputs: list[Tensor]) -> Sequence[Tensor]:
            with torch.no_grad():
                result = program(*inputs)
            return result if memory else [result]

        return compare(run, model, output, memory, "the loaded program")


def save_for_hf(
    model: LunaVit,
    folder: str | Path,
    training: dict[str, Any] | None = None,
    random_weights: bool = False,
    overwrite: bool = False,
) -> list[Check]:
    """Write a folder for the Hugging Face hub, once timm builds the same model from it again.

    It has `model.safetensors`, `config.json` with the arguments of the model and its normalisation, and a model card,
    `README.md`.

    Args:
        model: A Luna ViT. It is put into eval mode.
        folder: Where to: a new or an empty folder.
        training: How the weights came about, for the card: {what: value}.
        random_weights: Have the card say loudly that the model was not trained, and the commands that read the folder.
        overwrite: Replace these three files in a folder that has some already.

    Returns:
        The comparisons that were made; there is no difference.

    Raises:
        ValueError: A model, folder or argument that does not fit.
        ExportError: What timm builds from the folder is another model. Nothing is written then.
    """
    folder = Path(folder)
    check_model(model)
    slots = 0 if model.memory is None else model.memory.shape[1]
    if model.memory_len != slots:
        raise ValueError(
            f"the folder keeps all {slots} slots of the memory, and the model is set to {model.memory_len}: call "
            f"set_memory_len({slots}) first, and shorten the model that timm builds from it"
        )
    check_target(folder, "hf", overwrite)
    with new_folder(folder) as temporary:
        size, tag = get_model_input_config(model)["input_size"], "untrained" if random_weights else ""
        cfg = model.pretrained_cfg
        pixels = {name: cfg[name] for name in PIXEL_CFG if name in cfg}
        try:  # timm reads back no other names than its own
            model.pretrained_cfg = {name: value for name, value in cfg.items() if name not in pixels}
            timm.models.save_for_hf(
                model.eval(),
                temporary,
                safe_serialization=True,
                data_config={"input_size": size},
                model_config={"pretrained_cfg": {"tag": tag}, RANDOM_WEIGHTS: random_weights, PIXELS: pixels},
            )
        finally:
            model.pretrained_cfg = cfg
        # safetensors writes files that are their owner's alone
        shutil.copymode(temporary / "config.json", temporary / "model.safetensors")
        card = model_card(model, folder.resolve().name, training or {}, random_weights)
        write_text(temporary / "README.md", card)
        return compare_folder(model, temporary)


def onnx_libraries() -> ModuleType:
    """onnxruntime; a ValueError names what of the libraries for ONNX is not installed."""
    for name in ("onnx", "onnxscript"):
        _import(name)
    return _import("onnxruntime")


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f'format onnx needs {name}: pip install "luna-vision[export]"') from error
