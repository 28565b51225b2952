"""The model card of an exported folder: what the model is, how to load it, and what is known of its training."""

import copy
import re
from pathlib import Path
from typing import Any

from timm.data import resolve_input_data_config
from timm.models._hub import generate_readme
from timm.models._input import get_model_input_config

from ..images.decode import MODES
from ..models.factory import training_checkpoint
from ..models.luna_vit import LunaVit
from ..utils.cost import count_macs
from ..utils.text import printable

__all__ = ["model_card", "training_details"]

RANDOM = (
    "**RANDOM WEIGHTS: this model has not been trained.** What it returns says nothing about an image. It can be "
    "trained, or show how the model is loaded and what it costs."
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
@article{guo2021external,
  title   = {Beyond Self-attention: External Attention using Two Linear Layers for Visual Tasks},
  author  = {Guo, Meng-Hao and Liu, Zheng-Ning and Mu, Tai-Jiang and Hu, Shi-Min},
  journal = {IEEE Transactions on Pattern Analysis and Machine Intelligence},
  year    = {2022},
  note    = {arXiv:2105.02358}
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


def training_details(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of its training, for a card, as Markdown: {what: value}. Of another file than one of
    `train.py`, its name.

    Raises:
        ValueError: It says something else than a number where there should be one.
    """
    run = training_checkpoint(checkpoint)
    if not run:
        return {"Weights": f"{_code(checkpoint.name)}, which does not say what it was trained on"}
    hp = run["hyper_parameters"]
    details: dict[str, Any] = {"Weights": _code(checkpoint.name)}
    data = run.get("data")
    details["Training data"] = _code(f"luna_vision.data.{data['name']}") if data else "not recorded in the checkpoint"
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
    """Text of strangers as a code span, in which no Markdown, HTML or address means anything."""
    text = printable(str(text))
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{text}{fence}" if fence == "`" else f"{fence} {text} {fence}"


def model_card(model: LunaVit, name: str, training: dict[str, Any], random_weights: bool) -> str:
    """The text of a model card, Markdown with the hub's YAML header.

    Args:
        model: The model.
        name: What to call it.
        training: What is known of its training, as Markdown: {what: value}.
        random_weights: Whether it was not trained at all.
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
