"""The benchmark of distillation trains its four runs once, and says what each of them was."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from luna_vision.benchmarks import distillation
from luna_vision.tasks.cli import build

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
    monkeypatch.setattr(distillation, "train", train)
    return done


def test_all_parts_are_run_once(tmp_path, configs, runs, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--out", "out", "--configs", str(configs), "--work", "work", "--root", "data", "--epochs", "1"]
    assert distillation.main(arguments) == 0
    names = ["teacher", "targets-seed0", "logits-seed0", "logits-and-layers-seed0"]
    assert runs == names
    result = json.loads(Path("out/results.json").read_text())["parts"]
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
    assert "logits-and-layers-seed0  test accuracy" in capsys.readouterr().out
    more = distillation.parts(configs, Path("work"), Path("data"), seeds=2, epochs=1)
    assert list(more)[4:] == ["targets-seed1", "logits-seed1", "logits-and-layers-seed1"]
    assert more["logits-seed1"]["seed_everything"] == more["logits-seed1"]["data"]["init_args"]["seed"] == 1


def test_missing_configs(tmp_path):
    with pytest.raises(FileNotFoundError, match="give --configs"):
        distillation.main(["--out", str(tmp_path), "--configs", str(tmp_path)])
