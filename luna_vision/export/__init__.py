"""Export a Luna ViT for use without this package, or for the Hugging Face hub.

- `onnx`: one `.onnx` file, for onnxruntime and other runtimes.
- `torch-export`: one `.pt2` file, for `torch.export.load`.
- `hf`: a folder with weights, configuration and a model card. After `import luna_vision`, timm reads it by
  `timm.create_model("local-dir:FOLDER", pretrained=True)`.

The graphs take any batch, height and width. An export is loaded back and compared with the model before it gets its
name, so a file of that name is always complete and right.
"""

from .compare import Check, ExportError
from .graph import export_onnx, export_program, onnx_libraries
from .hub import HF_FILES, save_for_hf

__all__ = ["HF_FILES", "Check", "ExportError", "export_onnx", "export_program", "onnx_libraries", "save_for_hf"]
