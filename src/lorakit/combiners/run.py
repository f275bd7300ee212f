"""Combining several adapters of one weight: check, compute in a wide dtype, round once."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

import torch

from lorakit.combiners.checking import check_parts, check_request, not_finite
from lorakit.combiners.options import Combined, CombineOptions, Job
from lorakit.combiners.registry import METHODS
from lorakit.errors import NonFiniteError
from lorakit.types import Factors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_DEFAULTS = CombineOptions()


@torch.no_grad()
def combine(
    parts: Sequence[Factors], weights: Sequence[float], method: str, options: CombineOptions = _DEFAULTS
) -> Combined:
    """Several adapters of one weight as one, by a method of `METHODS`.

    Args:
        parts: factors with deltas of one shape (out, in), on one device, any floating dtypes; they are left alone.
        weights: a finite number for each part; a weight multiplies the delta. Negative ones subtract.
        method: `linear`, `cat`, `svd`, `ties`, `ties_svd`, `dare_linear`, `dare_linear_svd`, `dare_ties`,
            `dare_ties_svd`, `magnitude_prune` and `magnitude_prune_svd` are PEFT's; `sum`, `della`, `sce` and `slerp`
            are lorakit's own. With one part the pruning methods of PEFT and `sce` prune nothing: they are `linear`,
            or `svd` where they end in an SVD.
        options: density, rank and the like, see `CombineOptions`.

    Returns:
        The factors, scaling 1, in the dtype of the widest part, and how much of the wanted delta they keep. Computed in
        float32, or in float64 where a part is float64, and rounded once. The bias, under every method, is
        `sum_i w_i scaling_i bias_i` over the parts that have one.

    Raises:
        ConfigError: the request or the parts do not fit the method; every problem is listed.
        NonFiniteError: a part holds NaN or infinity, or the result does not fit into its dtype.
    """
    check_request(method, len(parts), weights, options)
    check_parts(method, parts)
    row = METHODS[method]
    if len(parts) == 1 and row.alone is not None:
        row = METHODS[row.alone]
    dtype = reduce(torch.promote_types, [tensor.dtype for part in parts for tensor in (part.A, part.B)])
    wide = torch.promote_types(dtype, torch.float32)
    widened = tuple(
        Factors(part.A.detach().to(wide), part.B.detach().to(wide), part.scaling) for part in parts
    )
    numbers = tuple(float(weight) for weight in weights)
    generator = _generator(options.seed, parts[0].A.device)
    found = row.run(Job(widened, numbers, options, wide, generator))
    factors = Factors(
        A=found.factors.A.to(dtype).contiguous(),
        B=found.factors.B.to(dtype).contiguous(),
        scaling=1.0,
        bias=_bias(parts, numbers, dtype, wide),
    )
    _check_finite(factors, method)
    return found._replace(factors=factors)


def _bias(
    parts: Sequence[Factors], weights: Sequence[float], dtype: torch.dtype, wide: torch.dtype
) -> Tensor | None:
    terms = [
        part.bias.detach().to(wide) * (weight * part.scaling)
        for part, weight in zip(parts, weights, strict=True)
        if part.bias is not None
    ]
    return torch.stack(terms).sum(dim=0).to(dtype) if terms else None


def _generator(seed: int | torch.Generator | None, device: torch.device) -> torch.Generator | None:
    if isinstance(seed, int):
        return torch.Generator(device).manual_seed(seed)
    return seed


def _check_finite(factors: Factors, method: str) -> None:
    bad = not_finite(factors)
    if bad:
        raise NonFiniteError(
            f"combining by {method!r}: {', '.join(bad)} of the result does not fit into {factors.A.dtype}; "
            "give smaller weights, or parts in a wider dtype"
        )
