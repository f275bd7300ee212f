"""A cheap proof that a merge stays finite."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lorakit.ops import delta_bound

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorakit.types import Factors
    from lorakit.weights import WeightState


def merge_is_finite(state: WeightState, factors: Sequence[Factors]) -> bool:
    """Whether norms alone prove that every element of the merged weight is finite.

    max|W| plus the Cauchy-Schwarz bound of each delta, against half the largest number of the base's dtype: one
    read of W and of the factors, no delta. False means "not proved". A bias is always left to the full check.
    """
    weight = state.weight.detach()
    if weight.is_meta or not weight.is_floating_point() or any(part.bias is not None for part in factors):
        return False
    low, high = weight.aminmax()
    bound = max(-low.item(), high.item()) + sum(delta_bound(part) for part in factors)
    return math.isfinite(bound) and bound < torch.finfo(weight.dtype).max / 2
