"""The model that options or arguments name is the one that runs, and what is wrong with them is said."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from lightning.pytorch import Trainer
from safetensors.torch import save_file
from timm.data import resolve_model_data_config

from luna_vision import export
from luna_vision.cli.common import Parser, add_model_options, load, model_options, run_command
from luna_vision.data import DigitsDataModule
from luna_vision.models import factory
from luna_vision.tasks import ClassificationTask, DetectionTask, SegmentationTask, export_weights
from luna_vision.utils.errors import UserError

TEST = ["--model", "test_luna_vit"]
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 1}


def parse(*words: str) -> Any:
    parser = Parser("test")
    add_model_options(parser)
    return parser.parse_args(list(words))


def load_model(options: Any, **overrides: Any) -> torch.nn.Module:
    return load(options, **overrides)


def random_weights(options: Any) -> bool:
    return factory.random_weights(**model_options(options))


def knows_its_images(options: Any) -> bool:
    return factory.knows_its_images(**model_options(options))


def test_model_arguments_reach_the_model(capsys):
    model = load_model(
        parse(*TEST, "--model-args", "memory_len=3", "num_classes=7", "local_mixing=none", "--device", "cpu")
    )
    assert (model.memory_len, model.num_classes, model.training) == (3, 7, False)
    assert model.blocks[0].local is None
    assert "test_luna_vit has RANDOM WEIGHTS" in capsys.readouterr().err


@pytest.mark.parametrize("overrides", [{}, {"num_classes": 0}])
@pytest.mark.parametrize("value", ["abc", "-1", "1.5", "true"])
def test_a_number_of_classes_that_is_none(value, overrides):
    """Said even where features are read, and the head is left out."""
    with pytest.raises(ValueError, match=r"num_classes must be a whole number of at least 0, got "):
        load_model(parse("--model-args", f"num_classes={value}"), **overrides)


def test_weights_of_a_file(tmp_path, capsys):
    trained = timm.create_model("test_luna_vit", num_classes=5)
    save_file(trained.state_dict(), tmp_path / "best.safetensors")
    model = load_model(
        parse(*TEST, "--checkpoint", str(tmp_path / "best.safetensors"), "--model-args", "num_classes=5")
    )
    torch.testing.assert_close(model.state_dict(), trained.state_dict(), rtol=0, atol=0)
    assert "RANDOM" not in capsys.readouterr().err


def test_a_training_checkpoint_says_what_model_it_holds(tmp_path):
    task = ClassificationTask("test_luna_vit", num_classes=6, in_chans=1, model_kwargs=SMALL)
    torch.save({"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams)}, tmp_path / "last.ckpt")
    model = load_model(parse("--checkpoint", str(tmp_path / "last.ckpt")))
    torch.testing.assert_close(model.state_dict(), task.model.state_dict(), rtol=0, atol=0)
    features = load_model(parse("--checkpoint", str(tmp_path / "last.ckpt")), num_classes=0)
    assert features(torch.zeros(1, 1, 32, 32)).shape == (1, 32)


@pytest.mark.parametrize("start", [{"checkpoint_path": "gone.safetensors"}, {"pretrained": True}])
def test_what_a_training_has_begun_with_is_not_read_again(start, tmp_path):
    """It may be gone by now, or far away, and has another head."""
    task = ClassificationTask("test_luna_vit", num_classes=6, model_kwargs=SMALL)
    parameters = {**task.hparams, "model_kwargs": SMALL | start}
    torch.save({"state_dict": task.state_dict(), "hyper_parameters": parameters}, tmp_path / "last.ckpt")
    model = load_model(parse("--checkpoint", str(tmp_path / "last.ckpt")))
    torch.testing.assert_close(model.state_dict(), task.model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("random", [None, False, True])
def test_a_folder_of_save_for_hf(random, tmp_path, capsys):
    """timm's own does not say whether the weights are random, ours does."""
    trained = timm.create_model("test_luna_vit", num_classes=5)
    if random is None:
        timm.models.save_for_hf(trained, tmp_path)
    else:
        export.save_for_hf(trained, tmp_path, random_weights=random)
    words = parse("--model", f"local-dir:{tmp_path}")
    model = load_model(words)
    torch.testing.assert_close(model.state_dict(), trained.state_dict(), rtol=0, atol=0)
    assert ("RANDOM" in capsys.readouterr().err) == random_weights(words) == bool(random)


@pytest.mark.parametrize("classes", [[], ["num_classes=0"], ["num_classes=5"]])
def test_nothing_of_a_folder_is_left_as_initialised(classes, tmp_path):
    """timm loads what there is where the number of classes differs, as it does in all commands that read features."""
    trained = timm.create_model("test_luna_vit", num_classes=5, depth=2)
    export.save_for_hf(trained, tmp_path)
    folder = ["--model", f"local-dir:{tmp_path}", "--model-args", *classes]
    model = load_model(parse(*folder, "drop_path_rate=0.1"), num_classes=0)
    image = torch.randn(1, 3, 40, 50)
    torch.testing.assert_close(model(image), trained.eval().forward_head(trained.forward_features(image), True))
    for argument in ("depth=3", "memory_mlp=own"):
        with pytest.raises(ValueError, match=f"^model local-dir:{tmp_path}: .* Missing key"):
            load_model(parse(*folder, argument), num_classes=0)
    with pytest.raises(ValueError, match=f"model local-dir:{tmp_path} has a head for 5 classes, and not for 7"):
        load_model(parse(*folder, "num_classes=7"))


def test_a_checkpoint_goes_over_the_weights_of_a_folder(tmp_path):
    export.save_for_hf(timm.create_model("test_luna_vit", num_classes=5, depth=2), tmp_path / "it")
    trained = timm.create_model("test_luna_vit", num_classes=7, depth=2)
    save_file(trained.state_dict(), tmp_path / "best.safetensors")
    words = ["--model", f"local-dir:{tmp_path / 'it'}", "--checkpoint", str(tmp_path / "best.safetensors")]
    model = load_model(parse(*words, "--model-args", "num_classes=7"))
    torch.testing.assert_close(model.state_dict(), trained.state_dict(), rtol=0, atol=0)


def test_a_model_has_the_weights_of_the_package_if_there_are_some(capsys):
    want = timm.create_model("luna_vit_nano_patch8", pretrained=True)
    for words in ([], ["--model", "luna_vit_nano_patch8"], ["--model", "luna_vit_nano_patch8.tiny_imagenet_64"]):
        torch.testing.assert_close(load_model(parse(*words)).state_dict(), want.state_dict(), rtol=0, atol=0)
        assert not random_weights(parse(*words)) and "RANDOM" not in capsys.readouterr().err
    for words in (["--model-args", "pretrained=False"], TEST):
        load_model(parse(*words))
        assert random_weights(parse(*words)) and "RANDOM" in capsys.readouterr().err
    with pytest.raises(UserError, match="memory_len': 32}; with pretrained=False it starts without: .* size mismatch"):
        load_model(parse("--model-args", "memory_len=32"))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--model", "luna_vit_smal"], "unknown model name 'luna_vit_smal'; did you mean luna_vit_small"),
        (["--model-args", "memory"], "--model-args are NAME=VALUE, got 'memory'"),
        (["--model-args", "slots=3"], "slots"),
        (["--model-args", "memory_length=3"], "did you mean memory_len?"),
        (["--model-args", "memory_len=0"], "memory_len must be at least 1, got 0"),
        (
            ["--model-args", "checkpoint_path=a.pt"],
            "checkpoint_path is no argument of a model here: give the file as checkpoint",
        ),
        (["--checkpoint", "gone.ckpt"], "checkpoint 'gone.ckpt' does not exist"),
        (["--model", "local-dir:gone"], "there is no gone/config.json"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run_command(lambda: load_model(parse(*words)) and None)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_checkpoint_of_another_model(tmp_path):
    save_file(timm.create_model("test_luna_vit", embed_dim=32).state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="does not fit LunaVit: [0-9]+ weights are of another shape .*, ") as raised:
        load_model(parse(*TEST, "--checkpoint", str(tmp_path / "a.safetensors")))
    assert len(str(raised.value).replace(str(tmp_path), "")) < 200
    (tmp_path / "b.ckpt").write_text("no checkpoint")
    with pytest.raises(ValueError, match="not a checkpoint"):
        load_model(parse("--checkpoint", str(tmp_path / "b.ckpt")))


def test_a_head_of_other_classes_is_refused_where_it_would_be_a_random_one(tmp_path):
    save_file(timm.create_model("test_luna_vit", num_classes=5).state_dict(), tmp_path / "five.safetensors")
    words = parse(*TEST, "--checkpoint", str(tmp_path / "five.safetensors"))
    with pytest.raises(ValueError, match="has a head for 5 classes, the model one for 1000"):
        load_model(words)
    assert load_model(words, num_classes=0).num_classes == 0


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(OSError, match="is a folder"):
        load_model(parse("--checkpoint", str(tmp_path)))


def _cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("model.safetensors", _cut_off, "model local-dir:{}: Error while deserializing header"),
        ("model.safetensors", lambda file: file.unlink(), "model local-dir:{}: "),
        ("config.json", _cut_off, "model local-dir:{0}: {0}/config.json is broken: "),
        ("config.json", lambda file: file.write_text("[1]"), "model local-dir:{0}: {0}/config.json is broken: "),
        ("config.json", lambda file: file.write_text("{}"), "model local-dir:{}: "),
    ],
)
def test_a_broken_folder_is_named_in_one_line(name, damage, message, tmp_path, capsys):
    export.save_for_hf(timm.create_model("test_luna_vit", depth=1, num_classes=5), tmp_path / "it")
    damage(tmp_path / "it" / name)
    with pytest.raises(SystemExit) as end:
        run_command(lambda: load_model(parse("--model", f"local-dir:{tmp_path / 'it'}")) and None)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("error: " + message.format(tmp_path / "it"))


@pytest.mark.parametrize("name", ["last.ckpt", "best.safetensors"])
@pytest.mark.parametrize("task", [DetectionTask, SegmentationTask])
@pytest.mark.parametrize("model_name", ["test_luna_vit", "vit_tiny_patch16_224"])  # which knows its image size
def test_the_backbone_of_a_detector_or_segmenter(task, model_name, name, tmp_path):
    size = {"min_size": 64} if task is DetectionTask else {}
    arguments = {"depth": 2} | ({"img_size": 64} if task is SegmentationTask else {})
    task = task(model_name, num_classes=6, in_chans=1, pyramid_channels=8, model_kwargs=arguments, **size)
    content = {"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams)}
    torch.save(content, tmp_path / "last.ckpt")
    export_weights(tmp_path / "last.ckpt", tmp_path / "best.safetensors")
    words = parse("--checkpoint", str(tmp_path / name))
    model = load_model(words, num_classes=0)
    body = task.model.get_submodule(task.pyramid).body
    torch.testing.assert_close(model.state_dict(), body.state_dict(), rtol=0, atol=0)
    assert model(torch.zeros(1, 1, 64, 64)).shape == (1, body.num_features) and knows_its_images(words)
    assert load_model(words).num_classes == 0
    with pytest.raises(ValueError, match=f"{name}' has a backbone and no head .*, the model one for 6"):
        load_model(parse("--checkpoint", str(tmp_path / name), "--model-args", "num_classes=6"))


@pytest.mark.parametrize("name", ["last.ckpt", "best.safetensors"])
@pytest.mark.parametrize("crop_pct, mode", [(None, "squash"), (0.875, "center")])
def test_a_training_checkpoint_says_what_its_images_were_like(tmp_path, crop_pct, mode, name):
    """In the words of timm, so that whatever prepares images for a timm model prepares them as the training did."""
    task = ClassificationTask("test_luna_vit", num_classes=10, in_chans=1, model_kwargs=SMALL)
    data = DigitsDataModule(img_size=32, in_chans=1, mean=[0.2], crop_pct=crop_pct)
    content = {"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams)}
    task.trainer = Trainer(logger=False, accelerator="cpu", max_epochs=1, enable_checkpointing=False)
    task.trainer._data_connector.attach_datamodule(task, data)
    task.on_save_checkpoint(content)
    torch.save(content, tmp_path / "last.ckpt")
    export_weights(tmp_path / "last.ckpt", tmp_path / "best.safetensors")
    model = load_model(parse("--checkpoint", str(tmp_path / name)))
    torch.testing.assert_close(model.state_dict(), task.model.state_dict(), rtol=0, atol=0)
    cfg = resolve_model_data_config(model)
    assert (cfg["input_size"], cfg["mean"], cfg["std"]) == ((1, 32, 32), (0.2,), data.std)
    assert (cfg["crop_pct"], cfg["crop_mode"]) == (crop_pct or 1.0, mode)
