"""A Luna ViT takes over the work of a softmax ViT of its width and depth."""

import copy

import pytest
import timm
import torch
from timm.layers import SwiGLU
from timm.models.vision_transformer import ResPostBlock

import luna_vision
from luna_vision.models.vit_init import load_vit, luna_arguments
from luna_vision.tasks import ConversionTask
from luna_vision.tasks.conversion import attention_residuals, relative_error, report, teacher_forced_errors
from luna_vision.tasks.reporting import save_weights

from .conftest import tiny_trainer
from .test_feature_distillation import Photos, weights

VIT = {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 8, "img_size": 32}
SHELL = VIT | {"mixer": "softmax", "mlp_ratio": 2.0}
KINDS = {
    "plain": ("test_vit", VIT | {"class_token": False, "global_pool": "avg"}),
    "class token": ("test_vit", VIT),
    "dinov2": ("test_vit", VIT | {"reg_tokens": 4, "init_values": 1e-5, "no_embed_class": True}),
    "deit3": ("test_vit", VIT | {"init_values": 1e-6, "no_embed_class": True}),
    "shell": ("test_luna_vit", SHELL),
}


@pytest.fixture(params=KINDS)
def kind(request) -> tuple[str, dict]:
    return KINDS[request.param]


def convert(path, kind: tuple[str, dict], stage: str = "attention", classes: int = 5, **arguments) -> ConversionTask:
    name, kwargs = kind
    torch.manual_seed(1)
    file = weights(path / "vit.pth", name, num_classes=classes, **kwargs)
    vit = timm.create_model(name, num_classes=classes, **kwargs)
    task = ConversionTask(
        stage=stage,
        model_name="luna_vit_small",
        model_kwargs=luna_arguments(vit, 6),
        num_classes=classes,
        teacher_model=name,
        teacher_checkpoint=file,
        teacher_kwargs=kwargs,
        mixup=False,
        **{"lr": 3e-3, **arguments},
    )
    load_vit(task.model, task.teacher.model)
    return task


def test_starts_from_the_weights_of_the_vit(tmp_path, kind):
    task = convert(tmp_path, kind)
    model, vit = task.model, task.teacher.model
    assert (model.embed_dim, len(model.blocks), model.memory_len) == (24, 3, 6)
    for ours, theirs in zip(model.blocks, vit.blocks, strict=True):
        q, k, v = theirs.attn.qkv.weight.chunk(3)
        assert torch.equal(ours.attn.pack_q.weight, q) and torch.equal(ours.attn.unpack_q.weight, q)
        assert torch.equal(ours.attn.pack_k.weight, k) and torch.equal(ours.attn.pack_v.weight, v)
        assert torch.equal(ours.attn.unpack_v.weight, torch.eye(24))
        assert torch.equal(ours.mlp.fc1.weight, theirs.mlp.fc1.weight)
    assert torch.equal(model.head.weight, vit.head.weight)
    if hasattr(vit, "pos_embed") and isinstance(vit.pos_embed, torch.nn.Parameter):
        added = model.pos_embed(torch.zeros(1, 4, 4, 24)).flatten(1, 2)
        torch.testing.assert_close(added, vit.pos_embed[:, -16:], rtol=0, atol=0.02)


def test_class_names_come_along(tmp_path):
    task, names = convert(tmp_path, KINDS["shell"]), list("abcde")
    task.teacher.model.pretrained_cfg = task.teacher.model.pretrained_cfg | {"label_names": names}
    save_weights(task, Photos(), tmp_path / "0_initial.safetensors")  # a stage's checkpoint records the same
    assert luna_vision.load(tmp_path / "0_initial.safetensors").class_names == names


def test_residuals_are_those_of_the_attention(tmp_path):
    vit = timm.create_model("test_vit", **VIT, init_values=0.5).eval()
    images = torch.rand(2, 3, 32, 32)
    found = attention_residuals(vit, images)
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    for block, (before, added) in zip(vit.blocks, found, strict=True):
        torch.testing.assert_close(before, x[:, 1:])
        torch.testing.assert_close(added, block.ls1(block.attn(block.norm1(x)))[:, 1:], rtol=1e-4, atol=1e-5)
        x = block(x)


def test_relative_error():
    theirs = torch.randn(2, 5, 3)
    assert relative_error(theirs, theirs) == 0 and relative_error(torch.zeros_like(theirs), theirs) == 1
    torch.testing.assert_close(relative_error(1.5 * theirs, theirs), torch.tensor(0.25))


@pytest.mark.parametrize("name", ["plain", "dinov2", "shell"])
def test_first_stage_brings_every_block_nearer_and_trains_no_other_weights(tmp_path, name):
    task = convert(tmp_path, KINDS[name])
    images = torch.cat([batch for (batch,) in Photos().val_dataloader()])
    first = report(task.model, task.teacher, [images], labelled=True)
    before = copy.deepcopy(task.model.state_dict())
    trainer = tiny_trainer(tmp_path, max_epochs=12)
    trainer.fit(task, Photos(count=32))
    last = report(task.model, task.teacher, [images], labelled=True)
    if name == "shell":  # whose untrained attention is nearly a mean, as the start of a conversion is
        assert max(first["block_errors"]) < 0.05 and max(last["block_errors"]) < 0.2
    else:
        assert all(b < a for a, b in zip(first["block_errors"], last["block_errors"], strict=True))
    moved = {name for name, value in task.model.state_dict().items() if not torch.equal(value, before[name])}
    parts = ("memory", ".attn.", ".local.", ".norm1_memory.", ".ls1_memory.")
    assert {name for name in moved if not any(part in f".{name}" for part in parts) and name != "memory"} == set()
    attention = {name for name in before if name.startswith("blocks.") and ".attn." in name}
    assert attention <= moved and "memory" in moved
    assert all(trainer.callback_metrics[name].isfinite() for name in ("val_loss", "val_cosine", "val_agreement"))


@pytest.mark.parametrize("name", ["class token", "shell"])
def test_second_stage_trains_all_weights_towards_the_features(tmp_path, name):
    task = convert(tmp_path, KINDS[name], stage="features")
    trainer = tiny_trainer(tmp_path, max_epochs=1)
    trainer.fit(task, Photos(count=32))
    first = trainer.callback_metrics["val_loss"].clone()
    sum(task.training_parts(torch.rand(2, 3, 32, 32)).values()).backward()
    assert [name for name, p in task.named_parameters() if p.grad is None] == []
    seen: list[int] = []
    task.teacher.model.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    trainer.validate(task, data := Photos(count=32), verbose=False)
    sizes = [len(batch) for batch, *_ in data.val_dataloader()]
    assert seen == [1, *sizes]  # to learn its shapes; then each image once
    trainer = tiny_trainer(tmp_path, max_epochs=6)
    trainer.fit(task, Photos(count=32))
    assert trainer.callback_metrics["val_loss"] < first


def test_a_perfect_student_has_no_error(tmp_path):
    """The shell itself as student: its blocks are given the patches and add what they did."""
    vit = timm.create_model("test_luna_vit", **SHELL).eval()

    class Student:
        memory, blocks = torch.zeros(1), vit.blocks
        learned_memory = staticmethod(lambda: torch.zeros(1, 0, 24))

    theirs = attention_residuals(vit, torch.rand(2, 3, 32, 32))
    torch.testing.assert_close(teacher_forced_errors(Student, theirs, (4, 4)), torch.zeros(3), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("test_resnet", {}, "is no plain ViT"),
        ("test_vit", VIT | {"qk_norm": True}, "attn.q_norm"),
        ("test_vit", VIT | {"pre_norm": True}, "norm_pre"),
        ("test_vit", VIT | {"scale_attn_norm": True, "scale_mlp_norm": True}, "lacks: blocks.0.attn.norm, .*mlp.norm"),
        ("test_vit", VIT | {"norm_layer": "rmsnorm"}, r"norm1 \(RmsNorm\), blocks.0.norm2 \(RmsNorm\), norm \(RmsNorm"),
        ("test_vit", VIT | {"embed_norm_layer": "layernorm"}, "patch_embed.norm"),
        ("test_vit", VIT | {"act_layer": "mish"}, "the activation Mish"),
        ("test_vit", VIT | {"attn_layer": "diff"}, "conversion knows pre-norm ones of plain attention"),
        ("test_vit", VIT | {"block_fn": ResPostBlock}, "conversion knows pre-norm ones"),
        ("test_vit", VIT | {"mlp_layer": SwiGLU}, "a plain MLP"),
        ("test_luna_vit", SHELL | {"norm_first": False}, "conversion knows pre-norm ones"),
        ("test_luna_vit", {}, "is no plain ViT"),
    ],
)
def test_other_models_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        luna_arguments(timm.create_model(name, **arguments))


@pytest.mark.parametrize("name, arguments", [("test_vit", VIT), ("test_luna_vit", SHELL | {"mlp": "gelu"})])
@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "quick_gelu", "relu"])
def test_the_activation_and_a_missing_final_norm_are_carried_over(name, arguments, act):
    vit = timm.create_model(name, **arguments, act_layer=act, final_norm=False)
    model = timm.create_model("test_luna_vit", **luna_arguments(vit))
    load_vit(model, vit)
    assert type(model.blocks[0].mlp.act) is type(vit.blocks[0].mlp.act)
    assert isinstance(model.norm, torch.nn.Identity)


def test_weights_without_a_place_are_not_dropped_in_silence():
    vit = timm.create_model("test_vit", **VIT)
    model = timm.create_model("test_luna_vit", **luna_arguments(vit))
    vit.blocks[1].extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="weights that a Luna ViT lacks: blocks.1.extra.weight, blocks.1.extra.bias"):
        load_vit(model, vit)


def test_another_width_or_depth_is_refused(tmp_path):
    task = convert(tmp_path, KINDS["plain"])
    with pytest.raises(ValueError, match="width"):
        narrow = dict(task.hparams.model_kwargs, embed_dim=16)
        ConversionTask(**{**task.hparams, "model_kwargs": narrow})
    with pytest.raises(ValueError, match="depth"):
        ConversionTask(**{**task.hparams, "model_kwargs": dict(task.hparams.model_kwargs, depth=2)}).check_data(
            Photos(), "fit"
        )
