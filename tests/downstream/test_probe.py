"""Probes of frozen features: the numbers of a plain reference, all data of both splits, and mistakes in one line."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from lightning.pytorch import Trainer
from PIL import Image
from sklearn.datasets import load_sample_image
from torch.utils.data import DataLoader

from luna_vision.cli.common import run_command
from luna_vision.cli.probe import DATA as NAMES
from luna_vision.cli.probe import main
from luna_vision.data import DigitsDataModule
from luna_vision.downstream import probe
from luna_vision.downstream.probe import (
    extract_features,
    knn_accuracy,
    linear_probe_accuracy,
    probe_model,
)
from luna_vision.downstream.probe_data import DATA, choose, open_data
from luna_vision.tasks import ClassificationTask

TINY = ["--model", "test_luna_vit", "--model-args", "embed_dim=32", "depth=2"]


def blobs(spread: float, n: int = 80, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points around a centre for each class, as far apart in every draw."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    features = np.eye(classes, 5)[labels] + spread * rng.standard_normal((n, 5))
    return features.astype(np.float32), labels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """root/{train,val}/{flower,temple} with parts of the two photographs."""
    rng = np.random.default_rng(0)
    for name, photo in (("temple", "china.jpg"), ("flower", "flower.jpg")):
        picture = load_sample_image(photo)
        for split, count in (("train", 10), ("val", 5)):
            (tmp_path / "root" / split / name).mkdir(parents=True)
            for i in range(count):
                y, x = rng.integers(0, 300), rng.integers(0, 500)
                part = Image.fromarray(picture[y : y + 90 + i, x : x + 100])
                part.save(tmp_path / "root" / split / name / f"{i}.png")
    return tmp_path / "root"


# ---------------------------------------------------------------- the probes


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (5, 0.07), (20, 0.5), (80, 1e-4)])
def test_knn_is_the_weighted_vote_of_dino(k, temperature):
    (x, y), (z, t) = blobs(0.6), blobs(0.6, n=300, seed=1)
    x[0] = 0  # an image without a direction is no error
    correct = 0
    for feature, target in zip(z, t, strict=True):
        similarity = x @ feature / np.maximum(np.linalg.norm(x, axis=1) * np.linalg.norm(feature), 1e-12)
        votes = np.zeros(3)
        for i in np.argsort(-similarity)[:k]:
            votes[y[i]] += math.exp((similarity[i] - similarity.max()) / temperature)
        correct += votes.argmax() == target
    assert knn_accuracy(x, y, z, t, k, temperature) == pytest.approx(correct / 300, abs=1 / 300)
    assert 0.4 < correct / 300 < 0.95


def test_knn_takes_no_heed_of_length():
    (x, y), (z, t) = blobs(0.3), blobs(0.3, seed=1)
    scale = np.random.default_rng(2).uniform(1, 1e4, (80, 1)).astype(np.float32)
    assert knn_accuracy(x * scale, y, z, t, 5) == knn_accuracy(x, y, z, t, 5)


def test_the_linear_probe_chooses_c_on_training_images_alone():
    (x, y), (z, t) = blobs(0.5, n=300), blobs(0.5, n=200, seed=1)
    result = linear_probe_accuracy(x * 1000 - 5e4, y, z * 1000 - 5e4, t)
    assert result.converged and result.accuracy > 0.7
    assert set(result.held_out) == set(probe.C_GRID)
    assert result.held_out[result.C] == max(result.held_out.values())
    again = linear_probe_accuracy(x * 1000 - 5e4, y, z * 0, t)  # other test images, the same C
    assert again.C == result.C and again.held_out == result.held_out
    plain = linear_probe_accuracy(x, y, z, t)  # what scale and offset the features have does not matter
    assert plain.C == result.C and plain.accuracy == pytest.approx(result.accuracy, abs=0.011)


def test_a_fit_that_does_not_end_is_said(monkeypatch):
    monkeypatch.setattr(probe, "MAX_ITER", 2)
    assert not linear_probe_accuracy(*blobs(0.5), *blobs(0.5, seed=1)).converged


@pytest.mark.parametrize("accuracy", [knn_accuracy, linear_probe_accuracy])
def test_features_that_make_no_sense_are_refused(accuracy):
    (x, y), (z, t) = blobs(0.3), blobs(0.3, seed=1)
    with pytest.raises(ValueError, match="test images but no training images of class 2$"):
        accuracy(x[y < 2], y[y < 2], z, t)
    with pytest.raises(ValueError, match="features of the test images are not all finite"):
        accuracy(x, y, np.where(z > 1, np.nan, z), t)


@pytest.mark.parametrize("k, temperature, message", [(81, 1, "k .* images, 80, got 81"), (3, 0, "above 0, got 0")])
def test_votes_that_are_none(k, temperature, message):
    with pytest.raises(ValueError, match=message):
        knn_accuracy(*blobs(0.3), *blobs(0.3), k, temperature)


@torch.no_grad()
def test_features_are_the_embeddings_in_the_order_of_the_loader(tiny):
    images, labels = torch.randn(7, 3, 32, 48), torch.arange(7)
    model = tiny(num_classes=5).train()
    features, found = extract_features(model, DataLoader(list(zip(images, labels, strict=True)), batch_size=3))
    assert found.tolist() == labels.tolist() and features.dtype == np.float32
    want = model.eval().forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(torch.from_numpy(features), want)
    convnext = timm.create_model("test_convnext")
    assert extract_features(convnext, [(images, labels)])[0].shape == (7, convnext.num_features)
    with pytest.raises(ValueError, match="there are no images"):
        extract_features(model, [])


# ---------------------------------------------------------------- data


def test_all_images_of_both_splits_as_evaluation_sees_them():
    data = open_data("digits", {"img_size": 16, "in_chans": 1})
    module = DigitsDataModule(img_size=16, val_fraction=0.0)
    assert (len(data.train.dataset), len(data.test.dataset)) == (1437, 360)
    images, labels = next(iter(data.train))
    source = module.make_source("train")
    assert labels.tolist() == [source[i][1] for i in range(128)] == data.train_labels[:128].tolist()
    torch.testing.assert_close(images[5], module.eval_transform(Image.fromarray(source[5][0]), 0))
    assert torch.equal(next(iter(data.train))[0], images)  # nothing is augmented


def test_limits_keep_the_shares_of_the_classes():
    labels = np.repeat([0, 1, 2], [500, 250, 50])
    for n in (1, 10, 64, 799):
        chosen = choose(n, 800, labels)
        assert len(set(chosen)) == n and (np.diff(chosen) > 0).all()
        np.testing.assert_allclose(np.bincount(labels[chosen], minlength=3), np.array([500, 250, 50]) * n / 800, atol=1)
    assert len(set(choose(64, 800, None))) == 64
    data = open_data("digits", {}, num_train=50, num_test=10**9)
    assert (len(data.train.dataset), len(data.test.dataset)) == (50, 360)
    assert sorted(set(label for _, label in data.train.dataset)) == list(range(10))
    assert [label for _, label in data.train.dataset] == data.train_labels.tolist()


def test_modules_without_labels_at_hand_or_with_a_validation_split_only(folder):
    canvas = open_data("canvas", {"side": 64, "item_size": 8, "num_test": 4, "in_chans": 1}, num_train=12)
    assert len(canvas.train.dataset) == 12 and len(list(canvas.test)[0][1]) == 4 and canvas.train_labels is None
    timm_data = open_data("timm", {"name": "", "num_classes": 2, "root": str(folder), "val_split": "val"})
    assert (len(timm_data.train.dataset), len(timm_data.test.dataset)) == (20, 10)
    with pytest.raises(ValueError, match="timm has no test images"):
        open_data("timm", {"name": "", "num_classes": 2, "root": str(folder), "val_split": None})


def test_every_module_can_be_named():
    assert tuple(DATA) == NAMES
    for name in DATA:
        with pytest.raises(ValueError, match="nonsense"):
            open_data(name, {"nonsense": 1})


# ---------------------------------------------------------------- both probes in one call


def test_one_call_gives_both_probes(folder, tiny):
    arguments = {"root": str(folder), "img_size": 48, "num_workers": 0}
    model, lines = tiny(num_classes=5), []
    found = probe_model(model, "imagefolder", arguments, k=3, say=lines.append)
    data = open_data("imagefolder", arguments)
    train, test = extract_features(model, data.train), extract_features(model, data.test)
    assert found.knn == knn_accuracy(*train, *test, 3)
    assert found.linear == linear_probe_accuracy(*train, *test) and found.features == 32
    assert lines[0] == "32 features from LunaVit; top-1 in %:" and len(lines) == 3
    assert probe_model(model, data, k=3) == found


def test_one_call_on_a_data_module_has_the_channels_of_the_model(tiny):
    with pytest.raises(ValueError, match="data must be one of digits, fashion_mnist, .*, got 'mnist'"):
        probe_model(tiny(), "mnist")
    data = open_data("digits", {"in_chans": 1, "img_size": 8}, num_train=60, num_test=20)
    assert probe_model(tiny(in_chans=1), data).features == 32
    with pytest.raises(ValueError, match="data_args are for data that is given by name, and not for ProbeData"):
        probe_model(tiny(in_chans=1), data, {"img_size": 16})
    with pytest.raises(ValueError, match=r"k \(--knn-k\) must be from 1 to the number of training images, 1437"):
        probe_model(tiny(in_chans=1), "digits", k=2000)


# ---------------------------------------------------------------- the command


def test_the_command_and_its_file(folder, weights, tmp_path, capsys):
    out = tmp_path / "new" / "probe.json"
    words = ["--data", "imagefolder", "--root", str(folder), "--img-size", "48", "--knn-k", "3", *weights]
    assert main([*words, "--out", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    result = json.loads(out.read_text())
    *found, size, _, knn, linear = printed
    assert found == [
        f"training: 20 images in {folder}/train, 2 classes",
        f"test: 10 images in {folder}/val, 2 classes",
    ]
    assert size == "imagefolder: 20 training and 10 test images of 48 x 48 pixels"
    assert knn == f"kNN, k=3, cosine, T=0.07                {100 * result['knn']['top1']:6.2f}"
    assert linear.startswith("linear, logistic regression, C=")
    assert linear.endswith(f"{100 * result['linear']['top1']:6.2f}")
    assert result["knn"]["top1"] >= 0.8 and result["linear"]["top1"] >= 0.8  # a temple is no flower
    assert result["images"] == {"train": 20, "test": 10, "height": 48, "width": 48}
    assert result["normalisation"]["mean"] == [0.485, 0.456, 0.406]
    assert result["model"]["name"] == "test_luna_vit" and len(result["model"]["weights"]) == 64
    assert result["random_weights"] is False


@pytest.mark.parametrize(
    "kind, words, mean",
    [
        ("checkpoint", [], [0.306]),
        ("checkpoint", ["--mean", "0.5", "--std", "0.25"], [0.5]),
        ("local-dir", [], [0.449]),  # what the model says, over the channels
        ("local-dir", ["--mean", "0.4"], [0.4]),
    ],
)
def test_pixels_are_normalised_as_in_training(kind, words, mean, tiny, tmp_path):
    model = tiny(in_chans=1)
    timm.models.save_for_hf(model, tmp_path / "hf", model_args={"embed_dim": 32, "depth": 2, "in_chans": 1})
    names = ["--model", f"local-dir:{tmp_path / 'hf'}"]
    if kind == "checkpoint":
        names = [*TINY, "in_chans=1", "--checkpoint", str(tmp_path / "hf" / "pytorch_model.bin")]
    limits = ["--num-train", "60", "--num-test", "20", "--img-size", "8"]
    assert main(["--data", "digits", *limits, *names, *words, "--out", str(tmp_path / "probe.json")]) == 0
    result = json.loads((tmp_path / "probe.json").read_text())
    assert result["normalisation"]["mean"] == pytest.approx(mean, abs=1e-6)
    assert result["images"]["train"] == 60


def test_a_training_checkpoint_says_how_pixels_are_normalised(tmp_path):
    data = DigitsDataModule(img_size=8, batch_size=8, num_workers=0, mean=[0.2], std=[0.6])
    shape = {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 1}
    task = ClassificationTask("test_luna_vit", num_classes=10, in_chans=1, model_kwargs=shape)
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    trainer = Trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0, accelerator="cpu", **quiet)
    trainer.fit(task, data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    words = ["--data", "digits", "--num-train", "60", "--num-test", "20", "--img-size", "8"]
    assert main([*words, "--checkpoint", str(tmp_path / "last.ckpt"), "--out", str(tmp_path / "probe.json")]) == 0
    result = json.loads((tmp_path / "probe.json").read_text())
    assert result["normalisation"] == {"mean": [0.2], "std": [0.6]}


@pytest.mark.parametrize(("words", "dtype"), [([], "float32"), (["--dtype", "bfloat16"], "bfloat16")])
def test_the_type_of_products_is_said_and_written_down(words, dtype, tmp_path, capsys):
    out = tmp_path / "probe.json"
    limits = ["--data", "digits", "--num-train", "60", "--num-test", "20", "--img-size", "8", "--device", "cpu"]
    assert main([*limits, *TINY, *words, "--out", str(out)]) == 0
    assert json.loads(out.read_text())["dtype"] == dtype
    assert ("on cpu, in bfloat16" in capsys.readouterr().err) == bool(words)


def test_random_weights_are_announced_and_written_down(tmp_path, capsys):
    words = ["--data", "digits", "--num-train", "60", "--num-test", "20", "--img-size", "8", *TINY]
    assert main([*words, "--out", str(tmp_path / "probe.json")]) == 0
    assert "test_luna_vit has RANDOM WEIGHTS" in capsys.readouterr().err
    assert json.loads((tmp_path / "probe.json").read_text())["random_weights"] is True


def test_folders_as_they_are(folder, weights, capsys):
    words = ["--data", "imagefolder", "--root", str(folder), "--img-size", "32", "--knn-k", "3", *weights]
    assert main(words) == 0
    _, _, *clean = capsys.readouterr().out.splitlines()
    for name in (".ipynb_checkpoints", "train/.Trash-0", "val/__MACOSX", "masks"):
        (folder / name).mkdir()
    for name in ("._0.png", "notes.txt"):
        (folder / "train" / "flower" / name).write_bytes(b"x")
    os.mkfifo(folder / "train" / "temple" / "pipe.png")  # which would be read for ever
    for name, of in (("validation", "val"), ("test", "validation")):
        (folder / of).rename(folder / name)
        assert main(words) == 0
        assert capsys.readouterr().out.splitlines() == [
            f"training: 20 images in {folder}/train, 2 classes; skipped 2 hidden and 2 other names "
            "(1 .txt, 1 not a file)",
            f"test: 10 images in {folder}/{name}, 2 classes; skipped 1 hidden and 0 other names",
            f"not used of {folder}: masks",
            *clean,
        ]


def remove_cats(root: Path) -> None:
    for path in (root / "train" / "temple").iterdir():
        path.unlink()


BROKEN = {
    "val has a class of its own": (
        lambda root: (root / "val" / "zebra").mkdir(),
        "val has classes that the training folder lacks: zebra",
    ),
    "train has an empty class": (remove_cats, "no images in class folders of photos/train: temple"),
    "no val": (lambda root: shutil.rmtree(root / "val"), "imagefolder has no test images"),
    "empty train": (lambda root: shutil.rmtree(root / "train") or (root / "train").mkdir(), "no class folders in"),
    "empty val": (lambda root: shutil.rmtree(root / "val") or (root / "val").mkdir(), "no class folders in photos/val"),
    "two val": (lambda root: (root / "valid").mkdir(), "photos/val and photos/valid are both for validation"),
    "broken image": (
        lambda root: (root / "val" / "temple" / "3.png").write_bytes(b"x"),
        "imagefolder test sample 8: cannot decode image file photos/val/temple/3.png",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_one_line(case, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder.parent)
    folder.rename("photos")
    breaks, message = BROKEN[case]
    breaks(Path("photos"))
    words = ["--data", "imagefolder", "--root", "photos", "--img-size", "32", "--knn-k", "3", *TINY]
    assert message in mistake(capsys, *words)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--knn-k", "1438"], "k (--knn-k) must be from 1 to the number of training images, 1437, got 1438"),
        (["--knn-t", "0"], "temperature (--knn-t) must be above 0, got 0.0"),
        (["--num-train", "10", "--knn-k", "3"], "cannot hold out 0.2 of 10 samples"),
        (["--data-args", "nonsense=1"], "do not fit DigitsDataModule"),
        (["--data-args", "in_chans=1"], "--data-args in_chans: there is an option for it, or it is settled"),
        (["--data-args", "nonsense"], "--data-args are NAME=VALUE, got 'nonsense'"),
        (["--out", "results.txt"], "the output must end in .json, got results.txt"),
        (["--data", "mnist"], "invalid choice: 'mnist'"),
        (["--data", "cifar10", "--root", "gone"], "no complete CIFAR10 in gone/cifar-10-batches-py"),
        (["--model", "vit_tiny_patch16_224", "--model-args", "depth=1"], "fails on 32 x 32 pixels: Input height"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert message in mistake(capsys, "--data", "digits", *TINY, *words)


def mistake(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        run_command(lambda: main(list(words)))
    assert end.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "RANDOM WEIGHTS" not in line]
    assert line.startswith("error: ")
    return line
