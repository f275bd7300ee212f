"""Combiners that look at single elements: of A and B, each by itself, or of the dense deltas."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lorakit.combiners.options import Combined
from lorakit.combiners.pruning import largest
from lorakit.combiners.reducing import reduced_dense
from lorakit.types import Factors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor

    from lorakit.combiners.options import Job

    Prune = Callable[[Tensor, Job], Tensor]
    Merge = Callable[[Iterable[Tensor], Sequence[float], Job], Tensor]


def whole(x: Tensor, _job: Job) -> Tensor:
    """x, not pruned."""
    return x


def on_factors(job: Job, *, prune: Prune, merge: Merge) -> Combined:
    """Prune and merge the A's, then the B's, each as if it were the weight; all ranks are the same.

    A part counts with `sqrt |w * scaling|` on both sides, and with the sign of `w * scaling` on A. The product of the two
    results is not the merged delta but has mixed terms `B_i A_j` too: cheap, and an approximation that has
    no error to report.
    """
    products = [weight * part.scaling for part, weight in zip(job.parts, job.weights, strict=True)]
    roots = [math.sqrt(abs(product)) for product in products]
    signed = [math.copysign(root, product) for root, product in zip(roots, products, strict=True)]
    A = merge((prune(part.A, job) for part in job.parts), signed, job)
    B = merge((prune(part.B, job) for part in job.parts), roots, job)
    return Combined(Factors(A, B, 1.0), 1.0, None)


def on_deltas(job: Job, *, prune: Prune, merge: Merge) -> Combined:
    """Prune and merge the dense deltas, then keep the best approximation with rank `rank` (default: the largest).

    The deltas are built one at a time: about six tensors of the weight's size at the most, however many parts. The cost
    is some passes over each delta, and `truncated_svd` of the result.
    """
    return reduced_dense(merge((prune(delta, job) for delta in _deltas(job)), job.weights, job), job)


def sce(job: Job) -> Combined:
    """Select, calculate, erase on the dense deltas `w_i D_i`, then as `on_deltas` (Wan et al., 2024, arXiv:2408.07990).

    Selected are the elements, `density` of them, that vary most between the parts. A part's coefficient is its share of
    the squared sum of what is selected. Elements against the sign of the sum are erased, and the rest is
    averaged with the coefficients. The deltas are built three times over, to hold a few dense tensors only.
    """
    weighted = job._replace(
        parts=tuple(
            Factors(part.A, part.B, part.scaling * weight)
            for part, weight in zip(job.parts, job.weights, strict=True)
        )
    )
    mean, spread = _mean_and_spread(weighted)
    k = int(float(job.options.density or 0.0) * mean.numel())
    selected = torch.ones_like(mean, dtype=torch.bool) if k == mean.numel() else largest(spread, k) > 0
    positive = mean >= 0
    energies = [float((delta * selected).square().sum(dtype=torch.float64)) for delta in _deltas(weighted)]
    total = sum(energies)
    merged, share = mean.zero_(), spread.zero_()
    for delta, energy in zip(_deltas(weighted), energies, strict=True):
        agreeing = selected & (delta != 0) & ((delta > 0) == positive)
        coefficient = energy / total if total else 0.0
        merged.add_(delta.mul_(agreeing), alpha=coefficient)
        share.add_(agreeing, alpha=coefficient)
    return reduced_dense(merged.div_(share.masked_fill_(share == 0, 1.0)), job)


def _mean_and_spread(job: Job) -> tuple[Tensor, Tensor]:
    """Mean of the deltas and sum of their squared distances from it, in one pass (Welford, 1962)."""
    deltas = _deltas(job)
    mean = next(deltas)
    spread = torch.zeros_like(mean)
    for number, delta in enumerate(deltas, start=2):
        step = delta - mean
        mean.add_(step, alpha=1 / number)
        spread.addcmul_(step, delta.sub_(mean))
    return mean, spread


def _deltas(job: Job) -> Iterator[Tensor]:
    return (part.delta(job.dtype) for part in job.parts)
