"""Training on whole slides: from the table to predictions, the ordinary task's numbers, and mistakes in a line."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import luna_vision
from luna_vision.cli.encode import main as encode_command
from luna_vision.cli.predict_words import with_weights
from luna_vision.cli.train import build
from luna_vision.data import SlideDataModule
from luna_vision.execution import encode
from luna_vision.images import open_image
from luna_vision.images.transforms import eval_transform
from luna_vision.tasks import ClassificationTask, SlideTask, export_weights
from tests.labelled import write_slides

from .conftest import SyntheticData, tiny_trainer

CONFIG = Path(__file__).parents[2] / "configs" / "slides.yaml"
SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8}


def task(**arguments) -> SlideTask:
    torch.manual_seed(0)
    small = {"model_name": "test_luna_vit", "num_classes": 2, "in_chans": 3, "model_kwargs": SMALL}
    return SlideTask(**small | arguments)


def slides(path: Path, **arguments) -> SlideDataModule:
    return SlideDataModule(str(write_slides(path / "slides.csv")), **arguments)


def test_a_run_trains_tests_and_predicts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])  # pytest's own arguments make LightningCLI warn
    write_slides(tmp_path / "slides.csv")
    (tmp_path / "disk").mkdir()
    small = SMALL | {"pretrained": False}
    kwargs = [f"--model.init_args.model_kwargs.{name}={value}" for name, value in small.items()]
    machine = ["--trainer.accelerator=cpu", "--trainer.max_epochs=2", "--trainer.enable_progress_bar=false"]
    words = ["--config", str(CONFIG), *kwargs, *machine]
    cli = build(["fit", *words, "--model.init_args.store=disk", "--trainer.accumulate_grad_batches=3"])
    assert cli.trainer.global_step == 2 * 3  # of 8 slides
    assert set(cli.trainer.callback_metrics) == {"test_loss", "test_acc1"}
    assert all(value.isfinite() for value in cli.trainer.callback_metrics.values())
    checkpoints = tmp_path / "runs" / "slides" / "version_0" / "checkpoints"
    build(["predict", *words, "--ckpt_path", str(checkpoints / "best.ckpt"), "--out", "found.csv"])
    with open("found.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert [Path(row[0]).name for row in rows[1:]] == ["test_0.png", "test_1.png"]
    Path("slides").rename("new")  # without the files of the table
    Path("new/test_0.png").write_bytes(b"no image")
    new = ["--data.init_args.predict_path=new", "--out", "new.csv"]
    with pytest.raises(SystemExit) as end:
        build(["predict", *words, "--ckpt_path", str(checkpoints / "best.ckpt"), *new])
    assert end.value.code == 1 and "new/test_0.png" in capsys.readouterr().err.splitlines()[-1]
    assert len(Path("new.csv").read_text().splitlines()) == len(list(Path("new").iterdir()))


def test_weights_that_are_moved_say_how_slides_were_read(tmp_path, monkeypatch, capfd):
    """`load`, `predict` and `encode` do as the run did, with level, mask and normalisation of the training."""
    rng, rows = np.random.default_rng(0), ["path,label,split"]
    for i in range(4):
        photo = rng.integers(0, 60, (96, 128, 3)).astype(np.uint8) + 160
        photo[: 20 + 10 * i, 30:90, 1] = 20  # what is colourful is tissue
        with tifffile.TiffWriter(tmp_path / f"{i}.tif") as tiff:
            tiff.write(photo, photometric="rgb", tile=(16, 16), subifds=1)
            tiff.write(photo[::2, ::2], photometric="rgb", tile=(16, 16), subfiletype=1)
        rows.append(f"{i}.tif,{'ab'[i % 2]},{'train' if i < 2 else 'val'}")
    (tmp_path / "slides.csv").write_text("\n".join(rows))
    how = {"mean": [0.6, 0.5, 0.7], "std": [0.2, 0.3, 0.1]}
    data = SlideDataModule(str(tmp_path / "slides.csv"), level=1, mask="otsu", **how)
    trainer, ours = tiny_trainer(tmp_path, max_epochs=1), task()
    trainer.fit(ours, datamodule=data)
    trainer.save_checkpoint(tmp_path / "best.ckpt")
    (tmp_path / "moved").mkdir()
    weights = tmp_path / "moved" / "mine.safetensors"
    export_weights(tmp_path / "best.ckpt", weights)
    slide, want = str(tmp_path / "3.tif"), {}
    data.predict_path = slide
    want = trainer.predict(ours, datamodule=data)[0]
    monkeypatch.chdir(tmp_path / "moved")

    model, transform, names = luna_vision.load(weights)
    assert names == ["a", "b"]
    whole = tifffile.imread(slide, level=0)
    torch.testing.assert_close(
        transform(whole), eval_transform((96, 128), how["mean"], how["std"])(Image.fromarray(whole))
    )
    found = encode(model, open_image(slide, level=1), mask="otsu", progress=False)
    assert 0 < found.patch_valid.float().mean() < 1
    torch.testing.assert_close(found.logits.softmax(0).max(), want["probabilities"][0, 0])

    assert encode_command([slide, f"--checkpoint={weights}", "--out=a.npz", "--device=cpu"]) == 0
    assert "as in training: --level 1 --mask otsu" in capfd.readouterr().err
    with np.load("a.npz") as file:
        np.testing.assert_allclose(file["logits"], found.logits, rtol=1e-4, atol=1e-5)
    own = ["--level=0", "--mask=none", "--out=b.npz"]
    assert encode_command([slide, f"--checkpoint={weights}", *own, "--device=cpu"]) == 0
    assert "as in training" not in capfd.readouterr().err
    with np.load("b.npz") as file:
        assert "patch_valid" not in file and json.loads(str(file["about"]))["grid_size"] == [12, 16]

    monkeypatch.setattr("sys.argv", ["train.py"])
    build(with_weights(["predict", slide, f"--checkpoint={weights}", "--out=c.csv", "--trainer.accelerator=cpu"]))
    with open("c.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["label1"] == names[want["labels"][0, 0]]
    assert float(row["probability1"]) == pytest.approx(float(want["probabilities"][0, 0]), abs=1e-5)


def test_logits_and_gradients_are_those_of_the_ordinary_task(tmp_path):
    data, ours = slides(tmp_path, hflip=0, vflip=0), task(store_dtype="float32", band_rows=1)
    theirs = ClassificationTask("test_luna_vit", 2, 3, SMALL)
    theirs.load_state_dict(ours.state_dict())
    slide, label = data.dataset("train")[0]
    image = eval_transform((48, 64), data.mean, data.std)(Image.open(slide.row.path))
    found = []
    for one, images in ((ours, [slide]), (theirs, image[None])):
        loss, logits = one.training_loss(images, torch.tensor([label]))
        loss.backward()
        found.append([logits.detach(), *(p.grad for p in one.parameters())])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_it_learns(tmp_path):
    """Which of two colours a square has, somewhere in an image."""
    rng, rows = np.random.default_rng(0), ["path,label,split"]
    for i in range(24):
        array = rng.integers(100, 140, (64, 72, 3)).astype(np.uint8)
        y, x = rng.integers(0, 48, 2)
        array[y : y + 16, x : x + 16, i % 2] = 255
        Image.fromarray(array).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{'rg'[i % 2]},{'train' if i < 16 else 'val'}")
    (tmp_path / "slides.csv").write_text("\n".join(rows))
    data = SlideDataModule(str(tmp_path / "slides.csv"))
    trainer = tiny_trainer(tmp_path, max_epochs=10, accumulate_grad_batches=4)
    trainer.fit(task(lr=3e-3), datamodule=data)
    assert trainer.callback_metrics["val_acc1"] == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"mixup": 0.2}, "mixup"),
        ({"compile": True}, "compile"),
        ({"grad_checkpointing": True}, "grad_checkpointing"),
        ({"band_rows": -1}, "band_rows must be at least 0"),
        ({"model_name": "vit_tiny_patch16_224", "model_kwargs": {}}, "needs a Luna ViT"),
        ({"model_kwargs": SMALL | {"pos_drop_rate": 0.1}}, "pos_drop_rate=0"),
    ],
)
def test_what_does_not_go_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        task(**arguments)


def test_a_store_that_is_no_folder_is_said_before_the_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        task(store=str(tmp_path / "gone")).check_start()


def test_data_and_task_that_do_not_belong_together(tmp_path):
    trainer = tiny_trainer(tmp_path)
    with pytest.raises(ValueError, match="SlideDataModule"):
        trainer.fit(task(num_classes=6, in_chans=1), datamodule=SyntheticData())
    with pytest.raises(ValueError, match="gives a list"):
        trainer.fit(ClassificationTask("test_luna_vit", 2, 3, SMALL), datamodule=slides(tmp_path))
