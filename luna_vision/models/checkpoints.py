"""Weights from files: read a checkpoint and what it records of its training, fit it to a model, load it."""

from __future__ import annotations

import json
import logging
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from timm.layers import resample_patch_embed
from timm.models import load_pretrained
from timm.models import load_state_dict as read_state_dict
from timm.models._input import get_model_input_config
from torch import Tensor, nn

_logger = logging.getLogger(__name__)

# the keys about images that are taken from a checkpoint, see `timm_cfg` of the data modules
IMAGE_CFG = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "num_classes", "label_names")
# likewise, of numbers in files, see `luna_vision.images.values`; and, only of images of any size, that are not resized,
# the part of a file and the mask, as `luna_vision.data.SlideDataModule` has them
PIXEL_CFG = ("value_range", "nodata", "fill", "slides")
# where the detectors and segmenters of `luna_vision.downstream` have their backbone
BODIES = ("backbone.pyramid_backbone.body.", "backbone.body.")


def unwrap_state_dict(state_dict: dict) -> dict[str, Tensor]:
    """The state dict of the model in a checkpoint of a training.

    It may be under a key of its own (EMA first), have the prefix "model." of a Lightning task, or be bare.
    """
    for wrapper in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(state_dict.get(wrapper), dict):
            state_dict = state_dict[wrapper]
    inner = {k.removeprefix("model."): v for k, v in state_dict.items() if k.startswith("model.")}
    return inner or state_dict


# parts that a last block has only if something reads its memory or its patches; the final pack likewise
_OPTIONAL = re.compile(r"(attn\.(unpack_|proj)|(norm|ls)[12](_memory)?\.|mlp(_memory)?\.)")


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Fit a checkpoint to `model`, for strict loading.

    Unwraps it, resamples a patch embedding of another patch size, and drops the parts that the end of this model was
    built without (see `last_block`). A final pack that only the model has keeps its initial values, with a warning.
    """
    own = model.state_dict()
    last = f"blocks.{len(model.blocks) - 1}."
    out = {}
    for key, value in unwrap_state_dict(state_dict).items():
        if key not in own and (
            key.startswith("final_pack.") or (key.startswith(last) and _OPTIONAL.match(key, len(last)))
        ):
            continue
        if key == "patch_embed.proj.weight" and key in own and value.shape[-2:] != own[key].shape[-2:]:
            value = resample_patch_embed(value, list(own[key].shape[-2:]), verbose=True)
        out[key] = value
    final_pack = {key: value for key, value in own.items() if key.startswith("final_pack.")}
    if final_pack and out and not final_pack.keys() & out.keys():
        _logger.warning("the checkpoint has no final pack: it keeps its initial values")
        out |= final_pack
    return out


def load_weights(
    model: nn.Module, path: str | Path, say: Callable[[str], None] = print, fresh_head: bool = True
) -> None:
    """Load a checkpoint into ``model``.

    The model's ``checkpoint_filter_fn`` runs (so positions are resampled), and the first convolution is adapted to
    another number of channels. A head for another number of classes keeps its initial values, with a notice. EMA
    weights are preferred where the file has both. From a detector or a segmenter, the backbone is taken, without a
    head.

    Args:
        model: a timm model.
        path: a timm, Lightning or safetensors file.
        say: gets the notices.
        fresh_head: whether a head for another number of classes may start fresh; if not, it is an error.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: it is a folder.
        ValueError: the file holds no weights, weights of another model or, without ``fresh_head``, other classes.
    """
    if Path(path).is_dir():
        raise IsADirectoryError(f"checkpoint {str(path)!r} is a folder")
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint {str(path)!r} does not exist")
    state_dict = read_weights(path)
    body = _body(state_dict)
    cfg = dict(model.pretrained_cfg, state_dict=body or state_dict, source="", num_classes=model.num_classes)
    _keep_own_head(model, cfg, str(path), say, fresh_head)
    _declare_channels(model, cfg)
    # timm keeps the filter beside the model class and hands it only to `create_model(pretrained=True)`.
    filter_fn = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        if filter_fn is not None:  # here, so that an error has the names of the model
            cfg["state_dict"] = filter_fn(cfg["state_dict"], model)
        load_pretrained(
            model,
            pretrained_cfg=cfg,
            num_classes=model.num_classes,
            in_chans=get_model_input_config(model)["input_size"][0],
        )
    except Exception as error:  # timm's filters raise nearly anything for a file that is not timm's
        differing = differing_weights(model.state_dict(), cfg["state_dict"]) or " ".join(str(error).split())
        raise ValueError(f"{str(path)!r} does not fit {type(model).__name__}: {differing}") from error
    say(f"weights loaded from {path}")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file, unwrapped; a ValueError where the file is no checkpoint of tensors and plain data."""
    try:
        return unwrap_state_dict(read_state_dict(str(path)))
    except Exception as error:  # reading a file that is no checkpoint raises nearly anything
        raise ValueError(not_plain(path, error)) from error


def load_whole(model: nn.Module, path: str | Path, name: str) -> bool:
    """Load the weights of a detector or a segmenter, with its head.

    Args:
        model: of `luna_vision.downstream`.
        path: of a training.
        name: of its backbone, for the error.

    Returns:
        Whether the file has such weights; else nothing is loaded.

    Raises:
        ValueError: They are those of another one.
    """
    weights = read_weights(path)
    if not _body(weights):
        return False
    if differing := differing_weights(model.state_dict(), weights):  # the defaults of a model may have changed since
        raise ValueError(f"{str(path)!r} does not fit {name} as it is built now: {differing}")
    model.load_state_dict(weights)
    return True


def _body(state_dict: dict) -> dict:
    """The backbone of a detector or segmenter; empty for any other model."""
    for prefix in BODIES:
        body = {name.removeprefix(prefix): x for name, x in state_dict.items() if name.startswith(prefix)}
        if body:
            return body
    return {}


def differing_weights(own: dict, given: dict) -> str:
    """The differences of two state dicts in names and shapes, in one line with up to three names of each kind."""
    kinds = {
        "missing": [name for name in own if name not in given],
        "of another shape": [n for n in own if n in given and getattr(given[n], "shape", None) != own[n].shape],
        "not the model's": [name for name in given if name not in own],
    }
    return "; ".join(
        f"{len(names)} weights are {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in kinds.items()
        if names
    )


def not_plain(path: str | Path, error: Exception) -> str:
    """The message, in one line, for a file that ``torch.load`` does not read with ``weights_only=True``."""
    cause = error.__cause__ or error  # timm's own message leaves out the type
    if isinstance(cause, pickle.UnpicklingError):
        found = re.search(r"GLOBAL ([\w.]+)", str(cause))
        what = f" ({found[1]})" if found else ", if there are any,"
        return (
            f"{str(path)!r} is not a checkpoint of tensors and plain data only: other Python objects{what} are "
            "refused, as loading them could run any code"
        )
    reason = " ".join(str(error)[:300].split())  # names in it may be of any length
    return f"{str(path)!r} is not a checkpoint: {reason or type(error).__name__}"


def _keep_own_head(model: nn.Module, cfg: dict, path: str, say: Callable[[str], None], fresh_head: bool) -> None:
    """Put the model's own head in the place of one of another size or of none, so that the rest can be loaded strictly.

    There is none in the backbone of a detector or segmenter, and in what was trained without labels.
    """
    own, given = model.state_dict(), cfg["state_dict"]
    classifiers = cfg.get("classifier") or ()
    for classifier in (classifiers,) if isinstance(classifiers, str) else classifiers:
        weight = f"{classifier}.weight"
        if weight not in own:  # a model for features
            for name in (weight, f"{classifier}.bias"):
                given.pop(name, None)
            continue
        classes = own[weight].shape[0]
        if weight in given:
            count = given[weight].shape[0]
            if count == classes:
                continue
            found, notice = f"a head for {count} classes", f"its head for {count} classes is dropped"
        else:
            found, notice = "a backbone and no head (num_classes=0 builds a model without)", "it has no head"
        if not fresh_head:
            raise ValueError(f"{path!r} has {found}, the model one for {classes}")
        say(f"{path}: {notice}; the model's own, for {classes}, starts fresh")
        given.update({name: own[name] for name in (weight, f"{classifier}.bias") if name in own})


def _declare_channels(model: nn.Module, cfg: dict) -> None:
    """Tell timm the number of channels of the file's first convolution; the cfg has that of the model."""
    weight = cfg["state_dict"].get(f"{get_model_input_config(model)['first_conv']}.weight")
    if weight is not None and weight.ndim == 4:
        cfg["input_size"] = (weight.shape[1], *cfg["input_size"][1:])


def training_checkpoint(checkpoint: str | Path) -> dict[str, Any]:
    """The content of a Lightning checkpoint, or the header of weights that a training exported; else empty."""
    checkpoint = Path(checkpoint)
    if not checkpoint.is_file():
        return {}
    try:
        if checkpoint.suffix == ".safetensors":
            content = _exported_training(checkpoint)
        else:
            content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # reading a file that is no checkpoint raises nearly anything; load_weights says what is wrong
        return {}
    parameters = content.get("hyper_parameters") if isinstance(content, dict) else None
    return content if isinstance(parameters, dict) and "model_name" in parameters else {}


def image_cfg(run: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's record of its images, limited to the keys in `IMAGE_CFG`."""
    cfg = run.get("data", {}).get("cfg", {})
    return {name: cfg[name] for name in IMAGE_CFG + PIXEL_CFG if name in cfg}


def _exported_training(weights: Path) -> dict[str, Any]:
    """The record of `luna_vision.tasks.export_weights` in the header, with tuples that JSON has made lists."""
    with safe_open(weights, "pt") as file:
        content = json.loads((file.metadata() or {}).get("training", "{}"))
    cfg = content.get("data", {}).get("cfg", {})
    cfg |= {name: tuple(cfg[name]) for name in ("input_size", "mean", "std") if name in cfg}
    return content
