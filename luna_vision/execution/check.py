"""What every execution asks of a model."""

from torch import nn

from ..models import LunaVit

__all__ = ["check_model"]


def check_model(model: nn.Module, execution: str) -> None:
    """Raise a ValueError that names the execution, unless the model is a Luna ViT with a memory."""
    if not isinstance(model, LunaVit):
        raise ValueError(f"{execution} takes a Luna ViT, got {type(model).__name__}")
    if model.memory is None:
        raise ValueError(
            f"{execution} takes a model with a memory, through which the parts of an image learn of each other: with "
            "mixer='luna', not another one"
        )
    if model.memory.is_meta:
        raise ValueError(
            f"{execution} takes a model whose memory is on a device, and this one's is offloaded: give "
            "accelerate.dispatch_model a device for `memory` and offload the blocks"
        )
