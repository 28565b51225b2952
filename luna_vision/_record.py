"""How results are kept: on what machine they were taken, and written so that a kill spoils nothing."""

import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import timm
import torch

import luna_vision

__all__ = ["machine", "read_json", "share_as_usual", "write_json"]


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the numbers were taken on, and with."""
    cpu = platform.processor() or platform.machine()
    try:
        cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):  # not Linux, or a CPU that has no name there
        pass
    out = {"cpu": cpu, "cores": os.cpu_count(), "instructions": torch.backends.cpu.get_cpu_capability()}
    if device == "cuda":
        out["gpu"] = torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "timm": timm.__version__, "luna_vision": luna_vision.__version__}
    return {**out, "system": platform.platform(), "python": platform.python_version(), **versions}


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote, or nothing yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write in one move, so that a file of this name is always complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def share_as_usual(path: Path) -> None:
    """Give a file the access that new files have. What safetensors writes is its owner's alone, where a server that is
    to load the weights may be someone else."""
    mask = os.umask(0o077)  # there is no other way to read it
    os.umask(mask)
    path.chmod(0o666 & ~mask)
