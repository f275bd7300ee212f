"""What an initialiser is given and what it returns. It never sees a module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from lorakit.specs import AdapterSpec
    from lorakit.types import Factors


@dataclass(frozen=True, slots=True)
class InitContext:
    """The circumstances of one new pair of factors: one low-rank block of an adapter.

    Attributes:
        spec: kind, rank, scaling, dtype and device of the adapter on this weight.
        read_weight: gives the block's base weight as a fresh (out, in) tensor of the dtype asked for; costs nothing
            unless called.
    """

    spec: AdapterSpec
    read_weight: Callable[[torch.dtype], Tensor]

    @property
    def rank(self) -> int:
        """The block's rank: `spec.r`, but for grouped convolutions, whose groups share it."""
        return self.spec.layout.block_rank(self.spec.r)

    @property
    def shape(self) -> tuple[int, int]:
        """The block's (out, in)."""
        return self.spec.layout.block_shape


class InitResult(NamedTuple):
    """What a scheme makes for one block.

    Attributes:
        factors: of the adapter.
        offset: factors whose delta is taken off the base weight for this adapter alone: the adapter adds
            `factors.delta() - offset.delta()` to the untouched base. For schemes that begin from a part of the weight
            (PiSSA, OLoRA, CorDA, LoRA-GA); None elsewhere. Its scaling stays what it is here.
        base_weight: (out, in), what the base is to hold from now on, for schemes that are meant to change the base
            (LoftQ: its quantised values); None elsewhere.
    """

    factors: Factors
    offset: Factors | None = None
    base_weight: Tensor | None = None
