"""How two low-rank changes of one weight relate, read from their factors in float64; the dense changes are never built."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from lorakit.ops.norms import frobenius_norm
from lorakit.types import Factors

if TYPE_CHECKING:
    from torch import Tensor

    from lorakit.ops.low_rank import LowRank

# Singular values below this share of the largest are rounding: float32 factors, of which products have been formed.
_NOTHING = 1e-6


@dataclass(frozen=True)
class Angles:
    """How two subspaces lie to each other.

    Attributes:
        overlap: mean squared cosine of the principal angles, in [0, 1]: 1 if the smaller lies in the larger one.
        smallest, largest: principal angles, in degrees.
    """

    overlap: float
    smallest: float
    largest: float


@torch.no_grad()
def inner_product(a: Factors, b: Factors) -> float:
    """The Frobenius inner product of two deltas, `s t sum((B^T B') * (A A'^T))`, in float64."""
    left = a.B.double().mT @ b.B.double()
    right = a.A.double() @ b.A.double().mT
    return float(a.scaling * b.scaling * (left * right).sum())


@torch.no_grad()
def difference_norm(a: Factors, b: Factors) -> float:
    """The Frobenius norm of the first delta minus the second, in float64; no digits cancel that the factors have."""
    minus = replace(b, scaling=-b.scaling)
    return frobenius_norm(Factors.cat([a.to(torch.float64), minus.to(torch.float64)]))


def numerical_rank(S: Tensor) -> int:
    """How many of falling singular values are more than rounding; 0 of a zero matrix."""
    if not S.numel() or float(S[0]) == 0.0:
        return 0
    return int((S / S[0] > _NOTHING).sum())


def column_angles(a: LowRank, b: LowRank) -> Angles | None:
    """The principal angles between the column spaces of two deltas; None if one of them is zero.

    The overlap is the similarity of subspaces of Hu et al., 2021, arXiv:2106.09685, section 7.2. Angles: Björck and Golub,
    1973, doi:10.2307/2005662.
    """
    return _angles(a.U[:, : numerical_rank(a.S)], b.U[:, : numerical_rank(b.S)])


def row_angles(a: LowRank, b: LowRank) -> Angles | None:
    """The same between their row spaces."""
    return _angles(a.Vh[: numerical_rank(a.S)].mT, b.Vh[: numerical_rank(b.S)].mT)


def _angles(Q: Tensor, P: Tensor) -> Angles | None:
    """Of two sets of orthonormal columns, (dim, k) and (dim, l)."""
    if not Q.shape[1] or not P.shape[1]:
        return None
    if Q.shape[1] < P.shape[1]:
        Q, P = P, Q
    cosines = torch.linalg.svdvals(Q.mT @ P).clamp(max=1.0)
    # small angles have no digits in their cosine; their sine, from what the larger space leaves of the smaller, has
    sines = torch.linalg.svdvals(P - Q @ (Q.mT @ P)).clamp(max=1.0).flip(0)
    angles = torch.rad2deg(torch.where(cosines > 0.7, sines.asin(), cosines.acos()))
    return Angles(float(cosines.square().mean()), float(angles[0]), float(angles[-1]))
