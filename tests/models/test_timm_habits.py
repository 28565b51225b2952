"""What people do with timm's ViTs, done with these."""

import copy
import inspect
import pickle

import pytest
import timm
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.func import functional_call, grad, jvp, vmap

import luna_vision
from luna_vision.layers import LunaBlock


def make(**arguments) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_luna_vit", num_classes=5, **arguments).eval()


TAKEN = [
    {"dynamic_img_size": True},
    {"dynamic_img_size": True, "dynamic_img_pad": True},
    {"class_token": False},
    {"class_token": False, "reg_tokens": 0, "no_embed_class": True, "fc_norm": False},
    {"weight_init": "skip"},
    {"qk_norm": False, "fix_init": False, "embed_norm_layer": None},
]
REFUSED = [
    ({"class_token": True}, "global_pool='token'"),
    ({"reg_tokens": 4}, "memory_len"),
    ({"pool_include_prefix": True}, "global_pool='both'"),
    ({"qk_norm": True}, "query_gain"),
    ({"pre_norm": True}, "norm_first"),
    ({"fc_norm": True}, "final_norm"),
    ({"weight_init": "jax"}, "init_weights"),
    ({"fix_init": True}, "init_values"),
    ({"scale_mlp_norm": True}, "MLP"),
    ({"mlp_layer": timm.layers.SwiGLU}, "local_mixing"),
    ({"attn_layer": "diff"}, "mixer"),
]


@pytest.mark.parametrize("arguments", TAKEN, ids=str)
def test_arguments_that_say_what_holds_anyway_are_taken(arguments):
    x = torch.rand(1, 3, 50, 90)
    torch.testing.assert_close(make(**arguments)(x), make()(x))


@pytest.mark.parametrize("arguments, instead", REFUSED, ids=str)
@pytest.mark.parametrize("build", [make, luna_vision.LunaVit], ids=["create_model", "LunaVit"])
def test_other_arguments_are_refused_with_what_to_do_instead(build, arguments, instead):
    with pytest.raises(ValueError, match=instead):
        build(**arguments)


def test_the_class_itself_takes_the_same_arguments():
    assert luna_vision.LunaVit(embed_dim=64, depth=1, num_heads=2, class_token=False, dynamic_img_size=True)
    for name in ("class_tokens", "features_only", "of_vit"):
        with pytest.raises(ValueError, match=f"LunaVit has no argument '{name}'"):
            luna_vision.LunaVit(**{name: True})


def test_every_argument_of_timms_vit_is_known():
    """timm may add some: decide then what they mean here."""
    own = inspect.signature(luna_vision.LunaVit.__init__).parameters
    for name in inspect.signature(VisionTransformer.__init__).parameters:
        if name not in own:
            with pytest.raises(ValueError, match=f"does not take {name}="):
                make(**{name: object()})


@pytest.mark.parametrize(
    "n, options",
    [(1, {}), (3, {"reshape": True}), ([0, 2], {"norm": True}), ((1, 3), {"return_prefix_tokens": True})],
    ids=str,
)
def test_get_intermediate_layers_is_that_of_timm(n, options):
    model, vit = make(), timm.create_model("test_vit", img_size=96, depth=4)
    x = torch.rand(2, 3, 96, 96)
    got, like = model.get_intermediate_layers(x, n, **options), vit.get_intermediate_layers(x, n, **options)
    assert isinstance(got, type(like)) and len(got) == len(like)
    for a, b in zip(got, like, strict=True):
        if options.get("return_prefix_tokens"):
            assert a[1].shape == (2, model.num_prefix_tokens, model.embed_dim)
            a, b = a[0], b[0]
        assert a.shape == b.shape
    last = model.get_intermediate_layers(x, norm=True, return_prefix_tokens=True)[0]
    torch.testing.assert_close(torch.cat([last[1], last[0]], dim=1), model.forward_features(x))


# ---- Grad-CAM


def to_grid(tensor: Tensor, height: int = 6, width: int = 10) -> Tensor:
    """docs/adapters.md"""
    return tensor.unflatten(1, (height, width)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "method, pool",
    [
        *((method, "avg") for method in ("GradCAM", "GradCAMPlusPlus", "HiResCAM", "LayerCAM", "ScoreCAM")),
        *(("GradCAM", pool) for pool in ("token", "map")),
    ],
)
def test_grad_cam(method, pool):
    import pytorch_grad_cam as cams

    model, x = make(global_pool=pool), torch.rand(1, 3, 96, 160)
    with getattr(cams, method)(model, [model.blocks[-1].norm1], reshape_transform=to_grid) as cam:
        targets = [cams.utils.model_targets.ClassifierOutputTarget(i) for i in range(5)]
        heats = [cam(input_tensor=x, targets=[target]) for target in targets]
    assert all(heat.shape == (1, 96, 160) for heat in heats)
    assert max(heat.max() for heat in heats) > 0  # what speaks for a class; against some, everything does


def test_the_activations_and_gradients_of_grad_cam():
    """What Grad-CAM takes, by hand: the output of a norm and its gradient."""
    model, kept = make(), {}

    def keep(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        kept["activation"] = out
        out.register_hook(lambda gradient: kept.update(gradient=gradient))

    model.blocks[-1].norm1.register_forward_hook(keep)
    model(torch.rand(1, 3, 96, 160))[0, 3].backward()
    assert to_grid(kept["activation"]).shape == to_grid(kept["gradient"]).shape == (1, 64, 6, 10)
    assert kept["gradient"].any()


# ---- torch.func, copies and files


def test_gradients_of_each_image_by_torch_func():
    """`vmap` over `grad`, in both forms, and with a residual stream that is large enough to be added in place."""
    for side, options in ((96, {}), (1040, {}), (96, {"pack_form": "projected", "unpack_form": "projected"})):
        model, x = make(**options), torch.rand(2, 3, side, side)
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(parameters: dict[str, Tensor], x: Tensor, model: nn.Module = model) -> Tensor:
            return functional_call(model, parameters, (x[None],)).square().sum()

        gradients = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
        model(x[1:]).square().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name][1], parameter.grad, rtol=1e-3, atol=1e-4)


def test_forward_mode_derivatives():
    model, x = make().double(), torch.rand(1, 3, 96, 160, dtype=torch.float64)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, got = jvp(model, (x,), (direction,))
    want = (model(x + 1e-5 * direction) - model(x - 1e-5 * direction)) / 2e-5
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_copies_and_whole_models_in_files(tmp_path):
    model, x = make(), torch.rand(1, 3, 96, 160)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        torch.testing.assert_close(other(x), model(x))


def test_checkpoint_wrappers_of_blocks():
    model, x = make(), torch.rand(1, 3, 96, 160)
    want = model(x)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, LunaBlock))
    got = model(x)
    torch.testing.assert_close(got, want)
    got.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
