"""What weights are worth: small models and a few images through all of the experiment."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from experiments.runs import result_path
from experiments.transfer import _parser, begin, execute, plan, write_report
from luna_vision.tasks import ClassificationTask, export_weights

SHAPE = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 1}
CFG = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.25] * 3, "num_classes": 4}


@pytest.fixture
def weights(tmp_path):
    """Files of a Luna ViT and of a softmax ViT with four classes."""
    files = []
    for name, mixer in (("luna", {}), ("softmax", {"mixer": "softmax", "mixer_args": {"query_gain": 8.0}})):
        task = ClassificationTask("luna_vit_tiny", num_classes=4, in_chans=3, model_kwargs=SHAPE | mixer)
        content = {"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams), "data": {"cfg": CFG}}
        torch.save(content, tmp_path / f"{name}.ckpt")
        files.append(tmp_path / f"{name}.safetensors")
        export_weights(tmp_path / f"{name}.ckpt", files[-1])
    return [f"--luna={files[0]}", f"--softmax={files[1]}"]


@pytest.fixture
def root(tmp_path):
    """A folder with a few images of CIFAR-10's ten classes, and scenes of CamVid."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 2)):
        for label in range(10):
            folder = tmp_path / "data/cifar10" / split / f"c{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    for split in ("train", "val"):
        for folder in (split, f"{split}annot"):
            (tmp_path / "data/camvid" / folder).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (36, 48, 3), dtype=np.uint8)).save(tmp_path / f"data/camvid/{split}/a.png")
        mask = Image.fromarray(rng.integers(0, 12, (36, 48), dtype=np.uint8))
        mask.save(tmp_path / f"data/camvid/{split}annot/a.png")
    return tmp_path / "data"


def runs_of(weights, *words):
    small = ["--depth=1", "--samples=64", "--batch-size=32", "--test-images=20"]
    return {run.variant: run for run in plan(_parser().parse_args([*weights, *small, *words]))}


@pytest.mark.filterwarnings("ignore")
def test_models_with_and_without_weights(weights, root, tmp_path):
    runs = runs_of(weights, "--width=32")
    assert len(runs) == 12
    out, names = tmp_path / "out", ("frozen-luna", "finetune64-luna", "finetune64-softmax-random")
    for run in (runs[name] for name in names):
        found = execute(run, str(root), tmp_path / "work" / run.name)
        row = {"task": run.task, "variant": run.variant, "seed": 0, "config": run.config, **found}
        result_path(out, run).parent.mkdir(parents=True, exist_ok=True)
        result_path(out, run).write_text(json.dumps(row))
    frozen, tuned = json.loads((out / "runs/cifar10-frozen-luna-seed0.json").read_text()), row
    assert 0 <= frozen["knn"] <= 1 and 0 <= frozen["camvid"]["accuracy"] <= 1
    assert tuned["accuracy"]["side"] == 64 and tuned["accuracy"]["images"] == 20
    lines = write_report(out).splitlines()
    assert [line.split("`")[1] for line in lines[2:4]] == ["luna", "softmax-random"]
    assert lines == (out / "transfer.md").read_text().splitlines() and (out / "transfer.png").stat().st_size


def test_a_model_begins_with_its_weights(weights):
    runs = runs_of(weights, "--width=32")
    state = load_file(weights[0].partition("=")[2])
    models = [begin(runs[f"frozen-{name}"].config) for name in ("luna", "luna-random")]
    assert [torch.equal(model.memory, state["memory"]) for model in models] == [True, False]
    assert all(model.num_classes == 10 for model in models)
    rates = [runs[f"finetune64-{name}"].config["optimization"]["lr"] for name in ("luna", "luna-random")]
    assert rates == [pytest.approx(5e-4), 1.5e-3]


def test_weights_of_another_model_are_refused(weights, tmp_path):
    with pytest.raises(RuntimeError, match="size mismatch"):
        begin(runs_of(weights, "--width=64")["frozen-luna"].config)
    (tmp_path / "no.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="no.safetensors does not record its training"):
        runs_of([f"--luna={tmp_path / 'no.safetensors'}", weights[1]])
