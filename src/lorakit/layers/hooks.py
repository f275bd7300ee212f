"""Is anybody watching or replacing what a module does? Then it must be called, not computed around."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.nn.modules import module as _module

from lorakit.ops.reference import must_compose

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

M = TypeVar("M", bound="nn.Module")


def is_observed(module: nn.Module) -> bool:
    """Whether calling `module` would do more than its class's `forward`.

    True with hooks on it (FSDP, tensor parallelism, ZeRO, profilers), global module hooks, a replaced `forward`
    (accelerate) or parametrisations (which change the class). Costs some dictionary look-ups.
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or "parametrizations" in module._modules
        or _module._has_any_global_hook()
    )


def may_keep_output(module: nn.Module) -> bool:
    """Whether a hook gets to see what `module` returns."""
    return bool(module._forward_hooks or _module._has_any_global_hook())


def add_to_output(y: Tensor, z: Tensor, base: nn.Module, plain: frozenset[type[nn.Module]]) -> Tensor:
    """`y + z` where y is what `base` returned; written into y where that is known to be nobody else's.

    Args:
        y: given away.
        z: of the shape of y.
        base: the module that gave y.
        plain: classes whose forward returns a new tensor and keeps it for no gradient.
    """
    if type(base) in plain and not is_observed(base) and not must_compose(y, ()):
        return y.add_(z)
    return y + z


def inside(module: nn.Module, kinds: type[M] | tuple[type[M], ...]) -> M:
    """The module of one of these types: `module`, or what a wrapper that took its place (sharding) wraps."""
    if isinstance(module, kinds):
        return module
    return next(found for found in module.modules() if isinstance(found, kinds))


def outside_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which products keep the dtype of their operands, for weights that are to be exact."""
    kind = device.type
    knows_autocast = torch.amp.is_autocast_available(kind)  # a meta device does not
    if knows_autocast and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
