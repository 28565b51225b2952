"""The weights that come with the package: `weights/MODEL.TAG.safetensors`, in float16.

`python -m experiments.pack_weights` makes such a file from a finished training. Its header has what every
`best.safetensors` has: the training, the preprocessing of images, and the names of the classes.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from timm.models import PretrainedCfg

from .checkpoints import image_cfg, training_checkpoint

FOLDER = Path(__file__).with_name("weights")
SHIPPED = ("luna_vit_nano_patch8.tiny_imagenet_64",)  # models, each with a tag that tells the data

KNOWN = {field.name for field in fields(PretrainedCfg)}  # what numbers in files mean is in the header alone


def weights_file(name: str) -> Path:
    """Where the package has the weights of a name in `SHIPPED`."""
    return FOLDER / f"{name}.safetensors"


def shipped_cfg(name: str) -> dict[str, Any]:
    """The `pretrained_cfg` of a name in `SHIPPED`; of a missing or damaged file, where it should be."""
    training = training_checkpoint(weights_file(name))
    notes = training.get("data", {}).get("cfg", {}).get("notes", [])
    cfg = {key: value for key, value in image_cfg(training).items() if key in KNOWN}
    return cfg | {"notes": tuple(notes), "file": str(weights_file(name))}


def check_shipped(file: str | None) -> None:
    """Raise a `RuntimeError` if weights of the package are missing or damaged; other files are not looked at."""
    if not file or Path(file).parent != FOLDER:
        return
    hint = "install luna-vision again, or give a file of your own with checkpoint_path"
    if not Path(file).is_file():
        raise RuntimeError(f"the weights of the package, {file}, are missing: {hint}")
    try:
        with safe_open(file, "pt") as weights:  # reads the header, and compares it with the length of the file
            weights.keys()
    except (SafetensorError, OSError) as error:
        raise RuntimeError(f"the weights of the package, {file}, are damaged ({error}): {hint}") from error
