"""Is anybody watching or replacing what a module does? Then it must be called, not computed around."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.modules import module as _module

if TYPE_CHECKING:
    from torch import nn


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
