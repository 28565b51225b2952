"""Parts of `luna_vit` with branches that fx cannot trace (so they are leaves of a trace), and its checkpoint filter.

Shapes: B batch, N patches, L memory slots, C width.
"""

import re

import torch
import torch.nn.functional as F
from timm.layers import resample_patch_embed
from timm.models import register_notrace_function, register_notrace_module
from torch import Tensor, nn

from .._tensors import check_option
from ..functional import check_valid

# what `global_pool=` may name
POOL_TYPES = ("", "avg", "max", "avgmax", "map", "token", "both")

# what of the last block's output `last_block=` may name
LAST_BLOCKS = ("patches", "memory", "both")


def read_by(global_pool: str) -> str:
    """What of the last block's output a pooling reads, one of `LAST_BLOCKS`."""
    return {"token": "memory", "both": "both"}.get(global_pool, "patches")


def check_last_block(last_block: str, global_pool: str, has_memory: bool) -> None:
    """
    Raises:
        ValueError: Not one of `LAST_BLOCKS`, a memory that there is not, or a last block that does not update the
            patches, which the pooling reads.
    """
    check_option("last_block", last_block, ("auto", *LAST_BLOCKS))
    if not has_memory and last_block != "patches":
        raise ValueError(f"last_block={last_block!r} has its memory read, and this model's mixer has none")
    if last_block == "memory" and global_pool not in ("", "token"):
        raise ValueError(
            f"a model that was created with global_pool='token' (or last_block='memory') does not update the patches "
            f"in its last block, and global_pool={global_pool!r} reads them: choose it when the model is created"
        )


@register_notrace_function
def check_image(x: Tensor, in_chans: int) -> Tensor:
    """Return `x`, a batch of images (B, in_chans, height, width) with sides of a pixel or more.

    Raises:
        ValueError: It is not that.
    """
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(f"images must have shape (batch, {in_chans}, height, width), got {list(x.shape)}")
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"images must have at least one pixel a side, got {x.shape[2]} x {x.shape[3]}")
    return x


@register_notrace_function
def pad_to_patches(x: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Pad images (B, C, height, width) with zeros, below and to the right, to whole patches.

    NOTE: what timm's PatchEmbed does with `dynamic_img_pad`, but without a copy where nothing is to be padded, and in
    an expression whose bounds torch.export can prove.
    """
    rows, columns = patch_size
    pad_h = (x.shape[2] + rows - 1) // rows * rows - x.shape[2]
    pad_w = (x.shape[3] + columns - 1) // columns * columns - x.shape[3]
    return F.pad(x, (0, pad_w, 0, pad_h))


@register_notrace_function
def blank_invalid(x: Tensor, patch_valid: Tensor | None, patch_size: tuple[int, int]) -> Tensor:
    """Set the pixels of invalid patches to zero, in images (B, C, height, width) of whole patches.

    Their weight in the attention is zero, but zero times what uninitialised memory may hold, NaN, is NaN; in the
    gradient of the patch embedding, too.

    Raises:
        ValueError: `patch_valid` is not (B, N) bool, or (eager mode only) an image has no valid patch.
    """
    if patch_valid is None:
        return x
    B, _, height, width = x.shape
    rows, columns = height // patch_size[0], width // patch_size[1]
    check_valid(patch_valid, B, rows * columns, "patch_valid")
    grid = patch_valid.reshape(B, 1, rows, 1, columns, 1)
    pixels = grid.expand(-1, -1, -1, patch_size[0], -1, patch_size[1]).reshape(B, 1, height, width)
    return x.masked_fill(~pixels, 0.0)


@register_notrace_function
def initial_memory(learned: Tensor | None, memory: Tensor | None, x: Tensor) -> Tensor:
    """The memory that enters the first block, (B, L, C): the caller's if given, else the learned one (1, L, C).

    Args:
        learned: None for a mixer without memory; what enters is then (B, 0, C).
        memory: The caller's.
        x: Patches (B, N, C).

    Raises:
        ValueError: The caller's has another shape than (B, L, C), or the model has no memory.
    """
    batch = x.shape[0]
    if learned is None:
        if memory is not None:
            raise ValueError("memory was given to a model whose mixer has none")
        return x.new_empty(batch, 0, x.shape[2])
    if memory is None:
        return learned.expand(batch, -1, -1)
    if memory.dim() != 3 or memory.shape[0] != batch or memory.shape[1:] != learned.shape[1:]:
        want = [batch, learned.shape[1], learned.shape[2]]
        raise ValueError(f"memory must have shape {want}, got {list(memory.shape)}")
    return memory.to(learned.dtype)


@register_notrace_function
def join_tokens(memory: Tensor, x: Tensor) -> Tensor:
    """Memory (B, L, C), then patches (B, N, C): (B, L + N, C); without a memory, the patches as they are."""
    return torch.cat([memory, x], dim=1) if memory.shape[1] else x


@register_notrace_function
def key_mask(patch_valid: Tensor | None) -> Tensor | None:
    """Attention mask (B, 1, 1, N) of a validity mask (B, N); a row without any valid patch attends to all of them."""
    if patch_valid is None:
        return None
    return (patch_valid | ~patch_valid.any(dim=1, keepdim=True))[:, None, None, :]


@register_notrace_function
def pool_tokens(x: Tensor, pool_type: str, num_prefix_tokens: int, patch_valid: Tensor | None = None) -> Tensor:
    """Pool memory and patches (B, L + N, C) to (B, C); unchanged for "". Invalid patches (B, N) are left out."""
    if pool_type == "":
        return x
    slots, patches = x[:, :num_prefix_tokens].mean(dim=1), x[:, num_prefix_tokens:]
    if pool_type == "token":
        return slots
    if patch_valid is None:
        avg, largest = patches.mean(dim=1), patches.amax(dim=1)
    else:
        hidden = ~patch_valid[:, :, None]
        count = patch_valid.sum(dim=1, keepdim=True).clamp(min=1)
        # sums of many tokens leave the range of float16 and the precision of bfloat16
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        avg = (patches.masked_fill(hidden, 0.0).sum(dim=1, dtype=wide) / count).to(x.dtype)
        largest = patches.masked_fill(hidden, -65504.0).amax(dim=1)
    return join_pools(pool_type, slots, avg, largest)


def join_pools(pool_type: str, slots: Tensor, avg: Tensor, largest: Tensor) -> Tensor:
    """What a pooling makes of the mean slot, the mean patch and the maximum over patches, (B, C) each."""
    if pool_type == "token":
        return slots
    if pool_type == "avg":
        return avg
    if pool_type == "max":
        return largest
    if pool_type == "avgmax":
        return 0.5 * (avg + largest)
    return 0.5 * (avg + slots)  # "both"


@register_notrace_module
class PatchMaskDrop(nn.Module):
    """Hide a random share of the patches in training: their content is zero, the pack and local mixing skip them.

    NOTE: timm's PatchDropout shortens the sequence. A grid for local mixing has to stay whole, so this one saves no
        work.
    """

    def __init__(self, prob: float) -> None:
        """
        Args:
            prob: Share of patches to hide, in [0, 1).
        """
        super().__init__()
        self.prob = prob

    def forward(self, x: Tensor, patch_valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Map (B, N, C) to itself with hidden patches at zero, and the mask (B, N) of those still to be read."""
        if not self.training or self.prob == 0.0:
            return x, patch_valid
        score = torch.rand(x.shape[0], x.shape[1], device=x.device)
        if patch_valid is not None:
            score = score.masked_fill(~patch_valid, -1.0)
        # the patch with the highest score always stays, so that no row is left empty
        keep = (score >= self.prob) | (score == score.amax(dim=1, keepdim=True))
        return x * keep[:, :, None].to(x.dtype), keep


def unwrap_state_dict(state_dict: dict) -> dict[str, Tensor]:
    """The model's own state dict in what a training script saved: under a key of its own (EMA first), with the prefix
    that a Lightning task gives to the model that it holds, or bare.
    """
    for wrapper in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(state_dict.get(wrapper), dict):
            state_dict = state_dict[wrapper]
    inner = {k.removeprefix("model."): v for k, v in state_dict.items() if k.startswith("model.")}
    return inner or state_dict


# what a block has or has not, depending on who reads its memory and its patches
_OPTIONAL = re.compile(r"(attn\.(unpack_|proj)|(norm|ls)[12](_memory)?\.|mlp(_memory)?\.)")


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Fit a checkpoint to `model`: unwrap it, resample a patch embedding of another patch size, and drop what the last
    block of this model was built without (see `global_pool`). Anything else that does not fit is left for strict
    loading.
    """
    own = model.state_dict()
    last = f"blocks.{len(model.blocks) - 1}."
    out = {}
    for key, value in unwrap_state_dict(state_dict).items():
        if key not in own and key.startswith(last) and _OPTIONAL.match(key, len(last)):
            continue
        if key == "patch_embed.proj.weight" and value.shape[-2:] != own[key].shape[-2:]:
            value = resample_patch_embed(value, list(own[key].shape[-2:]), verbose=True)
        out[key] = value
    return out
