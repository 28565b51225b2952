"""Files from strangers: whatever is given as weights or data, nothing in it is unpickled."""

import io
import json
import os
import pickle
import sys
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from luna_vision.cli import embed, encode, export, probe, visualize
from luna_vision.cli.common import run_command
from luna_vision.cli.train import main as train
from luna_vision.data import LitDataDataModule, WebDatasetDataModule

ROOT = Path(__file__).parents[1]
DEBUG = str(ROOT / "configs" / "debug.yaml")
MARKER = "unpickled"


class Hostile:
    """Makes a file in the working directory when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (MARKER,)


KINDS = ("zip.ckpt", "legacy.pt", "pickle.pth")


def hostile_file(folder: Path, kind: str) -> Path:
    """As Lightning, as old PyTorch and as no PyTorch at all would write it."""
    path = folder / kind
    model = {"model_name": "test_luna_vit", "num_classes": 10, "in_chans": 1, "model_kwargs": {}}
    content = {"state_dict": {"head.weight": Hostile()}, "hyper_parameters": model, "global_step": 1}
    if kind == "pickle.pth":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip.ckpt")
    return path


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # what an older PyTorch did by itself, and what users set who have read the advice in PyTorch's error
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    Image.new("RGB", (32, 32)).save("a.png")


def refused(run, path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        run()
    assert end.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and path.name in lines[0] and len(lines[0]) < 500, lines
    assert "could run any code" in lines[0]
    assert not Path(MARKER).exists()


def test_the_files_are_hostile(tmp_path):
    for kind in KINDS:
        torch.load(hostile_file(tmp_path, kind), weights_only=False) if kind != "pickle.pth" else pickle.loads(
            hostile_file(tmp_path, kind).read_bytes()
        )
        Path(MARKER).rmdir()


TRAIN = {
    "resume": ["fit", "--ckpt_path={}"],
    "test": ["test", "--ckpt_path={}"],
    "predict": ["predict", "--ckpt_path={}", "--data.predict_path=a.png"],
    "checkpoint": ["fit", "--model.checkpoint={}", "--trainer.logger=false"],
    "init_from_vit": ["fit", "--model.init_from_vit={}", "--trainer.logger=false"],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use", TRAIN)
def test_training(use, kind, tmp_path, monkeypatch, capsys):
    path = hostile_file(tmp_path, kind)
    words = [word.format(path) for word in TRAIN[use]]
    monkeypatch.setattr(sys, "argv", ["train.py", words[0], "--config", DEBUG, *words[1:]])
    refused(train, path, capsys)


COMMANDS = {
    "embed": (embed.main, ["a.png", "--out", "out.npz"]),
    "probe": (probe.main, ["--data", "digits"]),
    "export": (export.main, ["--format", "hf", "--out", "out"]),
    "visualize": (visualize.main, ["a.png", "--out", "out.png"]),
    "encode": (encode.main, ["a.png", "--out", "out.npz"]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", COMMANDS)
def test_commands(name, kind, tmp_path, capsys):
    main, words = COMMANDS[name]
    path = hostile_file(tmp_path, kind)
    weights = ["--model", "test_luna_vit", "--device", "cpu", "--checkpoint", str(path)]
    refused(lambda: run_command(lambda: main([*words, *weights])), path, capsys)


def hostile_folder(path: Path) -> Path:
    """As torch.distributed.checkpoint writes it; the index, the rest and the weights would each run code."""
    path.mkdir(parents=True)
    (path / ".metadata").write_bytes(pickle.dumps(Hostile()))
    for name in ("meta.pt", "__0_0.distcp"):
        torch.save(Hostile(), path / name)
    return path


FOLDER = {
    "fit": ["--ckpt_path={}"],
    "fit with fsdp2": ["--ckpt_path={}", "--trainer.strategy=fsdp2"],
    "fit from weights": ["--model.checkpoint={}"],
    "validate": ["--ckpt_path={}"],
    "test": ["--ckpt_path={}"],
    "test with weights": ["--model.checkpoint={}"],
    "predict": ["--ckpt_path={}", "--data.predict_path=a.png"],
    "fit --resume": ["--resume", "--trainer.max_epochs=1"],
    "export": ["--checkpoint={}", "--format=hf", "--out=out"],
    "embed": ["a.png", "--out=out.npz", "--model=test_luna_vit", "--checkpoint={}"],
}


@pytest.mark.parametrize("use", FOLDER)
def test_a_folder_as_checkpoint(use, tmp_path, monkeypatch, capsys):
    path = tmp_path / "runs/debug/version_0/checkpoints/last.ckpt"
    command = use.split()[0]
    words = [word.format(path) for word in FOLDER[use]]
    if command in ("export", "embed"):
        run = partial(run_command, lambda: {"export": export, "embed": embed}[command].main(words))
    else:
        config = tmp_path / "config.yaml"
        text = Path(DEBUG).read_text(encoding="utf-8")
        config.write_text(text[: text.index("  callbacks+:")], encoding="utf-8")  # fsdp2 refuses EMA
        monkeypatch.setattr(sys, "argv", ["train.py", command, f"--config={config}", *words])
        run = train
        if "--resume" in words:  # an unfinished run of the same configuration
            with pytest.raises(SystemExit, match="0"):
                train()
            record = path.parents[1] / "run.json"
            record.write_text(json.dumps({**json.loads(record.read_text()), "finished": False}))
            path.unlink()
    hostile_folder(path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run()
    assert end.value.code == 2 and not Path(MARKER).exists()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "last.ckpt" in line and "is a folder" in line


def test_a_folder_of_weights(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"architecture": "test_luna_vit", "pretrained_cfg": {}}))
    os.rename(hostile_file(tmp_path, "zip.ckpt"), tmp_path / "model" / "pytorch_model.bin")
    words = ["a.png", "--out", "out.npz", "--model", f"local-dir:{tmp_path / 'model'}", "--device", "cpu"]
    with pytest.raises(SystemExit) as end:
        run_command(lambda: embed.main(words))
    assert end.value.code == 2 and not Path(MARKER).exists()
    assert f"model local-dir:{tmp_path / 'model'}" in capsys.readouterr().err


def test_arrays_as_images(tmp_path, capsys):
    np.save("a.npy", np.array([Hostile()], dtype=object), allow_pickle=True)
    words = ["a.npy", "--out", "out.npz", "--model", "test_luna_vit", "--device", "cpu"]
    with pytest.raises(SystemExit) as end:
        run_command(lambda: encode.main(words))
    assert end.value.code == 2 and not Path(MARKER).exists()
    assert "a.npy" in capsys.readouterr().err.splitlines()[-1]


# ---- shards


def test_tar_shards(tmp_path):
    """WebDataset's own decoder unpickles what is called .pyd or .pickle; only the image and its .cls are read here."""
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    members = {"0.png": image.getvalue(), "0.cls": b"0"}
    members |= {f"0.{name}": pickle.dumps(Hostile()) for name in ("pyd", "pickle", "pkl", "pth", "npy")}
    with tarfile.open("train.tar", "w") as tar:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    listed = {"train": {"filenames": ["train.tar"], "shard_lengths": [1]}}
    Path("_info.json").write_text(json.dumps({"splits": listed}))
    Path("classes.txt").write_text("cat\n")
    data = WebDatasetDataModule(str(tmp_path), img_size=8, batch_size=1, num_workers=0, val_fraction=0)
    ((images, targets),) = data.train_dataloader()
    assert images.shape == (1, 3, 8, 8) and targets.tolist() == [0] and not Path(MARKER).exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("content", [{"image": b"", "label": Hostile()}, Hostile()])
def test_chunks_of_litdata(content, tmp_path):
    """Its index may name serializers that unpickle: of such a folder nothing is read."""
    from litdata.streaming.cache import Cache

    cache = Cache(str(tmp_path / "train"), chunk_bytes="1MB")
    cache[0] = content
    cache.done()
    cache.merge()
    Path("classes.txt").write_text("cat\n")
    with pytest.raises(ValueError, match="train/index.json is of other items than convert writes.* could run any code"):
        LitDataDataModule(str(tmp_path), img_size=8, num_workers=0, val_fraction=0).dataset("train")
    assert not Path(MARKER).exists()
