"""Accumulation, bf16, activation checkpointing and torch.compile, all at once, in one process and in two."""

import csv
import functools
import math

import pytest
import torch

from luna_vision.tasks.checkpoints import read_checkpoint

from .ranks import command_line, run, without_ema

ALL = ["--trainer.precision=bf16-mixed", "--model.grad_checkpointing=true", "--trainer.accumulate_grad_batches=2"]


def traced(*arguments: str) -> None:
    """A command line in which `torch.compile` generates no C++, which takes a minute."""
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    command_line(*arguments)


def trained(
    folder, world_size: int, *arguments: str, command=command_line
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights and losses of eight batches, four for an optimizer step."""
    folder.mkdir()
    if world_size > 1:
        arguments = (*arguments, "--trainer.devices=2", "--data.init_args.batch_size=8")
    plain = ["--model.mixup=0", "--model.cutmix=0", "--test_after_fit=false", "--trainer.num_sanity_val_steps=0"]
    run(folder, world_size, command, "fit", f"--config={without_ema(folder)}", *plain, *arguments)
    run_folder = folder / "runs/debug/version_0"
    with (run_folder / "metrics.csv").open(newline="") as file:
        losses = [float(row["train_loss_epoch"]) for row in csv.DictReader(file) if row["train_loss_epoch"]]
    return read_checkpoint(run_folder / "checkpoints/last.ckpt")["state_dict"], losses


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Of one process, with all but compile."""
    return trained(tmp_path_factory.mktemp("all") / "one", 1, *ALL)


@pytest.fixture(scope="module")
def lamb(tmp_path_factory) -> dict[str, torch.Tensor]:
    """Weights of one process whose optimizer takes norms of whole weights."""
    return trained(tmp_path_factory.mktemp("lamb") / "one", 1, "--model.optimizer=lamb")[0]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_all_but_compile_combine_with_processes(one, tmp_path, strategy):
    weights, losses = one
    ours, theirs = trained(tmp_path / "two", 2, *ALL, f"--trainer.strategy={strategy}")
    assert theirs == pytest.approx(losses, rel=5e-3) and all(map(math.isfinite, losses))
    # bf16 rounds each half of the batch in its own way, and AdamW makes whole steps (1e-3) of what is nearly 0
    assert max((ours[name] - weights[name]).abs().max() for name in weights) < 3e-3


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_optimizers_that_take_norms_of_whole_weights(lamb, tmp_path, strategy):
    ours, _ = trained(tmp_path / "two", 2, "--model.optimizer=lamb", f"--trainer.strategy={strategy}")
    assert max((ours[name] - lamb[name]).abs().max() for name in lamb) < 1e-5


@pytest.mark.slow
def test_with_compile(one, tmp_path):
    """In two processes, without the code generator."""
    weights, losses = trained(
        tmp_path / "two", 2, *ALL, "--trainer.strategy=ddp", "--model.compile=true", command=traced
    )
    assert losses == pytest.approx(one[1], rel=5e-3)
    assert not any("_orig_mod" in name for name in weights)
