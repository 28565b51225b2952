"""What a model is said to cost."""

import timm
import torch
from torch import nn

import luna_vision  # noqa: F401
from luna_vision.utils.cost import count_macs, saved_bytes


def test_attention_is_counted_in_the_multiply_adds():
    """A fused SDPA reads as nothing in PyTorch's counter on the CPU."""
    model = timm.create_model("test_luna_vit", mixer="softmax", device="meta")
    assert count_macs(model, 320, 320) > 4.05 * count_macs(model, 160, 160)


def test_a_model_in_half_precision_costs_the_same():
    model = timm.create_model("test_luna_vit", device="meta")
    assert count_macs(model, 64, 64) == count_macs(model.bfloat16(), 64, 64)


def test_saved_bytes_counts_a_storage_once_and_no_parameters():
    x = torch.randn(4, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    assert saved_bytes(lambda: model(x), model) == 2 * 4 * 8 * 4  # the input, and the result of the ReLU
