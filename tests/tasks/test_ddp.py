"""Several processes train as one does with all of their batches, see each sample once, and stop together."""

import os
import signal
import zlib
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import timm
import torch
import yaml
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from luna_vision.data import DigitsDataModule
from luna_vision.data.sampling import EpochSampler, EvalSampler

from .conftest import last_rows
from .ranks import DEBUG, command_line, finish, run, said, start, until, without_ema

PLAIN = ["--model.mixup=0", "--model.cutmix=0", "--trainer.accumulate_grad_batches=1", "--test_after_fit=false"]
# 147 images for validation: 73 and 74 for two processes, of which the second would have a batch more than the first
DATA = ["--data.init_args.val_fraction=0.102", "--data.init_args.eval_batch_size=73", "--trainer.limit_val_batches=1.0"]
STEPS = ["--trainer.max_steps=8", "--trainer.limit_train_batches=1.0", "--trainer.val_check_interval=8"]


class Seen(Callback):
    """Checksums of the training and validation images of each batch."""

    def __init__(self):
        self.train, self.val, self.mixed = [], [], []

    @staticmethod
    def checksums(batch):
        return [(zlib.crc32(image.numpy().tobytes()), int(label)) for image, label in zip(*batch, strict=True)]

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        self.train.append(self.checksums(batch))
        if task.mix is not None:  # what this process will draw
            _, targets = task.mix(batch[0].clone(), batch[1], (trainer.global_step, batch_idx, trainer.global_rank))
            self.mixed.append(round(float(targets.max()), 6))

    def on_validation_batch_start(self, trainer, task, batch, batch_idx, dataloader_idx=0):
        if not trainer.sanity_checking:
            self.val.append(self.checksums(batch))


def train(*arguments: str) -> None:
    """Train by a command line and leave what came of it in rank0.pt and so on."""
    from luna_vision.cli import train as cli

    seen, plain = Seen(), cli.LunaCLI.instantiate_trainer

    def instantiate_trainer(self, **kwargs):
        trainer = plain(self, **kwargs)
        trainer.callbacks.append(seen)
        return trainer

    cli.LunaCLI.instantiate_trainer = instantiate_trainer
    built = cli.build(["fit", *arguments])
    weights = {name: getattr(v, "full_tensor", lambda v=v: v)() for name, v in built.model.state_dict().items()}
    metrics = {name: float(value) for name, value in built.trainer.callback_metrics.items()}
    result = {"weights": weights, "metrics": metrics, "train": seen.train, "val": seen.val, "mixed": seen.mixed}
    torch.save(result, f"rank{built.trainer.global_rank}.pt")


def results(folder: Path) -> list[dict]:
    return [torch.load(path, weights_only=False) for path in sorted(folder.glob("rank*.pt"))]


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> dict:
    """Eight steps of one process."""
    folder = tmp_path_factory.mktemp("one")
    config = without_ema(folder)
    run(folder, 1, train, f"--config={config}", *PLAIN, *DATA, *STEPS, "--data.init_args.batch_size=16")
    return results(folder)[0]


@pytest.mark.slow
@pytest.mark.parametrize("strategy, rows", [("ddp", 3), ("fsdp2", 0)])
def test_two_processes_train_as_one_with_both_batches(one, tmp_path, strategy, rows):
    """With blocks in bands, too."""
    arguments = [*PLAIN, *DATA, *STEPS, "--data.init_args.batch_size=8", f"--model.band_rows={rows}"]
    arguments += [f"--trainer.strategy={strategy}", "--trainer.devices=2"]
    run(tmp_path, 2, train, f"--config={without_ema(tmp_path)}", *arguments)
    first, second = results(tmp_path)
    assert len(one["train"]) == 8
    for whole, a, b in zip(one["train"], first["train"], second["train"], strict=True):
        assert sorted(whole) == sorted(a + b)  # the same images, with the same augmentation
    assert len(first["val"]) == len(second["val"])
    every = [image for batch in first["val"] + second["val"] for image in batch]
    assert sorted(every) == sorted(image for batch in one["val"] for image in batch) and len(every) == 147
    for ours in (first, second):
        torch.testing.assert_close(ours["weights"], one["weights"], rtol=0, atol=1e-5)
        for name in ("val_loss", "val_acc1", "val_acc5", "train_loss_epoch"):
            assert ours["metrics"][name] == pytest.approx(one["metrics"][name], abs=1e-5)


def test_an_epoch_is_shared_out_and_augmented_alike():
    """Every sample of an epoch once; the last ones that do not fill a batch of all processes are left out."""

    def epoch(world_size: int, batch_size: int) -> list[list]:
        found = []
        for rank in range(world_size):
            data = DigitsDataModule(img_size=16, batch_size=batch_size, num_workers=0, val_fraction=0.8)
            data._rank = lambda rank=rank: (rank, world_size)
            loader = data.train_dataloader()
            loader.next_batch = lambda: (3, 0)
            found.append([Seen.checksums(batch) for batch in loader])
        return [sorted(image for batch in step for image in batch) for step in zip(*found, strict=True)]

    assert epoch(1, 36) == epoch(2, 18) == epoch(3, 12)


def test_evaluation_takes_every_sample_once_in_equally_many_batches():
    for count, world_size, batch_size in product((1, 2, 7, 16, 17, 24, 25, 31), (1, 2, 3, 8), (1, 2, 4, 8)):
        samplers = [EvalSampler(range(count), batch_size, world_size, rank) for rank in range(world_size)]
        loaders = [DataLoader(range(count), sampler.batch_size, sampler=sampler) for sampler in samplers]
        case = f"{count} samples, {world_size} processes, {batch_size} in a batch"
        assert len({len(list(loader)) for loader in loaders}) == 1, case
        assert all(len(sampler) == len(list(sampler)) for sampler in samplers), case
        taken = Counter(i for sampler in samplers for i in sampler)
        assert set(taken) == set(range(count)), case
        least, rest = divmod(count, world_size)
        if not rest or any(least % size for size in range(2, batch_size + 1)):
            assert max(taken.values()) == 1, case


def test_training_leaves_the_odd_ones_out_or_has_them_twice():
    for drop_last, count in ((True, 4), (False, 5)):
        ranks = [list(EpochSampler(range(14), 0, 3, rank, drop_last=drop_last)) for rank in range(3)]
        assert [len(rank) for rank in ranks] == [count] * 3
        taken = Counter(i for rank in ranks for _, i in rank)
        assert (max(taken.values()) == 1) == drop_last and len(taken) == (12 if drop_last else 14)


def killed(folder: Path, arguments: list[str], number: int, ranks: tuple[int, ...]) -> list[int]:
    """Exit codes of two processes, of which some get a signal when there is a checkpoint."""
    processes = start(folder, 2, command_line, *arguments)
    last = folder / "runs/debug/version_0/checkpoints/last.ckpt"
    until(last.exists, processes)
    for rank in ranks:
        os.kill(processes[rank].pid, number)
    return finish(folder, processes)


def end(folder: Path) -> tuple[dict, dict]:
    from luna_vision.tasks.checkpoints import read_checkpoint

    folder = folder / "runs/debug/version_0"
    return read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"], last_rows(folder / "metrics.csv")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "number", "ranks", "codes"),
    [
        ("ddp", signal.SIGTERM, (1,), [143, 143]),  # as where a launcher tells one before the other
        ("fsdp2", signal.SIGKILL, (0, 1), [-9, -9]),
    ],
)
def test_processes_stop_together_and_go_on_exactly(tmp_path, strategy, number, ranks, codes):
    """Dropped paths, mixing, accumulation and, with DDP, the average of the weights are as in a run left alone."""
    config = DEBUG if strategy == "ddp" else without_ema(tmp_path)
    arguments = ["fit", f"--config={config}", f"--trainer.strategy={strategy}", "--trainer.devices=2"]
    arguments += ["--trainer.max_epochs=3", "--test_after_fit=false", "--model.model_kwargs.drop_path_rate=0.3"]
    run(tmp_path / "whole", 2, command_line, *arguments)
    assert killed(tmp_path / "killed", arguments, number, ranks) == codes, said(tmp_path / "killed")
    run(tmp_path / "killed", 2, command_line, *arguments, "--resume")
    assert "resuming the unfinished run in runs/debug/version_0, from" in said(tmp_path / "killed")
    (weights, rows), (ours, logged) = end(tmp_path / "whole"), end(tmp_path / "killed")
    torch.testing.assert_close(ours, weights, rtol=0, atol=0)
    assert all(rows[key] == row for key, row in logged.items())
    # SIGKILL may take a row that was logged right after a checkpoint, which is not logged again
    assert number == signal.SIGKILL or logged == rows


def test_each_process_mixes_in_its_own_way(tmp_path):
    arguments = ["--trainer.strategy=ddp", "--trainer.devices=2", "--test_after_fit=false"]
    run(tmp_path, 2, train, f"--config={DEBUG}", *arguments)
    first, second = results(tmp_path)
    assert len(first["mixed"]) == 8 and first["mixed"] != second["mixed"]


@pytest.mark.slow
def test_two_processes_distill_layers_as_one_does(tmp_path):
    config = yaml.safe_load(without_ema(tmp_path).read_text())
    kwargs = config["model"]["model_kwargs"]
    teacher = timm.create_model("test_luna_vit", num_classes=10, in_chans=1, **kwargs)
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    distilled = {"teacher_model": "test_luna_vit", "teacher_kwargs": kwargs, "feature_layers": [[0, 1], [1, 0]]}
    distilled |= {"teacher_checkpoint": str(tmp_path / "teacher.pt"), "teacher_mean": [0.5], "teacher_std": [0.5]}
    arguments = {**config["model"], **distilled, "mixup": 0.0, "cutmix": 0.0}
    config["model"] = {"class_path": "luna_vision.tasks.DistillationTask", "init_args": arguments}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    one = [f"--config={tmp_path / 'config.yaml'}", "--trainer.accumulate_grad_batches=1", "--test_after_fit=false"]
    run(tmp_path / "one", 1, train, *one)
    two = ["--trainer.strategy=ddp", "--trainer.devices=2", "--data.init_args.batch_size=8"]
    run(tmp_path / "two", 2, train, *one, *two)
    (whole,), halves = results(tmp_path / "one"), results(tmp_path / "two")
    assert "projections.1.weight" in whole["weights"]
    for ours in halves:
        torch.testing.assert_close(ours["weights"], whole["weights"], rtol=0, atol=1e-5)
