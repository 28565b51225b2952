"""timm's own tests for a model (tests/test_models.py of timm 1.0.31).

Our names are treated as timm treats its ViTs: as non-standard models in the cfg tests (features are tokens, not a map)
and as models with `forward_intermediates`. Nothing else is excluded. The names differ in patch, width and depth alone,
but for the paper's block: the cfg test takes every name, without numbers, and the others one of each kind, in small.
"""

import math

import pytest
import timm
import torch
from timm import create_model, set_scriptable
from timm.layers import get_channel_dim, get_spatial_dim
from timm.models import get_notrace_functions, get_notrace_modules
from torchvision.models.feature_extraction import NodePathTracer, create_feature_extractor, get_graph_node_names

import luna_vision  # noqa: F401  registers the models

TAGGED = timm.list_models(module="luna_vit", include_tags=True)
SMALL = {"embed_dim": 64, "depth": 3, "num_heads": 2}
MODELS = {"test_luna_vit": {}, "luna_vit_nano_patch8": SMALL, "luna_vit_small_paper": SMALL}
SIZE = (3, 96, 96)


def create(name: str, **arguments):
    return create_model(name, **MODELS[name], **arguments)


def test_the_names_are_registered():
    assert set(timm.list_models(module="luna_vit")) == {
        "luna_vit_tiny",
        "luna_vit_small",
        "luna_vit_base",
        "luna_vit_large",
        "luna_vit_nano_patch8",
        "luna_vit_tiny_patch8",
        "luna_vit_small_patch8",
        "luna_vit_base_patch8",
        "luna_vit_small_paper",
        "test_luna_vit",
    }


@pytest.mark.parametrize("name", MODELS)
def test_forward(name):
    model = create(name).eval()
    x = torch.randn(1, *SIZE)
    y = model(x)
    assert y.shape[0] == 1
    assert not torch.isnan(y).any()
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)


def check_gradients(model, y):
    y.mean().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert not without, f"no gradient for {without}"
    assert y.shape[-1] == 42
    assert not torch.isnan(y).any()


@pytest.mark.parametrize("name", MODELS)
def test_backward(name):
    model = create(name, num_classes=42).train()
    check_gradients(model, model(torch.randn(2, *SIZE)))


@pytest.mark.parametrize("name", TAGGED)
def test_default_cfgs_non_std(name):
    model = create_model(name, device="meta").eval()
    assert model.num_classes >= 0 and model.num_features > 0 and model.head_hidden_size > 0
    state_dict, cfg = model.state_dict(), model.default_cfg
    x = torch.randn(1, *cfg["input_size"], device="meta")

    features = model.forward_features(x)
    pre_logits = model.forward_head(features, pre_logits=True)
    assert features.shape[-1] == model.num_features
    assert pre_logits.shape[1] == model.head_hidden_size

    model.reset_classifier(0)
    assert model.num_classes == 0
    y = model(x)
    assert y.shape[-1] == model.head_hidden_size and y.shape == pre_logits.shape

    assert create_model(name, num_classes=0, device="meta").eval()(x).shape[-1] == model.num_features
    assert cfg["classifier"] + ".weight" in state_dict
    assert cfg["first_conv"] + ".weight" in state_dict


@pytest.mark.parametrize("name", MODELS)
def test_forward_torchscript(name):
    with set_scriptable(True):
        model = create(name).eval()
    x = torch.randn(1, *SIZE)
    y = torch.jit.script(model)(x)
    torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)


def check_maps(outputs, channels, reductions, size):
    assert len(channels) == len(outputs)
    for c, r, o in zip(channels, reductions, outputs, strict=True):
        assert o.shape[get_channel_dim("NCHW")] == c
        for axis, side in zip(get_spatial_dim("NCHW"), size[-2:], strict=True):
            assert o.shape[axis] <= math.ceil(side / r) + 1
        assert o.shape[0] == 1
        assert not torch.isnan(o).any()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("feature_cls", [None, "getter"])
def test_features_only(name, feature_cls):
    kwargs = {} if feature_cls is None else {"feature_cls": feature_cls}
    model = create(name, features_only=True, **kwargs).eval()
    channels, reductions = model.feature_info.channels(), model.feature_info.reduction()
    assert len(channels) >= 3
    check_maps(model(torch.randn(1, *SIZE)), channels, reductions, SIZE)


@pytest.mark.parametrize("name", MODELS)
def test_forward_intermediates(name):
    model = create(name).eval()
    info = timm.models.FeatureInfo(model.feature_info, len(model.feature_info))
    assert len(info.channels()) >= 3
    x = torch.randn(1, *SIZE)
    features, intermediates = model.forward_intermediates(x, output_fmt="NCHW")
    check_maps(intermediates, info.channels(), info.reduction(), SIZE)
    torch.testing.assert_close(features, model.forward_features(x))
    model.set_grad_checkpointing()
    torch.testing.assert_close(model.forward_intermediates(x)[0], features, rtol=1e-4, atol=1e-5)


def create_fx_model(model, train: bool = False):
    tracer_kwargs = dict(
        leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions(), param_shapes_constant=True
    )
    train_nodes, eval_nodes = get_graph_node_names(model, tracer_kwargs=tracer_kwargs)
    train_return, eval_return = [train_nodes[-1]], [eval_nodes[-1]]
    if train:
        nodes = list(reversed(NodePathTracer(**tracer_kwargs).trace(model).nodes))
        names = [n.name for n in nodes]
        train_return = [train_nodes[-names.index(n.name)] for n in nodes[0]._input_nodes]
    return create_feature_extractor(
        model, train_return_nodes=train_return, eval_return_nodes=eval_return, tracer_kwargs=tracer_kwargs
    )


@pytest.mark.parametrize("name", MODELS)
def test_forward_fx(name):
    model = create(name).eval()
    x = torch.randn(1, *SIZE)
    with torch.inference_mode():
        y = model(x)
        (fx_y,) = create_fx_model(model)(x).values()
    assert torch.equal(fx_y, y)


@pytest.mark.parametrize("name", MODELS)
def test_backward_fx(name):
    model = create_fx_model(create(name, num_classes=42).train(), train=True)
    (y,) = model(torch.randn(2, *SIZE)).values()
    check_gradients(model, y)


@pytest.mark.parametrize("name", MODELS)
def test_forward_fx_torchscript(name):
    with set_scriptable(True):
        model = create(name).eval()
    x = torch.randn(1, *SIZE)
    with torch.inference_mode():
        (y,) = torch.jit.script(create_fx_model(model))(x).values()
    assert y.shape[0] == 1 and not torch.isnan(y).any()
