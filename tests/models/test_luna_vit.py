"""What users rely on in the backbone, beyond timm's own tests."""

import itertools

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torchvision.ops import FeaturePyramidNetwork

from luna_vision import LunaVit
from luna_vision.layers import LOCAL_MIXING, MEMORY_MLP
from luna_vision.mixers import MIXERS
from luna_vision.models.checkpoints import checkpoint_filter_fn

POOLS = ["avg", "max", "avgmax", "map", "token", "both"]


def tiny(**kwargs) -> LunaVit:
    """A model with weights that are all at work: local mixing starts near zero."""
    torch.manual_seed(0)
    model = timm.create_model("test_luna_vit", **{"num_classes": 5, **kwargs}).double().eval()
    for name, p in model.named_parameters():
        if "local" in name:
            torch.nn.init.normal_(p, std=0.2)
    return model


def image(*shape) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize("size", [(1, 1), (5, 40), (16, 16), (17, 33), (160, 96), (100, 250)])
def test_any_size_runs_and_is_padded_with_zeros_to_whole_patches(size):
    model = tiny()
    x = image(1, 3, *size)
    rows, columns = (-(-s // 16) for s in size)
    features = model.forward_features(x)
    assert features.shape == (1, 8 + rows * columns, 64)
    assert model.patch_embed.dynamic_feat_size(size) == (rows, columns)  # timm's, for tools that ask beforehand
    padded = torch.nn.functional.pad(x, (0, columns * 16 - size[1], 0, rows * 16 - size[0]))
    close(model.forward_features(padded), features)
    assert model(x).shape == (1, 5)


@pytest.mark.parametrize(
    "kwargs",
    [{"pack_by_row": True}, {"global_pool": "map", "stem": "conv"}, {"memory_len": 17, "attn_drop_rate": 0.1}]
    + [{"pack_form": form, "unpack_form": form} for form in ("projected", "absorbed")],
    ids=str,
)
def test_a_batch_without_images_gives_none(kwargs):
    model, x = tiny(**kwargs), image(0, 3, 33, 80)
    assert model(x).shape == model.train()(x, torch.ones(0, 15, dtype=torch.bool)).shape == (0, 5)


@pytest.mark.parametrize("pos_embed", ["fourier", "learn", "none"])
def test_state_dict_does_not_depend_on_the_image_size(pos_embed):
    small, large = (tiny(img_size=s, pos_embed=pos_embed) for s in (32, (512, 320)))
    assert {k: v.shape for k, v in small.state_dict().items()} == {k: v.shape for k, v in large.state_dict().items()}
    large.load_state_dict(small.state_dict())
    close(large(image(2, 3, 80, 48)), small(image(2, 3, 80, 48)))


VARIANTS = [
    *({"pos_embed": p} for p in ("fourier", "learn", "none")),
    *({"global_pool": p} for p in POOLS),
    *({"local_mixing": m} for m in LOCAL_MIXING),
    *({"memory_mlp": m} for m in MEMORY_MLP),
    {"stem": "conv"},
    {"mlp": "swiglu", "local_mixing": "mlp"},
    {"stem": "conv", "local_mixing": "mlp", "memory_mlp": "shared", "global_pool": "both", "pack_heads": 1},
]


@pytest.mark.parametrize("variant", [*VARIANTS, {"norm_first": False, **VARIANTS[-1]}], ids=str)
def test_batch_of_sizes_equals_each_image_alone(variant):
    model = tiny(**{"depth": 2, **variant})
    sizes = [(48, 80), (64, 33), (5, 96)]
    batch = image(3, 3, 64, 96) * 100  # what lies outside an image must not matter
    valid = torch.zeros(3, 4, 6, dtype=torch.bool)
    alone = []
    for i, (h, w) in enumerate(sizes):
        x = image(1, 3, h, w)
        rows, columns = -(-h // 16), -(-w // 16)
        batch[i, :, : rows * 16, : columns * 16] = 0
        batch[i, :, :h, :w] = x[0]
        valid[i, :rows, :columns] = True
        alone.append(x)
    features = model.forward_features(batch, valid.flatten(1))
    logits = model(batch, valid.flatten(1))
    for i, x in enumerate(alone):
        want = model.forward_features(x)[0]
        close(features[i, :8], want[:8])
        close(features[i, 8:][valid[i].flatten()], want[8:])
        close(logits[i], model(x)[0])


@pytest.mark.parametrize("form", ["projected", "absorbed"])
def test_padding_may_hold_anything(form):
    """Also what is not a number, as uninitialised padding does; values and gradients."""
    model = tiny(pack_form=form, unpack_form=form)
    x = image(2, 3, 64, 48)
    valid = torch.ones(2, 4, 3, dtype=torch.bool)
    valid[1, 2:] = False
    results = []
    for fill in (0.0, float("nan"), float("inf")):
        x[1, :, 32:] = fill
        model.zero_grad()
        y = model(x, valid.flatten(1))
        y.square().sum().backward()
        results.append([y, *(p.grad.clone() for p in model.parameters())])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            close(a, b)


@torch.no_grad()
def test_positions_of_a_float64_model_have_its_precision():
    """Devices round float32 coordinates differently."""
    embed = tiny().double().pos_embed
    k = torch.arange(8, dtype=torch.float64)
    frequencies = torch.pi * 2 ** (4 * k / (len(k) - 1) - 1)

    def axis(length, linear):
        angles = ((torch.arange(length, dtype=torch.float64) + 0.5) / length * 2 - 1)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1) @ linear.weight.T

    want = axis(7, embed.rows)[:, None] + axis(3, embed.columns)
    for valid in (None, torch.ones(1, 21, dtype=torch.bool)):
        found = embed(torch.zeros(1, 7, 3, want.shape[2], dtype=torch.float64), valid)[0]
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


def test_positions_are_relative_to_the_image():
    """The corners of any two grids have nearly the same position, and the order of rows and columns counts."""
    model = tiny()
    pos = [model.pos_embed(torch.zeros(1, h, w, 64, dtype=torch.float64))[0] for h, w in ((40, 40), (40, 60))]
    assert (pos[0][0, 0] - pos[1][0, 0]).norm() < 0.1 * (pos[0][0, 0] - pos[0][0, -1]).norm()
    assert not torch.allclose(pos[0], pos[0].transpose(0, 1))


def test_set_input_size_and_patch_size():
    model = tiny()
    x = image(1, 3, 64, 64)
    want = model(x)
    model.set_input_size((320, 96))
    close(model(x), want)
    model.set_input_size(patch_size=8)
    assert model.forward_features(x).shape == (1, 8 + 64, 64)
    assert model.feature_info[0]["reduction"] == 8


# ---------------------------------------------------------------- memory


def test_memory_goes_in_and_comes_out():
    model = tiny()
    x = image(2, 3, 64, 48)
    patches, memory = model.encode(x)
    assert patches.shape == (2, 12, 64) and memory.shape == (2, 8, 64)
    close(model.forward_features(x), model.norm(torch.cat([memory, patches], dim=1)))
    assert model.num_prefix_tokens == model.memory_len == 8
    # the learned initial memory, handed in, changes nothing; another one does
    close(model(x, memory=model.memory.expand(2, -1, -1)), model(x))
    carried = model(x, memory=memory)
    assert not torch.allclose(carried, model(x))
    close(model.forward_head(model.forward_features(x, memory=memory)), carried)
    with pytest.raises(ValueError, match=r"memory must have shape \[2, 8, 64\], got \[2, 7, 64\]"):
        model(x, memory=memory[:, :7])


def test_memory_len_is_an_argument():
    assert tiny(memory_len=3).forward_features(image(1, 3, 32, 32)).shape == (1, 3 + 4, 64)


def test_attention_maps_lie_over_the_image():
    model = tiny(pack_heads=1)
    x = image(2, 3, 64, 48)
    maps = model.get_attention_maps(x, indices=[0, 3])
    assert len(maps) == 2
    assert maps[0].pack.shape == (2, 1, 8, 4, 3) and maps[0].unpack.shape == (2, 2, 8, 4, 3)
    close(maps[1].pack.sum(dim=(-2, -1)), torch.ones(2, 1, 8, dtype=torch.float64))
    close(maps[1].unpack.sum(dim=2), torch.ones(2, 2, 4, 3, dtype=torch.float64))
    # they belong to the block that they are said to belong to
    seen = []
    hook = model.blocks[3].register_forward_pre_hook(lambda module, args: seen.append(args))
    model(x)
    hook.remove()
    pack, _ = model.blocks[3].attention_maps(*seen[0])
    close(maps[1].pack.flatten(-2), pack)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[:, 9:] = False
    assert (model.get_attention_maps(x, patch_valid=valid)[0].pack[..., 3, :] == 0).all()


# ---------------------------------------------------------------- heads and pooling


@pytest.mark.parametrize("pool", POOLS)
def test_pooling(pool):
    model = tiny(global_pool=pool)
    x = image(2, 3, 48, 64)
    tokens = model.forward_features(x)
    slots, patches = tokens[:, :8], tokens[:, 8:]
    want = {
        "avg": patches.mean(1),
        "max": patches.amax(1),
        "avgmax": 0.5 * (patches.mean(1) + patches.amax(1)),
        "token": slots.mean(1),
        "both": 0.5 * (patches.mean(1) + slots.mean(1)),
    }
    embedding = model.forward_head(tokens, pre_logits=True)
    if pool != "map":
        close(embedding, want[pool])
    assert embedding.shape == (2, 64)
    close(model.head(embedding), model(x))


@pytest.mark.parametrize("norm_first, memory_mlp", [(True, "none"), (True, "shared"), (False, "own")])
@pytest.mark.parametrize("pool", [*POOLS, ""])
def test_every_parameter_gets_a_gradient_whatever_the_head_reads(pool, norm_first, memory_mlp):
    model = tiny(global_pool=pool, norm_first=norm_first, memory_mlp=memory_mlp, init_values=0.1, depth=3).train()
    model(image(2, 3, 48, 64)).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("pool, local_mixing", itertools.product(["avg", "token"], ["attn", "mlp"]))
@pytest.mark.parametrize("mixer", ["luna", "identity"])
def test_every_parameter_gets_a_gradient_wherever_local_mixing_stands(pool, local_mixing, mixer):
    pool = pool if mixer == "luna" else "avg"
    model = tiny(global_pool=pool, local_mixing=local_mixing, mixer=mixer, stem="conv", depth=2).train()
    torch.jit.script(model)
    model(image(2, 3, 48, 64)).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("pool", ["avg", "token", "both"])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"memory_mlp": "shared"},
        {"mlp": "swiglu", "local_mixing": "mlp", "memory_mlp": "own"},
    ],
    ids=str,
)
def test_every_parameter_gets_a_gradient_with_all_that_a_block_may_have(options, norm_first, pool):
    model = tiny(global_pool=pool, norm_first=norm_first, init_values=0.1, depth=2, **options).train()
    torch.jit.script(model)
    model(image(2, 3, 48, 64)).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    features = timm.create_model("test_luna_vit", features_only=True, global_pool=pool, **options)
    sum(f.square().sum() for f in features(torch.randn(1, 3, 48, 64))).backward()
    assert [n for n, p in features.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("patch_size", [12, (16, 8), 1])
def test_conv_stem_says_which_patches_it_can_make(patch_size):
    with pytest.raises(ValueError, match="a conv stem needs a square patch of 2, 4, 8, ... pixels"):
        tiny(stem="conv", patch_size=patch_size)


@pytest.mark.parametrize("name", ["local_mixing", "memory_mlp", "stem", "pos_embed", "global_pool"])
def test_unknown_option_lists_the_options(name):
    with pytest.raises(ValueError, match=f"{name} must be one of '.*', '.*', got 'nowhere'"):
        tiny(**{name: "nowhere"})


@pytest.mark.parametrize("pool, norm_first", itertools.product(["avg", "token"], [True, False]))
def test_features_only_leaves_no_trainable_parameter_without_gradient(pool, norm_first):
    kwargs = dict(global_pool=pool, norm_first=norm_first, memory_mlp="own", init_values=0.1)
    model = timm.create_model("test_luna_vit", features_only=True, out_indices=(1, 3), **kwargs)
    sum(f.square().sum() for f in model(torch.randn(1, 3, 48, 64))).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("pool", ["token", "both"])
def test_final_pack_reads_the_finished_patches(pool):
    model = tiny(global_pool=pool)
    x, memory = model.encode(image(2, 3, 48, 40))
    ends = dict(last_block="both", global_pool="avg")
    other = tiny(**ends)
    other.load_state_dict(checkpoint_filter_fn(model.state_dict(), other))
    patches, before = other.encode(image(2, 3, 48, 40))
    torch.testing.assert_close(x, patches, rtol=0, atol=0)
    expected = before + model.final_pack.attn.pack(
        model.final_pack.norm1(patches), model.final_pack.norm1_memory(before)
    )
    torch.testing.assert_close(memory, expected)
    model(image(2, 3, 48, 40)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_reset_classifier():
    model = tiny()
    model.reset_classifier(7, "max")
    assert model(image(1, 3, 32, 32)).shape == (1, 7) and model.get_classifier() is model.head
    assert model.head.weight.dtype == torch.float64
    model.reset_classifier(0, "")
    assert model(image(1, 3, 32, 32)).shape == (1, 8 + 4, 64)
    assert timm.create_model("test_luna_vit", num_classes=0)(torch.randn(2, 3, 64, 64)).shape == (2, 64)


@pytest.mark.parametrize(
    "mixer, pool_type, message",
    [
        ("luna", "foo", "pool_type must be one of .*, got 'foo'"),
        ("luna", "map", "pool_type='map' has weights of its own"),
        ("softmax", "token", "pool_type='token' reads the memory"),
        ("softmax", "both", "pool_type='both' reads the memory"),
    ],
)
def test_a_pooling_that_the_model_lacks_is_refused(mixer, pool_type, message):
    model = tiny(mixer=mixer)
    with pytest.raises(ValueError, match=message):
        model.pool(model.forward_features(image(1, 3, 32, 32)), pool_type)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"global_pool": "cls"}, "global_pool must be one of '', 'avg', .*'both', got 'cls'"),
        ({"pos_embed": "rope"}, "pos_embed must be one of 'fourier', 'learn', 'none', got 'rope'"),
        ({"memory_len": 0}, "memory_len must be at least 1, got 0"),
        ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
        ({"in_chans": 0}, "in_chans must be at least 1, got 0"),
        ({"num_classes": -1}, "num_classes must be at least 0, got -1"),
        ({"num_heads": 5}, r"dim \(64\) must be a multiple of num_heads \(5\)"),
        ({"mlp_ratio": 0}, "mlp_ratio must be above 0, got 0"),
        ({"drop_path_rate": 2.0}, r"drop_path_rate must be in \[0, 1\), got 2.0"),
        ({"patch_drop_rate": 1.5}, r"patch_drop_rate must be in \[0, 1\), got 1.5"),
    ],
)
def test_wrong_arguments_are_said(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny(**kwargs)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((2, 1, 32, 32), r"images must have shape \(batch, 3, height, width\), got \[2, 1, 32, 32\]"),
        ((3, 32, 32), r"images must have shape \(batch, 3, height, width\), got \[3, 32, 32\]"),
        ((1, 3, 0, 32), "images must have at least one pixel a side, got 0 x 32"),
    ],
)
def test_wrong_images_are_said(shape, message):
    with pytest.raises(ValueError, match=message):
        tiny()(image(*shape))


def test_wrong_patch_valid_is_said():
    for pos_embed, local_mixing in itertools.product(["fourier", "none"], ["before", "none"]):
        model = tiny(pos_embed=pos_embed, local_mixing=local_mixing)
        with pytest.raises(ValueError, match=r"patch_valid must have shape \(1, 4\), got \[1, 5\]"):
            model(image(1, 3, 32, 32), torch.ones(1, 5, dtype=torch.bool))


# ---------------------------------------------------------------- training


@pytest.mark.parametrize(
    "rate", ["drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"]
)
def test_drop_rates_act_in_training_only(rate):
    model, plain = tiny(**{rate: 0.5}), tiny()
    x = image(2, 3, 64, 64)
    close(model(x), plain(x))
    assert not torch.allclose(model.train()(x), plain(x))


def test_hidden_patches_hide_their_content():
    model = tiny(patch_drop_rate=0.5, local_mixing="none").train()
    x = image(1, 3, 64, 64)
    _, _, _, keep = model._embed(x, None, None)
    assert 0 < keep.sum() < 16
    valid = torch.zeros(1, 16, dtype=torch.bool)
    valid[0, 3] = True
    assert model._embed(x, valid, None)[3].tolist() == valid.tolist()  # the last valid patch stays


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for enable in (False, True):
        model = tiny().train()
        model.set_grad_checkpointing(enable)
        model(image(2, 3, 48, 64)).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        close(a, b)


def test_groups_for_layer_decay_and_weight_decay_know_the_memory():
    for pos_embed in ("fourier", "learn"):
        model = tiny(pos_embed=pos_embed)
        own = {n for n, _ in model.named_parameters()}
        no_decay = model.no_weight_decay() & own
        assert "memory" in no_decay and any(n.startswith("pos_embed") for n in no_decay)
        optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
        group = {id(p): g for g in optimizer.param_groups for p in g["params"]}
        named = {n: group[id(p)] for n, p in model.named_parameters()}
        assert named["memory"]["weight_decay"] == 0.0
        assert named["memory"]["lr_scale"] == named["patch_embed.proj.weight"]["lr_scale"] == 0.5**5
        assert named["blocks.0.attn.proj.weight"]["lr_scale"] == 0.5**4
        assert named["blocks.3.attn.proj.weight"]["lr_scale"] == 0.5
        assert named["norm.weight"]["lr_scale"] == 0.5 and named["head.weight"]["lr_scale"] == 1.0
        assert len(group) == len(own)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_near(dtype):
    model = tiny().float()
    x = image(2, 3, 80, 64).float()
    y = model.to(dtype)(x.to(dtype)).float()
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y, model.float()(x), rtol=0.05, atol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize("value", [0.0, 6e4, -6e4])
def test_half_precision_is_finite_at_the_end_of_its_range(value):
    x = torch.full((1, 3, 64, 48), value, dtype=torch.float16)
    assert torch.isfinite(timm.create_model("test_luna_vit").half().eval()(x)).all()


def test_device_and_dtype_are_factory_arguments():
    model = timm.create_model("test_luna_vit", device="meta", dtype=torch.bfloat16, init_values=0.1, memory_mlp="own")
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert timm.create_model("test_luna_vit", in_chans=5)(torch.randn(1, 5, 32, 32)).shape == (1, 1000)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"stem": "conv", "pos_embed": "learn", "init_values": 0.1, "memory_mlp": "own", "global_pool": "map"},
        {"norm_layer": "rmsnorm", "local_mixing": "mlp"},
        *({"mixer": mixer} for mixer in MIXERS),
    ],
    ids=str,
)
def test_a_model_from_the_meta_device_can_be_initialised(kwargs):
    model = timm.create_model("test_luna_vit", device="meta", **kwargs).to_empty(device="cpu")
    for value in model.state_dict().values():
        value.data.fill_(torch.nan if value.is_floating_point() else 7)
    model.init_weights()
    for name, value in timm.create_model("test_luna_vit", **kwargs).state_dict().items():
        got = model.state_dict()[name]
        assert got.isfinite().all(), name
        if value.float().std() == 0:
            assert torch.equal(got, value), name


# ---------------------------------------------------------------- features


def test_forward_intermediates_arguments():
    model = tiny()
    x = image(2, 3, 48, 64)
    features, maps = model.forward_intermediates(x)
    close(features, model.forward_features(x))
    assert [m.shape for m in maps] == [(2, 64, 3, 4)] * 4
    patches, memory = model.encode(x)
    close(maps[-1].flatten(2).transpose(1, 2), patches)
    pairs = model.forward_intermediates(
        x, indices=[1, 3], return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
    )
    assert len(pairs) == 2
    close(pairs[1][0], model.norm(patches))
    close(pairs[1][1], model.norm(memory))
    early = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    close(early[0], maps[1])
    out = model.forward_intermediates(x, indices=2, output_dict=True, return_prefix_tokens=True)
    assert set(out) == {"image_features", "image_intermediates", "image_intermediates_prefix"}
    close(out["image_intermediates"][0], maps[2])
    assert out["image_intermediates_prefix"][0].shape == (2, 8, 64)
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NLC', got 'NHWC'"):
        model.forward_intermediates(x, output_fmt="NHWC")


@pytest.mark.parametrize("block", [1, 3])
def test_a_block_that_is_asked_for_twice_is_returned_once(block):
    model, x = tiny(), image(1, 3, 32, 32)
    once, twice = (model.forward_intermediates(x, i, intermediates_only=True) for i in ([block], [block, block]))
    torch.testing.assert_close(twice, once, rtol=0, atol=0)


def test_features_only_equals_forward_intermediates_and_prunes():
    model = timm.create_model("test_luna_vit", features_only=True, out_indices=(0, 2)).eval()
    whole = timm.create_model("test_luna_vit").eval()
    whole.load_state_dict(model.model.state_dict(), strict=False)
    assert len(model.model.blocks) == 3
    x = torch.randn(1, 3, 50, 70)
    for a, b in zip(model(x), whole.forward_intermediates(x, indices=[0, 2], intermediates_only=True), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("last", [1, 3])
@pytest.mark.parametrize("kwargs", [{}, {"init_values": 1e-2}, {"memory_mlp": "own"}, {"norm_first": False}])
def test_pruning_changes_nothing_that_is_still_returned(kwargs, last):
    model = tiny(**kwargs)
    for name, p in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(p, 1.0, 0.3)
    x = image(1, 3, 48, 64)
    want = model.forward_intermediates(x, indices=[last], return_prefix_tokens=True, intermediates_only=True)
    assert model.prune_intermediate_layers([last]) == [last] and len(model.blocks) == last + 1
    got = model.forward_intermediates(x, indices=[last], return_prefix_tokens=True, intermediates_only=True)
    for a, b in zip(want[0], got[0], strict=True):
        close(a, b)


def test_features_drive_a_feature_pyramid():
    model = timm.create_model("luna_vit_tiny", features_only=True, out_indices=(3, 7, 11)).eval()
    fpn = FeaturePyramidNetwork(model.feature_info.channels(), 32)
    out = fpn({str(i): f for i, f in enumerate(model(torch.randn(1, 3, 100, 150)))})
    assert [v.shape for v in out.values()] == [(1, 32, 7, 10)] * 3
    assert model.feature_info.reduction() == [16, 16, 16]


def test_query_gain_is_applied_once_whatever_the_initialisation_is_called():
    """Slots that start sharp tell apart what they read; the paper's variant starts as the authors' code does."""
    model = timm.create_model("luna_vit_tiny", depth=2, embed_dim=64, num_heads=2)
    model.init_weights()  # again
    for block in model.blocks:
        for query, other in ((block.attn.pack_q, block.attn.pack_kv), (block.attn.unpack_q, block.attn.unpack_kv)):
            assert 7.0 < query.weight.std() / other.weight.std() < 9.0
    paper = timm.create_model("luna_vit_small_paper", depth=2, embed_dim=64, num_heads=2)
    attn = paper.blocks[0].attn
    assert 0.9 < attn.pack_q.weight.std() / attn.pack_kv.weight.std() < 1.1
    softmax = timm.create_model("test_luna_vit", mixer="softmax", mixer_args={"query_gain": 4.0})
    weight = softmax.blocks[0].attn.qkv.weight
    assert 3.5 < weight[:64].std() / weight[64:].std() < 4.5


def test_a_mistyped_argument_is_answered_with_the_nearest_name():
    with pytest.raises(ValueError, match="test_luna_vit has no argument 'memory_length'; did you mean memory_len?"):
        timm.create_model("test_luna_vit", memory_length=8)
    with pytest.raises(ValueError, match="no argument 'xyz'"):
        timm.create_model("test_luna_vit", xyz=8)
