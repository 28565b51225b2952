"""The weights that come with the package.

`weights/` has two files for each: `MODEL.TAG.safetensors` with float16 weights, and `MODEL.TAG.json` with timm's
`pretrained_cfg`. `python -m experiments.pack_weights` writes both from a finished training.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

FOLDER = Path(__file__).with_name("weights")


def shipped_cfgs() -> dict[str, dict[str, Any]]:
    """The `pretrained_cfg` of all weights in the package, by the name of their model with its tag."""
    found = {}
    for path in sorted(FOLDER.glob("*.json")):
        cfg = json.loads(path.read_text(encoding="utf-8"))
        cfg |= {name: tuple(cfg[name]) for name in ("input_size", "mean", "std")}
        found[path.stem] = cfg | {"file": str(path.with_suffix(".safetensors"))}
    return found


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
