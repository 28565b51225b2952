"""Checksums of a model, by which a resumed run recognises it."""

import hashlib
from typing import Any

import torch
from torch import nn

__all__ = ["describe"]


def describe(model: nn.Module) -> dict[str, str]:
    """Checksums of the architecture, with the plain attributes of all modules, and of the weights."""
    architecture, weights = hashlib.sha256(), hashlib.sha256()
    for name, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if _is_plain(v) and k != "training" and not k.startswith("_")}
        architecture.update(repr((name, type(module).__name__, plain)).encode())
    for name, tensor in model.state_dict().items():
        weights.update(repr((name, tensor.dtype, tensor.shape)).encode())
        weights.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return {"architecture": architecture.hexdigest(), "weights": weights.hexdigest()}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
