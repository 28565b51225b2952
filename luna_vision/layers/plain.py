"""What others have done to a layer: whether it must be called, and whether its output is watched."""

import torch
from timm.layers import LayerNorm
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["has_hooks", "is_hooked", "is_plain", "is_plain_norm"]


def is_plain(layer: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether calling this layer of a kind does what its weight and bias say, and nothing else.

    Not so after LoRA, quantisation, pruning, offload and the like, which replace a layer, its `forward` or its weight,
    or hook it. A parametrized layer is plain: its `weight` is the one that acts. Hooks of all modules at once
    (`torch.nn.modules.module.register_module_forward_hook`) do not count: profilers use them.
    """
    if not isinstance(layer, kind) or type(layer).forward is not kind.forward or "forward" in vars(layer):
        return False
    if is_hooked(layer):
        return False
    return not any(parameter is not None and _is_wrapper(parameter) for parameter in layer._parameters.values())


def is_plain_norm(layer: nn.Module) -> bool:
    """Whether calling this layer is the LayerNorm that its weight and bias say, and nothing else."""
    if type(layer) not in (nn.LayerNorm, LayerNorm) or "forward" in vars(layer) or is_hooked(layer):
        return False
    return all(p is not None and not _is_wrapper(p) for p in (layer.weight, layer.bias))


@torch.jit.ignore
def has_hooks(module: nn.Module) -> bool:
    """Whether a module or one inside it has hooks, or all modules have."""
    return _has_any_global_hook() or any(map(is_hooked, module.modules()))


def is_hooked(module: nn.Module) -> bool:
    """Whether a module has hooks of its own."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _is_wrapper(parameter: Tensor) -> bool:
    """Whether it is a quantised or distributed tensor: made for `F.linear`, and free to refuse what the absorbed form
    does to a weight."""
    if torch.compiler.is_dynamo_compiling():  # which does not see the methods of such a tensor
        return type(parameter) not in (nn.Parameter, Tensor)
    return is_traceable_wrapper_subclass(parameter)
