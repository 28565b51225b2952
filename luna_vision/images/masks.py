"""Pixels that are missing, and the patches that have no other pixels.

With the fill "mask" (see `luna_vision.images.values`), NaN stands for a missing pixel on its way from a file to the
model. There `split_missing` makes a mask of it, the `patch_valid` of a Luna ViT. Everything that runs a model calls it.

Shapes: B images, C channels, H x W pixels, H', W' patch grid, N = H' * W'.
"""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["no_masks", "split_missing", "valid_patches"]


def valid_patches(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """The patches (B, H', W') bool of images (B, C, H, W) that have a pixel which is not missing.

    A pixel is missing where all of its channels are NaN. Sides that are not whole patches are padded.
    """
    there = ~images.isnan().all(dim=1)
    rows, columns = patch_size
    height, width = there.shape[1:]
    there = F.pad(there, (0, -width % columns, 0, -height % rows), value=False)
    return there.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).any(dim=(2, 4))


def split_missing(images: Tensor, patch_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Divide normalised images (B, C, H, W) in which NaN is missing into numbers and a mask.

    Returns:
        The images, with 0, which is the mean, where numbers are missing; and `patch_valid` (B, N) bool. In an image
        without a single pixel, such as a crop of training can be, all patches are valid.
    """
    valid = valid_patches(images, patch_size).flatten(1)
    return images.masked_fill(images.isnan(), 0.0), valid | ~valid.any(dim=1, keepdim=True)


def no_masks(name: str) -> str:
    """Why a model cannot leave out missing pixels."""
    return f"{name} takes no mask of missing pixels: that takes a Luna ViT, or another fill than 'mask'"
