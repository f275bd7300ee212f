"""The flags of what adapters consist of: who wants gradients, and who is in training mode.

Switching adapters, or the mode of a model, visits every adapter of every layer, since somebody may have changed flags by
hand. So a flag is set where it is kept, and one that is right is only looked at: 0.2 microseconds for a factor, a tenth
of asking the layer for it by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from lorakit.layers.varied import PartHolder

if TYPE_CHECKING:
    from collections.abc import Collection

    from lorakit.layers.holding import HoldingLayer

NO_FACTORS = frozenset({"base_layer", "lora_dropout", "lora_offset", "token_adapter"})
"""The parts of a layer that hold no parameters by adapter."""
PLAIN = frozenset({nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Identity, nn.Dropout, PartHolder})
"""Modules of an adapter that hold their parameters themselves and no modules, unlike what FSDP or a parametrization made
of one."""


def flag_factors(layer: HoldingLayer, names: Collection[str]) -> set[str]:
    """Let the factors of these adapters want gradients, and those of no other.

    Returns:
        The adapters that were passed over: some of their parameters are never trained, or are not held plainly.
    """
    left = set(layer.frozen)
    if layer._modules["token_adapter"] is not None:
        left.update(layer.adapters)
    for part, holder in layer._modules.items():
        if holder is None or part in NO_FACTORS:
            continue
        for name, module in holder._modules.items():
            if name in left or module is None or type(module) not in PLAIN:
                left.add(name)
                continue
            wanted = name in names
            for parameter in module._parameters.values():
                if parameter is not None and parameter.requires_grad is not wanted:
                    parameter.requires_grad_(wanted)
        for name, parameter in holder._parameters.items():
            wanted = name in names
            if name not in left and parameter is not None and parameter.requires_grad is not wanted:
                parameter.requires_grad_(wanted)
    return left


def set_mode(holder: nn.ModuleDict, *, training: bool) -> None:
    """Let a dictionary of modules and these be in training mode, or not: `nn.Module.train`."""
    holder.__dict__["training"] = training
    for module in holder._modules.values():
        if type(module) in PLAIN:
            module.__dict__["training"] = training
        elif module is not None:
            module.train(training)
