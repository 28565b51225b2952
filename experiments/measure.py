"""What a variant of `experiments.compare` costs. Step times are a phase of their own: beside another job they say
nothing."""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import create_model
from torch import nn

from luna_vision.tasks.optimization import build_optimizer
from luna_vision.utils.cost import count_macs, saved_bytes
from luna_vision.utils.files import write_json

from .runs import Config, Run, measured_path, provenance


def measure(runs: Sequence[Run], out: Path, rounds: int) -> int:
    """Time a training step of each variant on one thread, and write `out/measured/TASK-VARIANT.json`.

    The variants of a task take turns, a step each, so that what slows the machine for a while slows them all.

    Args:
        runs: One for each task and variant.
        out: Folder of the results.
        rounds: Steps that are timed, after one that is not.

    Returns:
        The number of variants that could not be measured.
    """
    torch.set_num_threads(1)
    failed = 0
    for task in dict.fromkeys(run.task for run in runs):
        steps: dict[Run, Callable[[], None]] = {}
        facts: dict[Run, dict[str, Any]] = {}
        for run in (r for r in runs if r.task == task):
            try:
                facts[run] = cost(run.config)
                step = training_step(run.config)
                step()
            except Exception as error:  # as in training: a variant that fails must not stop the others
                failed += 1
                print(f"{task} {run.variant}: failed: {type(error).__name__}: {error}", flush=True)
                continue
            steps[run] = step
        times: dict[Run, list[float]] = {run: [] for run in steps}
        for _ in range(rounds):
            for run, step in steps.items():
                since = time.perf_counter()
                step()
                times[run].append(time.perf_counter() - since)
        for run, seconds in times.items():
            median = statistics.median(seconds)
            result = {
                "task": task,
                "variant": run.variant,
                **facts[run],
                "step_seconds": median,
                "step_seconds_all": seconds,
                "images_per_s": run.config["batch_size"] / median,
                "config": run.config,
                **provenance(run.config.get("accelerator", "cpu")),
            }
            write_json(measured_path(out, run), result)
            print(f"{task} {run.variant}: {median * 1e3:.1f} ms a step", flush=True)
    return failed


def fresh_model(config: Config, **kwargs: Any) -> nn.Module:
    """The model of a configuration, freshly initialised, in training mode."""
    torch.manual_seed(config["seed"])
    in_chans = config["data"]["args"]["in_chans"]
    shape = dict(num_classes=config.get("num_classes", 10), in_chans=in_chans)
    return create_model("luna_vit_tiny", **shape, **config["model"], **kwargs).train()


def cost(config: Config) -> dict[str, Any]:
    """Parameters, multiply-adds of an image, and bytes that autograd keeps for a training step."""
    model, side = fresh_model(config), config["model"]["img_size"]
    images = torch.randn(config["batch_size"], model.in_chans, side, side)
    return {
        "params": sum(p.numel() for p in model.parameters()),
        "macs": count_macs(fresh_model(config, device="meta"), side, side),
        "saved_bytes": saved_bytes(lambda: model(images), model),
        "batch_size": config["batch_size"],
    }


def training_step(config: Config) -> Callable[[], None]:
    """A whole training step on random images: forward, backward, clipping and the optimizer's step."""
    device = torch.device(config.get("accelerator", "cpu"))
    model, hp = fresh_model(config).to(device), config["optimization"]
    optimizer = build_optimizer(model, hp["optimizer"], hp["lr"], hp["weight_decay"], None, {})
    images = torch.randn(config["batch_size"], model.in_chans, *[config["model"]["img_size"]] * 2, device=device)
    targets = torch.arange(config["batch_size"], device=device) % model.num_classes

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images).float(), targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config["gradient_clip_val"])
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step
