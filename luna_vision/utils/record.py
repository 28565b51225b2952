"""The machine and the versions of a measurement, and the results of an earlier run."""

import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import timm
import torch

import luna_vision

__all__ = ["machine", "read_json"]


def machine(device: str = "cpu") -> dict[str, Any]:
    """The machine and the versions of the libraries, for a file of results."""
    cpu = platform.processor() or platform.machine()
    try:
        cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):  # not Linux, or a CPU without a name there
        pass
    out = {"cpu": cpu, "cores": os.cpu_count(), "instructions": torch.backends.cpu.get_cpu_capability()}
    if device == "cuda":
        out["gpu"] = torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "timm": timm.__version__, "luna_vision": luna_vision.__version__}
    return {**out, "system": platform.platform(), "python": platform.python_version(), **versions}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file; an empty one if there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
