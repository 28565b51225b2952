"""A pytest plug-in, `-p experiments.gpu.cuda_default`: tensors that tests make without naming a device are on the GPU.

What then breaks on `.numpy()` or on a file that was read to the CPU is the test's matter, and not the layer's.
"""

import os

import torch


def pytest_configure(config) -> None:
    torch.set_default_device(os.environ.get("DEVICE", "cuda"))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
