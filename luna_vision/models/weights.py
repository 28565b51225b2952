"""Starting weights for fine-tuning: any timm, Lightning or safetensors file, through timm's own loader."""

from __future__ import annotations

import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path

from timm.models import load_pretrained
from timm.models import load_state_dict as read_state_dict
from timm.models._input import get_model_input_config
from torch import nn

from ._parts import unwrap_state_dict


def load_weights(
    model: nn.Module, path: str | Path, say: Callable[[str], None] = print, fresh_head: bool = True
) -> None:
    """Load a checkpoint into ``model``, adapting what may differ.

    The model's ``checkpoint_filter_fn`` runs (so positions are resampled), the first convolution is adapted to another
    number of channels, and a head for another number of classes is left as initialised, with a notice (a model without
    a head takes none). EMA weights are preferred where the file has both.

    Args:
        model: a timm model.
        path: a timm, Lightning or safetensors file.
        say: what notices go to.
        fresh_head: whether a head for another number of classes may start fresh; if not, it is an error.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no weights, weights of another model or, without ``fresh_head``, other classes.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint {str(path)!r} does not exist")
    try:
        state_dict = unwrap_state_dict(read_state_dict(str(path)))
    except Exception as error:  # reading a file that is no checkpoint raises nearly anything
        raise ValueError(not_plain(path, error)) from error
    cfg = dict(model.pretrained_cfg, state_dict=state_dict, source="", num_classes=model.num_classes)
    _keep_own_head(model, cfg, str(path), say, fresh_head)
    _declare_channels(model, cfg)
    try:
        load_pretrained(
            model,
            pretrained_cfg=cfg,
            num_classes=model.num_classes,
            in_chans=get_model_input_config(model)["input_size"][0],
            # timm keeps the filter beside the model class and hands it only to `create_model(pretrained=True)`.
            filter_fn=getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None),
        )
    except RuntimeError as error:
        raise ValueError(f"{str(path)!r} does not fit {type(model).__name__}: {error}") from error
    say(f"weights loaded from {path}")


def not_plain(path: str | Path, error: Exception) -> str:
    """What to say, in one line, of a file that ``torch.load`` does not read with ``weights_only=True``."""
    cause = error.__cause__ or error  # timm's own message leaves out what it is
    if isinstance(cause, pickle.UnpicklingError):
        found = re.search(r"GLOBAL ([\w.]+)", str(cause))
        what = f" ({found[1]})" if found else ", if there are any,"
        return (
            f"{str(path)!r} is not a checkpoint of tensors and plain data only: other Python objects{what} are "
            "refused, as loading them could run any code"
        )
    return f"{str(path)!r} is not a checkpoint: {' '.join(str(error).split()) or type(error).__name__}"


def _keep_own_head(model: nn.Module, cfg: dict, path: str, say: Callable[[str], None], fresh_head: bool) -> None:
    """Give a head of another size the model's own values, so that the rest can still be loaded strictly."""
    own, given = model.state_dict(), cfg["state_dict"]
    classifiers = cfg.get("classifier") or ()
    for classifier in (classifiers,) if isinstance(classifiers, str) else classifiers:
        weight = f"{classifier}.weight"
        if weight not in given:
            continue
        if weight not in own:  # a model for features
            for name in (weight, f"{classifier}.bias"):
                given.pop(name, None)
        elif given[weight].shape[0] != own[weight].shape[0]:
            if not fresh_head:
                classes = (given[weight].shape[0], own[weight].shape[0])
                raise ValueError(f"{path!r} has a head for {classes[0]} classes, the model one for {classes[1]}")
            say(
                f"{path}: its head for {given[weight].shape[0]} classes is dropped; the model's own, for "
                f"{own[weight].shape[0]}, starts fresh"
            )
            given.update({name: own[name] for name in (weight, f"{classifier}.bias") if name in own})


def _declare_channels(model: nn.Module, cfg: dict) -> None:
    """Tell timm how many channels the file's first convolution reads; the cfg declares the model's, not the file's."""
    weight = cfg["state_dict"].get(f"{get_model_input_config(model)['first_conv']}.weight")
    if weight is not None and weight.ndim == 4:
        cfg["input_size"] = (weight.shape[1], *cfg["input_size"][1:])
