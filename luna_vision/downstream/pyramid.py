"""Feature maps at several strides from a backbone with a single stride, for detectors and segmentation heads.

Shapes: B batch, H x W pixels, D width of the backbone, C channels of the pyramid, H' x W' patch grid.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from luna_vision.images.transforms import per_channel
from luna_vision.models import LunaVit, prune_memory_update
from luna_vision.models.factory import build_model
from luna_vision.utils.errors import UserError

__all__ = ["PyramidBackbone", "SimpleFeaturePyramid", "patches_of_images"]


def patches_of_images(
    sizes: Sequence[tuple[int, int]], padded: tuple[int, int], patch_size: tuple[int, int], device=None
) -> Tensor:
    """The mask ``patch_valid`` of a padded batch: True for patches that are part of an image.

    Args:
        sizes: (height, width) of each image in pixels; it lies at the top left of its rectangle.
        padded: (height, width) of the batch in pixels.
        patch_size: (height, width) of a patch in pixels.
        device: The device of the mask.

    Returns:
        (B, N) bool, row by row; True also for a patch that an image covers in part.

    Raises:
        ValueError: An image is larger than the batch, or empty.
    """
    grid = [-(-side // patch) for side, patch in zip(padded, patch_size, strict=True)]
    for size in sizes:
        if not (1 <= size[0] <= padded[0] and 1 <= size[1] <= padded[1]):
            raise ValueError(f"image sizes must be 1 x 1 to {padded[0]} x {padded[1]}, got {size[0]} x {size[1]}")
    covered = torch.tensor([[-(-s[axis] // patch_size[axis]) for s in sizes] for axis in (0, 1)])
    covered = covered.to(device, non_blocking=True)  # `torch.tensor` would wait for the device
    rows, columns = (torch.arange(grid[axis], device=device) < covered[axis][:, None] for axis in (0, 1))
    return (rows[:, :, None] & columns[:, None, :]).flatten(1)


class SimpleFeaturePyramid(nn.Module):
    """Maps at several strides from one map, without lateral connections.

    Transposed convolutions of stride 2 make finer maps, max pooling makes coarser ones. A 1x1 and a 3x3 convolution
    follow, each with a LayerNorm over channels.

    Source: Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", ECCV 2022 (arXiv
    2203.16527), section 3 and appendix A.2.
    """

    def __init__(
        self,
        dim: int,
        stride: int,
        strides: Sequence[int] = (4, 8, 16, 32),
        out_channels: int = 256,
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            dim: Channels D of the input.
            stride: Stride of the input, pixels.
            strides: Strides of the output maps: `stride` times or divided by a power of two.
            out_channels: Channels C of the output maps.

        Raises:
            ValueError: No strides, or one that cannot be reached by halving and doubling.
        """
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if not strides:
            raise ValueError("strides must name at least one stride")
        self.strides = tuple(strides)
        self.levels = nn.ModuleList()
        for wanted in self.strides:
            larger, smaller = max(wanted, stride), min(wanted, stride)
            ratio = larger // smaller if smaller > 0 else 0
            if ratio < 1 or ratio * smaller != larger or ratio & (ratio - 1):
                raise ValueError(f"strides must be {stride} times a power of two, or divided by one, got {wanted}")
            steps, width = ratio.bit_length() - 1, dim
            layers: list[nn.Module] = []
            for step in range(steps if wanted < stride else 0):
                if step:
                    layers += [LayerNorm2d(width, **dd), nn.GELU()]
                layers.append(nn.ConvTranspose2d(width, max(width // 2, 1), 2, 2, **dd))
                width = max(width // 2, 1)
            if wanted > stride:
                layers.append(nn.MaxPool2d(ratio, ratio, ceil_mode=True))
            layers += [nn.Conv2d(width, out_channels, 1, bias=False, **dd), LayerNorm2d(out_channels, **dd)]
            layers.append(nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False, **dd))
            layers.append(LayerNorm2d(out_channels, **dd))
            self.levels.append(nn.Sequential(*layers))

    def forward(self, x: Tensor) -> list[Tensor]:
        """A map (B, D, H', W') to one map (B, C, height, width) for each stride."""
        return [level(x) for level in self.levels]


class PyramidBackbone(nn.Module):
    """A timm model with a `SimpleFeaturePyramid`, in the form that torchvision's detectors take.

    Attributes:
        out_channels: Channels of the maps.
        strides: Their strides; the maps are called "0", "1", ...
        body: The timm model without its head.
        mean, std: Statistics of pixels in [0, 1] by channel, from the model's `pretrained_cfg`.
    """

    def __init__(
        self,
        model_name: str = "luna_vit_small",
        strides: Sequence[int] = (4, 8, 16, 32),
        out_channels: int = 256,
        in_chans: int = 3,
        **model_kwargs,
    ) -> None:
        """
        Args:
            model_name: Any timm model that has `forward_intermediates` with maps of one stride. ViTs that timm can give
                images of any size get them.
            strides: Strides of the pyramid, pixels.
            out_channels: Channels of the pyramid.
            in_chans: Image channels.
            **model_kwargs: Further arguments of the model.

        Raises:
            ValueError: Unknown model or argument, or a model or strides that do not fit.
        """
        super().__init__()
        self.arguments = dict(name=model_name, num_classes=0, in_chans=in_chans, **model_kwargs)
        model = build_model(**self.arguments)
        if self._fixed(model):  # timm's ViTs can also take any size, on request
            any_size = {"dynamic_img_size": True, "dynamic_img_pad": True}
            with suppress(UserError):
                model = build_model(**any_size | self.arguments)
                self.arguments = any_size | self.arguments
        reductions = {info["reduction"] for info in getattr(model, "feature_info", [])}
        if not hasattr(model, "forward_intermediates") or len(reductions) != 1:
            raise ValueError(f"{model_name} has no maps of a single stride: torchvision builds pyramids on such models")
        patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
        if isinstance(patch, tuple) and len(set(patch)) > 1:
            raise ValueError(f"both axes have the same strides, so patches must be square, got {patch[0]} x {patch[1]}")
        self.stride = reductions.pop()
        self.pyramid = SimpleFeaturePyramid(model.num_features, self.stride, strides, out_channels)
        self.strides, self.out_channels = self.pyramid.strides, out_channels
        self.mean, self.std = (per_channel(name, model.pretrained_cfg[name], in_chans) for name in ("mean", "std"))
        model.prune_intermediate_layers(1, prune_norm=False, prune_head=True)  # 1: the last block
        if isinstance(model, LunaVit):
            prune_memory_update(model)
        self.body = model
        self.masks = "patch_valid" in inspect.signature(model.forward_intermediates).parameters

    def load_body(self, full: nn.Module) -> None:
        """Copy the weights of a complete model of the same architecture, `build_model(**self.arguments)`."""
        weights = full.state_dict()
        self.body.load_state_dict({name: weights[name] for name in self.body.state_dict()})

    @staticmethod
    def _fixed(model: nn.Module) -> tuple[int, int] | None:
        """Height and width of the images of a model that takes no others."""
        embed = getattr(model, "patch_embed", None)
        return embed.img_size if getattr(embed, "strict_img_size", False) else None

    def patches(self, x: Tensor, image_sizes: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """The map (B, D, H', W') that the pyramid reads, zero where patches are padded; arguments as in `forward`."""
        if (fixed := self._fixed(self.body)) and tuple(x.shape[2:]) != tuple(fixed):
            sizes = [" x ".join(map(str, size)) for size in (fixed, x.shape[2:])]
            raise ValueError(f"{self.arguments['name']} takes images of {sizes[0]} alone, got {sizes[1]}")
        valid = None
        if image_sizes is not None and any(tuple(size) != tuple(x.shape[2:]) for size in image_sizes):
            patch = (self.stride, self.stride)
            valid = patches_of_images(image_sizes, tuple(x.shape[2:]), patch, x.device)
        mask = {"patch_valid": valid} if self.masks else {}
        (y,) = self.body.forward_intermediates(
            x, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True, **mask
        )
        return y if valid is None else y * valid.view(-1, 1, *y.shape[2:])

    def forward(self, x: Tensor, image_sizes: Sequence[tuple[int, int]] | None = None) -> OrderedDict[str, Tensor]:
        """
        Args:
            x: Images (B, in_chans, H, W), padded below and to the right if their sizes differ.
            image_sizes: (height, width) of each image in pixels. A model that takes `patch_valid` then ignores the
                padding; other models read it as part of the image.

        Returns:
            "0", "1", ...: (B, C, height, width) for each stride. Padded patches are zero before the pyramid.
        """
        return OrderedDict((str(i), level) for i, level in enumerate(self.pyramid(self.patches(x, image_sizes))))
