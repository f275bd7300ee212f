"""Whether numbers are finite: a sum tells, and where it overflows the extremes."""

from __future__ import annotations

import pytest
import torch

from lorakit.ops import is_finite

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BAD = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", [0, 17, -1])
@pytest.mark.parametrize("bad", BAD)
def test_one_bad_number_anywhere_is_seen(dtype, where, bad):
    numbers = torch.randn(5, 7).to(dtype)
    assert is_finite(numbers)
    numbers.view(-1)[where] = bad
    assert not is_finite(numbers)
    assert not is_finite(torch.ones(3, dtype=dtype), numbers)


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_of_both_signs_do_not_cancel(dtype):
    assert not is_finite(torch.tensor([float("inf"), float("-inf"), 1.0], dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_numbers_whose_sum_overflows_are_finite(dtype):
    numbers = torch.full((8,), torch.finfo(dtype).max, dtype=dtype)
    assert not numbers.sum().isfinite()
    assert is_finite(numbers)
    assert not is_finite(torch.cat([numbers, numbers.new_tensor([float("nan")])]))


def test_no_numbers_and_parameters():
    assert is_finite()
    assert is_finite(torch.empty(0, 4))
    assert is_finite(torch.nn.Parameter(torch.ones(2, 2)), torch.ones(4, 4).t()[1:])
