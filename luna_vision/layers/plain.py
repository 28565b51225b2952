"""Which linear layers the absorbed form may read instead of calling them."""

from torch import nn

__all__ = ["is_plain"]


def is_plain(layer: nn.Module) -> bool:
    """Whether calling this layer does what its weight and bias say, and nothing else.

    Not so after LoRA, quantisation, pruning, offload and the like, which replace a layer, its `forward` or its weight,
    or hook it. A parametrized layer is plain: its `weight` is the one that acts. Hooks of all modules at once
    (`torch.nn.modules.module.register_module_forward_hook`) do not count: profilers use them.
    """
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward or "forward" in vars(layer):
        return False
    if any((layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)):
        return False
    # quantised and distributed tensors are made for `F.linear`, and may refuse what the absorbed form does to them
    return not any(hasattr(parameter, "__tensor_flatten__") for parameter in layer._parameters.values())
