"""On what machine results were taken, and those of an earlier run."""

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
    """What a run wrote, or nothing yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
