"""Initialisers by name. A new scheme is one function and one row here."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from lorakit.init.context import InitContext
from lorakit.init.random import gaussian, kaiming, orthogonal, random

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from lorakit.init.context import InitResult
    from lorakit.specs import AdapterSpec

INITIALISERS: Mapping[str, Callable[[InitContext], InitResult]] = {
    "default": kaiming,
    "gaussian": gaussian,
    "random": random,
    "orthogonal": orthogonal,
    "eva": kaiming,  # until `initialize_lora_eva_weights` has seen data
    "eva": kaiming,  # until `initialize_lora_eva_weights` has seen data
}

FROZEN: Mapping[str, frozenset[str]] = {"mica": frozenset({"B"})}
"""Which factors are never trained, by scheme."""
TAKES_OFF = frozenset({"pissa", "olora", "corda", "lora_ga"})
"""Schemes that give an offset (`InitResult.offset`)."""
REPLACES_BASE = frozenset({"loftq"})
"""Schemes that are meant to change the base (`InitResult.base_weight`)."""


def initialiser_name(init_lora_weights: bool | str) -> str:
    """The registry's name for a value of `LoraConfig.init_lora_weights` (True and False have names too)."""
    if isinstance(init_lora_weights, bool):
        return "default" if init_lora_weights else "random"
    return init_lora_weights


@torch.no_grad()
def initialise(spec: AdapterSpec, read: Callable[[torch.dtype], Tensor]) -> tuple[InitResult, ...]:
    """The new factors of each block of an adapter, by the scheme that its spec names.

    Args:
        spec: what is planned for the weight.
        read: gives the weight as `WeightCodec.read` does; called only by schemes that look at it.
    """
    scheme = INITIALISERS[spec.init]
    return tuple(
        scheme(InitContext(spec, partial(_block, spec, read, block))) for block in range(spec.layout.blocks)
    )


def _block(
    spec: AdapterSpec, read: Callable[[torch.dtype], Tensor], block: int, dtype: torch.dtype
) -> Tensor:
    weight, layout = read(dtype), spec.layout
    if layout.experts:
        return weight[block]
    if layout.groups > 1:  # factors see the channels of all groups, so the block has zeros at those of others
        grouped = weight.view(layout.out, layout.row[0] // layout.groups, *layout.row[1:])
        return layout.make_dense(grouped).flatten(start_dim=1).chunk(layout.groups)[block].contiguous()
    return weight
