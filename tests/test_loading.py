"""`luna_vision.load`: one line gives what train.py computes, and the documented lines without the package do, too."""

import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from lightning.pytorch import Trainer
from PIL import Image
from safetensors.torch import save_file

import luna_vision
from luna_vision import export
from luna_vision.cli.export import main as export_command
from luna_vision.data import ImageFolderDataModule
from luna_vision.tasks import ClassificationTask, export_weights

CLASSES = ["ant", "bee", "cow"]
# the size of the data is not that which the model was built for: it takes any
RUNS = {
    "centre": ({"in_chans": 3}, {"img_size": 24, "crop_pct": 0.7}),
    "squashed": ({"in_chans": 1}, {"img_size": [20, 28], "crop_pct": None, "mean": [0.3], "std": [0.2], "in_chans": 1}),
}


def photo(path: Path, rng: np.random.Generator, width: int, height: int, **kwargs) -> None:
    small = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR).save(path, **kwargs)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """photos/train/{ant,bee,cow}/{0,1,2}.png, of which no side is a multiple of another, and a JPEG on its side."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name in CLASSES:
        (root / "train" / name).mkdir(parents=True)
        for i in range(3):
            photo(root / "train" / name / f"{i}.png", rng, 61 + 7 * i, 43 + 2 * i)
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(root / "train" / "cow" / "turned.jpg", rng, 75, 50, exif=exif)
    return root


@pytest.fixture(scope="module", params=RUNS)
def trained(request, photos, tmp_path_factory) -> tuple[Path, list[dict]]:
    """A folder with best.ckpt, best.safetensors and hf/, and what `predict` says of photos/train."""
    torch.manual_seed(0)
    folder, (model, data) = tmp_path_factory.mktemp(request.param), RUNS[request.param]
    kwargs = {"img_size": 32, "embed_dim": 16, "depth": 1, "patch_size": 4, "num_heads": 2}
    task = ClassificationTask("test_luna_vit", num_classes=3, model_kwargs=kwargs, **model)
    module = ImageFolderDataModule(str(photos), val_fraction=0, batch_size=1, num_workers=0, **data)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=1, enable_checkpointing=False, **quiet)
    trainer.fit(task, module)
    trainer.save_checkpoint(folder / "best.ckpt")
    export_weights(folder / "best.ckpt", folder / "best.safetensors")
    export_command([f"--checkpoint={folder / 'best.ckpt'}", "--format=hf", f"--out={folder / 'hf'}"])
    module.predict_path = str(photos / "train")
    return folder, trainer.predict(task, module)


@pytest.mark.parametrize("name", ["best.ckpt", "best.safetensors", "hf"])
def test_what_is_loaded_predicts_as_the_run_does_bit_by_bit(name, trained):
    folder, predictions = trained
    model, transform, class_names = luna_vision.load(str(folder / name))
    assert class_names == CLASSES and not model.training and len(predictions) == 10
    for prediction in predictions:
        (path,) = prediction["ids"]
        with Image.open(path) as image:
            for given in (path, Path(path), image):
                with torch.inference_mode():
                    found = model(transform(given)[None]).softmax(1).topk(3)
                assert torch.equal(found.values, prediction["probabilities"])
                assert torch.equal(found.indices, prediction["labels"])


def test_a_model_that_does_not_say_how_images_were_is_loaded_too(tmp_path):
    task = ClassificationTask("test_luna_vit", num_classes=3, in_chans=1, model_kwargs={"img_size": 32, "depth": 1})
    content = {"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams)}
    torch.save(content, tmp_path / "a.ckpt")
    model, transform, class_names = luna_vision.load(tmp_path / "a.ckpt")
    assert class_names is None and model(transform(np.zeros((50, 60), np.uint8))[None]).shape == (1, 3)
    assert transform.size == (32, 32) and transform.in_chans == 1
    export.save_for_hf(timm.create_model("test_luna_vit", in_chans=5, depth=1), tmp_path / "five")
    model, transform, _ = luna_vision.load(tmp_path / "five")
    assert model(transform(np.zeros((50, 60, 5), np.uint8))[None]).shape == (1, 1000)


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.ckpt"):
        luna_vision.load(tmp_path / "gone.ckpt")
    save_file(timm.create_model("test_luna_vit", depth=1).state_dict(), tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="bare.safetensors .* does not record its model"):
        luna_vision.load(tmp_path / "bare.safetensors")
    with pytest.raises(FileNotFoundError, match="config.json"):
        luna_vision.load(tmp_path)


def lines_of_the_docs() -> str:
    """The Python of docs/export.md that needs onnxruntime."""
    text = (Path(__file__).parents[1] / "docs" / "export.md").read_text(encoding="utf-8")
    (lines,) = [code for code in re.findall("```python\n(.*?)```", text, re.S) if "onnxruntime" in code]
    return lines


@pytest.mark.slow
def test_the_documented_lines_prepare_an_image_as_load_does(trained, tmp_path, monkeypatch, capsys):
    folder, predictions = trained
    monkeypatch.chdir(tmp_path)
    export_command([f"--checkpoint={folder / 'best.ckpt'}", "--format=onnx", "--out=model.onnx"])
    model, transform, class_names = luna_vision.load(folder / "best.safetensors")
    for prediction in predictions:
        Path("photo.jpg").unlink(missing_ok=True)
        Path("photo.jpg").symlink_to(prediction["ids"][0])
        scope: dict = {}
        capsys.readouterr()
        exec(lines_of_the_docs(), scope)
        with torch.inference_mode():
            logits = model(transform("photo.jpg")[None]).numpy()
        np.testing.assert_allclose(scope["logits"], logits, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(scope["pixels"].transpose(2, 0, 1), transform("photo.jpg"))
        assert capsys.readouterr().out.strip() == class_names[logits.argmax()]
