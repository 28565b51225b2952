"""Validity masks: True for a token that is part of the image.

Shapes: B batch, K tokens.
"""

import torch
from torch import Tensor


def check_valid(valid: Tensor, batch: int, length: int, name: str, values: bool = True) -> None:
    """Check a validity mask (True = valid) against the tokens that it describes.

    Args:
        valid: Mask of shape (batch, length), bool.
        batch: Batch size of the tokens.
        length: Number of tokens.
        name: Name of the mask in messages.
        values: Also look for rows without a valid token, in a mask on the CPU. On a GPU this would wait for the
            device: whoever makes masks looks at them before they go there.

    Raises:
        ValueError: The mask is not bool, has another shape, or (on a CPU and in eager mode only) leaves a row without a
            single valid token. Elsewhere such a row gives finite numbers of no meaning.
    """
    if valid.dim() != 2 or valid.shape[0] != batch or valid.shape[1] != length:
        raise ValueError(f"{name} must have shape ({batch}, {length}), got {list(valid.shape)}")
    if valid.dtype != torch.bool:
        raise ValueError(f"{name} must be a bool tensor with True for valid tokens, got {valid.dtype}")
    if not torch.jit.is_scripting():
        if not values or torch.jit.is_tracing() or torch.compiler.is_compiling() or valid.device.type != "cpu":
            return
        if not bool(valid.any(dim=1).all()):
            raise ValueError(f"{name} has a row without any valid token; every row needs at least one")


def readable(valid: Tensor) -> Tensor:
    """A mask (B, K) in which a row without any valid key is all valid.

    The softmax of an empty row would be NaN. Its output has no meaning, but must be finite in compiled and exported
    code.
    """
    return valid | ~valid.any(dim=1, keepdim=True)


def zero_invalid(x: Tensor, patch_valid: Tensor | None) -> Tensor:
    """Patches (B, N, C) with the invalid ones at zero. Their weight is zero, but zero times NaN would be NaN.

    Raises:
        ValueError: The mask (B, N) has another shape or type.
    """
    if patch_valid is None:
        return x
    check_valid(patch_valid, x.shape[0], x.shape[1], "patch_valid", values=False)
    return x.masked_fill(~patch_valid[:, :, None], 0.0)
