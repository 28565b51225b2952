"""Accumulation, bf16, activation checkpointing and torch.compile, all at once, in one process and in two."""

import csv
import math

import pytest
import torch

from luna_vision.tasks.checkpoints import read_checkpoint

from .ranks import command_line, run, without_ema

ALL = ["--trainer.precision=bf16-mixed", "--model.grad_checkpointing=true", "--trainer.accumulate_grad_batches=2"]


def trained(folder, world_size: int, *arguments: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights and losses of eight batches, four for an optimizer step."""
    folder.mkdir()
    if world_size > 1:
        arguments = (*arguments, "--trainer.devices=2", "--data.init_args.batch_size=8")
    plain = ["--model.mixup=0", "--model.cutmix=0", "--test_after_fit=false", "--trainer.num_sanity_val_steps=0"]
    run(
        folder, world_size, command_line, "fit", f"--config={without_ema(folder)}", *plain, *arguments, timeout=1200
    )  # compiling C++ takes its time
    run_folder = folder / "runs/debug/version_0"
    with (run_folder / "metrics.csv").open(newline="") as file:
        losses = [float(row["train_loss_epoch"]) for row in csv.DictReader(file) if row["train_loss_epoch"]]
    return read_checkpoint(run_folder / "checkpoints/last.ckpt")["state_dict"], losses


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_all_but_compile_combine_with_processes(tmp_path, strategy):
    weights, losses = trained(tmp_path / "one", 1, *ALL)
    ours, theirs = trained(tmp_path / "two", 2, *ALL, f"--trainer.strategy={strategy}")
    assert theirs == pytest.approx(losses, rel=5e-3) and all(map(math.isfinite, losses))
    # bf16 rounds each half of the batch in its own way, and AdamW makes whole steps (1e-3) of what is nearly 0
    assert max((ours[name] - weights[name]).abs().max() for name in weights) < 3e-3


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_optimizers_that_take_norms_of_whole_weights(tmp_path, strategy):
    weights, _ = trained(tmp_path / "one", 1, "--model.optimizer=lamb")
    ours, _ = trained(tmp_path / "two", 2, "--model.optimizer=lamb", f"--trainer.strategy={strategy}")
    assert max((ours[name] - weights[name]).abs().max() for name in weights) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_with_compile(tmp_path, strategy):
    world_size = 1 if strategy == "auto" else 2
    one = ["--model.model_kwargs.depth=1", "--trainer.limit_val_batches=0", "--trainer.max_epochs=1"]
    arguments = [*ALL, *one, f"--trainer.strategy={strategy}"]
    _, losses = trained(tmp_path / "eager", world_size, *arguments)
    weights, compiled = trained(tmp_path / "compiled", world_size, *arguments, "--model.compile=true")
    assert compiled == pytest.approx(losses, rel=5e-3)
    assert not any("_orig_mod" in name for name in weights)
