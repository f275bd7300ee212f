"""A cheap proof that a merge stays finite."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lorakit.ops import delta_bound

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lorakit.types import Factors
    from lorakit.weights import WeightState


def merge_is_finite(state: WeightState, adapters: Sequence[Sequence[Factors]]) -> bool:
    """Whether norms alone prove that every element of the merged weight is finite.

    The norm of W (of fp16, whose range is small, the largest element) plus, for each adapter, the largest
    Cauchy-Schwarz bound of its blocks, against half the largest number of the base's dtype: one read of W and of the
    factors, no delta. False means "not proved". A bias is always left to the full check.
    """
    weight = state.weight.detach()
    has_bias = any(block.bias is not None for blocks in adapters for block in blocks)
    if weight.is_meta or not weight.is_floating_point() or has_bias:
        return False
    bounds = [[delta_bound(block) for block in blocks] for blocks in adapters]
    if not all(math.isfinite(bound) for each in bounds for bound in each):  # `max` may pass over a NaN
        return False
    bound = _largest(weight) + sum(max(each) for each in bounds)
    return math.isfinite(bound) and bound < torch.finfo(weight.dtype).max / 2


def _largest(weight: Tensor) -> float:
    """No less than any |element|, but for rounding; the norm takes half the time of the extremes."""
    if weight.dtype is torch.float16:
        return max(abs(float(end)) for end in torch.aminmax(weight))
    return float(torch.linalg.vector_norm(weight))
