"""The change of one weight in factors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from lorakit.ops.low_rank import rank_for, truncated_svd
from lorakit.types import Factors

if TYPE_CHECKING:
    from torch import Tensor

    from lorakit.layouts import Layout
    from lorakit.ops.low_rank import LowRank

_FIRST = 16  # ranks that are tried first where an energy is asked for; each try after has twice as many
_TOLERANCE = 1e-5


class Factored(NamedTuple):
    """The factors of a change, and what they lose of it.

    Attributes:
        factors: of scaling 1; A and B share the singular values evenly.
        norm: the Frobenius norm of the change.
        error: that of the change minus the factors' delta, with the rounding to their dtype, relative to `norm`.
    """

    factors: Factors
    norm: float
    error: float


@torch.no_grad()
def factored(
    change: Tensor, layout: Layout, rank: int | None, energy: float | None, dtype: torch.dtype
) -> Factored:
    """The best factors of a change, from its leading singular triplets (Eckart and Young, 1936).

    Args:
        change: of the weight in the shape in which it is stored, fp32 or fp64; overwritten.
        layout: of the weight, of one block.
        rank: of the factors, at the most; None: as many as `energy` needs.
        energy: the share of the squared norm that is enough; None: all ranks that are asked for.
        dtype: of the factors.

    Raises:
        NonFiniteError: the change holds NaN or infinity.
    """
    (region,) = layout.regions(change.contiguous())
    wanted = region.mT if layout.transposed else region
    svd = _leading(wanted, rank, energy)
    root = svd.S.sqrt()
    factors = Factors((root[:, None] * svd.Vh).to(dtype), (svd.U * root).to(dtype), 1.0)
    wanted.addmm_(factors.B.to(wanted.dtype), factors.A.to(wanted.dtype), alpha=-1.0)
    lost = float(torch.linalg.vector_norm(torch.linalg.vector_norm(wanted, dim=1), dtype=torch.float64))
    norm = math.sqrt(svd.energy)
    return Factored(factors, norm, lost / norm if norm else 0.0)


def _leading(wanted: Tensor, rank: int | None, energy: float | None) -> LowRank:
    most = min(*wanted.shape, rank or max(wanted.shape))
    if energy is None:
        return truncated_svd(wanted, most, tol=_TOLERANCE)
    tried = min(_FIRST, most)
    while True:
        svd = truncated_svd(wanted, tried, tol=_TOLERANCE)
        reached = float(svd.S.double().square().sum()) >= energy * svd.energy
        if reached or tried == most:
            return svd.truncated(rank_for(svd.S, energy, svd.energy))
        tried = min(2 * tried, most)
