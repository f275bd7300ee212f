"""Factors: what adds up, and what takes it apart again."""

from __future__ import annotations

import pytest
import torch

from lorakit import Factors
from models import random_factors


@pytest.mark.parametrize("bias", [True, False])
def test_cat_is_the_sum_and_split_its_inverse(bias):
    parts = [
        random_factors((7, 5), torch.float64, r=r, scaling=scaling, bias=bias, seed=r)
        for r, scaling in ((1, 2.0), (3, -0.5), (4, 1.0))
    ]
    whole = Factors.cat(parts)
    assert whole.rank == 8
    assert whole.shape == (7, 5)
    torch.testing.assert_close(
        whole.delta(torch.float64), torch.stack([part.delta(torch.float64) for part in parts]).sum(dim=0)
    )
    again = whole.split([1, 3, 4])
    for part, found in zip(parts, again, strict=True):
        torch.testing.assert_close(found.delta(torch.float64), part.delta(torch.float64))
    if bias:
        torch.testing.assert_close(whole.bias, torch.stack([p.bias * p.scaling for p in parts]).sum(dim=0))
    assert [found.bias is not None for found in again] == [bias, False, False]


def test_ranks_must_add_up():
    with pytest.raises(AssertionError, match="do not sum"):
        random_factors((7, 5), r=4).split([1, 2])
