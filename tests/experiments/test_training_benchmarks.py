"""The benchmarks that train configs of the project: each run once, with its result, for two batches of digits."""

import json

import pytest
import torch

from experiments.benchmarks import distillation, progressive
from experiments.benchmarks.train_runs import recipe_config
from experiments.runs import Run
from luna_vision.utils.files import write_json

pytestmark = pytest.mark.filterwarnings("ignore")


def shrink(config: dict, **data) -> dict:
    """The same run of a small model, for one epoch."""
    kept = ("ModelCheckpoint", "LastCheckpoint", "EMA", "ProgressBar")
    trainer, model = config["recipe"]["trainer"], config["recipe"]["model"]
    trainer["callbacks+"] = [c for c in trainer.get("callbacks+", []) if c["class_path"].endswith(kept)]
    trainer |= {"limit_test_batches": 2, "accelerator": "cpu", "max_epochs": 1}
    config["recipe"]["data"]["init_args"] |= data
    model.get("init_args", model)["model_kwargs"]["embed_dim"] = 16
    return config


def test_distillation(tmp_path, monkeypatch):
    def small(name, *args, **kwargs):
        config = shrink(recipe_config(name, *args, **kwargs))
        digits = {"img_size": 28, "in_chans": 1, "batch_size": 16}
        config["recipe"]["data"] = {"class_path": "luna_vision.data.DigitsDataModule", "init_args": digits}
        config["recipe"]["trainer"]["limit_train_batches"] = 2
        arguments = config["recipe"]["model"].get("init_args", {})
        if "teacher_kwargs" in arguments:
            arguments["teacher_kwargs"]["embed_dim"] = 16
        return config

    monkeypatch.setattr(distillation, "recipe_config", small)
    runs = distillation.plan(distillation._parser().parse_args(["--seeds", "2"]))
    students = ["targets", "logits", "logits-and-layers"]
    assert [(run.variant, run.seed) for run in runs] == [("teacher", 0), *((s, i) for i in (0, 1) for s in students)]
    losses = set()
    for run in runs[:4]:
        result = distillation.execute(run, "data", tmp_path / "work" / run.work_name)
        assert 0 <= result["test_acc1"] <= 1 and len(result["val_acc1"]) == 1 and result["seconds"] > 0
        losses.add(result["test_loss"])
        write_json(tmp_path / "runs" / f"{run.name}.json", {"variant": run.variant, "seed": run.seed, **result})
    assert len(losses) == 4
    text = distillation.write_report(tmp_path)
    assert "logits-and-layers-seed0  test accuracy" in text
    written = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert set(written) == {"teacher", *(f"{name}-seed0" for name in students)}
    assert (tmp_path / "results.png").stat().st_size > 10_000


def test_students_differ_in_their_loss_alone():
    teacher, *students = distillation.plan(distillation._parser().parse_args([]))
    assert len({json.dumps({**s.config, "overlays": s.config["overlays"][1:]}) for s in students}) == 1
    assert students[0].config["teacher"] == teacher.work_name


def test_progressive(tmp_path):
    small = {"source": "digits", "num_train": 160, "num_val": 4, "num_test": 4, "train_sizes": [112, 192]}
    runs = progressive.plan(progressive._parser().parse_args([]))
    assert [run.variant for run in runs] == ["fixed", "progressive"]
    for run in runs:
        config = shrink(run.config, download=False, **small)
        result = progressive.execute(Run(run.task, run.variant, 0, config), "data", tmp_path / run.work_name)
        # 47 + 16 + 47 + 16 images, and the 34 that are left are not a whole batch
        checkpoint = torch.load(tmp_path / run.work_name / "checkpoints" / "last.ckpt", weights_only=True)
        assert checkpoint["global_step"] == 4
        assert [at["side"] for at in result["larger"].values()] == [192, 384, 768]
        assert result["larger"]["1"]["accuracy"] == pytest.approx(result["test_acc1"])
        write_json(tmp_path / "runs" / f"{run.name}.json", {"variant": run.variant, "seed": 0, **result})
    assert "progressive  test accuracy at 192 px" in progressive.write_report(tmp_path)
    assert (tmp_path / "results.png").stat().st_size > 10_000
