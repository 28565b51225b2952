"""distill, pretrain and convert --vit from their command line, on a folder of photographs, and what follows on them."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_sample_images

from luna_vision.cli.main import main

SMALL = ["--data.num_workers", "0", "--trainer.max_steps=4", "--trainer.accelerator=cpu"]
NARROW = ["--model.model_kwargs.embed_dim=16", "--model.model_kwargs.depth=2", "--model.model_kwargs.num_heads=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """photos/: 40 images without labels; labels/{train,test}: 24 of two classes; teacher.pth."""
    root, rng = tmp_path_factory.mktemp("recipes"), np.random.default_rng(0)
    pictures = [Image.fromarray(image) for image in load_sample_images().images]

    def cut(path: Path, i: int) -> None:
        x, y, w, h = *rng.integers(0, 300, 2), *rng.integers(40, 120, 2)
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures[i % 2].crop((x, y, x + w, y + h)).save(path)

    for i in range(40):
        cut(root / "photos" / "abc"[i % 3] / f"{i}.jpg", i)
    for i in range(24):
        cut(root / "labels" / ("train" if i < 18 else "test") / str(i % 2) / f"{i}.png", i)
    torch.save(timm.create_model("test_vit", num_classes=5).state_dict(), root / "teacher.pth")
    return root


def luna_vision(*words: str) -> int:
    """The exit code of a command."""
    before, sys.argv[1:] = sys.argv[1:], list(map(str, words))
    try:
        main()
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv[1:] = before
    raise AssertionError("a command exits")


def refused(capsys, *words: str) -> str:
    """The one line of a command that was given a mistake."""
    capsys.readouterr()
    assert luna_vision(*words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture(scope="module")
def distilled(folder) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        teacher = ["--teacher", "test_vit", "--teacher-checkpoint", "teacher.pth"]
        run = ["--data", "photos", "--out", "runs/distilled", "--model", "test_luna_vit", "--img-size", "32"]
        words = ["--batch-size", "8", "--labels", "labels", *NARROW, *SMALL, "--trainer.max_epochs=1"]
        assert luna_vision("distill", *run, *teacher, *words) == 0
    return folder / "runs" / "distilled" / "version_0"


def test_distill_takes_any_option_of_fit(distilled):
    config = yaml.safe_load((distilled / "config.yaml").read_text())
    assert config["trainer"]["max_steps"] == 4 and config["data"]["init_args"]["root"] == "photos"
    assert config["model"]["init_args"]["model_kwargs"]["embed_dim"] == 16
    metrics = (distilled / "metrics.csv").read_text()
    assert "val_rank" in metrics and "val_rank_slots" in metrics


@pytest.mark.slow
def test_everything_that_follows_works(distilled, folder, monkeypatch):
    monkeypatch.chdir(folder)
    weights = distilled / "checkpoints" / "best.safetensors"
    image = next((folder / "photos").rglob("*.jpg"))
    assert luna_vision("embed", image, "--out", "out.npz", "--checkpoint", weights) == 0
    assert np.load("out.npz")["embedding"].shape == (1, 16)
    probe = ["--data", "imagefolder", "--root", "labels", "--img-size", "32", "--knn-k", "5", "--out", "probe.json"]
    assert luna_vision("probe", *probe, "--checkpoint", weights) == 0
    assert not json.loads(Path("probe.json").read_text())["random_weights"]
    assert luna_vision("export", "--format", "hf", "--checkpoint", weights, "--out", "hub") == 0
    assert luna_vision("encode", image, "--checkpoint", weights, "--out", "encoded.npz") == 0
    later = ["--model.model_name=test_luna_vit", f"--model.checkpoint={weights}", "--data.img_size=32"]
    config = Path(__file__).parents[2] / "configs" / "image_folder.yaml"
    words = ["--data.root=labels", "--data.batch_size=4", "--data.val_fraction=0.4", *NARROW, *SMALL]
    assert luna_vision("fit", "--config", config, *later, *words, "--trainer.max_epochs=1") == 0
    assert Path("runs", "image_folder", "version_0", "checkpoints", "best.safetensors").is_file()


def test_pretrain(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    run = ["--data", "photos", "--out", "runs/pretrained", "--model", "test_luna_vit", "--img-size", "32"]
    small = [*NARROW, *SMALL, "--data.local_views=2", "--data.patch_size=4", "--model.projector_hidden=32"]
    assert luna_vision("pretrain", *run, "--batch-size", "8", "--epochs", "1", *small) == 0
    files = {path.name for path in (folder / "runs" / "pretrained" / "version_0" / "checkpoints").iterdir()}
    assert files == {"best.ckpt", "last.ckpt", "best.safetensors"}
    assert "batch_size must be at least 2" in refused(capsys, "pretrain", *run, "--batch-size", "1", *small)


@pytest.mark.slow
def test_convert_resumes_and_reports(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    run = ["--vit", "test_vit", "--vit-checkpoint", "teacher.pth", "--data", "photos", "--out", "runs/converted"]
    words = ["--img-size", "32", "--batch-size", "8", "--memory-len", "4", *SMALL]
    assert luna_vision("convert", *run, *words, "--steps", "3", "0", "0") == 0
    out = folder / "runs" / "converted"
    first = (out / "1_attention.safetensors").read_bytes()
    assert luna_vision("convert", *run, *words, "--steps", "3", "2", "2") == 0
    assert (out / "1_attention.safetensors").read_bytes() == first
    report = json.loads((out / "report.json").read_text())["stages"]
    assert list(report) == ["initial", "attention", "features", "sizes"]
    assert all(len(found["block_errors"]) == 6 and 0 <= found["agreement"] <= 1 for found in report.values())
    capsys.readouterr()
    assert luna_vision("convert", "--vit", "--help") == 0 and "--memory-len" in capsys.readouterr().out
    assert luna_vision("embed", "photos/a/0.jpg", "--out", "c.npz", "--checkpoint", out / "3_sizes.safetensors") == 0
    assert "another ViT" in refused(capsys, "convert", *run, *words, "--memory-len", "8")


def test_mistakes_are_one_line_and_write_nothing(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    good = ["--data", folder / "photos", "--out", "runs/x", "--teacher", "test_luna_vit", "--img-size", "32", *SMALL]
    assert "--data, --out" in refused(capsys, "distill")
    assert "give --teacher NAME" in refused(capsys, "distill", "--data", "x", "--out", "y")
    assert "did you mean" in refused(capsys, "distill", *good, "--teacher", "vit_base_patch14_dino2")
    assert "give its weights" in refused(capsys, "distill", *good)
    assert "x.pth" in refused(capsys, "distill", *good, "--teacher-checkpoint", "x.pth")
    assert "--trainer.max_stops" in refused(capsys, "distill", *good, "--trainer.max_stops=1")
    three = tmp_path / "three"
    three.mkdir()
    for image in sorted((folder / "photos").rglob("*.jpg"))[:3]:
        (three / image.name).write_bytes(image.read_bytes())
    teacher = ["--teacher", "test_vit", "--teacher-checkpoint", folder / "teacher.pth", "--model", "test_luna_vit"]
    assert "nowhere" in refused(capsys, "distill", *good, *teacher, "--data", "nowhere")
    assert "fewer than batch_size" in refused(capsys, "distill", *good, *teacher, "--data", three)
    assert not (tmp_path / "runs").exists()
