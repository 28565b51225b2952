"""Weights for the package: float16 and a pretrained_cfg that timm loads, and what is said of broken ones."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file

import luna_vision
from experiments.pack_weights import main
from luna_vision.models import weights
from luna_vision.tasks import ClassificationTask, export_weights

NAME = "test_luna_vit.goldfish_32"
CFG = {
    "num_classes": 2,
    "input_size": [3, 32, 32],
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.2, 0.2],
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "label_names": ["n01443537", "my dog"],
}


@pytest.fixture
def run(tmp_path):
    """A folder as a finished run leaves it, and its model."""
    torch.manual_seed(0)
    task = ClassificationTask("test_luna_vit", num_classes=2, in_chans=3)
    content = {"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams), "data": {"cfg": CFG}}
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(content, tmp_path / "best.ckpt")
    export_weights(tmp_path / "best.ckpt", folder / "checkpoints" / "best.safetensors")
    (folder / "metrics.csv").write_text("epoch,train_loss,test_acc1\n0,1.5,\n1,,0.4321\n")
    return folder, task.model.eval()


def test_the_files_are_what_timm_loads(run, tmp_path, monkeypatch, capsys):
    folder, model = run
    assert main([str(folder), "--name", NAME, "--about", "two photos", "--out", str(tmp_path / "weights")]) == 0
    assert f"{NAME}: 0." in capsys.readouterr().out
    assert {x.dtype for x in load_file(tmp_path / "weights" / f"{NAME}.safetensors").values()} == {torch.float16}
    monkeypatch.setattr(weights, "FOLDER", tmp_path / "weights")
    cfg = weights.shipped_cfg(NAME)
    assert cfg["label_names"] == ["goldfish", "my dog"] and cfg["mean"] == (0.4, 0.5, 0.6)
    assert cfg["notes"] == ("two photos", "top-1 0.4321 on its test images")
    found, _, names = luna_vision.load(weights.weights_file(NAME))
    assert names == ["goldfish", "my dog"] and not found.training
    loaded = timm.create_model("test_luna_vit", pretrained=True, pretrained_cfg_overlay=cfg).eval()
    x = torch.randn(1, 3, 40, 24)
    assert loaded.num_classes == 2 and next(loaded.parameters()).dtype == torch.float32
    torch.testing.assert_close(loaded(x), model(x), rtol=5e-3, atol=5e-3)
    adapted = timm.create_model("test_luna_vit", pretrained=True, pretrained_cfg_overlay=cfg, num_classes=5, in_chans=1)
    assert adapted(x[:, :1]).shape == (1, 5)


@pytest.mark.parametrize("damage, message", [("missing", "are missing: install"), ("cut", "are damaged (")])
def test_broken_files_are_named_in_one_line(run, tmp_path, monkeypatch, damage, message):
    out = tmp_path / "weights"
    main([str(run[0]), "--name", NAME, "--out", str(out)])
    monkeypatch.setattr(weights, "FOLDER", out)
    file = out / f"{NAME}.safetensors"
    content = file.read_bytes()
    file.unlink() if damage == "missing" else file.write_bytes(content[: len(content) // 2])
    with pytest.raises(RuntimeError) as error:
        timm.create_model("test_luna_vit", pretrained=True, pretrained_cfg_overlay=weights.shipped_cfg(NAME))
    assert str(file) in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


def test_what_cannot_be_shipped(run, tmp_path, capsys):
    folder, _ = run
    for words, message in (
        ([str(tmp_path)], "best.safetensors does not record its training"),
        ([str(folder), "--name", "luna_vit_tiny.goldfish"], "size mismatch"),
    ):
        with pytest.raises(SystemExit) as end:
            main([*words, "--out", str(tmp_path / "out")])
        assert end.value.code == 2 and message in capsys.readouterr().err
    (folder / "metrics.csv").write_text(json.dumps("epoch"))
    with pytest.raises(SystemExit):
        main([str(folder), "--out", str(tmp_path / "out")])
    assert "has no test_acc1" in capsys.readouterr().err and not (tmp_path / "out").exists()
