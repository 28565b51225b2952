"""Times on a GPU, predicted from counts: the counts are right, and the file says that nothing was measured."""

import json

import torch

from experiments.gpu import cost_model
from experiments.gpu.fake import Kernels, fake_cuda


def test_bytes_operations_and_what_a_compiler_would_fuse():
    with fake_cuda(), Kernels() as kernels:
        x, w = (torch.empty(shape, device="cuda", dtype=torch.bfloat16) for shape in ((4, 64, 32), (4, 32, 16)))
        (torch.bmm((x.relu() + 1).transpose(1, 2).transpose(1, 2), w).exp() * 2).view(-1)
    size, out = 2 * 4 * 64 * 32, 2 * 4 * 64 * 16
    assert [k.name for k in kernels.ran] == [f"aten::{n}" for n in ("relu", "add", "bmm", "exp", "mul")]
    assert [k.bytes for k in kernels.ran] == [2 * size, 2 * size, size + 2 * 4 * 32 * 16 + out, 2 * out, 2 * out]
    assert kernels.ran[2].flops == 2 * 4 * 64 * 32 * 16
    assert [k.bytes for k in cost_model.fuse(kernels.ran)] == [2 * size, size + 2 * 4 * 32 * 16 + out, 2 * out]


def test_a_broadcast_addend_of_a_batched_product_is_a_copy_of_its_own():
    with fake_cuda(), Kernels() as kernels:
        a, b, bias = (torch.empty(shape, device="cuda") for shape in ((2, 5, 3), (2, 3, 7), (7,)))
        torch.baddbmm(bias, a, b)
    assert [k.name for k in kernels.ran] == ["aten::baddbmm", "aten::copy_"]


def test_the_command(tmp_path, capsys):
    out = tmp_path / "predicted.json"
    assert cost_model.main(["--sizes", "64", "--batch", "2", "--models", "test_luna_vit", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    (row,) = found["rows"]
    assert found["predicted"] and row["GFLOP_an_image"] > 0
    assert row["compiled"]["kernels"] < row["eager"]["kernels"]
    assert row["compiled"]["GB_an_image"] < row["eager"]["GB_an_image"]
    assert "| test_luna_vit | 64 | 2 |" in capsys.readouterr().out
