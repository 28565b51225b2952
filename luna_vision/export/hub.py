"""A folder for the Hugging Face hub, and its model card: the model, how to load it, and how it was trained."""

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import timm
from timm.data import resolve_input_data_config
from timm.models._hub import generate_readme
from timm.models._input import get_model_input_config

from ..images.decode import MODES
from ..models.factory import PIXEL_CFG, PIXELS, RANDOM_WEIGHTS, training_checkpoint
from ..models.luna_vit import LunaVit
from ..utils.cost import count_macs
from ..utils.files import check_folder, new_folder, write_text
from ..utils.text import printable
from .compare import Check, ExportError, check_model, compare, first_line

__all__ = ["HF_FILES", "check_hf_folder", "save_for_hf", "training_details"]

HF_FILES = ("config.json", "model.safetensors", "README.md")
RANDOM = (
    "**RANDOM WEIGHTS: this model has not been trained.** Its output says nothing about an image. It can be "
    "trained, or show how the model is loaded and how much it costs."
)
CITATIONS = [
    """\
@inproceedings{ma2021luna,
  title     = {Luna: Linear Unified Nested Attention},
  author    = {Ma, Xuezhe and Kong, Xiang and Wang, Sinong and Zhou, Chunting and May, Jonathan and
               Ma, Hao and Zettlemoyer, Luke},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {34},
  year      = {2021},
  note      = {arXiv:2106.01540}
}""",
    """\
@misc{rw2019timm,
  author    = {Ross Wightman},
  title     = {PyTorch Image Models},
  year      = {2019},
  publisher = {GitHub},
  doi       = {10.5281/zenodo.4414861}
}""",
]


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
        folder: A new or an empty folder.
        training: How the model was trained, for the card, as Markdown: {name: value}.
        random_weights: The model was not trained; the card, and commands that read the folder, then say so.
        overwrite: Replace these three files in a folder that is not empty.

    Returns:
        The comparisons that were made; the outputs were equal bit by bit.

    Raises:
        ValueError: A model, folder or argument that does not fit.
        OSError: The folder cannot be written.
        ExportError: timm builds another model from the folder. Nothing is written then.
    """
    folder = Path(folder)
    check_model(model)
    slots = 0 if model.memory is None else model.memory.shape[1]
    if model.memory_len != slots:
        raise ValueError(
            f"the folder keeps all {slots} slots of the memory, and the model is set to {model.memory_len}: call "
            f"set_memory_len({slots}) first, and shorten the model that timm builds from the folder"
        )
    check_hf_folder(folder, overwrite)
    with new_folder(folder) as temporary:
        size, tag = get_model_input_config(model)["input_size"], "untrained" if random_weights else ""
        cfg = model.pretrained_cfg
        pixels = {name: cfg[name] for name in PIXEL_CFG if name in cfg}
        try:  # timm reads back only the names that it knows
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
        # safetensors writes files that only their owner can read
        shutil.copymode(temporary / "config.json", temporary / "model.safetensors")
        card = model_card(model, folder.resolve().name, training or {}, random_weights)
        write_text(temporary / "README.md", card)
        try:
            loaded = timm.create_model(f"local-dir:{temporary}", pretrained=True).eval().to(next(model.parameters()))
        except Exception as error:  # timm and safetensors raise nearly anything
            raise ExportError(f"timm cannot build the model from the folder: {first_line(error)}") from error
        return compare(lambda x: [loaded(*x)], model, "logits", False, "timm's model of the folder", tolerance=0.0)


def check_hf_folder(folder: Path, overwrite: bool) -> None:
    """See, before any work, that `save_for_hf` may and can write a folder; it raises the same errors."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file; format hf writes a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"{folder} is not empty: give --overwrite (overwrite=True) to replace its files")
    check_folder(folder if folder.is_dir() else folder.parent)


def training_details(checkpoint: Path) -> dict[str, Any]:
    """How a checkpoint was trained, for a card, as Markdown: {name: value}; only the file's name if it does not say.

    Raises:
        ValueError: Something that should be a number is not.
    """
    run = training_checkpoint(checkpoint)
    if not run:
        return {"Weights": f"{_code(checkpoint.name)}, which does not say what it was trained on"}
    hp = run["hyper_parameters"]
    details: dict[str, Any] = {"Weights": _code(checkpoint.name)}
    data = run.get("data")
    details["Training data"] = _code(f"luna_vision.data.{data['name']}") if data else "not recorded in the checkpoint"
    if notes := (data or {}).get("cfg", {}).get("notes"):
        details["Notes"] = "; ".join(map(_code, notes))
    if "epoch" in run:
        details["Training length"] = f"{int(run['epoch']) + 1} epochs, {int(run['global_step'])} steps"
    if "optimizer" in hp:
        rates = f"learning rate {float(hp['lr']):g}, weight decay {float(hp['weight_decay']):g}"
        details["Optimizer"] = f"{_code(hp['optimizer'])}, {rates}"
    start = hp.get("init_from_vit") or hp.get("checkpoint")
    if start:
        details["Started from"] = _code(Path(start).name)
    for name, state in run.get("callbacks", {}).items():
        score = state.get("current_score") if name.startswith("ModelCheckpoint") else None
        if score is not None:
            details[f"{_code(state['monitor'])} at the end of that epoch"] = f"{float(score):.4f}"
    return details


def _code(text: Any) -> str:
    """Text from an untrusted file as a code span, in which Markdown, HTML and addresses have no effect."""
    text = printable(str(text))
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{text}{fence}" if fence == "`" else f"{fence} {text} {fence}"


def model_card(model: LunaVit, name: str, training: dict[str, Any], random_weights: bool) -> str:
    """The text of a model card, Markdown with the hub's YAML header.

    Args:
        model: The model.
        name: Its name.
        training: How it was trained, as Markdown: {name: value}.
        random_weights: It was not trained.
    """
    cfg = resolve_input_data_config(model)
    channels, height, width = get_model_input_config(model)["input_size"]
    macs = count_macs(copy.deepcopy(model).to("meta"), height, width)
    task = "image-classification" if model.num_classes else "image-feature-extraction"
    architecture = _code(model.pretrained_cfg["architecture"])
    license = str(model.pretrained_cfg.get("license", "apache-2.0"))
    details = {
        "Architecture": f"{architecture} of luna_vision, a ViT with Luna attention, whose cost is linear in the "
        "number of patches",
        "Parameters (M)": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}",
        f"GMACs at {height} x {width}": f"{macs / 1e9:.2f}",
        "Image size": f"{height} x {width} pixels; any other size runs, too",
        "Channels": channels,
        "Patch size": " x ".join(map(str, model.patch_embed.patch_size)),
        "Memory slots": model.memory_len or "none",
        "Classes": model.num_classes or "none: it returns an embedding",
        "Mean, of pixels in [0, 1]": ", ".join(f"{x:.4g}" for x in cfg["mean"]),
        "Standard deviation": ", ".join(f"{x:.4g}" for x in cfg["std"]),
        **training,
    }
    model_args = getattr(model, "_model_args", {})
    if model_args.get("mixer", "luna") != "luna":
        details["Architecture"] = f"{architecture} of luna_vision with the mixer {_code(model_args['mixer'])}"
    card = {
        "tags": [task, "timm", "luna"],
        "license": license if re.fullmatch(r"[\w.+-]+", license) else "other",
        "description": RANDOM if random_weights else f"A Luna ViT for {task.replace('-', ' ')}.",
        "details": details,
        "usage": usage(name, channels, height, width),
        "citation": CITATIONS,
    }
    return generate_readme(card, name, task_name=task)


def usage(name: str, channels: int, height: int, width: int) -> str:
    """How to load and run the model, as Markdown."""
    image = 'transform("image.png")[None]'
    if channels not in MODES:
        image = f"torch.randn(1, {channels}, {height}, {width})  # normalised"
    return f"""\
It needs the package `luna_vision`. `{name}` is this folder; `huggingface_hub.snapshot_download("USER/{name}")` gets it
from the hub.

```python
import torch

import luna_vision

model, transform, class_names = luna_vision.load("{name}")
image = {image}
with torch.inference_mode():
    output = model(image)
```

`timm.create_model("local-dir:{name}", pretrained=True)` and `"hf-hub:USER/{name}"` give the model alone.
"""
