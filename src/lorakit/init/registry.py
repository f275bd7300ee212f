"""Initialisers by name. A new scheme is one function and one row here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lorakit.init.random import gaussian, kaiming, orthogonal, random

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lorakit.init.context import InitContext, InitResult

INITIALISERS: Mapping[str, Callable[[InitContext], InitResult]] = {
    "default": kaiming,
    "gaussian": gaussian,
    "random": random,
    "orthogonal": orthogonal,
}


def initialiser_name(init_lora_weights: bool | str) -> str:
    """The registry's name for a value of `LoraConfig.init_lora_weights` (True and False have names too)."""
    if isinstance(init_lora_weights, bool):
        return "default" if init_lora_weights else "random"
    return init_lora_weights


@torch.no_grad()
def initialise(context: InitContext) -> InitResult:
    """New factors for one module, by the scheme that its spec names."""
    return INITIALISERS[context.spec.init](context)
