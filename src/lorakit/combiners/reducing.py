"""From the singular values of the wanted delta to factors of the asked rank."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from lorakit.combiners.options import Combined
from lorakit.errors import ConfigError
from lorakit.ops.low_rank import padded_rows, rank_for, truncated_svd
from lorakit.types import Factors

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from lorakit.combiners.options import Job
    from lorakit.ops.low_rank import LowRank


def largest_rank(job: Job) -> int:
    """The largest rank of the parts."""
    return max(part.rank for part in job.parts)


def reduced(svd: LowRank, job: Job, distance: Callable[[Factors], float] | None = None) -> Combined:
    """The best factors of the rank that the options ask for: `rank`, else by `energy`, else the largest of the parts.

    Args:
        svd: of the wanted delta.
        job: its options say `rank`, `energy` and `svd_clamp`.
        distance: the Frobenius norm of wanted delta minus that of some factors. None: what `svd` says of the rest, which
            is the truth if nothing is clamped and the SVD is one of factors.
    """
    rank, energy = job.options.rank, job.options.energy
    if rank is None:
        rank = largest_rank(job) if energy is None else svd.S.shape[0]
    if energy is not None:
        rank = min(rank, rank_for(svd.S, energy, svd.energy))
    svd = svd.truncated(rank)
    factors = _padded(svd.factors(), rank)
    if job.options.svd_clamp is not None and svd.energy > 0.0:
        factors = _clamped(factors, job.options.svd_clamp)
    error = distance(factors) if distance else svd.rest
    kept = 1.0 if svd.energy == 0.0 else 1.0 - error**2 / svd.energy
    return Combined(factors, min(1.0, max(0.0, kept)), error)


def reduced_dense(wanted: Tensor, job: Job) -> Combined:
    """`reduced` of a dense (out, in) delta, which is overwritten; at most `rank` triplets are computed."""
    svd = truncated_svd(wanted, job.options.rank or largest_rank(job))

    def distance(factors: Factors) -> float:
        rest = wanted.addmm_(factors.B, factors.A, alpha=-1.0)
        return float(torch.linalg.vector_norm(torch.linalg.vector_norm(rest, dim=1), dtype=torch.float64))

    return reduced(svd, job, distance)


def _padded(factors: Factors, rank: int) -> Factors:
    """The same delta with that rank: B gets zeros, A orthonormal rows, so that training can use the new rank."""
    missing = rank - factors.rank
    if missing <= 0:
        return factors
    return Factors(A=padded_rows(factors.A, rank), B=pad(factors.B, (0, missing)), scaling=factors.scaling)


def _clamped(factors: Factors, quantile: float) -> Factors:
    """Entries of B and A cut to the quantile of them all, signed, interpolated as `torch.quantile` does.

    Raises:
        ConfigError: that quantile is not positive: half of the entries are negative.
    """
    entries = torch.cat([factors.B.flatten(), factors.A.flatten()])
    position = quantile * (entries.numel() - 1)
    low = math.floor(position)
    # torch.quantile refuses more than 16 M entries
    below, above = (entries.kthvalue(1 + index).values for index in (low, math.ceil(position)))
    bound = float(torch.lerp(below, above, position - low))
    if bound <= 0.0:
        raise ConfigError(
            f"svd_clamp={quantile}: that quantile of the entries of U * S and Vh is {bound:.3g}, and cutting them to it "
            "leaves nothing; give one near 1, such as 0.99"
        )
    return Factors(
        A=factors.A.clamp(-bound, bound), B=factors.B.clamp(-bound, bound), scaling=factors.scaling
    )
