"""Making one tensor of several that come one at a time: their number does not count in the memory taken."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from lorakit.combiners.options import Job


def weighted_sum(tensors: Iterable[Tensor], weights: Sequence[float], _job: Job) -> Tensor:
    """`sum_i w_i x_i` (task arithmetic; Ilharco et al., 2023, arXiv:2212.04089)."""
    total: Tensor | None = None
    for x, weight in zip(tensors, weights, strict=True):
        total = x * weight if total is None else total.add_(x, alpha=weight)
    assert total is not None
    return total


def elected_mean(tensors: Iterable[Tensor], weights: Sequence[float], job: Job) -> Tensor:
    """The mean of `w_i x_i` over the x_i of the elected sign, element by element (Yadav et al., 2023, arXiv:2306.01708).

    The sign is that of the sum of the x_i, or of their signs under majority_sign_method="frequency", and
    positive in a tie. Weights, and their signs, have no vote. Zeros are not counted.
    """
    up, down, votes = _Tally(), _Tally(), None
    for x, weight in zip(tensors, weights, strict=True):
        votes = x.clone() if votes is None else votes.add_(x)
        up.add(x.clamp(min=0), weight)
        down.add(x.clamp(max=0), weight)
    assert votes is not None
    positive = votes >= 0 if job.options.majority_sign_method == "total" else up.count >= down.count
    return torch.where(positive, up.mean(), down.mean())


class _Tally:
    """A weighted sum of tensors, and how many of them are not zero."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self.count: Tensor

    def add(self, x: Tensor, weight: float) -> None:
        if self._sum is None:
            self.count = (x != 0).to(torch.int16)
            self._sum = x.mul_(weight)
        else:
            self.count += x != 0
            self._sum.add_(x, alpha=weight)

    def mean(self) -> Tensor:
        assert self._sum is not None
        return self._sum.div_(self.count.clamp(min=1))
