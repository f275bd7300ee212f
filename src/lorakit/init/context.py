"""What an initialiser is given and what it returns. It never sees a module."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from lorakit.errors import NonFiniteError
from lorakit.ops import is_finite
from lorakit.types import Factors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from lorakit.specs import AdapterSpec


@dataclass(frozen=True, slots=True)
class InitContext:
    """The circumstances of one new pair of factors: one low-rank block of an adapter.

    Attributes:
        spec: kind, rank, scaling, dtype and device of the adapter on this weight, and the scheme's options.
        read_weight: gives the block's base weight, (out, in), in the dtype asked for; costs nothing unless called.
            Not to be written into: blocks share it, and it may be the base's own memory.
        block: which of the weight's blocks it is.
    """

    spec: AdapterSpec
    read_weight: Callable[[torch.dtype], Tensor]
    block: int = 0

    @property
    def rank(self) -> int:
        """The block's rank: `spec.r`, but for grouped convolutions, whose groups share it."""
        return self.spec.layout.block_rank(self.spec.r)

    @property
    def shape(self) -> tuple[int, int]:
        """The block's (out, in)."""
        return self.spec.layout.block_shape

    @property
    def own_inputs(self) -> slice:
        """The columns of the block's weight that are not zero by construction: of a group, those of its channels."""
        groups = self.spec.layout.groups
        columns, group = (
            self.shape[1] // groups,
            self.block % groups,
        )  # of experts every block has all columns
        return slice(group * columns, (group + 1) * columns)

    def weight(self) -> Tensor:
        """The block's base weight, (out, in), to compute with: float64 for an adapter in float64, else float32."""
        return self.read_weight(torch.promote_types(self.spec.dtype, torch.float32))

    def factors(self, A: Tensor, B: Tensor) -> Factors:
        """A (rank, in) and B (out, rank) as the adapter's: in its dtype and with its scaling; a bias is zero.

        Raises:
            NonFiniteError: they hold more than the adapter's dtype can hold.
        """
        spec = self.spec
        A, B = narrowed(A, spec.dtype), narrowed(B, spec.dtype)
        bias = torch.zeros(self.shape[0], dtype=spec.dtype, device=A.device) if spec.lora_bias else None
        return Factors(A, B, spec.scaling, bias)


def narrowed(values: Tensor, dtype: torch.dtype) -> Tensor:
    """First values of an adapter in its dtype, contiguous; `NonFiniteError` if that cannot hold them."""
    own = values.to(dtype).contiguous()
    check_finite(f"the first values of the adapter in {dtype}", own)
    return own


def check_finite(what: str, *tensors: Tensor) -> None:
    """Raise `NonFiniteError` unless all the numbers are finite; tensors on meta have none."""
    for tensor in tensors:
        if not tensor.is_meta and not is_finite(tensor):
            raise NonFiniteError(f"{what}: NaN or infinity")


class Misfit(NamedTuple):
    """How far a quantised base is from the weight that it stands for; Frobenius norms.

    Attributes:
        weight: of the weight W itself.
        before: of W - Q, where Q is W quantised without an adapter.
        after: of W - Q - scaling * B @ A, as adapter and base begin.
    """

    weight: float
    before: float
    after: float

    @staticmethod
    def total(parts: Sequence[Misfit]) -> Misfit:
        """Of several blocks or weights taken together."""
        return Misfit(*(math.hypot(*norms) for norms in zip(*parts, strict=True)))

    def __str__(self) -> str:
        size = self.weight or 1.0
        return f"error {self.before / size:.3%} -> {self.after / size:.3%} of the weight's norm"


class InitResult(NamedTuple):
    """What a scheme makes for one block.

    Attributes:
        factors: of the adapter.
        offset: factors whose delta is taken off the base weight for this adapter alone: the adapter adds
            `factors.delta() - offset.delta()` to the untouched base. For schemes that begin from a part of the weight
            (PiSSA, OLoRA, CorDA, LoRA-GA); None elsewhere. Its scaling stays what it is here.
        base_weight: (out, in), what the base is to hold from now on, for schemes that are meant to change the base
            (LoftQ: its quantised values); None elsewhere.
        misfit: how well base and adapter stand for the weight, for schemes that give `base_weight`; None elsewhere.
    """

    factors: Factors
    offset: Factors | None = None
    base_weight: Tensor | None = None
    misfit: Misfit | None = None
