"""Compiled and exported models agree with eager ones, at sizes that were not seen when they were made."""

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from timm.utils.onnx import onnx_export
from torch.export import Dim

from experiments.gpu.fake import fake_cuda
from luna_vision import LunaVit
from luna_vision.export import export_onnx, export_program, save_for_hf

SIZES = [(1, 3, 160, 160), (3, 3, 50, 99), (2, 3, 300, 65), (1, 3, 17, 224)]


@pytest.fixture
def model():
    """Of one block, which is enough for compilers, as they need minutes for more on two cores."""
    torch.manual_seed(0)
    return timm.create_model("test_luna_vit", num_classes=5, depth=1).eval()


def check_compiled(model, backend, sizes):
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for size in sizes:
            x = torch.randn(*size)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    return compiled


@pytest.mark.slow
def test_compile_fullgraph_with_inductor(model):
    check_compiled(model, "inductor", SIZES[1:2])


@pytest.mark.slow
def test_compile_fullgraph_at_several_sizes_and_with_a_mask(model):
    compiled = check_compiled(model, "aot_eager", SIZES)
    valid = torch.ones(1, 100, dtype=torch.bool)
    valid[:, 90:] = False
    x = torch.randn(*SIZES[0])
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, valid), model(x, valid), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name, options",
    [
        ("test_luna_vit", {"depth": 2}),
        ("luna_vit_small_paper", {"embed_dim": 64, "depth": 2, "num_heads": 2}),
        ("test_luna_vit", {"depth": 2, "mlp": "swiglu", "local_mixing": "mlp", "memory_mlp": "shared"}),
    ],
    ids=str,
)
def test_export_with_dynamic_batch_height_and_width(name, options):
    model = timm.create_model(name, num_classes=5, **options).eval()
    dims = {0: Dim("batch", min=1, max=64), 2: Dim("height", min=17, max=8192), 3: Dim("width", min=17, max=8192)}
    exported = torch.export.export(model, (torch.randn(2, 3, 160, 96),), dynamic_shapes={"x": dims}).module()
    for size in SIZES:
        x = torch.randn(*size)
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_onnx_with_dynamic_height_and_width(tmp_path):
    """By timm's helper, with positions that are resampled; ours are in `tests/cli/test_export_command.py`."""
    model = timm.create_model("test_luna_vit", num_classes=5, depth=1, pos_embed="learn").eval()
    path = str(tmp_path / "model.onnx")
    example = torch.randn(2, 3, 160, 96)
    onnx_export(model, path, example_input=example, use_dynamo=True, dynamic_size=True, check_forward=True)
    session = onnxruntime.InferenceSession(path)
    for size in SIZES:
        x = torch.randn(*size)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(y, model(x).detach().numpy(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("export", [export_onnx, export_program, save_for_hf])
def test_a_model_that_timm_did_not_build_is_refused_before_any_work(export, tmp_path):
    model = LunaVit(embed_dim=32, depth=1, num_heads=2)
    with pytest.raises(ValueError, match="timm.create_model"):
        export(model, tmp_path / {export_onnx: "a.onnx", export_program: "a.pt2"}.get(export, "a"))
    assert not any(tmp_path.iterdir())


def test_an_exported_graph_is_the_same_wherever_it_is_made():
    """A file may run on another device than that which wrote it: it has none of the choices of the latter."""
    dims = {0: Dim("batch", min=1, max=64), 2: Dim("height", min=17, max=8192), 3: Dim("width", min=17, max=8192)}
    graphs = []
    for device in ("cpu", "cuda"):
        # with many slots, a GPU has another form than a CPU
        model = timm.create_model("test_luna_vit", num_classes=5, depth=1, memory_len=40).to("meta").eval()
        assert model.blocks[0].attn.prefers_absorbed_unpack == {"cpu": True, "cuda": False}
        with fake_cuda(), torch.no_grad():
            model, x = model.to_empty(device=device), torch.empty(2, 3, 160, 96, device=device)
            exported = torch.export.export(model, (x,), dynamic_shapes={"x": dims})
        graphs.append([str(node.target) for node in exported.graph.nodes])
    assert graphs[0] == graphs[1]
