"""Making a tensor sparse: by size, at random, and at random by rank of size. Nothing is written in place."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import hardshrink

from lorakit.ops import tile_rows

if TYPE_CHECKING:
    from torch import Tensor

    from lorakit.combiners.options import Job

_SAMPLE = 2**14  # elements that a window around the threshold is read from
_WINDOW = 4.0  # half its width in standard deviations of the sample's quantile: missed once in 15 000 times
_SPREAD = 0.2  # of the keep probabilities of `della`


def keep_largest(x: Tensor, job: Job) -> Tensor:
    """Keep the `int(density * numel)` largest elements in size, zero the others (Yadav et al., 2023, arXiv:2306.01708).

    Of equals at the threshold the first in memory order stay, so the number is exact and the choice is
    always the same.
    """
    return largest(x, int(_density(job) * x.numel()))


def largest(x: Tensor, k: int) -> Tensor:
    """Keep the k largest elements in size, zero the others; the first of equals stay.

    4.2 M elements in 15 to 20 ms, for which `topk` takes 130 to 400 (one thread, AVX512).
    """
    if k >= x.numel():
        return x
    if k == 0:
        return torch.zeros_like(x)
    sizes = x.abs().flatten()
    threshold, surplus = _threshold(sizes, k)
    if threshold == 0.0:
        return x
    below = torch.nextafter(threshold, threshold.new_zeros(()))
    kept = hardshrink(x.contiguous(), float(below))  # one pass that needs no mask: 1.2 ms, against 4 to 15
    if surplus:
        equals = (sizes == threshold).nonzero()
        kept.view(-1)[equals[-surplus:, 0]] = 0.0
    return kept


def drop_random(x: Tensor, job: Job) -> Tensor:
    """Keep each element with probability `density`, divided by it (DARE; Yu et al., 2024, arXiv:2311.03099).

    One `torch.bernoulli` on a tensor of probabilities in the shape of x, as PEFT draws. Part by part, and all A's before the
    B's, from torch's default generator in the same state, float32 adapters are given the very masks of PEFT.
    """
    density = _density(job)
    if density == 1.0:
        return x
    return x * torch.bernoulli(torch.full_like(x, density), generator=job.generator) / density


def drop_by_rank(x: Tensor, job: Job) -> Tensor:
    """Drop elements at random, the small ones of a row more often, and divide the rest by their keep probabilities.

    The keep probability of a row's elements, from the smallest to the largest, rises in equal steps from
    `density - epsilon / 2` to `density + epsilon / 2`: MAGPRUNE of Deep et al., 2024, arXiv:2406.11617. The steps are
    taken at their middles, so that the mean is `density`. A sort of x, in tiles of rows.
    """
    density = _density(job)
    epsilon = job.options.epsilon
    if epsilon is None:
        epsilon = min(_SPREAD, density, 2 * (1 - density))
    rows, columns = x.shape
    ramp = (torch.arange(columns, dtype=torch.float64, device=x.device) + 0.5) / columns
    ramp = (density + epsilon * (ramp - 0.5)).to(x.dtype)
    tiles = []
    for tile in x.split(tile_rows((rows, columns))):
        order = tile.abs().argsort(dim=1, stable=True)
        keep = torch.empty_like(tile).scatter_(1, order, ramp.expand_as(tile))
        tiles.append(tile * torch.bernoulli(keep, generator=job.generator) / keep)
    return torch.cat(tiles)


def _threshold(sizes: Tensor, k: int) -> tuple[Tensor, int]:
    """The k-th largest of `sizes` (n,), and by how much the number of elements not below it exceeds k.

    A sample gives a window that holds it almost surely; counting what lies above shows whether it does, and the
    selection then runs on the window alone. Without a hit it runs on all.
    """
    n = sizes.numel()
    above, window = 0, sizes
    if n > 4 * _SAMPLE:
        sample = sizes[:: n // _SAMPLE | 1].sort().values
        share, count = k / n, sample.numel()
        middle, reach = (1 - share) * count, _WINDOW * math.sqrt(count * share * (1 - share)) + 1
        low = sample[max(0, int(middle - reach))]
        high = sample[min(count - 1, math.ceil(middle + reach))]
        over = sizes > high
        above = int(torch.count_nonzero(over))
        window = sizes[(sizes >= low) ^ over]
        if not above < k <= above + window.numel():
            above, window = 0, sizes
    threshold = window.kthvalue(window.numel() - (k - above) + 1).values
    return threshold, above + int(torch.count_nonzero(window >= threshold)) - k


def _density(job: Job) -> float:
    density = job.options.density
    assert density is not None, "check_request lets no job without a density through"
    return float(density)
