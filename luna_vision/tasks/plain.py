"""Checkpoints from strangers: tensors and plain data are read of them, and nothing is unpickled that is more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from luna_vision.models.checkpoints import not_plain


def load_plain(path: str | Path, **options: Any) -> dict[str, Any]:
    """``torch.load`` of a checkpoint that holds tensors and plain data only.

    Raises:
        ValueError: There are other objects in it, which could run code if they were unpickled, or it is no checkpoint.
    """
    try:
        checkpoint = torch.load(path, weights_only=True, **options)
    except OSError:
        raise
    except Exception as error:  # reading a file that is no checkpoint raises nearly anything
        raise ValueError(not_plain(path, error)) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{str(path)!r} is not a checkpoint: it holds a {type(checkpoint).__name__}")
    return checkpoint
