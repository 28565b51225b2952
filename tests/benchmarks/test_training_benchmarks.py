"""The benchmarks of training train each run once, and say what each of them was."""

import csv
import json
import sys
from pathlib import Path

import pytest
import yaml

from luna_vision.benchmarks import distillation, progressive
from luna_vision.cli.train import build

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def configs(tmp_path) -> Path:
    """The configs of the benchmark, for two batches of digits."""
    (tmp_path / "configs").mkdir()
    for name in ("fashion_mnist_teacher", "fashion_mnist_distill"):
        config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        digits = {"img_size": 28, "batch_size": 16, "root": "data"}
        config["data"] = {"class_path": "luna_vision.data.DigitsDataModule", "init_args": digits}
        names = ("ModelCheckpoint", "ExportBest", "EMA")
        kept = [c for c in config["trainer"]["callbacks"] if c["class_path"].endswith(names)]
        config["trainer"] |= {
            "limit_train_batches": 2,
            "limit_test_batches": 2,
            "callbacks": kept,
            "accelerator": "cpu",
        }
        (tmp_path / "configs" / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "configs"


@pytest.fixture
def runs(monkeypatch) -> list[str]:
    """Names of the runs that were trained, which is done in this process."""
    done = []

    def train(config: Path) -> int:
        build(["fit", "--config", str(config)])
        done.append(config.parent.name.rpartition("-")[0])
        return 0

    monkeypatch.setattr(sys, "argv", ["train.py"])  # pytest's own arguments make LightningCLI warn
    monkeypatch.setattr("luna_vision.benchmarks.train_runs.train", train)
    return done


def test_distillation(tmp_path, configs, runs, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--out", "out", "--configs", str(configs), "--work", "work", "--root", "data", "--epochs", "1"]
    assert distillation.main(arguments) == 0
    names = ["teacher", "targets-seed0", "logits-seed0", "logits-and-layers-seed0"]
    assert runs == names
    result = json.loads(Path("out/results.json").read_text())["runs"]
    assert list(result) == names and all(0 <= row["test_acc1"] <= 1 for row in result.values())
    assert {"torch", "timm", "lightning", "threads"} <= set(result["teacher"]["machine"])
    assert str(tmp_path) not in json.dumps(result)
    students = [result[name]["config"] for name in names[1:]]
    assert students[0]["model"]["class_path"] == "luna_vision.tasks.ClassificationTask"
    assert students[1]["model"]["init_args"]["feature_layers"] is None
    shared = [(c["model"]["init_args"]["model_kwargs"], c["model"]["init_args"]["lr"], c["data"]) for c in students]
    assert shared[0] == shared[1] == shared[2]
    assert distillation.main(arguments) == 0 and runs == names  # nothing again
    Path("out/results.json").unlink()
    assert distillation.main(arguments) == 0 and runs == names  # what a run has left is enough
    assert Path("out/results.png").stat().st_size > 10_000
    assert "logits-and-layers-seed0  test accuracy" in capsys.readouterr().out
    more = distillation.plan(configs, Path("work"), Path("data"), seeds=2)
    assert list(more)[4:] == ["targets-seed1", "logits-seed1", "logits-and-layers-seed1"]
    assert more["logits-seed1"]["seed_everything"] == more["logits-seed1"]["data"]["init_args"]["seed"] == 1


def test_missing_configs(tmp_path):
    with pytest.raises(FileNotFoundError, match="give --configs"):
        distillation.main(["--out", str(tmp_path), "--configs", str(tmp_path)])


def test_progressive(tmp_path, runs, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load((CONFIGS / "canvas_progressive.yaml").read_text())
    config["data"]["init_args"] |= {
        "source": "digits",
        "num_train": 160,
        "num_val": 4,
        "num_test": 4,
        "download": False,
    }
    config["data"]["init_args"]["train_sizes"] = [112, 192]
    kept = [c for c in config["trainer"]["callbacks"] if c["class_path"].endswith(("ModelCheckpoint", "EMA"))]
    config["trainer"] |= {"callbacks": kept, "accelerator": "cpu", "log_every_n_steps": 1}
    config["model"]["model_kwargs"] |= {"embed_dim": 16, "depth": 2}
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "canvas_progressive.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--out", "out", "--configs", "configs", "--work", "work", "--epochs", "1"]
    assert progressive.main(arguments) == 0
    result = json.loads(Path("out/results.json").read_text())["runs"]
    assert runs == list(result) == ["fixed", "progressive"]
    assert result["fixed"]["config"]["data"]["init_args"]["train_sizes"] is None
    steps = []
    for folder in Path("work").iterdir():
        with (folder / "version_0" / "metrics.csv").open(newline="") as file:
            steps.append(sum(bool(row["train_loss"]) for row in csv.DictReader(file)))
    assert steps == [4, 4]  # 47 + 16 + 47 + 16 images, and the 34 that are left are not a whole batch
    for row in result.values():
        assert [at["side"] for at in row["larger"].values()] == [192, 384, 768]
        assert row["larger"]["1"]["accuracy"] == pytest.approx(row["test_acc1"])
    assert progressive.main(arguments) == 0 and len(runs) == 2  # nothing again
    assert Path("out/results.png").stat().st_size > 10_000
    assert "progressive  test accuracy at 192 px" in capsys.readouterr().out
