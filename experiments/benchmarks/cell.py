"""One cell of the benchmark, a process of its own: build a model, say what it costs, and run it when told to.

A cell that runs out of memory dies alone, and its peak is nobody else's. While it waits, others run: that is how
repeats are interleaved.
"""

import argparse
import ast
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import luna_vision  # noqa: F401  registers the models
from luna_vision.utils.cost import count_macs, saved_bytes
from luna_vision.utils.device import allow_tf32

from .jobs import peak_resident

__all__ = ["Spec", "build", "gemm_rate", "run_cell"]

REWARM_SECONDS = 30.0  # a run that takes longer is not run for nothing
TURN_SECONDS = 0.4  # of a model before the next has its turn


@dataclass(frozen=True)
class Spec:
    """A model of the benchmark, `name,argument=value,...`: a timm name and arguments of `timm.create_model`.

    `masked=True` is none of them: it hands the model a mask by which the last quarter of the patches is invalid.
    """

    text: str
    name: str
    args: dict[str, Any] = field(default_factory=dict)
    masked: bool = False

    @classmethod
    def parse(cls, text: str) -> "Spec":
        """What a command line says; an argument type.

        Raises:
            ArgumentTypeError: An unknown model, or an argument that is not `name=value`.
        """
        name, *pairs = text.split(",")
        if not timm.is_model(name):
            models = ", ".join(timm.list_models("luna*"))
            raise argparse.ArgumentTypeError(f"unknown model {name!r}; luna models are {models}")
        args: dict[str, Any] = {}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not equals:
                raise argparse.ArgumentTypeError(f"model {text!r}: arguments are name=value, got {pair!r}")
            try:
                args[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                args[key] = value
        masked = bool(args.pop("masked", False))
        if masked and not name.startswith(("luna_", "test_luna")):
            raise argparse.ArgumentTypeError(f"model {text!r}: only luna models take a mask")
        return cls(text, name, args, masked)

    def create(self, **kwargs: Any) -> nn.Module:
        """The model."""
        return timm.create_model(self.name, **self.args, **kwargs)


def build(spec: Spec, height: int, width: int, **kwargs: Any) -> nn.Module:
    """The model of a spec, for images of a size. Models that are built for one size are built for this one."""
    try:
        return spec.create(img_size=(height, width), **kwargs)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return spec.create(**kwargs)


def gemm_rate(dtype: torch.dtype, device: str, seconds: float = 2.0) -> float:
    """The rate of plain matrix products here, multiply-adds a second: the best of a few shapes, those of an MLP too."""
    best = 0.0
    for m, k, n in ((4096, 384, 1536), (4096, 1536, 384), (2048, 2048, 2048)):
        a, b = (torch.randn(s, device=device).to(dtype) for s in ((m, k), (n, k)))
        started, times = time.perf_counter(), []
        while time.perf_counter() - started < seconds / 3 or len(times) < 2:
            begin = time.perf_counter()
            F.linear(a, b)
            _synchronize(device)
            times.append(time.perf_counter() - begin)
        best = max(best, m * k * n / min(times))
    return best


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peak_memory(device: str) -> int:
    """Peak of the process (resident) or of the GPU, bytes."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return peak_resident()


def _reset_peak(device: str) -> int:
    """Forget the peak so far, and return what is used now, bytes."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return 0
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # the peak then includes what came before
    return _peak_memory(device)


def _last_to_be_spared() -> None:
    """Ask Linux to kill this process first when memory runs out, rather than the one that reports it."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
    except OSError:
        pass


def _prepare(cell: dict[str, Any]) -> tuple[nn.Module, Callable[[], Any]]:
    """The model of a cell, and one run of it."""
    spec, device = Spec.parse(cell["model"]), cell["device"]
    height, width = cell["height"], cell["width"]
    dtype = getattr(torch, cell["dtype"])
    allow_tf32(dtype != torch.float32)
    torch.manual_seed(0)
    training = cell["mode"] == "training"
    model = build(spec, height, width).to(device=device, dtype=dtype).train(training)
    x = torch.randn(cell["batch_size"], 3, height, width, device=device).to(dtype)
    args: tuple[Tensor, ...] = ()
    if spec.masked:
        patches = -(-height // model.patch_embed.patch_size[0]) * -(-width // model.patch_embed.patch_size[1])
        args = ((torch.arange(patches, device=device) < 0.75 * patches).expand(cell["batch_size"], -1),)
    forward = torch.compile(model) if cell["execution"] == "compiled" else model

    def infer() -> None:
        with torch.inference_mode():
            forward(x, *args)

    def train() -> None:
        logits = forward(x, *args)
        F.cross_entropy(logits.float(), torch.zeros(len(x), dtype=torch.long, device=device)).backward()
        model.zero_grad(set_to_none=True)

    return model, train if training else infer


def run_cell(connection: Connection, cell: dict[str, Any]) -> None:
    """What the process does: send what a run costs, then the seconds of a few runs for each message that comes.

    Args:
        connection: To the parent. A message None ends the process.
        cell: `model` (text of a `Spec`), `height`, `width`, `dtype`, `device`, `execution` ("eager", "compiled"),
            `mode` ("inference", "training"), `batch_size`, `threads`.
    """
    _last_to_be_spared()
    device = cell["device"]
    try:
        if cell["threads"]:
            torch.set_num_threads(cell["threads"])
        idle = _reset_peak(device)
        model, step = _prepare(cell)
        if cell["execution"] == "compiled":
            step()  # compiles, whose memory is not the model's
            _reset_peak(device)

        def timed() -> float:
            _synchronize(device)
            begin = time.perf_counter()
            step()
            _synchronize(device)
            return time.perf_counter() - begin

        first = timed()
        report = {
            "first_seconds": first,
            "peak_bytes": max(_peak_memory(device) - idle, 0),
            "params": sum(p.numel() for p in model.parameters()),
        }
        with torch.device("meta"):
            meta = build(Spec.parse(cell["model"]), cell["height"], cell["width"])
        report["macs"] = count_macs(meta.eval(), cell["height"], cell["width"])
        if cell["mode"] == "training" and cell["execution"] == "eager":
            report["saved_bytes"] = saved_bytes(step, model)
        connection.send(report)
        while connection.recv() is not None:
            # what waited has cold caches, and the system may have taken its pages: run once before the clock starts
            if first < REWARM_SECONDS:
                step()
            times = [timed()]
            while sum(times) < TURN_SECONDS:
                times.append(timed())
            connection.send({"seconds": times})
    except (MemoryError, torch.cuda.OutOfMemoryError):
        connection.send({"error": "out of memory"})
    except RuntimeError as error:
        text = str(error).strip().splitlines()[0]
        connection.send({"error": "out of memory" if "allocate memory" in text else text})
    except Exception as error:  # the run goes on with the other cells
        connection.send({"error": f"{type(error).__name__}: {error}".splitlines()[0]})
    except (KeyboardInterrupt, EOFError):
        pass
    finally:
        connection.close()
        os._exit(0)  # no clean-up of what may be gigabytes
