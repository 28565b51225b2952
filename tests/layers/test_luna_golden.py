"""The layer against the numbers of the Luna authors' code (tests/golden/README.md): values and gradients in float64."""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from luna_vision.layers import LunaAttention, LunaBlock

GOLDEN = Path(__file__).parents[1] / "golden"
ATTENTION = sorted(p.stem for p in GOLDEN.glob("attention_*.safetensors"))
LAYER = sorted(p.stem for p in GOLDEN.glob("layer_*.safetensors"))

# the authors' name: ours
ATTENTION_KEYS = {
    "pq_proj": "pack_q",
    "pc_proj": "pack_kv",
    "pk_proj": "pack_k",
    "pv_proj": "pack_v",
    "q_proj": "unpack_q",
    "c_proj": "unpack_kv",
    "k_proj": "unpack_k",
    "v_proj": "unpack_v",
    "out_proj": "proj",
}
LAYER_KEYS = {
    "self_attn_layer_norm": "norm1",
    "self_atten_proj_layer_norm": "norm1_memory",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    "final_layer_norm": "norm2",
}


def translate(state: dict) -> dict:
    """The authors' state dict under our names. Biases of untied keys have no effect and no counterpart."""
    out = {}
    for key, value in state.items():
        module, _, leaf = key.removeprefix("state.").rpartition(".")
        prefix, _, name = module.rpartition(".")
        if name in ("pk_proj", "k_proj") and leaf == "bias":
            continue
        out["attn." * bool(prefix) + {**ATTENTION_KEYS, **LAYER_KEYS}[name] + "." + leaf] = value
    return out


def load(case: str) -> tuple[dict, dict]:
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    return tensors, translate({k: v for k, v in tensors.items() if k.startswith("state.")})


def check_outputs_and_gradients(module: nn.Module, g: dict) -> None:
    x, memory = g["in.x"].requires_grad_(), g["in.memory"].requires_grad_()
    masks = [~g[k] if k in g else None for k in ("in.x_padding_mask", "in.memory_padding_mask")]
    kwargs = dict(zip(("patch_valid", "memory_valid"), masks, strict=True))
    out_x, out_memory = module.eval()(x, memory, **kwargs)
    torch.testing.assert_close(out_x, g["out.x"], rtol=0, atol=1e-10)
    torch.testing.assert_close(out_memory, g["out.memory"], rtol=0, atol=1e-10)
    ((out_x * g["cotangent.x"]).sum() + (out_memory * g["cotangent.memory"]).sum()).backward()
    torch.testing.assert_close(x.grad, g["grad.x"], rtol=0, atol=1e-10)
    torch.testing.assert_close(memory.grad, g["grad.memory"], rtol=0, atol=1e-10)


def test_all_golden_cases_are_here():
    assert len(ATTENTION) == 5 and len(LAYER) == 3


# the authors' numbers hold in every form: left to itself, a layer of this size takes one of them
FORMS = pytest.mark.parametrize(
    "pack_form, unpack_form", list(itertools.product(["auto", "projected", "absorbed"], repeat=2))
)


@FORMS
@pytest.mark.parametrize("case", ATTENTION)
def test_attention_equals_authors(case, pack_form, unpack_form):
    g, state = load(case)
    pack_heads = 2 if case.endswith("pack_heads") or case == "attention_masked" else 4
    forms = {"pack_form": pack_form, "unpack_form": unpack_form}
    module = LunaAttention(32, num_heads=4, pack_heads=pack_heads, tie_kv="pack_kv.weight" in state, **forms)
    module.double().load_state_dict(state)
    check_outputs_and_gradients(module, g)


@FORMS
@pytest.mark.parametrize("case", LAYER)
def test_block_equals_authors(case, pack_form, unpack_form):
    g, state = load(case)
    block = LunaBlock(
        32,
        num_heads=4,
        pack_heads=2 if case.endswith("norm_relu") else 4,
        mlp_ratio=2.0,
        tie_kv="attn.pack_kv.weight" in state,
        norm_first="prenorm" in case,
        local_mixing="none",
        mlp="gelu",
        act_layer="relu" if "relu" in case else "gelu",
        pack_form=pack_form,
        unpack_form=unpack_form,
        norm_layer=nn.LayerNorm,  # eps 1e-5, as the authors have it
    )
    block.double().load_state_dict(state)
    check_outputs_and_gradients(block, g)
