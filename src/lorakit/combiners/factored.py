"""Combiners that stay on the factors: what they compute is exact, or the best of its rank, and never dense."""

from __future__ import annotations

import math

import torch

from lorakit.combiners.options import Combined, Job
from lorakit.combiners.reducing import largest_rank, reduced
from lorakit.ops import frobenius_norm
from lorakit.ops.low_rank import low_rank_svd
from lorakit.types import Factors

# Nearer than this to parallel, the arc and the chord are the same to the digits of float64, and the arc divides by 0.
_FLAT = 1e-6


def cat(job: Job) -> Combined:
    """The exact weighted sum: B's side by side, A's on top of each other, ranks add up.

    Weight and scaling are folded into A. No SVD, no rounding but that of the fold.
    """
    A = torch.cat(
        [part.A * (weight * part.scaling) for part, weight in zip(job.parts, job.weights, strict=True)]
    )
    return Combined(Factors(A, torch.cat([part.B for part in job.parts], dim=1), 1.0), 1.0, None)


def exact_sum(job: Job) -> Combined:
    """The weighted sum of the deltas: exact without `rank` and `energy`, the best of its rank with either.

    The exact sum has the sum of the ranks, as `cat`, or `min(out, in)` if that is less. O((out + in) R^2) for a sum
    of ranks R where it reduces.
    """
    return _added(job, job.weights)


def svd(job: Job) -> Combined:
    """The best approximation of the weighted sum with rank `rank` (default: the largest of the parts).

    From QR of the stacked factors and the SVD of a core as wide as the sum of the ranks: O((out + in) R^2). A rank above
    that of the sum is filled up with zeros in B and orthonormal rows in A.
    """
    return _reduced(job)


def slerp(job: Job) -> Combined:
    """Spherical interpolation from the first weighted delta to the second (Shoemake, 1985, doi:10.1145/325165.325242).

    `(sin((1 - t) a) D_1 + sin(t a) D_2) / sin(a)` with a the angle between the two under the Frobenius inner product,
    which is read off the factors; the weights are folded into D. Parallel, opposite and zero deltas, whose arc is
    not defined, are interpolated linearly. Then as `sum`.
    """
    t = 0.5 if job.options.t is None else float(job.options.t)
    first, second = _weighted(job)
    angle = _angle(first, second)
    if math.sin(angle) < _FLAT:
        shares = 1 - t, t
    else:
        shares = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return _added(job, tuple(weight * share for weight, share in zip(job.weights, shares, strict=True)))


def _added(job: Job, weights: tuple[float, ...]) -> Combined:
    total = job._replace(weights=weights)
    if job.options.rank is not None or job.options.energy is not None:
        return _reduced(total)
    if sum(part.rank for part in job.parts) <= min(job.parts[0].shape):
        return cat(total)
    return Combined(low_rank_svd(_weighted(total)).factors(), 1.0, None)


def _reduced(job: Job) -> Combined:
    parts, options = _weighted(job), job.options
    rank = options.rank or (largest_rank(job) if options.energy is None else None)
    svd = low_rank_svd(parts, rank=rank, driver=options.svd_driver)
    if options.svd_clamp is None:
        return reduced(svd, job)

    def distance(factors: Factors) -> float:
        return frobenius_norm(Factors.cat([*parts, Factors(factors.A, factors.B, -1.0)]))

    return reduced(svd, job, distance)


def _angle(first: Factors, second: Factors) -> float:
    """The angle between two deltas, 0 if one is zero; in float64."""
    norms = frobenius_norm(first) * frobenius_norm(second)
    if norms == 0.0:
        return 0.0
    inner = (first.B.mT.double() @ second.B.double()) * (first.A.double() @ second.A.mT.double())
    cosine = first.scaling * second.scaling * float(inner.sum()) / norms
    return math.acos(max(-1.0, min(1.0, cosine)))


def _weighted(job: Job) -> list[Factors]:
    pairs = zip(job.parts, job.weights, strict=True)
    return [Factors(part.A, part.B, part.scaling * weight) for part, weight in pairs]
