"""What `torch.compile` makes of the models: one graph, few of them for many sizes, and one for equal blocks."""

import pytest
import timm
import torch
from torch._dynamo.testing import CompileCounter

import luna_vision  # noqa: F401  registers the models
from luna_vision.utils.device import compile_blocks

SIZES = [
    (2, 64, 64),
    (2, 96, 96),
    (3, 64, 96),
    (1, 48, 80),
    (5, 33, 70),
    (2, 160, 48),
    (4, 64, 64),
    (1, 17, 224),
    (2, 80, 80),
]


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@torch.no_grad()
def graphs_after(model, counter, sizes, **mask) -> list[int]:
    """How many graphs there are after each size."""
    found = []
    for batch, *side in sizes:
        model(torch.randn(batch, 3, *side))
        found.append(counter.frame_count)
    return found


@pytest.mark.parametrize("args", [{}, {"patch_size": 8, "embed_dim": 128, "num_heads": 4}], ids=str)
def test_nine_sizes_take_few_graphs(args):
    """One of fixed sizes, one of any, and one more for a batch of one; `fullgraph` refuses breaks."""
    model, counter = timm.create_model("test_luna_vit", num_classes=5, depth=1, **args).eval(), CompileCounter()
    graphs = graphs_after(torch.compile(model, fullgraph=True, backend=counter), counter, SIZES)
    assert graphs[0] == 1 and graphs[-1] <= 4


def test_equal_blocks_share_their_code():
    model, counter = timm.create_model("test_luna_vit", num_classes=5, depth=5).eval(), CompileCounter()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want = model(x)
        compile_blocks(model, fullgraph=True, backend=counter)
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2  # not five; the final pack is not compiled
    assert graphs_after(model, counter, SIZES)[-1] <= 8


def test_a_model_without_blocks_is_compiled_as_a_whole():
    model, counter = timm.create_model("test_resnet", num_classes=5).eval(), CompileCounter()
    compile_blocks(model, backend=counter)
    assert graphs_after(model, counter, [(2, 64, 64)]) == [1]
