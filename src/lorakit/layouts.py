"""How the factors of an adapter are stored for one kind of weight, and the low-rank blocks that they stand for.

A matrix, an embedding and an ordinary convolution have one block: `delta = scaling * B @ A`. A grouped convolution has
one for each group of outputs, a stack of expert matrices one for each expert. Whatever asks about weights (merging,
combining, norms) works on blocks, so it works for every kind alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from lorakit.types import Factors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Layout:
    """The shapes of a weight and of the factors that change it.

    Attributes:
        out: outputs of the weight: features, channels, or the embedding's dimension.
        row: the shape of what one row of A multiplies: (in,), or (in_channels, *kernel) of a convolution.
        groups: of a convolution. A sees all input channels, B only the ranks of its own group.
        experts: how many matrices are stacked along the first dimension of the weight; 0 for a plain matrix.
        transposed: the weight is stored (in, out), or (experts, in, out).
    """

    out: int
    row: tuple[int, ...]
    groups: int = 1
    experts: int = 0
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of one block of the weight, or of the whole of a grouped convolution made dense."""
        return self.out, math.prod(self.row)

    @property
    def blocks(self) -> int:
        """How many low-rank blocks an adapter consists of."""
        return max(self.groups, self.experts, 1)

    def block_rank(self, r: int) -> int:
        """The rank of one block."""
        return r // self.groups

    @property
    def block_shape(self) -> tuple[int, int]:
        """(out, in) of one block."""
        out, inner = self.shape
        return out // self.groups, inner

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes in which A and B are stored."""
        stacked = max(self.experts, 1)
        pointwise = (1,) * (len(self.row) - 1)
        return (r * stacked, *self.row), (self.out, r // self.groups * stacked, *pointwise)

    def split(self, A: Tensor, B: Tensor, scaling: float, bias: Tensor | None = None) -> tuple[Factors, ...]:
        """The blocks of stored factors, sharing memory with them.

        Args:
            A: of the first of `factor_shapes(r)`.
            B: of the second.
            scaling: of the adapter.
            bias: (out,) or None. A grouped convolution's is cut like its outputs; experts have none.
        """
        A = A.reshape(A.shape[0], -1)
        B = B.reshape(B.shape[0], -1)
        if self.experts:
            each_A = A.reshape(self.experts, -1, A.shape[1])
            each_B = B.reshape(self.out, -1, self.experts).permute(2, 0, 1)
            pairs = list(zip(each_A, each_B, strict=True))
        else:
            pairs = list(zip(A.chunk(self.groups), B.chunk(self.groups), strict=True))
        assert bias is None or not self.experts, "a stack of matrices has no bias"
        biases = [None] * len(pairs) if bias is None else list(bias.chunk(len(pairs)))
        return tuple(Factors(a, b, scaling, c) for (a, b), c in zip(pairs, biases, strict=True))

    def join(self, blocks: Sequence[Factors]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Stored A, B and bias of blocks, the inverse of `split`; lesser ranks are filled with zeros.

        The scalings, which `split` gives to each block, must be equal; they are not folded in. Of a single block the
        stored tensors share memory with its own.
        """
        assert len(blocks) == self.blocks, f"{len(blocks)} blocks for {self.blocks}"
        pointwise = (1,) * (len(self.row) - 1)
        if len(blocks) == 1:
            (only,) = blocks
            if not pointwise:
                return only.A.contiguous(), only.B.contiguous(), only.bias
            A, B = only.A.reshape(-1, *self.row), only.B.reshape(self.out, -1, *pointwise)
            return A.contiguous(), B.contiguous(), only.bias
        assert len({block.scaling for block in blocks}) == 1, "blocks of one adapter share a scaling"
        rank = max(block.rank for block in blocks)
        As = torch.stack([filled(block.A, rank, dim=0) for block in blocks])
        Bs = torch.stack([filled(block.B, rank, dim=1) for block in blocks])
        if self.experts:
            B = Bs.flatten(1).t().reshape(self.out, -1)
        else:
            B = Bs.reshape(self.out, rank, *pointwise)
        biases = [block.bias for block in blocks if block.bias is not None]
        return As.reshape(-1, *self.row).contiguous(), B.contiguous(), torch.cat(biases) if biases else None

    def dense(self, A: Tensor, B: Tensor) -> Tensor:
        """`B @ A` of stored factors in the shape of the stored weight, of a grouped convolution's made dense.

        Differentiable; computed and returned in the dtype of the factors.
        """
        products = torch.stack([block.B @ block.A for block in self.split(A, B, 1.0)])
        products = products.mT if self.transposed else products
        if self.experts:
            return products
        matrix = products.flatten(0, 1)
        return matrix if self.transposed else matrix.view(self.out, *self.row)

    def regions(self, weight: Tensor) -> tuple[Tensor, ...]:
        """For each block the part of a stored weight that it changes: a matrix, (in, out) if `transposed`.

        Args:
            weight: as it is stored; a grouped convolution's made dense (`make_dense`).

        Returns:
            Views that share memory with `weight`, which must be contiguous.
        """
        if self.experts:
            return tuple(weight)
        matrix = weight.view(weight.shape[0], -1)
        return tuple(matrix.chunk(self.groups))

    def by_output(self, rows: Tensor) -> Tensor:
        """(out,) numbers in the shape that multiplies the stored weight output by output."""
        if self.transposed:
            return rows
        return rows.view(-1, *(1,) * len(self.row))

    def make_dense(self, weight: Tensor) -> Tensor:
        """A grouped convolution's weight (out, in / groups, *kernel) as that of an ungrouped one, others as they are.

        An adapter mixes the channels of all groups, which a grouped weight has no place for. Differentiable.
        """
        if self.groups == 1:
            return weight
        group = torch.arange(self.groups, device=weight.device)
        of_output = group.repeat_interleave(self.out // self.groups)
        of_channel = group.repeat_interleave(self.row[0] // self.groups)
        own = (of_output[:, None] == of_channel).view(self.out, self.row[0], *(1,) * (len(self.row) - 1))
        return torch.where(own, torch.cat([weight] * self.groups, dim=1), 0)


@lru_cache(maxsize=1024)  # a model has hundreds of matrices and a dozen shapes
def matrix_layout(out: int, inner: int, *, transposed: bool = False) -> Layout:
    """The layout of a plain matrix of (out, in)."""
    return Layout(out, (inner,), transposed=transposed)


def filled(tensor: Tensor, size: int, *, dim: int) -> Tensor:
    """The tensor with zeros up to a size along one dimension; itself where it has that size. Differentiable."""
    lacking = size - tensor.shape[dim]
    if not lacking:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = lacking
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)
