import pytest
import timm
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file

from luna_vision.models import load_weights
from luna_vision.tasks import EMA, ExportBest, SegmentationTask, export_weights

from .conftest import tiny_task, tiny_trainer


def test_closing_line_gives_the_model_that_was_trained(tmp_path, data, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = ModelCheckpoint(tmp_path / "run", monitor="val_acc1", mode="max", filename="best")
    callbacks = [EMA(decay=0.5), checkpoint, ExportBest()]
    trainer = tiny_trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True, max_epochs=3)
    task = tiny_task(lr=1e-2)
    trainer.fit(task, data)
    callbacks[-1].announce()
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("best checkpoint: run/best.ckpt (val_acc1 ") for line in lines)
    statement = next(line for line in lines if line.startswith("load it with:")).partition(":")[2].strip()
    namespace = {}
    exec(statement, namespace)
    saved = torch.load(tmp_path / "run" / "best.ckpt", weights_only=True)
    task.load_state_dict(saved["state_dict"])
    images = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(namespace["model"].eval()(images), task.eval()(images))
    assert [path.name for path in (tmp_path / "run").glob("*partial*")] == []


@pytest.mark.parametrize("kind", ["lightning", "safetensors", "timm"])
def test_start_from_a_checkpoint(tmp_path, data, kind):
    source = tiny_task()
    path = tmp_path / f"weights.{'safetensors' if kind == 'safetensors' else 'pt'}"
    if kind == "lightning":
        torch.save({"state_dict": source.state_dict()}, path)
    elif kind == "timm":
        torch.save(source.model.state_dict(), path)
    else:
        save_file(source.model.state_dict(), path)
    task = tiny_task(checkpoint=str(path))
    tiny_trainer(tmp_path).validate(task, data, verbose=False)
    torch.testing.assert_close(task.model.state_dict(), source.model.state_dict(), rtol=0, atol=0)


def test_head_of_other_classes_is_dropped_with_a_notice(tmp_path, capsys):
    torch.save(tiny_task(num_classes=9).model.state_dict(), tmp_path / "nine.pt")
    model = tiny_task().model
    head = model.head.weight.detach().clone()
    load_weights(model, tmp_path / "nine.pt")
    assert "head for 9 classes is dropped" in capsys.readouterr().out
    assert torch.equal(model.head.weight, head)
    nine = torch.load(tmp_path / "nine.pt", weights_only=True)
    torch.testing.assert_close(model.state_dict()["blocks.0.norm1.weight"], nine["blocks.0.norm1.weight"])
    assert torch.equal(model.state_dict()["patch_embed.proj.weight"], nine["patch_embed.proj.weight"])


def test_the_backbone_of_a_segmenter_starts_a_classifier(tmp_path, capsys):
    source = SegmentationTask("test_luna_vit", pyramid_channels=8)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "masks.ckpt")
    model = timm.create_model("test_luna_vit", num_classes=5)
    head = model.head.weight.detach().clone()
    load_weights(model, tmp_path / "masks.ckpt")
    assert "it has no head; the model's own, for 5, starts fresh" in capsys.readouterr().out
    assert torch.equal(model.memory, source.model.backbone.body.memory) and torch.equal(model.head.weight, head)


def test_first_convolution_adapts_to_other_channels(tmp_path):
    source = tiny_task(in_chans=3).model
    torch.save(source.state_dict(), tmp_path / "rgb.pt")
    model = tiny_task(in_chans=1).model
    load_weights(model, tmp_path / "rgb.pt")
    torch.testing.assert_close(model.patch_embed.proj.weight, source.patch_embed.proj.weight.sum(1, keepdim=True))


@pytest.mark.parametrize(
    "name, arguments, first",
    [
        ("test_luna_vit", {"stem": "conv"}, "patch_embed.stem.0.conv"),
        ("xcit_nano_12_p16_224", {"depth": 1, "cls_attn_layers": 1}, "patch_embed.proj.0.0"),
    ],
)
def test_stems_of_several_convolutions(name, arguments, first, tmp_path):
    source = timm.create_model(name, num_classes=3, **arguments)
    torch.save(source.state_dict(), tmp_path / "rgb.pt")
    for in_chans in (3, 1):
        model = timm.create_model(name, num_classes=3, in_chans=in_chans, **arguments)
        load_weights(model, tmp_path / "rgb.pt")
        wanted = source.state_dict()
        if in_chans == 1:
            wanted[f"{first}.weight"] = wanted[f"{first}.weight"].sum(1, keepdim=True)
        torch.testing.assert_close(model.state_dict(), wanted, rtol=0, atol=0)


def test_plain_vit_resamples_its_positions(tmp_path):
    """A model that is not ours: its checkpoint_filter_fn has to run."""
    small = timm.create_model("test_vit", img_size=32, num_classes=6)
    torch.save(small.state_dict(), tmp_path / "vit.pt")
    large = timm.create_model("test_vit", img_size=64, num_classes=6)
    load_weights(large, tmp_path / "vit.pt")
    assert torch.equal(large.head.weight, small.head.weight)


@pytest.mark.parametrize(
    ("write", "error", "message"),
    [
        (None, FileNotFoundError, "does not exist"),
        (lambda path: path.write_bytes(b"no checkpoint"), ValueError, "not a checkpoint"),
        (lambda path: torch.save({"weight": torch.zeros(1)}, path), ValueError, "does not fit"),
    ],
)
def test_bad_files(tmp_path, write, error, message):
    path = tmp_path / "weights.pt"
    if write:
        write(path)
    with pytest.raises(error, match=message):
        load_weights(tiny_task().model, path)


@pytest.mark.parametrize("name", ["convnext_atto", "beit_base_patch16_224"])
def test_a_file_that_the_filter_of_a_model_does_not_know(name, tmp_path):
    """timm's filters look up the names that they expect, and raise a KeyError or an AttributeError."""
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "vit.pt")
    model = timm.create_model(name, num_classes=0, device="meta")
    with pytest.raises(ValueError, match="vit.pt' does not fit [A-Za-z]+: [0-9]+ weights are missing"):
        load_weights(model, tmp_path / "vit.pt")


def test_starting_weights_are_not_read_on_resume(tmp_path, data):
    checkpoint = ModelCheckpoint(tmp_path, filename="first")
    tiny_trainer(tmp_path, max_epochs=1, callbacks=[checkpoint], enable_checkpointing=True).fit(tiny_task(), data)
    task = tiny_task(checkpoint="gone.pt")
    tiny_trainer(tmp_path).fit(task, data, ckpt_path=tmp_path / "first.ckpt", weights_only=True)
    with pytest.raises(FileNotFoundError):
        tiny_trainer(tmp_path).fit(tiny_task(checkpoint="gone.pt"), data)


def test_checkpoint_of_another_model(tmp_path, data):
    checkpoint = ModelCheckpoint(tmp_path, filename="first")
    tiny_trainer(tmp_path, max_epochs=1, callbacks=[checkpoint], enable_checkpointing=True).fit(tiny_task(), data)
    other = tiny_task(model_kwargs={"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2})
    with pytest.raises(ValueError, match="another model's weights"):
        tiny_trainer(tmp_path).test(other, data, ckpt_path=tmp_path / "first.ckpt", weights_only=True)


def test_weights_alone_do_not_resume_a_training(tmp_path, data):
    checkpoint = ModelCheckpoint(tmp_path, filename="first", save_weights_only=True)
    tiny_trainer(tmp_path, max_epochs=1, callbacks=[checkpoint], enable_checkpointing=True).fit(tiny_task(), data)
    with pytest.raises(ValueError, match="no state of the optimizer: give its weights as --model.checkpoint"):
        tiny_trainer(tmp_path).fit(tiny_task(), data, ckpt_path=tmp_path / "first.ckpt", weights_only=True)


def test_init_from_vit_is_called_with_its_source(tmp_path, data, monkeypatch):
    calls = []
    monkeypatch.setattr("luna_vision.tasks.base.init_from_vit", lambda model, source: calls.append((model, source)))
    task = tiny_task(init_from_vit="vit_tiny_patch16_224")
    tiny_trainer(tmp_path).validate(task, data, verbose=False)
    assert calls == [(task.model, "vit_tiny_patch16_224")]


def test_export_is_a_plain_state_dict(tmp_path):
    task = tiny_task()
    torch.save({"state_dict": task.state_dict()}, tmp_path / "a.ckpt")
    export_weights(tmp_path / "a.ckpt", tmp_path / "a.safetensors")
    model = tiny_task().model
    load_weights(model, tmp_path / "a.safetensors")
    torch.testing.assert_close(model.state_dict(), task.model.state_dict(), rtol=0, atol=0)
