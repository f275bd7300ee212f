"""What the floors exchange: the two factors of an adapter, and the rows of a plan.

`Factors` is the only form in which layers, files and combiners hand weights to each other; the dense
`B @ A` is built only where the answer is dense.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """A low-rank change of a weight, `scaling * B @ A` (Hu et al., 2021, arXiv:2106.09685).

    Attributes:
        A: (r, in), any floating dtype.
        B: (out, r), same device as A.
        scaling: the factor on `B @ A`: `lora_alpha / r`, or `lora_alpha / sqrt(r)` under rsLoRA.
        bias: (out,) or None, the bias of B (`lora_bias=True`); it changes the base's bias by `scaling * bias`.
    """

    A: Tensor
    B: Tensor
    scaling: float
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.A.ndim == 2, f"A must be (r, in), got {tuple(self.A.shape)}"
        assert self.B.ndim == 2, f"B must be (out, r), got {tuple(self.B.shape)}"
        assert self.A.shape[0] == self.B.shape[1], f"ranks differ: {self.A.shape} and {self.B.shape}"

    @property
    def rank(self) -> int:
        """The number of rows of A, which is the number of columns of B."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight that the factors change."""
        return self.B.shape[0], self.A.shape[1]

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense change `scaling * B @ A`, (out, in), computed and returned in `dtype`."""
        return (self.B.to(dtype) @ self.A.to(dtype)).mul_(self.scaling)

    def to(self, dtype: torch.dtype) -> Factors:
        """The same in another dtype."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return Factors(self.A.to(dtype), self.B.to(dtype), self.scaling, bias)

    @staticmethod
    def cat(parts: Sequence[Factors]) -> Factors:
        """One pair of factors whose delta is the exact sum of the deltas of `parts` (ranks add up).

        Each scaling is folded into its B, so the result has scaling 1. Biases are summed alike.
        """
        biases = [part.bias * part.scaling for part in parts if part.bias is not None]
        return Factors(
            A=torch.cat([part.A for part in parts], dim=0),
            B=torch.cat([part.B * part.scaling for part in parts], dim=1),
            scaling=1.0,
            bias=torch.stack(biases).sum(dim=0) if biases else None,
        )

    def split(self, ranks: Sequence[int]) -> list[Factors]:
        """The inverse of `cat`: consecutive slices of the given ranks, whose deltas sum to this delta."""
        assert sum(ranks) == self.rank, f"ranks {ranks} do not sum to {self.rank}"
        pairs = zip(self.A.split(list(ranks), dim=0), self.B.split(list(ranks), dim=1), strict=True)
        bias = self.bias
        out = []
        for A, B in pairs:
            out.append(Factors(A, B, self.scaling, bias))
            bias = None  # the sum of the parts carries the bias once
        return out
