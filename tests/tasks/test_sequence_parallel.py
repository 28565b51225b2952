"""Training on strips: the same as on one process, by the command line, and what is refused."""

import csv
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn

from luna_vision.cli.train import main
from luna_vision.tasks import (
    ClassificationTask,
    DistillationTask,
    SequenceParallelStrategy,
    SequenceTask,
    sequence_parallel,
)
from luna_vision.tasks.dense import SegmentationTask
from tests.labelled import write_slides

from .conftest import tiny_task
from .ranks import command_line, run

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "canvas_sequence_parallel.yaml"
# 7 rows of patches, the last of them cut: 3 on the first process, 4 on the second
# Adam makes a whole step of a gradient that is nothing but rounding.
SMALL = """
--data.init_args.side=100 --data.init_args.item_size=12 --data.init_args.num_items=3 --data.init_args.num_workers=0
--data.init_args.num_train=8 --data.init_args.num_val=4 --data.init_args.num_test=4
--model.model_kwargs.img_size=100 --model.model_kwargs.embed_dim=32 --model.model_kwargs.depth=2
--model.model_kwargs.num_heads=2 --model.optimizer=sgd --model.lr=1e-1 --model.warmup_epochs=0
--trainer.accelerator=cpu --trainer.precision=32-true --trainer.max_epochs=1 --trainer.num_sanity_val_steps=0
""".split()


def call(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    """Run the command line in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["train.py", *args])
    try:
        main()
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def checkpoint(folder: Path) -> dict:
    path = folder / "runs/canvas_sequence_parallel/version_0/checkpoints/last.ckpt"
    return torch.load(path, map_location="cpu", weights_only=True)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """Four steps of optimizer, clipping and EMA, validation, and the test of the best checkpoint."""
    two, one = tmp_path / "two", tmp_path / "one"
    words = ["fit", f"--config={CONFIG}", *SMALL]
    two.mkdir()
    command = [sys.executable, str(ROOT / "train.py"), *words]  # whose second process Lightning starts
    done = subprocess.run(command, cwd=two, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    run(one, 1, command_line, *words, "--trainer.strategy=auto", "--trainer.devices=1")

    got, want = checkpoint(two), checkpoint(one)
    assert got["global_step"] == want["global_step"] == 4
    for part in ("state_dict", "current_model_state"):
        assert got[part].keys() == want[part].keys()
        for name, value in want[part].items():
            torch.testing.assert_close(got[part][name], value, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert re.search(r"test accuracy: +[01]\.\d{4} with runs/canvas_sequence_parallel", done.stdout)


@pytest.mark.slow
def test_two_processes_train_on_slides_as_one(tmp_path):
    write_slides(tmp_path / "slides.csv")
    small = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8, "pretrained": False}
    words = ["fit", f"--config={ROOT / 'configs/slides.yaml'}", f"--data.root={tmp_path / 'slides.csv'}"]
    words += [f"--model.init_args.model_kwargs.{name}={value}" for name, value in small.items()]
    words += ["--model.optimizer=sgd", "--model.lr=1e-1", "--model.warmup_epochs=0", "--model.store_dtype=float32"]
    words += ["--trainer.accelerator=cpu", "--trainer.precision=64-true", "--trainer.max_epochs=1"]
    words += ["--trainer.accumulate_grad_batches=3", "--trainer.log_every_n_steps=1"]
    run(tmp_path / "two", 2, command_line, *words, f"--config={ROOT / 'configs/overlays/sequence_parallel.yaml'}")
    run(tmp_path / "one", 1, command_line, *words)
    got, want = ({}, {})
    for folder, found in (("two", got), ("one", want)):
        version = tmp_path / folder / "runs/slides/version_0"
        content = torch.load(version / "checkpoints/last.ckpt", map_location="cpu", weights_only=True)
        found |= content["state_dict"] | {"steps": torch.tensor(content["global_step"])}
        with open(version / "metrics.csv", newline="") as file:
            losses = [row[name] for row in csv.DictReader(file) for name in row if name.endswith("loss") and row[name]]
        found["losses"] = torch.tensor([float(loss) for loss in losses], dtype=torch.float64)
    assert got.keys() == want.keys() and want["steps"] == 3 and len(want["losses"]) > 2
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_the_processes_of_an_image_have_the_same_part_of_the_data(monkeypatch):
    strategy = SequenceParallelStrategy(2)
    monkeypatch.setattr(SequenceParallelStrategy, "world_size", 6)
    shares = []
    for rank in range(6):
        monkeypatch.setattr(SequenceParallelStrategy, "global_rank", rank)
        shares.append(strategy.distributed_sampler_kwargs)
    assert [s["rank"] for s in shares] == [0, 0, 1, 1, 2, 2]
    assert {s["num_replicas"] for s in shares} == {3}


def test_different_images_are_refused(monkeypatch):
    strategy = SequenceParallelStrategy(2)
    strategy.connect(tiny_task())
    strategy.parallel_devices = [torch.device("cpu")]
    strategy._mesh = {"seq": SimpleNamespace(get_group=lambda: None)}
    monkeypatch.setattr(SequenceParallelStrategy, "root_device", torch.device("cpu"))
    monkeypatch.setattr(sequence_parallel, "from_all", lambda numbers, *_: [numbers, [numbers[0] + 1]])
    with pytest.raises(ValueError, match="were given different ones.*trainer.distributed_sampler_kwargs"):
        strategy.batch_to_device([torch.ones(1, 1, 8, 8), torch.ones(1)])


def compiled() -> ClassificationTask:
    task = tiny_task()
    task.hparams.compile = True  # without what compiling takes
    return task


def sequences() -> SequenceTask:
    return SequenceTask(model_name="test_luna_vit", num_classes=3)


def distilled() -> DistillationTask:
    return DistillationTask("test_vit", "teacher.ckpt", model_name="test_luna_vit", num_classes=3)


@pytest.mark.parametrize(
    "task, fn, message",
    [
        (lambda: tiny_task(mixup=0.5), TrainerFn.FITTING, "set mixup and cutmix to 0"),
        (compiled, TrainerFn.FITTING, "set compile to false"),
        (lambda: tiny_task(band_rows=2), TrainerFn.FITTING, "set band_rows to 0"),
        (lambda: tiny_task(), TrainerFn.PREDICTING, "give --trainer.strategy=auto --trainer.devices=1"),
        (
            lambda: SegmentationTask("test_luna_vit", num_classes=3),
            TrainerFn.FITTING,
            "trains a ClassificationTask or a SlideTask, got SegmentationTask",
        ),
        (sequences, TrainerFn.FITTING, "trains a ClassificationTask or a SlideTask, got SequenceTask"),
        (distilled, TrainerFn.FITTING, "trains a ClassificationTask or a SlideTask, got DistillationTask"),
    ],
)
def test_what_strips_do_not_fit_is_refused(task, fn, message, monkeypatch):
    task = task()
    task._trainer = SimpleNamespace(state=SimpleNamespace(fn=fn), datamodule=None)
    strategy = SequenceParallelStrategy(2)
    strategy.connect(task)
    monkeypatch.setattr(SequenceParallelStrategy, "world_size", 2)
    with pytest.raises(ValueError, match=message):
        strategy.setup_environment()


def test_the_number_of_processes_must_fit(tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="processes must be at least 2, got 1"):
        SequenceParallelStrategy(1)
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "fit", "--config", str(CONFIG), *SMALL, "--trainer.devices=1") == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and "2 processes are to share an image, but the 1 of this run cannot be divided" in error[0]
    assert not list(tmp_path.rglob("*.ckpt"))
