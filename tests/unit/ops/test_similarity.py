"""What two sets of factors say of each other, against the dense deltas."""

from __future__ import annotations

import math

import pytest
import torch

from lorakit.ops.low_rank import low_rank_svd
from lorakit.ops.similarity import column_angles, difference_norm, inner_product, numerical_rank, row_angles
from lorakit.types import Factors

OUT, IN = 9, 7


def drawn(seed, rank, scaling=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, IN, generator=generator, dtype=dtype)
    return Factors(A, torch.randn(OUT, rank, generator=generator, dtype=dtype), scaling)


@pytest.mark.parametrize(
    ("ranks", "scalings"), [((2, 3), (1.0, 1.0)), ((4, 1), (-0.5, 3.0)), ((8, 8), (2.0, 0.1))]
)
def test_against_dense(ranks, scalings):
    a, b = (drawn(seed, rank, s) for seed, (rank, s) in enumerate(zip(ranks, scalings, strict=True)))
    dense = [each.delta(torch.float64) for each in (a, b)]
    assert inner_product(a, b) == pytest.approx(float((dense[0] * dense[1]).sum()), rel=1e-12)
    assert difference_norm(a, b) == pytest.approx(float((dense[0] - dense[1]).norm()), rel=1e-12)


def test_what_nearly_cancels_keeps_its_digits():
    a = drawn(0, 3, dtype=torch.float32)
    nudged = Factors(a.A, a.B + 1e-6 * a.B.abs().max() * torch.eye(OUT, 3), a.scaling)
    wanted = float((nudged.delta(torch.float64) - a.delta(torch.float64)).norm())
    assert difference_norm(a, nudged) == pytest.approx(wanted, rel=1e-6)
    assert difference_norm(a, Factors(2 * a.A, 0.5 * a.B, a.scaling)) < 1e-14 * float(a.delta().norm())


def test_known_angles():
    """Two planes in space that share a line and stand at 30 degrees; one small angle, for its digits."""
    basis = torch.eye(OUT, dtype=torch.float64)

    def columns(*vectors):
        B = torch.stack(vectors, dim=1)
        A = torch.eye(IN, dtype=torch.float64)[: B.shape[1]]
        return low_rank_svd([Factors(A, B, 2.0)])

    plane = columns(basis[0], basis[1])
    for degrees in (90.0, 60.0, 30.0, 1e-4):
        turn = math.radians(degrees)
        other = columns(basis[0], math.cos(turn) * basis[1] + math.sin(turn) * basis[2])
        found = column_angles(plane, other)
        assert found.smallest == pytest.approx(0.0, abs=1e-6)
        assert found.largest == pytest.approx(degrees, rel=1e-6)
        assert found.overlap == pytest.approx((1 + math.cos(turn) ** 2) / 2)
    assert row_angles(plane, other).overlap == pytest.approx(1.0)


def test_a_smaller_space_inside_a_larger_one():
    large = drawn(0, 4)
    small = Factors(large.A[1:3], large.B[:, 1:3], 1.0)
    for angles in (column_angles, row_angles):
        for pair in ((large, small), (small, large)):
            found = angles(*(low_rank_svd([each]) for each in pair))
            assert found.overlap == pytest.approx(1.0)
            assert found.largest < 1e-5


def test_zero_and_numerical_rank():
    a, zero = drawn(0, 3), Factors(torch.ones(2, IN).double(), torch.zeros(OUT, 2).double(), 1.0)
    assert column_angles(low_rank_svd([a]), low_rank_svd([zero])) is None
    assert row_angles(low_rank_svd([zero]), low_rank_svd([a])) is None
    twice = Factors(torch.cat([a.A, a.A]), torch.cat([a.B, a.B], dim=1), 1.0)
    assert numerical_rank(low_rank_svd([twice]).S) == 3
    assert numerical_rank(low_rank_svd([zero]).S) == 0
    assert numerical_rank(torch.empty(0)) == 0
