"""Packages that replace, wrap or hook linear layers: every way to run a model does what their layers do."""

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, skip_init, spectral_norm, weight_norm
from torch.nn.utils.convert_parameters import parameters_to_vector, vector_to_parameters

import luna_vision
from luna_vision.execution import encode, set_band_checkpointing

LORA_TARGETS = ["pack_q", "pack_kv", "unpack_q", "unpack_kv", "attn.proj", "fc1", "fc2"]
OPTIONS = [
    {"pack_form": "absorbed", "unpack_form": "absorbed"},
    {"pack_form": "absorbed", "unpack_form": "absorbed", "tie_kv": False, "memory_mlp": "shared", "global_pool": "map"},
    {"mixer": "longformer"},
    {"mixer": "star"},
]
IDS = ["tied", "untied", "longformer", "star"]


def each(tools: Iterable[str], everywhere: str) -> pytest.MarkDecorator:
    """Every tool on the first of the options, and one of them on the others, too."""
    cases = [(tool, 0) for tool in tools] + [(everywhere, i) for i in range(1, len(OPTIONS))]
    params = [pytest.param(tool, OPTIONS[i], id=f"{tool}-{IDS[i]}") for tool, i in cases]
    return pytest.mark.parametrize("tool, options", params)


def make(**arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_luna_vit", depth=2, num_classes=5, **arguments).eval()


def image() -> Tensor:
    return torch.rand(1, 3, 80, 48, generator=torch.Generator().manual_seed(1))


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, layer) for name, layer in list(model.named_modules()) if isinstance(layer, nn.Linear))


def set_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def called(model: nn.Module, **arguments: Any) -> nn.Module:
    """A plain model whose linear layers have the weights that those of `model` act with when they are called."""
    plain = make(**arguments)
    with torch.no_grad():
        for name, linear in linear_layers(plain):
            layer = model.get_submodule(name)
            bias = layer(torch.zeros(1, linear.in_features))
            linear.weight.copy_((layer(torch.eye(linear.in_features)) - bias).T)
            if linear.bias is not None:
                linear.bias.copy_(bias[0])
    return plain


@torch.no_grad()
def run(model: nn.Module) -> dict[str, Tensor]:
    x = image()
    runs = {"forward": model(x)}
    if model.memory is None:
        return runs
    set_band_checkpointing(model, 2)
    runs["bands"] = model(x)
    set_band_checkpointing(model, 0)
    pixels = x[0].permute(1, 2, 0).numpy()
    runs["encode"] = encode(model, pixels, mean=0, std=1, band_rows=2, progress=False).logits[None]
    for i, maps in enumerate(model.get_attention_maps(x)):
        runs |= {f"pack {i}": maps.pack, f"unpack {i}": maps.unpack}
    return runs


def check_runs(got_model: nn.Module, want_model: nn.Module, tolerance: float = 5e-4) -> None:
    """In every execution, two models give the same."""
    got_runs, want_runs = run(got_model), run(want_model)
    for name in want_runs:
        got, want = got_runs[name], want_runs[name]
        atol = tolerance * max([1.0, *want.abs().flatten().tolist()])
        torch.testing.assert_close(got, want, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def each_layer(change: Callable[[nn.Linear], Any]) -> Callable[[nn.Module], nn.Module]:
    def apply(model: nn.Module) -> nn.Module:
        for _, layer in linear_layers(model):
            change(layer)
        return model

    return apply


def replace_layers(model: nn.Module) -> nn.Module:
    for name, layer in linear_layers(model):
        new = skip_init(nn.Linear, layer.in_features, layer.out_features, bias=layer.bias is not None)
        for parameter in new.parameters():
            nn.init.normal_(parameter, std=0.2)
        set_layer(model, name, new)
    return model


def set_vector(model: nn.Module) -> nn.Module:
    vector_to_parameters(1.1 * parameters_to_vector(model.blocks.parameters()), model.blocks.parameters())
    return model


def stretch(layer: nn.Linear) -> None:
    """What a norm of the weights learns, which is not what they start with."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith(("weight_g", "original0")):
                parameter.mul_(1.5)


OF_TORCH = {
    "weight_norm": each_layer(lambda layer: stretch(weight_norm(layer))),
    "spectral_norm": each_layer(spectral_norm),
    "parametrized weight_norm": each_layer(lambda layer: stretch(parametrizations.weight_norm(layer))),
    "parametrized spectral_norm": each_layer(parametrizations.spectral_norm),
    "orthogonal": each_layer(parametrizations.orthogonal),
    "prune": each_layer(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)),
    "prune heads": each_layer(lambda layer: prune.ln_structured(layer, "weight", 0.3, 2, 0)),
    "pre-hook": each_layer(lambda layer: layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))),
    "hook": each_layer(lambda layer: layer.register_forward_hook(lambda module, args, out: 2 * out)),
    "skip_init": replace_layers,
    "vector_to_parameters": set_vector,
}


@each(OF_TORCH, everywhere="parametrized weight_norm")
def test_what_torch_does_to_linear_layers_acts_in_every_execution(tool, options):
    model = OF_TORCH[tool](make(**options))
    model.train()(image())  # the old norms set the weight when the layer is called
    model.eval()(image())
    if tool == "vector_to_parameters":
        plain = make(**options)
        plain.load_state_dict(model.state_dict())
    else:
        plain = called(model, **options)
    check_runs(model, plain)

    model.train()(image()).square().mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []

    again = OF_TORCH[tool](make(**options))
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.eval()(image()), model.eval()(image()))


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_hooks_of_all_linear_layers_fire_as_in_a_plain_vit(options):
    """Those that watch: forward, before it, and both of the backward pass."""

    def count(model: nn.Module) -> dict[str, list[int]]:
        fired = {name: [0, 0, 0, 0] for name, _ in linear_layers(model)}

        def watch(name: str, kind: int) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                fired[name][kind] += 1

            return hook

        for name, layer in linear_layers(model):
            layer.register_forward_pre_hook(watch(name, 0))
            layer.register_forward_hook(watch(name, 1))
            layer.register_full_backward_pre_hook(watch(name, 2))
            layer.register_full_backward_hook(watch(name, 3))
        model(torch.rand(1, 3, 160, 160)).sum().backward()
        return fired

    vit = timm.create_model("test_vit", global_pool=options.get("global_pool", "token"))
    for model in (vit, make(**options)):
        assert {name: kinds for name, kinds in count(model).items() if not all(kinds)} == {}


@pytest.mark.parametrize("options", [*OPTIONS[:2], {"local_mixing": "attn"}, {"norm_first": False}], ids=str)
@pytest.mark.parametrize("side", [160, 1040])  # large enough to be added in place
def test_what_hooks_keep_stays_as_it_was(side, options):
    """A captured output, as feature extraction has it, is not overwritten later."""
    model, kept = make(**options), {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda module, args, out, name=name: kept.update({name: (out, copy.deepcopy(out))})
        )
    with torch.no_grad():
        model(torch.rand(1, 3, side, side))
    for name, (out, then) in kept.items():
        torch.testing.assert_close(out, then, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


@each(["qint8", "float16"], everywhere="qint8")
def test_dynamic_quantisation(tool, options):
    dtype = getattr(torch, tool)
    model = torch.ao.quantization.quantize_dynamic(make(**options), {nn.Linear}, dtype=dtype)
    # qint8 also rounds what goes into a layer, to what its largest number allows: of a band this is another
    check_runs(model, called(model, **options), 1e-4 if dtype == torch.float16 else 0.2)
    torch.testing.assert_close(torch.jit.script(model)(image()), model(image()))

    again = torch.ao.quantization.quantize_dynamic(make(**options), {nn.Linear}, dtype=dtype)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(image()), model(image()))


# ---- LoRA


def with_lora(options: dict[str, Any], **config: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    targets = [*LORA_TARGETS, "pack_k", "pack_v", "unpack_k", "unpack_v", "qkv", "attn_pool.q", "attn_pool.kv"]
    targets += [f"{name}_{part}" for name in ("global", "relay") for part in "qkv"]
    config = {"r": 4, "target_modules": targets, "modules_to_save": ["head"], "init_lora_weights": False, **config}
    return peft.get_peft_model(make(**options), peft.LoraConfig(**config)).eval()


@each(["LoRA", "DoRA"], everywhere="LoRA")
def test_lora_acts_merges_and_learns(tool, options):
    model = with_lora(options, use_dora=tool == "DoRA")
    merged = copy.deepcopy(model).merge_and_unload()
    with torch.no_grad():
        assert (model(image()) - make(**options)(image())).abs().max() > 0.05
    check_runs(model.get_base_model(), merged)

    model.train()(image()).square().mean().backward()
    adapted = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" in name}
    assert len(adapted) >= 2 * 2 * 4  # A and B of 4 layers or more of 2 blocks
    learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert adapted <= learning and all(model.get_parameter(name).grad.any() for name in adapted)


def test_the_documented_lora_reaches_every_linear_layer_of_the_blocks():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make(), peft.LoraConfig(target_modules=LORA_TARGETS, modules_to_save=["head"]))
    inside = ("blocks", "final_pack")
    assert set(model.targeted_module_names) == {name for name, _ in linear_layers(make()) if name.startswith(inside)}


def test_the_documented_lines_run(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    text = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")
    lines = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].replace("luna_vit_small", "test_luna_vit")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(lines, names)
    assert names["targets"] == LORA_TARGETS
    assert type(names["model"]) is luna_vision.LunaVit


def test_lora_survives_saving_and_a_training_by_bands(tmp_path):
    peft = pytest.importorskip("peft")
    model = with_lora({})
    set_band_checkpointing(model.get_base_model(), 2)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 1e-3)
    before = model(image())
    model.train()(image()).square().mean().backward()
    optimizer.step()
    after = model.eval()(image())
    assert (after - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(loaded(image()), after, rtol=0, atol=1e-4)


# ---- torchao


@each(["Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "IntxWeightOnlyConfig"], everywhere="Int8WeightOnlyConfig")
def test_torchao_weights_are_dequantised(tool, options):
    quantization = pytest.importorskip("torchao.quantization")
    model = make(**options)
    quantization.quantize_(model, getattr(quantization, tool)())
    plain = called(model, **options)
    with torch.no_grad():
        assert (plain(image()) - make(**options)(image())).abs().max() > 1e-3
    check_runs(model, plain)

    again = make(**options)
    quantization.quantize_(again, getattr(quantization, tool)())
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(image()), model(image()))


# ---- accelerate


def dispatch(accelerate: Any, model: nn.Module, folder: str) -> nn.Module:
    places = {name: "cpu" for name, _ in model.named_children() if name != "blocks"}
    places |= {"blocks.0": "cpu", "blocks.1": "disk"} | ({} if model.memory is None else {"memory": "cpu"})
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


OFFLOADS = {
    "cpu_offload": lambda accelerate, model, folder: accelerate.cpu_offload(model, "cpu"),
    "disk_offload": lambda accelerate, model, folder: accelerate.disk_offload(model, folder, "cpu"),
    "dispatch_model": dispatch,
}


@each(OFFLOADS, everywhere="dispatch_model")
def test_accelerate_offloads_a_model(tool, options, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, plain = OFFLOADS[tool](accelerate, make(**options), str(tmp_path)), make(**options)
    with torch.no_grad():
        torch.testing.assert_close(model(image()), plain(image()), rtol=0, atol=1e-4)
    if tool == "dispatch_model" and "mixer" not in options:
        check_runs(model, plain)
    elif "mixer" not in options:  # the model's own weights, its memory, are there while it is called and no longer
        with pytest.raises(ValueError, match="dispatch_model"):
            encode(model, image()[0].permute(1, 2, 0).numpy(), mean=0, std=1, band_rows=2, progress=False)


# ---- compiled and exported

COMPILED = {
    "LoRA": lambda options: with_lora(options),
    "torchao": lambda options: torchao_int8(make(**options)),
    "weight_norm": lambda options: OF_TORCH["weight_norm"](make(**options)),
    "parametrized": lambda options: OF_TORCH["parametrized weight_norm"](make(**options)),
    "hook": lambda options: OF_TORCH["hook"](make(**options)),
}


def torchao_int8(model: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


@pytest.mark.slow
@each(COMPILED, everywhere="hook")
def test_compiled_and_exported_models_call_the_layers(tool, options):
    torch._dynamo.reset()  # of models that were compiled before, this one is another version
    model, x = COMPILED[tool](options), image()
    with torch.no_grad():
        want = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), want, rtol=0, atol=1e-4)
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), want, rtol=0, atol=1e-4)
