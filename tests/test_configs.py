"""Every config builds its task, data and trainer, with no data present and nothing downloaded."""

from pathlib import Path

import pytest

from luna_vision.tasks import NonFiniteGuard
from luna_vision.tasks.cli import build

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_builds(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])  # pytest's own arguments make LightningCLI warn
    machine = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.precision=32-true"]
    cli = build(["--config", str(path), *machine], run=False)
    hparams, data = cli.model.hparams, cli.datamodule
    assert hparams.in_chans == data.in_chans
    assert hparams.get("compile", False) in (False, "auto")  # by device: a CPU takes minutes
    if not path.stem.startswith("imagenet"):  # whose classes are the folders'
        assert hparams.num_classes == data.num_classes == len(data.class_names)
    sides = hparams.model_kwargs.get("img_size", 224)
    assert data.img_size == (sides, sides)
    assert cli.trainer.checkpoint_callback.monitor == cli.model.headline[0].replace("test_", "val_")
    assert [logger.root_dir for logger in cli.trainer.loggers][0] == f"runs/{path.stem}"
    assert not list(tmp_path.iterdir()), "building a run must not write anything"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_header_says_how_to_run_it_and_what_comes_out(path):
    header = [line[2:] for line in path.read_text().splitlines() if line.startswith("# ")]
    found = dict(line.split(":", 1) for line in header if line.startswith(("Command:", "Hardware:", "Time:", "Score:")))
    fields = {name: value.strip() for name, value in found.items()}
    assert set(fields) == {"Command", "Hardware", "Time", "Score"}
    assert all(value and "not measured" not in value for value in fields.values())
    named = "" if path.stem == "digits" else f" --config configs/{path.name}"
    assert fields["Command"] == f"python train.py fit{named}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_anomalies_can_be_looked_for_in_any_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    overlay = str(path.parent / "overlays" / "detect_anomaly.yaml")
    machine = ["--trainer.accelerator=cpu", "--trainer.devices=1"]
    cli = build(["--config", str(path), "--config", overlay, *machine], run=False)
    assert cli.trainer._detect_anomaly and cli.trainer.precision == "32-true"
    cli.model.trainer = cli.trainer
    cli.model.setup("fit")
    assert cli.model.model._compiled_call_impl is None
    assert any(isinstance(callback, NonFiniteGuard) for callback in cli.trainer.callbacks)
