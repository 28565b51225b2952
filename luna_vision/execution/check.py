"""The check that all executions share."""

from torch import nn

from ..models import LunaVit

__all__ = ["check_model"]


def check_model(model: nn.Module, execution: str) -> None:
    """Raise a ValueError that names the execution unless the model is a Luna ViT with a memory."""
    if not isinstance(model, LunaVit):
        raise ValueError(f"{execution} needs a Luna ViT, got {type(model).__name__}")
    if model.memory is None:
        raise ValueError(f"{execution} needs a memory, which connects the parts of an image: use mixer='luna'")
    if model.memory.is_meta:
        raise ValueError(
            f"{execution} needs the memory on a device, but it is offloaded: give accelerate.dispatch_model a device "
            "for `memory`, and offload the blocks"
        )
