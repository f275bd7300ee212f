"""A module's double for one call: everything is shared with the module but for some parameters and children."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

M = TypeVar("M", bound="nn.Module")


def stand_in(module: M, parameters: Mapping[str, Any], children: Mapping[str, nn.Module] | None = None) -> M:
    """A module of the same class, mode and hooks that holds these values instead of its own.

    Args:
        module: not changed.
        parameters: tensors, or what acts like one, by the names of parameters.
        children: modules by the names of children.
    """
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__["_parameters"] = {**module._parameters, **parameters}
    twin.__dict__["_modules"] = {**module._modules, **(children or {})}
    return twin


def call_on_stand_in(
    module: nn.Module,
    parameters: Mapping[str, Any],
    children: Mapping[str, nn.Module],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """What the module gives when it holds these values; what its forward notes on itself, it keeps."""
    twin = stand_in(module, parameters, children)
    before = twin.__dict__.copy()
    try:
        return twin(*args, **kwargs)
    finally:
        for name, value in twin.__dict__.items():
            if name not in before or before[name] is not value:
                module.__dict__[name] = value
