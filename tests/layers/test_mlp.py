"""The MLPs map many patches part by part where nobody can tell but by time and memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from luna_vision.layers.mlp import ROWS, Mlp, SwiGlu

C, HIDDEN = 8, 24
MANY = 5 * ROWS + 3


class Largest(TorchDispatchMode):
    """The numbers of the largest new tensor."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.size = max(self.size, out.numel())
        return out


@pytest.mark.parametrize("kind", [Mlp, SwiGlu])
@pytest.mark.parametrize("shape", [(1, MANY), (3, MANY // 2), (2, 7)])
def test_parts_give_what_the_whole_gives(kind, shape):
    mlp, x = kind(C, HIDDEN).double().eval(), torch.randn(*shape, C, dtype=torch.float64)
    whole = mlp(x).detach()  # with gradients
    with torch.inference_mode():
        torch.testing.assert_close(mlp(x), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [Mlp, SwiGlu])
def test_the_hidden_layer_does_not_grow_with_the_image(kind, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    mlp, x = kind(C, HIDDEN).eval(), torch.randn(1, 8 * ROWS, C)
    with torch.inference_mode(), Largest() as largest:
        mlp(x)
    assert largest.size == x.numel()


@pytest.mark.parametrize("kind", [Mlp, SwiGlu])
@pytest.mark.parametrize("name", ["fc1", "act", "fc2"])
def test_a_hook_sees_all_patches_at_once(kind, name):
    mlp, x, seen = kind(C, HIDDEN).eval(), torch.randn(1, MANY, C), []
    mlp.get_submodule(name).register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    with torch.inference_mode():
        mlp(x)
    assert seen == [MANY]


@pytest.mark.parametrize("kind", [Mlp, SwiGlu])
def test_local_mixing_inside_sees_the_whole_grid(kind):
    mlp, x = kind(C, HIDDEN, local_mixing=True).double().eval(), torch.randn(1, 40 * 33, C, dtype=torch.float64)
    whole = mlp(x, (40, 33)).detach()
    with torch.inference_mode():
        torch.testing.assert_close(mlp(x, (40, 33)), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [Mlp, SwiGlu])
def test_a_graph_takes_any_number_of_patches(kind):
    mlp, (few, many) = kind(C, HIDDEN).eval(), (torch.randn(1, n, C) for n in (2, MANY))
    with torch.no_grad():
        traced = torch.jit.trace(mlp, many, check_trace=False)
        shapes = {"x": {1: torch.export.Dim.DYNAMIC}}
        exported = torch.export.export(mlp, (many,), dynamic_shapes=shapes)
        for x in (few, many):
            torch.testing.assert_close(traced(x), mlp(x))
            torch.testing.assert_close(exported.module()(x), mlp(x))
