"""What an initialiser is given and what it returns. It never sees a module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from lorakit.types import AdapterSpec, Factors


@dataclass(frozen=True, slots=True)
class InitContext:
    """The circumstances of one new pair of factors.

    Attributes:
        spec: shape, rank, scaling, dtype and device of the adapter on this module.
        read_weight: gives the base weight as a fresh (out, in) tensor of the dtype asked for; costs nothing
            unless called.
    """

    spec: AdapterSpec
    read_weight: Callable[[torch.dtype], Tensor]


class InitResult(NamedTuple):
    """New factors, and the new base weight (out, in) for schemes that change it, else None."""

    factors: Factors
    base_weight: Tensor | None = None
