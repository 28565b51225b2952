"""Step times of `experiments.compare`: a phase of its own, as a timing beside another job says nothing."""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from luna_vision._record import write_json
from luna_vision.tasks.optimization import build_optimizer

from .runs import Run, describe, make_task, provenance


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
                facts[run] = describe(run.config)
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
            device = run.config.get("accelerator", "cpu")
            result = {
                "task": task,
                "variant": run.variant,
                **facts[run],
                "step_seconds": median,
                "step_seconds_all": seconds,
                "images_per_s": run.config["batch_size"] / median,
                "config": run.config,
                **provenance(device),
            }
            write_json(measured_path(out, run), result)
            print(f"{task} {run.variant}: {median * 1e3:.1f} ms a step", flush=True)
    return failed


def measured_path(out: Path, run: Run) -> Path:
    """Where the times of a run's task and variant are written."""
    return out / "measured" / f"{run.task}-{run.variant}.json"


def training_step(config: dict[str, Any]) -> Callable[[], None]:
    """A whole training step on random images: forward, backward, clipping and the optimizer's step."""
    device = torch.device(config.get("accelerator", "cpu"))
    task = make_task(config).to(device)
    hp = task.hparams
    optimizer = build_optimizer(task.model, hp.optimizer, hp.lr, hp.weight_decay, None, {})
    images = torch.randn(config["batch_size"], hp.in_chans, *[config["model"]["img_size"]] * 2, device=device)
    targets = torch.arange(config["batch_size"], device=device) % hp.num_classes
    parameters = list(task.model.train().parameters())

    def step() -> None:
        optimizer.zero_grad()
        task.compute_loss(task(images), targets).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config["gradient_clip_val"])
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step
