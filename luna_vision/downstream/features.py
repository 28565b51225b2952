"""Features of a frozen model: the embedding of an image, its patch grid and, of a Luna ViT, its memory.

Shapes: B batch, C width, L memory slots, H', W' patch grid, N = H' * W'.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from timm.models._input import get_model_input_config
from torch import Tensor, nn

from luna_vision.images.decode import SampleError
from luna_vision.images.masks import no_masks, split_missing
from luna_vision.models.luna_vit import LunaVit
from luna_vision.utils.device import fetch, to_device
from luna_vision.utils.errors import one_line

__all__ = ["Extractor", "Features"]


class Features(NamedTuple):
    """The features of one image, float32."""

    embedding: np.ndarray
    """(C,): the input of the classifier, `forward_head(pre_logits=True)`."""
    memory: np.ndarray | None
    """(L, C): the memory slots after the final norm."""
    grid: np.ndarray | None
    """(H', W', C): the patches after the final norm."""


class Extractor:
    """Runs a frozen model on images.

    A Luna ViT takes images of different sizes in one batch: they are padded to the largest, and a mask excludes the
    padding, so that each image has the same features as alone, and patches in which all pixels are missing (NaN). Any
    other model takes batches of one size.

    Attributes:
        in_chans: Channels of the images.
        patch_size: Sides (height, width) of a patch for a Luna ViT, None for other models.
    """

    def __init__(self, model: nn.Module, memory: bool = False, grid: bool = False) -> None:
        """
        Args:
            model: A timm classification model; it is put in eval mode.
            memory: Return the memory.
            grid: Return the patch grid (of a convolutional network, its last feature map).

        Raises:
            ValueError: Not such a model, or no memory though it is wanted.
        """
        self.name = type(model).__name__
        if not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
            raise ValueError(
                f"{self.name} is not a timm classification model: it has no forward_features, forward_head"
            )
        if memory and not getattr(model, "memory_len", 0):
            raise ValueError(f"memory is wanted, and {self.name} has none: use a Luna ViT with mixer='luna'")
        self.model, self.memory, self.grid = model.eval(), memory, grid
        self.patch_size: tuple[int, int] | None = model.patch_embed.patch_size if isinstance(model, LunaVit) else None
        # timm's models keep no other record of their channels than the first convolution
        convs = (module for module in model.modules() if isinstance(module, nn.Conv2d))
        self.in_chans = model.in_chans if hasattr(model, "in_chans") else getattr(next(convs, None), "in_channels", 3)
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype

    def __call__(self, images: Sequence[Tensor] | Tensor) -> list[Features]:
        """The features of normalised images (channels, height, width), a list or a batch.

        Raises:
            SampleError: The model does not take images of this size.
            ValueError: The model returns no embedding, or no grid though one is wanted.
        """
        return self.submit(images)()

    def submit(self, images: Sequence[Tensor] | Tensor) -> Callable[[], list[Features]]:
        """Start to compute the features of images; the result waits for them. On a GPU the caller can prepare the next
        images meanwhile. Errors as in a call."""
        batch, valid = self._batch(images)
        tokens, embeddings = self._run(batch, valid)
        if embeddings.ndim == 4 and embeddings.shape[2:] == (1, 1):
            embeddings = embeddings.flatten(1)
        if embeddings.ndim != 2:
            shape = list(embeddings.shape[1:])
            raise ValueError(f"{self.name} gives {shape} for an image, not one vector: create it with a global_pool")
        memories = tokens[:, : self.model.memory_len] if self.memory else None
        wait = fetch(embeddings, memories, self._grids(tokens, batch) if self.grid else None)
        own = [self._cells(image) for image in images] if self.grid and self.patch_size else None

        def finish() -> list[Features]:
            embeddings, memories, grids = ([None] * len(batch) if x is None else x.numpy() for x in wait())
            if own:  # copies, for a view would keep the padding in memory
                grids = [grid[:rows, :columns].copy() for grid, (rows, columns) in zip(grids, own, strict=True)]
            return [Features(*of_image) for of_image in zip(embeddings, memories, grids, strict=True)]

        return finish

    def _cells(self, image: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of an image, rounded up."""
        return -(-image.shape[1] // self.patch_size[0]), -(-image.shape[2] // self.patch_size[1])

    def _batch(self, images: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor | None]:
        """Images as one batch and, if they have different grids or lack pixels, a mask (B, N) of their own patches."""
        missing = any(bool(image.isnan().any()) for image in images)
        if missing and self.patch_size is None:
            raise ValueError(no_masks(self.name))
        alike = len({image.shape for image in images}) <= 1
        if isinstance(images, Tensor):
            batch = images
        elif alike:  # a single image, which may be large, is not copied
            batch = torch.stack(list(images)) if len(images) > 1 else images[0].unsqueeze(0)
        else:
            height, width = (max(side) for side in zip(*(image.shape[1:] for image in images), strict=True))
            batch = torch.full((len(images), self.in_chans, height, width), torch.nan)
            for i, image in enumerate(images):
                batch[i, :, : image.shape[1], : image.shape[2]] = image
        if alike and not missing:
            return batch, None
        batch, valid = split_missing(batch, self.patch_size)
        return batch, None if valid.all() else valid

    def _run(self, batch: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens and embeddings of a batch."""
        mask = {} if valid is None else {"patch_valid": to_device(valid, self.device)}
        try:
            with torch.inference_mode():
                tokens = self.model.forward_features(to_device(batch, self.device, self.dtype), **mask)
                return tokens, self.model.forward_head(tokens, pre_logits=True, **mask)
        except (RuntimeError, AssertionError, ValueError) as error:  # depending on the model
            if isinstance(error, torch.OutOfMemoryError) or not self._has_a_size():
                raise
            height, width = batch.shape[2:]
            raise SampleError(f"{self.name} fails on {width} x {height} pixels: {one_line(error)}") from error

    def _has_a_size(self) -> bool:
        """Whether the model works at its own size, so that the size of the images must be the cause of a failure."""
        if self.patch_size:
            return False
        size = get_model_input_config(self.model)["input_size"][1:]
        try:
            with torch.inference_mode():
                self.model(torch.zeros(1, self.in_chans, *size, device=self.device, dtype=self.dtype))
        except (RuntimeError, AssertionError, ValueError):
            return False
        return True

    def _grids(self, tokens: Tensor, batch: Tensor) -> Tensor:
        """The patch grids (B, H', W', C) of the padded batch."""
        if tokens.ndim == 4:
            return tokens if getattr(self.model, "output_fmt", "NCHW") == "NHWC" else tokens.permute(0, 2, 3, 1)
        if tokens.ndim == 3 and hasattr(self.model, "patch_embed"):
            # a Luna ViT pads to whole patches, a timm ViT may or may not
            cells = self._cells if self.patch_size else lambda x: self.model.patch_embed.dynamic_feat_size(x.shape[1:])
            size = cells(batch[0])
            patches = tokens[:, getattr(self.model, "num_prefix_tokens", 0) :]
            if patches.shape[1] == size[0] * size[1]:
                return patches.unflatten(1, tuple(size))
        raise ValueError(f"a grid is wanted, and {self.name} gives none: its features are {list(tokens.shape[1:])}")
