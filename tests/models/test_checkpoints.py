"""Weights in and out: no pretrained ones yet, checkpoints of one's own, and initialisation from a plain ViT."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

from luna_vision import init_from_vit
from luna_vision.models.luna_vit import checkpoint_filter_fn


@pytest.fixture
def trained():
    torch.manual_seed(3)
    return timm.create_model("test_luna_vit", num_classes=5).eval()


@pytest.fixture
def trained_on_patches():
    torch.manual_seed(3)
    return timm.create_model("test_luna_vit", num_classes=5, global_pool="avg").eval()


X = torch.randn(1, 3, 40, 72, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["luna_vit_small", "luna_vit_small.untrained"])
def test_pretrained_says_that_there_are_no_weights_and_what_to_do(name):
    with pytest.raises(RuntimeError) as error:
        timm.create_model(name, pretrained=True)
    for part in ("no pretrained weights for luna_vit_small", "configs/", "checkpoint_path=", "local-dir:"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_checkpoint_path(trained, tmp_path, suffix):
    path = tmp_path / f"w.{suffix}"
    save_file(trained.state_dict(), path) if suffix == "safetensors" else torch.save(trained.state_dict(), path)
    model = timm.create_model("test_luna_vit", num_classes=5, checkpoint_path=path).eval()
    torch.testing.assert_close(model(X), trained(X))


def test_local_dir_round_trip(trained, tmp_path):
    save_for_hf(trained, tmp_path, safe_serialization=True)
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == "test_luna_vit"
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(model(X), trained(X))


@pytest.mark.parametrize("wrapped", [False, True])
def test_overlay_file_goes_through_the_filter(trained, tmp_path, wrapped):
    """A Lightning checkpoint's names, another patch size, and another number of classes."""
    state = trained.state_dict()
    torch.save({"state_dict": {f"model.{k}": v for k, v in state.items()}} if wrapped else state, tmp_path / "w.ckpt")
    overlay = dict(file=str(tmp_path / "w.ckpt"), num_classes=5)
    model = timm.create_model("test_luna_vit", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5).eval()
    torch.testing.assert_close(model(X), trained(X))
    model = timm.create_model(
        "test_luna_vit", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=9, patch_size=8
    ).eval()
    assert model(X).shape == (1, 9)
    torch.testing.assert_close(model.blocks[2].mlp.fc1.weight, trained.blocks[2].mlp.fc1.weight)


def test_head_that_reads_the_memory_takes_a_checkpoint_of_one_that_reads_patches(trained_on_patches, tmp_path, caplog):
    torch.save(trained_on_patches.state_dict(), tmp_path / "w.pth")
    overlay = dict(file=str(tmp_path / "w.pth"), num_classes=5)
    kwargs = dict(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, global_pool="token")
    model = timm.create_model("test_luna_vit", **kwargs).eval()
    assert "no final pack: it keeps its initial values" in caplog.text
    torch.testing.assert_close(model.head.weight, trained_on_patches.head.weight)


def vit(**kwargs):
    torch.manual_seed(5)
    return timm.create_model(
        "vit_tiny_patch16_224", embed_dim=64, depth=4, num_heads=2, mlp_ratio=3, num_classes=5, **kwargs
    )


def luna(**kwargs):
    return timm.create_model("test_luna_vit", **({"mlp": "gelu", "local_mixing": "before"} | kwargs))


@pytest.mark.parametrize("tie_kv", [True, False])
def test_init_from_vit_loads_what_has_a_counterpart(tie_kv, capsys):
    source, model = vit(), luna(num_classes=5, tie_kv=tie_kv)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = init_from_vit(model, source.state_dict())
    own, theirs = model.state_dict(), source.state_dict()
    for name in (
        "patch_embed.proj.weight",
        "blocks.2.mlp.fc1.weight",
        "blocks.3.norm2.bias",
        "norm.weight",
        "head.bias",
    ):
        assert torch.equal(own[name], theirs[name]), name
    q, k, v = theirs["blocks.1.attn.qkv.weight"].chunk(3)
    want = {"pack_kv": v, "unpack_q": q} if tie_kv else {"pack_q": q, "pack_k": k, "pack_v": v, "unpack_q": q}
    for name, value in want.items():
        assert torch.equal(own[f"blocks.1.attn.{name}.weight"], value), name
    assert torch.equal(own["blocks.1.attn.proj.weight"], theirs["blocks.1.attn.proj.weight"])
    assert set(result.loaded) | set(result.new) == set(own) and not set(result.loaded) & set(result.new)
    assert all(torch.equal(own[n], before[n]) for n in result.new)
    assert "memory" in result.new and {"cls_token", "pos_embed"} <= set(result.unused)
    printed = capsys.readouterr().out
    assert "left new" in printed and "blocks.*.local.conv.weight" in printed


def test_init_from_vit_takes_files_other_patch_sizes_and_other_heads(tmp_path):
    save_file(vit().state_dict(), tmp_path / "vit.safetensors")
    model = luna(num_classes=9, patch_size=8)
    result = init_from_vit(model, tmp_path / "vit.safetensors", verbose=False)
    assert "patch_embed.proj.weight" in result.loaded and "head.weight" in result.new


def test_init_from_vit_adapts_channels_and_unwraps_dicts():
    source = vit().state_dict()
    model = luna(num_classes=5, in_chans=1)
    init_from_vit(model, {"model": source}, verbose=False)
    want = source["patch_embed.proj.weight"].sum(dim=1, keepdim=True)
    torch.testing.assert_close(model.patch_embed.proj.weight.data, want)


def test_init_from_vit_takes_a_lightning_checkpoint_and_refuses_other_files(tmp_path):
    source = vit().state_dict()
    torch.save({"state_dict": {f"model.{k}": v for k, v in source.items()}}, tmp_path / "vit.ckpt")
    model = luna(num_classes=5)
    init_from_vit(model, tmp_path / "vit.ckpt", verbose=False)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, source["blocks.1.mlp.fc1.weight"])
    (tmp_path / "junk.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="junk.pth' is not a checkpoint"):
        init_from_vit(model, tmp_path / "junk.pth")
    with pytest.raises(ValueError, match="model must be a Luna ViT, got FeatureGetterNet"):
        init_from_vit(luna(features_only=True), source)


@pytest.mark.parametrize("mixer", ["softmax", "identity"])
def test_init_from_vit_refuses_a_mixer_without_memory(mixer):
    with pytest.raises(ValueError, match="this model's mixer has none"):
        init_from_vit(luna(mixer=mixer, global_pool="avg"), vit().state_dict())


def test_init_from_vit_says_what_does_not_fit():
    model = luna(mlp_ratio=4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"mlp.fc1.weight has shape \[192, 64\] where .* has \[256, 64\]"):
        init_from_vit(model, vit().state_dict())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # nothing half-written
    with pytest.raises(ValueError, match=r"mlp.fc1.* a ViT's MLP needs a model with mlp='gelu'"):
        init_from_vit(luna(mlp="swiglu"), vit().state_dict())
    with pytest.raises(ValueError, match="source must be a timm model name, a file or a state dict, got VisionTransf"):
        init_from_vit(model, vit())
    with pytest.raises(ValueError, match="the ViT has width 192 and depth 12, the model 64 and 4"):
        init_from_vit(model, timm.create_model("vit_tiny_patch16_224").state_dict())
    with pytest.raises(ValueError, match="source is not a plain ViT"):
        init_from_vit(model, timm.create_model("resnet18").state_dict())
    with pytest.raises(ValueError, match="neither a file nor the name of a timm model"):
        init_from_vit(model, "vit_tinny")


def test_init_from_vit_takes_a_model_name(monkeypatch):
    """The name is handed to timm with pretrained=True; the hub is replaced, since tests run without a network."""
    calls, source = [], vit()

    def create_model(name, pretrained=False, **kwargs):
        calls.append((name, pretrained))
        return source

    model = luna()
    monkeypatch.setattr(timm, "create_model", create_model)
    init_from_vit(model, "vit_tiny_patch16_224.augreg_in21k", verbose=False)
    assert calls == [("vit_tiny_patch16_224.augreg_in21k", True)]


def test_filter_drops_only_what_the_last_block_may_be_without(trained):
    state = trained.state_dict() | {"blocks.3.typo.weight": torch.zeros(1)}
    model = timm.create_model("test_luna_vit", num_classes=5, global_pool="token")
    assert set(checkpoint_filter_fn(state, model)) - set(model.state_dict()) == {"blocks.3.typo.weight"}


def reload(model, folder):
    """What timm builds from what it saved."""
    save_for_hf(model, folder, safe_serialization=True)
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@pytest.mark.parametrize("kwargs", [{}, {"norm_first": False, "memory_mlp": "own", "init_values": 0.1}])
@pytest.mark.parametrize("before, after", [("token", ""), ("avg", "token"), ("both", "avg"), ("map", "both")])
def test_round_trip_after_another_pooling_was_chosen(before, after, kwargs, tmp_path):
    """The last block keeps the parts that it was built with, and they are what is built again."""
    model = timm.create_model("test_luna_vit", global_pool=before, **kwargs).eval()
    model.reset_classifier(7, after)
    loaded = reload(model, tmp_path)
    assert loaded.global_pool == after
    assert torch.equal(loaded(X), model(X))
    assert torch.equal(loaded.encode(X)[1], model.encode(X)[1])


@pytest.mark.parametrize("global_pool", ["token", "avg"])
@pytest.mark.parametrize("prune_norm, prune_head", [(True, True), (False, False)])
def test_round_trip_after_pruning(global_pool, prune_norm, prune_head, tmp_path):
    model = timm.create_model("test_luna_vit", num_classes=5, global_pool=global_pool).eval()
    model.prune_intermediate_layers([1], prune_norm=prune_norm, prune_head=prune_head)
    loaded = reload(model, tmp_path)
    assert len(loaded.blocks) == 2
    assert torch.equal(loaded(X), model(X))


def test_the_filter_leaves_what_does_not_fit_to_strict_loading(trained):
    """A stem of another kind, and a final pack of which a part is missing."""
    conv = timm.create_model("test_luna_vit", num_classes=5, stem="conv")
    with pytest.raises(RuntimeError, match="patch_embed.stem"):
        conv.load_state_dict(checkpoint_filter_fn(trained.state_dict(), conv))
    state = trained.state_dict()
    del state["final_pack.attn.pack_q.weight"]
    with pytest.raises(RuntimeError, match="final_pack.attn.pack_q.weight"):
        trained.load_state_dict(checkpoint_filter_fn(state, trained))


@pytest.mark.parametrize("built", [False, True])
def test_round_trip_after_the_pack_by_row_was_changed(built, tmp_path):
    model = timm.create_model("test_luna_vit", num_classes=5, pack_by_row=built).eval()
    before = model(X)
    model.set_pack_by_row(not built)
    assert torch.equal(reload(model, tmp_path)(X), model(X)) and not torch.equal(model(X), before)


def test_the_last_block_can_be_chosen_apart_from_the_pooling():
    model = timm.create_model("test_luna_vit", global_pool="", last_block="final_pack", num_classes=0)
    assert model.final_pack.mlp is None
    model = timm.create_model("test_luna_vit", global_pool="avg", last_block="both", memory_mlp="own")
    assert model.blocks[-1].mlp_memory is not None
    with pytest.raises(ValueError, match="last_block must be one of 'auto', 'final_pack', 'patches', .*, got 'none'"):
        timm.create_model("test_luna_vit", last_block="none")
    with pytest.raises(ValueError, match="last_block='both' has its memory read, and this model's mixer has none"):
        timm.create_model("test_luna_vit", mixer="softmax", last_block="both")
