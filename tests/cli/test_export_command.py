"""What `python -m luna_vision.export` writes computes what the model does and says what it is, or it is not written."""

import json
import subprocess
import sys
import tempfile

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from safetensors.torch import save_file

from luna_vision import export
from luna_vision.cli.common import run_command
from luna_vision.cli.export import main
from luna_vision.data import DigitsDataModule
from luna_vision.export import compare as comparing
from luna_vision.tasks import ClassificationTask

SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 1, "memory_len": 3}
WORDS = [f"{name}={value}" for name, value in SMALL.items()]


def small(**kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_luna_vit", **{"num_classes": 5, **SMALL, **kwargs}).eval()


def run(*words) -> int:
    """The exit code of the command."""
    with pytest.raises(SystemExit) as end:
        run_command(lambda: main([str(word) for word in words]))
    return end.value.code


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of a real, if short, training run on greys, and its data."""
    folder = tmp_path_factory.mktemp("run")
    data = DigitsDataModule(img_size=32, in_chans=1, batch_size=8, num_workers=0, mean=[0.3], std=[0.4])
    task = ClassificationTask("test_luna_vit", num_classes=10, in_chans=1, model_kwargs=SMALL)
    keep = ModelCheckpoint(folder, filename="best", monitor="val_acc1", mode="max")
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    Trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=1, callbacks=[keep], **quiet).fit(task, data)
    return folder / "best.ckpt", data, task.model.eval()


# ---------------------------------------------------------------- graphs


@pytest.mark.slow
def test_onnx_of_a_training_run_carries_the_memory(trained, tmp_path, capsys):
    """Everything but the file comes from the checkpoint. Small images, other batches and the second image are right."""
    checkpoint, _, model = trained
    path = tmp_path / "new" / "model.onnx"
    assert run("--checkpoint", checkpoint, "--format", "onnx", "--memory", "--out", path) == 0
    printed = capsys.readouterr()
    assert "RANDOM" not in printed.err and "NOTE" not in printed.err
    assert f"wrote {path}" in printed.out and "3 x 1 x 14 x 27" in printed.out and "1e-04 is allowed" in printed.out
    assert list(path.parent.iterdir()) == [path]
    onnx.checker.check_model(path, full_check=True)

    session = onnxruntime.InferenceSession(path)
    assert [x.name for x in session.get_inputs()] == ["image", "memory"]
    assert session.get_inputs()[0].shape == ["batch", 1, "height", "width"]
    assert [x.name for x in session.get_outputs()] == ["logits", "new_memory"]
    about = session.get_modelmeta().custom_metadata_map
    assert (about["model"], about["license"]) == ("test_luna_vit", "apache-2.0")
    assert (json.loads(about["mean"]), json.loads(about["std"])) == ([0.3], [0.4])
    assert (json.loads(about["num_classes"]), json.loads(about["input_size"])) == (10, [1, 32, 32])
    assert json.loads(about["label_names"]) == [str(digit) for digit in range(10)]
    assert (about["interpolation"], about["crop_mode"], about["channels"]) == ("bicubic", "squash", "L")
    assert json.loads(about["crop_pct"]) == 1.0

    start = np.array(json.loads(about["initial_memory"]), np.float32)
    np.testing.assert_array_equal(start, model.memory.detach().numpy())
    memory, given = start.repeat(2, axis=0), None
    for size in ((2, 1, 32, 32), (2, 1, 41, 5)):
        image = torch.randn(size)
        with torch.no_grad():
            wanted, kept = model(image, memory=given), model.encode(image, memory=given)[1]
        logits, memory = session.run(None, {"image": image.numpy(), "memory": memory})
        np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(memory, kept, rtol=1e-4, atol=1e-5)
        given = kept


@pytest.mark.slow
def test_onnx_of_features_replaces_a_file_when_told(tmp_path):
    model, path = small(num_classes=0, global_pool="token"), tmp_path / "model.onnx"
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError, match="exists: give --overwrite"):
        export.export_onnx(model, path, "features")
    assert path.read_bytes() == b"old"
    checks = export.export_onnx(model, path, "features", overwrite=True)
    assert len(checks) == 4 and max(check.error for check in checks) < 1e-5
    image = torch.randn(1, 3, 18, 30)
    (features,) = onnxruntime.InferenceSession(path).run(["features"], {"image": image.numpy()})
    wanted = model.forward_features(image)[:, model.num_prefix_tokens :].transpose(1, 2).reshape(1, 16, 5, 8)
    np.testing.assert_allclose(features, wanted.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mixer, heads",  # clusters, a fixed grid, random features
    [("routing", 2), ("linformer", 1), ("performer", 2)],
)
def test_onnx_of_other_mixers(mixer, heads, tmp_path):
    """What is written has been compared at sizes of one block and of many."""
    checks = export.export_onnx(small(mixer=mixer, num_heads=heads), tmp_path / "model.onnx")
    assert len(checks) == 4 and max(check.error for check in checks) < 1e-5


@pytest.mark.slow
def test_a_program_is_loaded_by_pytorch_alone(tmp_path):
    """In a process that has never heard of this package."""
    path = tmp_path / "model.pt2"
    model = small()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    words = [
        "--model",
        "test_luna_vit",
        "--model-args",
        *WORDS,
        "num_classes=5",
        "--output",
        "embedding",
        "--mean",
        0.5,
    ]
    words += ["--checkpoint", tmp_path / "w.safetensors"]
    assert run(*words, "--format", "torch-export", "--memory", "--out", path) == 0
    image, memory = torch.randn(2, 3, 9, 50), torch.randn(2, 3, 16)
    torch.save((image, memory), tmp_path / "in.pt")
    script = (
        "import json, sys, torch; about = {'metadata.json': ''};"
        "program = torch.export.load('model.pt2', extra_files=about).module();"
        "torch.save((*program(*torch.load('in.pt')), json.loads(about['metadata.json'])), 'out.pt');"
        "assert not any(name.startswith(('luna_vision', 'timm')) for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    embedding, new_memory, about = torch.load(tmp_path / "out.pt")
    wanted = model.forward_head(model.forward_features(image, memory=memory), pre_logits=True)
    torch.testing.assert_close(embedding, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(new_memory, model.encode(image, memory=memory)[1], rtol=1e-4, atol=1e-5)
    assert about["mean"] == [0.5, 0.5, 0.5] and about["output"] == "embedding"
    assert (about["crop_mode"], about["crop_pct"], about["channels"]) == ("center", 0.9, "RGB")
    assert torch.equal(torch.tensor(about["initial_memory"]), model.memory)


@pytest.mark.slow
def test_a_graph_that_differs_gets_no_name(tmp_path, capsys, monkeypatch):
    """The model that is compared with is made another one while the graph is as it was."""
    original = comparing.reference
    monkeypatch.setattr(comparing, "reference", lambda *args: [1.001 * y for y in original(*args)])
    words = ("--model", "test_luna_vit", "--model-args", *WORDS, "--format", "torch-export")
    with pytest.raises(export.ExportError, match="the loaded program differs from PyTorch by"):
        run(*words, "--out", tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_a_graph_that_cannot_be_made_is_no_mistake_of_the_user(tmp_path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("a guard\nand a hundred lines")

    monkeypatch.setattr(torch.export, "export", fail)
    words = ("--model", "test_luna_vit", "--model-args", *WORDS, "--format", "torch-export")
    with pytest.raises(export.ExportError, match="cannot trace this model for all sizes: a guard") as raised:
        run(*words, "--out", tmp_path / "model.pt2")
    assert raised.value.__cause__.args == ("a guard\nand a hundred lines",)
    assert "error: " not in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_is_compared():
    """Batches of 1 and 3, sides that are no multiples of the patch, not square, and larger than what is traced."""
    model = small(patch_size=(4, 8), img_size=(32, 64))
    sizes = comparing.check_sizes(model)
    assert sizes[0] == (1, 3, 32, 64)
    assert {size[0] for size in sizes} >= {1, 3}
    assert any(h % 4 and w % 8 for _, _, h, w in sizes)
    assert any(h > 10 * 4 for _, _, h, _ in sizes) and any(w > 6 * 8 for *_, w in sizes)
    for wrong in ([torch.full((1, 5), torch.nan)], [torch.zeros(1, 4)]):
        with pytest.raises(export.ExportError, match="it differs from PyTorch by inf .* at 1 x 3 x 32 x 64; 1e-04 is"):
            comparing.compare(lambda inputs, wrong=wrong: wrong, model, "logits", False, "it")


# ---------------------------------------------------------------- hf

ARGUMENTS = [
    {"in_chans": 1, "img_size": (16, 48), "patch_size": (4, 8), "stem": "patch", "pos_embed": "learn"},
    {"memory_len": 5, "pack_heads": 2, "num_heads": 4, "tie_kv": False, "memory_mlp": "own", "mlp_ratio": 2.5},
    {"norm_first": False, "local_mixing": "none", "final_norm": True, "qkv_bias": False, "proj_bias": False},
    {"mixer": "linformer", "mixer_args": {"proj_len": 7, "ref_size": 5}, "local_mixing": "mlp"},
    {"mixer": "performer", "mixer_args": {"num_features": 9}, "global_pool": "map", "num_classes": 0},
    {"mixer": "longformer", "mixer_args": {"window_size": 6}, "stem": "conv", "act_layer": "silu", "init_values": 0.1},
    {"global_pool": "token", "depth": 2, "num_classes": 3, "memory_mlp": "shared", "norm_layer": "rmsnorm"},
]


@pytest.mark.parametrize("kwargs", ARGUMENTS)
def test_arguments_survive_a_folder(kwargs, tmp_path):
    model = small(**kwargs)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    export.save_for_hf(model, tmp_path / "it")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'it'}", pretrained=True).eval()
    assert {k: v.shape for k, v in loaded.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    image = torch.randn(2, model.in_chans, 19, 33)
    assert torch.equal(loaded(image), model(image))
    assert (loaded.num_classes, loaded.global_pool) == (model.num_classes, model.global_pool)
    assert loaded.patch_embed.img_size == model.patch_embed.img_size


def test_folder_of_a_training_run(trained, tmp_path, capsys, monkeypatch):
    """The card tells of the training, and its code prepares an image as the training did and runs."""
    checkpoint, data, model = trained
    monkeypatch.chdir(tmp_path)
    assert run("--checkpoint", checkpoint, "--format", "hf", "--out", "digits") == 0
    assert "equal bit for bit" in capsys.readouterr().out
    assert sorted(file.name for file in (tmp_path / "digits").iterdir()) == sorted(export.HF_FILES)

    card = ModelCard.load("digits/README.md")
    about = card.data.to_dict()
    assert (about["license"], about["library_name"]) == ("apache-2.0", "timm")
    assert {"image-classification", "timm", "luna"} <= set(card.data.tags)
    for text in (
        "`test_luna_vit`",
        "GMACs at 32 x 32",
        "**Mean, of pixels in [0, 1]:** 0.3",
        "`luna_vision.data.DigitsDataModule`",
        "1 epochs, 2 steps",
        "`adamw`, learning rate 0.001",
        "val_acc1",
        "ma2021luna",
    ):
        assert text in card.text, text
    assert "RANDOM" not in card.text

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60), dtype=np.uint8))
    picture.save("image.png")
    scope: dict = {}
    exec(card.text.split("```python\n")[1].split("```")[0], scope)
    assert torch.equal(scope["image"][0], data.eval_transform(picture, 0))
    with torch.no_grad():
        assert torch.equal(scope["output"], model(scope["image"]))
    assert scope["model"].pretrained_cfg["label_names"] == [str(digit) for digit in range(10)]


def test_random_weights_are_said_loudly_and_a_folder_goes_into_another(tmp_path, capsys):
    words = ["--format", "hf", "--model", "test_luna_vit", "--model-args", *WORDS, "in_chans=2", "--std", 0.1, 0.2]
    assert run(*words, "--out", tmp_path / "a") == 0
    assert "RANDOM WEIGHTS" in capsys.readouterr().err
    card = (tmp_path / "a" / "README.md").read_text()
    assert "RANDOM WEIGHTS" in card and "torch.randn(1, 2, 32, 32)" in card
    assert json.loads((tmp_path / "a" / "config.json").read_text())["pretrained_cfg"]["input_size"] == [2, 32, 32]
    (tmp_path / "a" / "notes.txt").write_text("mine")

    assert run("--format", "hf", "--model", f"local-dir:{tmp_path / 'a'}", "--out", tmp_path / "b") == 0
    assert json.loads((tmp_path / "b" / "config.json").read_text())["pretrained_cfg"]["std"] == [0.1, 0.2]
    assert "RANDOM WEIGHTS" in capsys.readouterr().err and "RANDOM" in (tmp_path / "b" / "README.md").read_text()

    assert run(*words, "--out", tmp_path / "a", "--overwrite") == 0
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b"]


def test_a_folder_that_exists_is_filled_from_within(tmp_path, monkeypatch):
    """Its parent may be read-only, or on another file system than a folder that is mounted there."""
    folder, make = tmp_path / "it", tempfile.TemporaryDirectory
    folder.mkdir()

    def refuse(dir, **kwargs):  # the superuser may write everywhere
        if dir != folder:
            raise PermissionError(13, "Permission denied", str(dir))
        return make(dir=dir, **kwargs)

    monkeypatch.setattr("tempfile.TemporaryDirectory", refuse)
    export.save_for_hf(small(), folder)
    assert sorted(file.name for file in folder.iterdir()) == sorted(export.HF_FILES)


def test_weights_of_a_file_are_named_and_what_it_does_not_say(tmp_path, capsys):
    save_file(small().state_dict(), tmp_path / "mine.safetensors")
    words = ("--model", "test_luna_vit", "--model-args", *WORDS, "num_classes=5", "--checkpoint")
    assert run(*words, tmp_path / "mine.safetensors", "--format", "hf", "--out", tmp_path / "it") == 0
    assert "mine.safetensors does not say how images are normalised" in capsys.readouterr().err
    card = (tmp_path / "it" / "README.md").read_text()
    assert "`mine.safetensors`, which does not say what it was trained on" in card
    assert json.loads((tmp_path / "it" / "config.json").read_text())["pretrained_cfg"].get("tag") != "untrained"


def test_a_folder_that_builds_another_model_is_not_written(tmp_path, monkeypatch):
    model = small()
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: create(*args, **{**kwargs, "num_heads": 2}))
    with pytest.raises(export.ExportError, match="differs from PyTorch by .* at 1 x 3 x 32 x 32"):
        export.save_for_hf(model, tmp_path / "it")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- mistakes

PROGRAM = ["--format", "torch-export", "--out", "a.pt2"]
MISTAKES = [
    (["--format", "tflite", "--out", "a.onnx"], "argument --format: invalid choice: 'tflite'"),
    (["--format", "onnx", "--out", "a.pt2"], "the output must end in .onnx, got a.pt2"),
    (["--format", "torch-export", "--out", "a.onnx"], "the output must end in .pt2, got a.onnx"),
    (["--format", "torch-export", "--out", "there.pt2"], "there.pt2 exists: give --overwrite"),
    (["--format", "torch-export", "--out", "folder.pt2"], "the output folder.pt2 is a folder"),
    (["--format", "hf", "--out", "there.pt2"], "there.pt2 is a file; format hf writes a folder"),
    (["--format", "hf", "--out", "folder.pt2"], "folder.pt2 is not empty: give --overwrite"),
    (["--format", "torch-export", "--out", "there.pt2/a.pt2"], "cannot write into there.pt2: "),
    (["--format", "hf", "--out", "it", "--memory"], "are for graphs, not for --format hf"),
    (["--format", "hf", "--out", "it", "--mean", "1", "2"], "mean must be 1 or 3 finite numbers, got (1.0, 2.0)"),
    (["--format", "hf", "--out", "it", "--std", "0"], "std must be 1 or 3 finite numbers, above 0, got (0.0,)"),
    (
        ["--format", "torch-export", "--out", "a.pt2", "--model-args", "num_classes=0", "--output", "logits"],
        "no logits",
    ),
    (["--format", "torch-export", "--out", "a.pt2", "--model-args", "mixer=linear", "--memory"], "has no memory that"),
    (["--format", "torch-export", "--out", "a.pt2", "--model", "resnet18"], "this exports Luna ViTs, got ResNet"),
    (["--format", "hf", "--out", "it", "--model", "resnet18"], "this exports Luna ViTs, got ResNet"),
    (["--format", "hf", "--out", "it", "--checkpoint", "gone.ckpt"], "checkpoint 'gone.ckpt' does not exist"),
    (["--format", "hf", "--out", "it", "--checkpoint", "other.safetensors"], "does not fit LunaVit"),
    (
        ["--format", "hf", "--out", "it", "--checkpoint", "other.safetensors", "--model-args", "num_classes=3"],
        "has a head for 1000 classes, the model one for 3",
    ),
    (["--out", "a.onnx"], "the following arguments are required, here or in a --config: format"),
]


@pytest.mark.parametrize("words, message", MISTAKES)
def test_mistakes_are_one_line_and_exit_code_2(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.pt2").write_text("old")
    (tmp_path / "folder.pt2").mkdir()
    (tmp_path / "folder.pt2" / "old").write_text("old")
    save_file(small(embed_dim=8, num_classes=1000).state_dict(), tmp_path / "other.safetensors")
    before = sorted(tmp_path.rglob("*"))
    if "--model" not in words:
        words = ["--model", "test_luna_vit", *words]
    assert run(*words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "RANDOM WEIGHTS" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_libraries_are_said_before_the_work(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    assert run("--model", "test_luna_vit", "--format", "onnx", "--out", tmp_path / "a.onnx") == 2
    assert capsys.readouterr().err == f'error: format onnx needs {name}: pip install "luna-vision[export]"\n'


def test_a_place_without_permission_is_refused_before_the_work(tmp_path, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "somewhere")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # the superuser may write everywhere
    assert run("--model", "test_luna_vit", "--format", "torch-export", "--out", tmp_path / "a.pt2") == 2
    assert capsys.readouterr().err == f"error: cannot write into {tmp_path}: Permission denied\n"


def test_what_a_graph_cannot_be_checked_for_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be in float32, in which the check is made, got torch.float16"):
        export.export_program(small().half(), tmp_path / "a.pt2")
    with pytest.raises(ValueError, match="output must be one of 'logits', 'embedding', 'features', got 'maps'"):
        export.export_program(small(), tmp_path / "a.pt2", "maps")
    with pytest.raises(ValueError, match="must be on the CPU, where onnxruntime is compared with it, got meta"):
        export.export_onnx(small().to("meta"), tmp_path / "a.onnx")
    with pytest.raises(ValueError, match="less than 2 GiB, and this model has 2.3 GiB of weights"):
        export.export_onnx(timm.create_model("luna_vit_base", depth=80, device="meta"), tmp_path / "a.onnx")
