"""How a model uses its device: number types, TF32, compiled blocks, and copies for which nobody waits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError

__all__ = [
    "DTYPES",
    "allow_tf32",
    "cast_products",
    "compile_blocks",
    "fetch",
    "pick_dtype",
    "product_dtype",
    "products_in",
    "settle_dtype",
    "to_device",
]

DTYPES = ("auto", "float32", "bfloat16", "float16")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of products for a name of `DTYPES`: "auto" is bfloat16 on a GPU that has it, and float32 elsewhere.

    Raises:
        UserError: "bfloat16" on a GPU that lacks it.
    """
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "bfloat16" and device.type == "cuda" and not has_bfloat16:
        raise UserError(f"dtype bfloat16: {torch.cuda.get_device_name(device)} does not have it; float16 does as well")
    return getattr(torch, ("bfloat16" if has_bfloat16 else "float32") if name == "auto" else name)


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The type in which a model with weights of a type computes products now: that of autocast, if it is on."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype


def allow_tf32(allowed: bool) -> None:
    """Say whether float32 products and convolutions on a GPU may round what they multiply to TF32 (10 bits).

    PyTorch allows it for convolutions alone. Here both are alike, for all models and mixers: allowed in a run whose
    other products are in half precision, which is no finer, and not allowed in a run in float32.
    """
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        torch.backends.cudnn.allow_tf32 = allowed


def cast_products(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of linear layers and convolutions once, in place, as autocast would in every pass.

    Under autocast the results stay the same: what it computes in float32, such as norms, keeps its weights.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(dtype)


def settle_dtype(model: nn.Module, name: str) -> torch.dtype:
    """Prepare a model, in place, for products in a type of `DTYPES` on its device: the type, for `products_in`.

    The weights of half precision are cast once, and float32 means float32 (see `allow_tf32`).
    """
    dtype = pick_dtype(name, next(model.parameters()).device)
    allow_tf32(dtype != torch.float32)
    if dtype != torch.float32:
        cast_products(model, dtype)
    return dtype


def products_in(model: nn.Module, dtype: torch.dtype) -> torch.autocast:
    """A context in which a model computes products in a type: autocast, unless it is float32."""
    return torch.autocast(next(model.parameters()).device.type, dtype, enabled=dtype != torch.float32)


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """Compile a model in place, at the first call: its blocks one by one, as equal blocks share their code.

    The twelve blocks of a Luna ViT are compiled as two, and what lies between blocks is small. Its final pack is not
    compiled: with it, images of a few sizes pass PyTorch's limit of recompilations (8), as all blocks share one
    `forward`. A model without a list `blocks` is compiled as a whole.

    Args:
        model: Any.
        **options: Of `torch.compile`.
    """
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleList | nn.Sequential):
        model.compile(**options)
        return
    for block in blocks:
        block.compile(**options)


def to_device(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on a device, in a type; a copy to a GPU is from page-locked memory, and the caller does not wait."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True).to(dtype=dtype)
    return x.to(device, dtype)


def fetch(*tensors: Tensor | None) -> Callable[[], list[Tensor | None]]:
    """Start to copy tensors to the CPU, in float32; the result waits for the copies, and for nothing that comes later.

    None stays None.
    """
    copies = [None if x is None else x.float().to("cpu", non_blocking=True) for x in tensors]
    if not any(x is not None and x.is_cuda for x in tensors):
        return lambda: copies
    done = torch.cuda.Event()
    done.record()

    def wait() -> list[Tensor | None]:
        done.synchronize()
        return copies

    return wait
